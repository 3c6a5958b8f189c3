/* dynamic8.h - the 8-bit dynamic map: seven decades, each cut into twice as many steps as the one below.
 *
 * With A the index of a magnitude and A = 2^e + k, 0 <= k < 2^e, its entry is the float nearest to
 *     10^(e - 6) (0.1 + 0.9 (k + 1/2) / 2^e)    signed,   e = 0..6;  A = 0 is 0, A = 128 is 1;  code = 127 +- A
 *     10^(e - 7) (0.1 + 0.9 (k + 1/2) / 2^e)    unsigned, e = 1..7;  A = 1 is 0, A = 256 is 1;  code = A - 1
 * Codes ascend with their values; -1 is no entry. Encoding takes the nearest entry, ties to the lower code.
 *
 * No search: within a decade entries are linear in A. With n = 9 A + 4.5 - 8 2^e the entry is n c, c = 10^(e - 7) / 2^e
 * (signed) or 10^(e - 8) / 2^e. n has at most 12 bits, so its product with a 12-bit `high` half of c is exact, and that
 * plus its product with the rest, `low`, rounds to the right float for every entry. The entry 1 is a decade by itself.
 *
 * Tables have eight places: eight floats are one AVX2 register, and a look-up is one permutation.
 */
#ifndef QG_CORE_DYNAMIC8_H
#define QG_CORE_DYNAMIC8_H

#include "core/scalar.h"

typedef struct qg_dynamic_map {
    /* From A to its entry, by the exponent of A modulo 8: n = 9 A + base. */
    float base[8];
    float high[8];
    float low[8];
    /* From x to A, by decade: places 4 to 10 modulo 8, and 3 for the entry 1. A decade ends at `bound`, the midpoint to
     * the next one, as a key (qg_dynamic_key); its last entry is `last`; A = x slope + intercept, which is half-way
     * between two integers at every midpoint. In the lowest decade, that with 0, only midpoints are on the line. */
    int32_t bound[8];
    float last[8];
    float slope[8];
    float intercept[8];
    int32_t zero; /* A of the entry 0 */
} qg_dynamic_map;

/* c cut in two by Veltkamp's splitting: the upper 12 bits, and the rest. */
#define QG_SPLIT 0x1.00000000008p41
#define QG_HIGH(c) ((float)((c) * QG_SPLIT - ((c) * QG_SPLIT - (c))))
#define QG_LOW(c) ((float)((c) - ((c) * QG_SPLIT - ((c) * QG_SPLIT - (c)))))

/* clang-format off */
QG_TABLE qg_dynamic_map qg_dynamic_signed = {
    /* e = 1, 2, 3, 4, 5, 6, the entry 1, e = 0 */
    {4.5f - 16, 4.5f - 32, 4.5f - 64, 4.5f - 128, 4.5f - 256, 4.5f - 512, 1 - 9 * 128, 4.5f - 8},
    {QG_HIGH(1e-6 / 2), QG_HIGH(1e-5 / 4), QG_HIGH(1e-4 / 8), QG_HIGH(1e-3 / 16), QG_HIGH(1e-2 / 32),
     QG_HIGH(1e-1 / 64), 1, QG_HIGH(1e-7)},
    {QG_LOW(1e-6 / 2), QG_LOW(1e-5 / 4), QG_LOW(1e-4 / 8), QG_LOW(1e-3 / 16), QG_LOW(1e-2 / 32), QG_LOW(1e-1 / 64),
     0, QG_LOW(1e-7)},
    /* e = 4, 5, 6, the entry 1, e = 0, 1, 2, 3 */
    {0x785a1cac, 0x7ba51eb8, 0x7efe3333, 0x7fffffff, 0x6bfe0701, 0x6ee68a0d, 0x7200e6af, 0x7523a29d},
    {1e-2 * (1 - .45 / 16), 1e-1 * (1 - .45 / 32), 1 - .45 / 64, 1,
     1e-6 * (1 - .45), 1e-5 * (1 - .45 / 2), 1e-4 * (1 - .45 / 4), 1e-3 * (1 - .45 / 8)},
    {1e3 * 16 / 9, 1e2 * 32 / 9, 1e1 * 64 / 9, 0, .5 / 2.75e-7, 1e6 * 2 / 9, 1e5 * 4 / 9, 1e4 * 8 / 9},
    {128. / 9 - .5, 256. / 9 - .5, 512. / 9 - .5, 127.9, 0, 16. / 9 - .5, 32. / 9 - .5, 64. / 9 - .5},
    0,
};

