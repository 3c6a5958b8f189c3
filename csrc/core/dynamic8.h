/* dynamic8.h - the 8-bit dynamic map of the moments: seven decades, each cut into twice as many steps as the one below.
 *
 * With A the index of a magnitude and A = 2^e + k, 0 <= k < 2^e, its entry is the float nearest to
 *     10^(e - 6) (0.1 + 0.9 (k + 1/2) / 2^e)    signed,   e = 0..6;  A = 0 is 0, A = 128 is 1;  code = 127 +- A
 *     10^(e - 7) (0.1 + 0.9 (k + 1/2) / 2^e)    unsigned, e = 1..7;  A = 1 is 0, A = 256 is 1;  code = A - 1
 * Codes ascend with their values; -1 is no entry. Encoding takes the nearest entry, ties to the lower code.
 *
 * No search: with F = A + 1/2 the entry is (9 F - 8 2^e) c, c = 10^(e - 7) / 2^e (signed) or 10^(e - 8) / 2^e, which is
 * linear in F within a decade. 9 F - 8 2^e has at most 12 bits, so its product with a 12-bit `high` half of c is exact,
 * and that plus its product with the rest, `low`, rounds to the right float for every entry.
 *
 * Every decade, zero included, has its own place in tables of eight: the low three bits of the exponent of F. (A = 128
 * and A = 256 share theirs with zero.) Eight floats are one AVX2 register, and a table look-up one permutation.
 */
#ifndef QG_CORE_DYNAMIC8_H
#define QG_CORE_DYNAMIC8_H

#include "core/scalar.h"

#ifndef QG_TABLE /* "static __constant__ const" under nvcc */
#define QG_TABLE static const
#endif

typedef struct qg_dynamic_map {
    /* Which decade: by four octaves of x, the place of the lowest decade there, and where the next ones begin. The
     * bounds are the midpoints between decades as keys of qg_dynamic_key; no bound is INT32_MAX. */
    int32_t place[8];
    int32_t bound1[8];
    int32_t bound2[8];
    /* Within a decade: A = floor(x slope + intercept) or one more, for x up to the decade's largest entry. */
    float largest[8];
    float slope[8];
    float intercept[8];
    /* The entry of A: (9 A + base) high + (9 A + base) low. */
    float base[8];
    float high[8];
    float low[8];
    int32_t top; /* A of the entry 1 */
} qg_dynamic_map;

/* c cut in two by Veltkamp's splitting: the upper 12 bits, and the rest. */
#define QG_SPLIT 0x1.00000000008p41
#define QG_HIGH(c) ((float)((c) * QG_SPLIT - ((c) * QG_SPLIT - (c))))
#define QG_LOW(c) ((float)((c) - ((c) * QG_SPLIT - ((c) * QG_SPLIT - (c)))))
#define QG_NONE 0x7fffffff

/* clang-format off */
QG_TABLE qg_dynamic_map qg_dynamic_signed = {
    /*  x from 2^-31,   2^-27,      2^-23,      2^-19,      2^-15,      2^-11,       2^-7,   2^-3 */
    {              6,       6,          6,          8,          9,         10,         11,     13},
    {        QG_NONE, QG_NONE, 0x6927476c, 0x6ee68a0d, 0x7200e6af, 0x7523a29d, 0x785a1cac, QG_NONE},
    {        QG_NONE, QG_NONE, 0x6bfe0701,    QG_NONE,    QG_NONE,    QG_NONE, 0x7ba51eb8, QG_NONE},
    /*           e = 1,               2,                3,                 4,                 5,    6, zero,       0 */
    {1e-5 * (1 - .45 / 2), 1e-4 * (1 - .45 / 4), 1e-3 * (1 - .45 / 8), 1e-2 * (1 - .45 / 16), 1e-1 * (1 - .45 / 32), 1, 0,
     1e-6 * (1 - .45)},
    {1e6 * 2 / 9, 1e5 * 4 / 9, 1e4 * 8 / 9, 1e3 * 16 / 9, 1e2 * 32 / 9, 1e1 * 64 / 9, 0, 1e7 / 9},
    {16. / 9 - .5, 32. / 9 - .5, 64. / 9 - .5, 128. / 9 - .5, 256. / 9 - .5, 512. / 9 - .5, 0, 8. / 9 - .5},
    {4.5f - 16, 4.5f - 32, 4.5f - 64, 4.5f - 128, 4.5f - 256, 4.5f - 512, 0, 4.5f - 8},
    {QG_HIGH(1e-6 / 2), QG_HIGH(1e-5 / 4), QG_HIGH(1e-4 / 8), QG_HIGH(1e-3 / 16), QG_HIGH(1e-2 / 32),
     QG_HIGH(1e-1 / 64), 1, QG_HIGH(1e-7)},
    {QG_LOW(1e-6 / 2), QG_LOW(1e-5 / 4), QG_LOW(1e-4 / 8), QG_LOW(1e-3 / 16), QG_LOW(1e-2 / 32),
     QG_LOW(1e-1 / 64), 0, QG_LOW(1e-7)},
    128,
};

