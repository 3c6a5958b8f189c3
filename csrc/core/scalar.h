/* scalar.h - what one element computes: conversions, noise, Adam, the update of a float weight.
 *
 * Plain C that gcc and nvcc both read, and the definition of every result: a kernel is a loop over these functions, so
 * its bits do not depend on the device, the SIMD level or the number of threads. All float operations are IEEE single
 * precision, rounded to nearest, denormals kept, never contracted.
 */
#ifndef QG_CORE_SCALAR_H
#define QG_CORE_SCALAR_H

#include "core/backend.h"

#include <math.h>
#include <string.h>

#ifndef QG_INLINE /* "static __host__ __device__ inline" under nvcc */
#define QG_INLINE static inline
#endif

#ifndef QG_TABLE /* "static __constant__ const" under nvcc */
#define QG_TABLE static const
#endif

/* ---------------------------------------------------------------- bits */

QG_INLINE uint32_t qg_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

QG_INLINE float qg_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* An integer that orders as the float does (-0 just below +0): integer reductions vectorise, float ones do not. */
QG_INLINE int32_t qg_order(float x) {
    const int32_t bits = (int32_t)qg_bits(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

QG_INLINE float qg_from_order(int32_t order) {
    return qg_float((uint32_t)(order ^ ((order >> 31) & 0x7fffffff)));
}

/* The bits of |x|, which order as |x| does. */
QG_INLINE int32_t qg_magnitude(float x) {
    return (int32_t)(qg_bits(x) & 0x7fffffff);
}

/* Choices as masks: gcc turns several choices on one number into branches, and then does not vectorise the loop. */
QG_INLINE uint32_t qg_less(uint32_t a, uint32_t b) {
    return (uint32_t)((int32_t)(a - b) >> 31);
} /* a, b < 2^31 */
QG_INLINE uint32_t qg_choose(uint32_t mask, uint32_t a, uint32_t b) {
    return b ^ ((a ^ b) & mask);
}

/* ---------------------------------------------------------------- rounding */

/* rint(x) for |x| <= 2^22: next to 1.5 2^23 floats are one apart, and their low bits count. */
QG_INLINE int32_t qg_round(float x) {
    return (int32_t)(qg_bits(x + 0x1.8p23f) - 0x4b400000u);
}

/* floor(x) for |x| < 2^31. */
QG_INLINE int32_t qg_floor(float x) {
    const int32_t towards_zero = (int32_t)x;
    return towards_zero - ((float)towards_zero > x);
}

/* x with |x| at most limit > 0. As integers: gcc turns two such choices between floats into branches. */
QG_INLINE float qg_clamp(float x, float limit) {
    const int32_t magnitude = qg_magnitude(x) < qg_magnitude(limit) ? qg_magnitude(x) : qg_magnitude(limit);
    return qg_float((qg_bits(x) & 0x80000000) | (uint32_t)magnitude);
}

/* rint(x) for |x| <= 2^51. */
QG_INLINE double qg_round_double(double x) {
    return (x + 0x1.8p52) - 0x1.8p52;
}

/* ---------------------------------------------------------------- bfloat16 and float16 */

QG_INLINE float qg_from_bfloat16(uint16_t bits) {
    return qg_float((uint32_t)bits << 16);
}

/* To nearest, ties to even; a NaN stays one. */
QG_INLINE uint16_t qg_to_bfloat16(float x) {
    const uint32_t bits = qg_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

/* The least bfloat16 not below x > 0, or the largest finite one. */
QG_INLINE float qg_round_up_bfloat16(float x) {
    const uint32_t bits = (qg_bits(x) + 0xffff) & 0xffff0000;
    return qg_float(bits < 0x7f7f0000 ? bits : 0x7f7f0000);
}

/* Up or down with the probability of the distance; a finite value never becomes infinite. x is the result of an
 * operation: a NaN is a quiet one, whose upper half suffices. */
QG_INLINE uint16_t qg_to_bfloat16_stochastic(float x, int32_t noise) {
    const int32_t magnitude = qg_magnitude(x);
    const int32_t moved = (int32_t)((uint32_t)magnitude + ((uint32_t)noise >> 8));
    const int32_t finite = moved < 0x7f7fffff ? moved : 0x7f7fffff;
    const int32_t rounded = finite > magnitude ? finite : magnitude; /* infinities and NaNs as they are */
    return (uint16_t)(((qg_bits(x) & 0x80000000) | (uint32_t)rounded) >> 16);
}

QG_INLINE float qg_from_float16(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    /* A denormal has exponent 0 and counts in units of 2^-24: give it the exponent of 2^-14 and take that away. */
    const uint32_t away = qg_less(magnitude, 0x00800000) & 0x38800000; /* 2^-14, or 0 */
    const uint32_t finite = qg_bits(qg_float(magnitude + (away | 0x38000000)) - qg_float(away));
    return qg_float(sign | qg_choose(qg_less(magnitude, 0x0f800000), finite, magnitude | 0x7f800000));
}

/* To nearest, ties to even; too large becomes infinite, a NaN stays one. */
QG_INLINE uint16_t qg_to_float16(float x) {
    const uint32_t sign = (qg_bits(x) >> 16) & 0x8000;
    const uint32_t magnitude = qg_bits(x) & 0x7fffffff;
    /* Below 2^-14 the last place is 2^-24, the spacing of floats next to 0.5. */
    const uint32_t denormal = qg_less(magnitude, 0x38800000);
    const uint32_t half = denormal & 0x3f000000; /* 0.5, or 0 */
    const uint32_t shifted = qg_bits(qg_float(magnitude) + qg_float(half)) - half;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t finite = qg_choose(denormal, shifted, normal);
    const uint32_t special = 0x7c00 | (qg_less(0x7f800000, magnitude) & 0x200);
    return (uint16_t)(sign | qg_choose(qg_less(magnitude, 0x477ff000), finite, special));
}

/* ---------------------------------------------------------------- noise */

/* What the elements that share the high word of their index have in common. */
typedef struct qg_noise_key {
    uint32_t k[3];
    uint32_t element_high;
} qg_noise_key;

/* Philox4x32-10 with the seed as key and (id, step, high word of the element) as counter. */
QG_INLINE qg_noise_key qg_make_noise_key(const qg_noise_stream *stream, uint32_t element_high) {
    uint32_t seed[2] = {(uint32_t)stream->seed, (uint32_t)(stream->seed >> 32)};
    uint32_t c[4] = {stream->id, (uint32_t)stream->step, (uint32_t)(stream->step >> 32), element_high};
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c[0];
        const uint64_t b = (uint64_t)0xCD9E8D57u * c[2];
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ seed[0];
        c[1] = (uint32_t)b;
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ seed[1];
        c[3] = (uint32_t)a;
        seed[0] += 0x9E3779B9u;
        seed[1] += 0xBB67AE85u;
    }
    qg_noise_key key;
    key.k[0] = c[0];
    key.k[1] = c[1];
    key.k[2] = c[2];
    key.element_high = element_high;
    return key;
}

/* 24 uniform bits for one element: a keyed mixing of the low word of its index. */
QG_INLINE int32_t qg_noise_element(const qg_noise_key *key, uint32_t element_low) {
    uint32_t x = element_low ^ key->k[0];
    x ^= x >> 16;
    x *= 0x7feb352du;
    x += key->k[1];
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    x ^= key->k[2];
    return (int32_t)(x >> 8);
}

/* ---------------------------------------------------------------- Adam */

QG_INLINE float qg_adam_exp_avg(float m, float g, const qg_adam_coefficients *c) {
    return c->beta1 * m + c->one_minus_beta1 * g;
}

QG_INLINE float qg_adam_exp_avg_sq(float v, float g, const qg_adam_coefficients *c) {
    return c->beta2 * v + c->one_minus_beta2 * (g * g);
}

QG_INLINE float qg_adam_normalised(float m, float v, const qg_adam_coefficients *c) {
    return (m * c->bias1) / (sqrtf(v) * c->bias2 + c->eps);
}

/* ---------------------------------------------------------------- a limit on the growth of ||N|| */

/* *norm is the norm of the step before (0: none) and becomes this one's; the rate shrinks what has grown too much. */
QG_INLINE void qg_limit_growth(float *rate_out, double *norm, double squares, double growth, double rate) {
    const double now = sqrt(squares), most = growth * *norm;
    const int limited = *norm > 0.0 && now > most;
    *rate_out = (float)(limited ? rate * (most / now) : rate);
    *norm = limited ? most : now;
}

/* ---------------------------------------------------------------- float weights */

QG_INLINE float qg_updated_weight(float w, float u, const qg_update_coefficients *c) {
    return w * c->keep - c->rate * u;
}

#endif