QG_TABLE qg_dynamic_map qg_dynamic_unsigned = {
    /* e = 1, 2, 3, 4, 5, 6, 7, the entry 1 */
    {4.5f - 16, 4.5f - 32, 4.5f - 64, 4.5f - 128, 4.5f - 256, 4.5f - 512, 4.5f - 1024, 1 - 9 * 256},
    {QG_HIGH(1e-7 / 2), QG_HIGH(1e-6 / 4), QG_HIGH(1e-5 / 8), QG_HIGH(1e-4 / 16), QG_HIGH(1e-3 / 32),
     QG_HIGH(1e-2 / 64), QG_HIGH(1e-1 / 128), 1},
    {QG_LOW(1e-7 / 2), QG_LOW(1e-6 / 4), QG_LOW(1e-5 / 8), QG_LOW(1e-4 / 16), QG_LOW(1e-3 / 32), QG_LOW(1e-2 / 64),
     QG_LOW(1e-1 / 128), 0},
    /* e = 5, 6, 7, the entry 1, e = 1, 2, 3, 4 */
    {0x7850e560, 0x7b9f5c29, 0x7eff199a, 0x7fffffff, 0x6b853b3e, 0x6e9b0ab4, 0x71d29dc7, 0x7514e3bd},
    {1e-2 * (1 - .45 / 32), 1e-1 * (1 - .45 / 64), 1 - .45 / 128, 1,
     1e-6 * (1 - .45 / 2), 1e-5 * (1 - .45 / 4), 1e-4 * (1 - .45 / 8), 1e-3 * (1 - .45 / 16)},
    {1e3 * 32 / 9, 1e2 * 64 / 9, 1e1 * 128 / 9, 0, 1 / 3.875e-7, 1e6 * 4 / 9, 1e5 * 8 / 9, 1e4 * 16 / 9},
    {256. / 9 - .5, 512. / 9 - .5, 1024. / 9 - .5, 255.9,
     1.5 - 1.625e-7 / 3.875e-7, 32. / 9 - .5, 64. / 9 - .5, 128. / 9 - .5},
    1,
};
/* clang-format on */

/* The entry of A. */
QG_INLINE float qg_dynamic_entry(const qg_dynamic_map *map, int32_t a) {
    const int32_t place = (int32_t)(qg_bits((float)a) >> 23) & 7;
    const float n = 9 * (float)a + map->base[place];
    return a == map->zero ? 0 : n * map->high[place] + n * map->low[place];
}

/* Twice the bits of x >= 0, one more if ties go up: as if x were half an ulp larger, past a midpoint but no further. */
QG_INLINE int32_t qg_dynamic_key(float x, int32_t ties_up) {
    return (int32_t)(qg_bits(x) << 1) + ties_up;
}

/* A key between the last midpoint inside the lowest decade and that decade's bound, in both maps: that of 1.2e-6. */
#define QG_DYNAMIC_LOWEST 0x6b450000

/* The upper half of a key from there up to that of 2, times this / 2^16, is 36 to 42, in stretches of some three
 * octaves that hold one bound each. */
#define QG_DYNAMIC_STRETCH 86

QG_INLINE int32_t qg_dynamic_decade(const qg_dynamic_map *map, int32_t key) {
    const int32_t raised = key > QG_DYNAMIC_LOWEST ? key : QG_DYNAMIC_LOWEST;
    const int32_t octaves = ((raised >> 16) * QG_DYNAMIC_STRETCH) >> 16;
    return (octaves + (key > map->bound[octaves & 7])) & 7;
}

/* The errors of x slope + intercept, and of entries that are rounded to floats, are together below this. */
#define QG_DYNAMIC_DOUBT 0x1p-13f

/* A of the entry nearest to x in [0, 2): the integer nearest to x slope + intercept, unless x is next to a midpoint: then
 * one of the two next to it, whichever entry is nearer. */