QG_TABLE qg_dynamic_map qg_dynamic_unsigned = {
    /*  x from 2^-31,   2^-27,      2^-23,      2^-19,      2^-15,      2^-11,       2^-7,   2^-3 */
    {              7,       7,          7,          9,         10,         11,         12,     14},
    {        QG_NONE, QG_NONE, 0x685cf752, 0x6e9b0ab4, 0x71d29dc7, 0x7514e3bd, 0x7850e560, QG_NONE},
    {        QG_NONE, QG_NONE, 0x6b853b3e,    QG_NONE,    QG_NONE,    QG_NONE, 0x7b9f5c29, QG_NONE},
    /* e = 1, 2, 3, 4, 5, 6, 7, zero */
    {1e-6 * (1 - .45 / 2), 1e-5 * (1 - .45 / 4), 1e-4 * (1 - .45 / 8), 1e-3 * (1 - .45 / 16), 1e-2 * (1 - .45 / 32),
     1e-1 * (1 - .45 / 64), 1, 0},
    {1e7 * 2 / 9, 1e6 * 4 / 9, 1e5 * 8 / 9, 1e4 * 16 / 9, 1e3 * 32 / 9, 1e2 * 64 / 9, 1e1 * 128 / 9, 0},
    {16. / 9 - .5, 32. / 9 - .5, 64. / 9 - .5, 128. / 9 - .5, 256. / 9 - .5, 512. / 9 - .5, 1024. / 9 - .5, 1},
    {4.5f - 16, 4.5f - 32, 4.5f - 64, 4.5f - 128, 4.5f - 256, 4.5f - 512, 4.5f - 1024, -9},
    {QG_HIGH(1e-7 / 2), QG_HIGH(1e-6 / 4), QG_HIGH(1e-5 / 8), QG_HIGH(1e-4 / 16), QG_HIGH(1e-3 / 32),
     QG_HIGH(1e-2 / 64), QG_HIGH(1e-1 / 128), 1},
    {QG_LOW(1e-7 / 2), QG_LOW(1e-6 / 4), QG_LOW(1e-5 / 8), QG_LOW(1e-4 / 16), QG_LOW(1e-3 / 32),
     QG_LOW(1e-2 / 64), QG_LOW(1e-1 / 128), 0},
    256,
};
/* clang-format on */

/* Below this a magnitude is zero in either map; it is where the tables of bounds begin. */
#define QG_DYNAMIC_FLOOR 0x60000000 /* the key of 2^-31 */

/* The entry of A. */
QG_INLINE float qg_dynamic_entry(const qg_dynamic_map *map, int32_t a) {
    const int32_t place = (int32_t)(qg_bits((float)a + 0.5f) >> 23) & 7;
    const float n = 9 * (float)a + map->base[place];
    return a == map->top ? 1 : n * map->high[place] + n * map->low[place];
}

/* A of the entry nearest to x in [0, 2); a tie goes up if ties_up is 1, down if it is 0. */
QG_INLINE int32_t qg_dynamic_index(const qg_dynamic_map *map, float x, int32_t ties_up) {
    /* Twice the bits, so that ties_up moves x by half an ulp: past a midpoint, but no further. */
    int32_t key = (int32_t)(qg_bits(x) << 1) + ties_up;
    key = key > QG_DYNAMIC_FLOOR ? key : QG_DYNAMIC_FLOOR;
    const int32_t octaves = (key >> 26) & 7;
    const int32_t place = (map->place[octaves] + (key > map->bound1[octaves]) + (key > map->bound2[octaves])) & 7;

    const float y = x < map->largest[place] ? x : map->largest[place];
    const int32_t a = (int32_t)(y * map->slope[place] + map->intercept[place]);
    const float n = 9 * (float)a + map->base[place];
    const float lower = n * map->high[place] + n * map->low[place];
    float upper = (n + 9) * map->high[place] + (n + 9) * map->low[place];
    upper = upper < 1 ? upper : 1;
    /* Both distances are exact where they are nearly equal. As integers, a tie is one more. */
    return a + ((int32_t)qg_bits(y - lower) + ties_up > (int32_t)qg_bits(upper - y));
}

QG_INLINE float qg_dynamic_decode_signed(uint8_t code) {
    const float entry = qg_dynamic_entry(&qg_dynamic_signed, code < 127 ? 127 - code : code - 127);
    return code < 127 ? -entry : entry;
}

QG_INLINE float qg_dynamic_decode_unsigned(uint8_t code) {
    return qg_dynamic_entry(&qg_dynamic_unsigned, code + 1);
}

/* |x| <= about 1. The lower code is the larger magnitude where x < 0. */
QG_INLINE uint8_t qg_dynamic_encode_signed(float x) {
    const int32_t negative = (int32_t)(qg_bits(x) >> 31);
    const int32_t a = qg_dynamic_index(&qg_dynamic_signed, qg_float(qg_bits(x) & 0x7fffffff), negative);
    const int32_t code = negative ? 127 - a : 127 + a;
    return (uint8_t)(code > 0 ? code : 0);
}

QG_INLINE uint8_t qg_dynamic_encode_unsigned(float x) {
    return (uint8_t)(qg_dynamic_index(&qg_dynamic_unsigned, x > 0 ? x : 0, 0) - 1);
}

/* A first moment that is not zero keeps its sign: zero's code moves by one towards it. */
QG_INLINE uint8_t qg_dynamic_keep_sign(uint8_t code, float value) {
    return (uint8_t)(code == 127 ? 127 + (value > 0) - (value < 0) : code);
}

/* How a block is brought to [-1, 1]: x = (value first) second. An absmax so small or large that its reciprocal would be
 * lost is moved by a power of two first; in a block of zeros every x is 0. */
typedef struct qg_dynamic_scale {
    float first;
    float second;
} qg_dynamic_scale;

QG_INLINE qg_dynamic_scale qg_make_dynamic_scale(float absmax) {
    qg_dynamic_scale scale;
    scale.first = absmax < 0x1p-100f ? 0x1p100f : absmax > 0x1p100f ? 0x1p-100f : 1;
    scale.second = absmax > 0 ? 1.0f / (absmax * scale.first) : 0;
    return scale;
}

#endif