QG_INLINE int32_t qg_dynamic_index(const qg_dynamic_map *map, float x, int32_t ties_up) {
    const int32_t decade = qg_dynamic_decade(map, qg_dynamic_key(x, ties_up));
    const float y = x < map->last[decade] ? x : map->last[decade];
    const float line = y * map->slope[decade] + map->intercept[decade];
    const float off = line - ((line + 0x1.8p23f) - 0x1.8p23f);
    if (fabsf(off) < 0.5f - QG_DYNAMIC_DOUBT) {
        return qg_round(line);
    }
    const int32_t a = (int32_t)line;
    /* Both distances are exact where they are nearly equal. Their bits order as they do, and a tie is one more. */
    const int32_t below = (int32_t)qg_bits(x - qg_dynamic_entry(map, a));
    const int32_t above = (int32_t)qg_bits(qg_dynamic_entry(map, a + 1) - x);
    return a + (below + ties_up > above);
}

/* The maps are arguments below: a GPU keeps them in shared memory. */
QG_INLINE float qg_dynamic_signed_value(const qg_dynamic_map *map, uint8_t code) {
    const float entry = qg_dynamic_entry(map, code < 127 ? 127 - code : code - 127);
    return code < 127 ? -entry : entry;
}

QG_INLINE float qg_dynamic_unsigned_value(const qg_dynamic_map *map, uint8_t code) {
    return qg_dynamic_entry(map, code + 1);
}

/* |x| <= about 1. The lower code is the larger magnitude where x < 0. */
QG_INLINE uint8_t qg_dynamic_signed_code(const qg_dynamic_map *map, float x) {
    const int32_t negative = (int32_t)(qg_bits(x) >> 31);
    const int32_t a = qg_dynamic_index(map, qg_float(qg_bits(x) & 0x7fffffff), negative);
    const int32_t code = negative ? 127 - a : 127 + a;
    return (uint8_t)(code > 0 ? code : 0);
}

QG_INLINE uint8_t qg_dynamic_unsigned_code(const qg_dynamic_map *map, float x) {
    return (uint8_t)(qg_dynamic_index(map, x > 0 ? x : 0, 0) - 1);
}

QG_INLINE float qg_dynamic_decode_signed(uint8_t code) {
    return qg_dynamic_signed_value(&qg_dynamic_signed, code);
}

QG_INLINE float qg_dynamic_decode_unsigned(uint8_t code) {
    return qg_dynamic_unsigned_value(&qg_dynamic_unsigned, code);
}

QG_INLINE uint8_t qg_dynamic_encode_signed(float x) {
    return qg_dynamic_signed_code(&qg_dynamic_signed, x);
}

QG_INLINE uint8_t qg_dynamic_encode_unsigned(float x) {
    return qg_dynamic_unsigned_code(&qg_dynamic_unsigned, x);
}

/* A first moment that is not zero keeps its sign: zero's code moves by one towards it. */
QG_INLINE uint8_t qg_dynamic_keep_sign(uint8_t code, float value) {
    return (uint8_t)(code == 127 ? 127 + (value > 0) - (value < 0) : code);
}

/* A second moment that is not zero is not stored as zero: a first moment of the same element may have survived, and m
 * over the root of nothing is a step of any size. */
QG_INLINE uint8_t qg_dynamic_keep_positive(uint8_t code, float value) {
    return (uint8_t)(code + (code == 0 && value > 0));
}

/* How a block is brought to [-1, 1]: x = (value first) second. An absmax so small or large that its reciprocal would be
 * lost is moved by a power of two first; in a block of zeros every x is 0. */
typedef struct qg_dynamic_scale {
    float first;
    float second;
} qg_dynamic_scale;

QG_INLINE qg_dynamic_scale qg_make_dynamic_scale(float absmax) {
    qg_dynamic_scale scale;
    scale.first = absmax > 0x1p100f ? 0x1p-100f : absmax < 0x1p-100f && absmax > 0 ? 0x1p100f : 1;
    scale.second = absmax > 0 ? 1.0f / (absmax * scale.first) : 0;
    return scale;
}

QG_INLINE float qg_dynamic_unit(float value, qg_dynamic_scale scale) {
    return (value * scale.first) * scale.second;
}

#endif
