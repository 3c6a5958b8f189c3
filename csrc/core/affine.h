/* affine.h - one element of the affine formats: INT8 weights, INT8 and INT4 projectors.
 *
 * value = scale (code - zero). An INT8 weight is updated in steps from its code, w / scale is never formed again:
 *     d = -(decay (q - z)) - (rate / s) u
 *     q' = q + floor(d) + [noise < rint(2^24 (d - floor d))]
 */
#ifndef QG_CORE_AFFINE_H
#define QG_CORE_AFFINE_H

#include "core/scalar.h"

#include <float.h>

typedef struct qg_affine {
    float scale;
    int32_t zero;
} qg_affine;

/* ---------------------------------------------------------------- INT8 weights: the range of a group */

/* Four codes of head-room on each side of [low, high], centred: with none, clamping would bias the extremes. */
QG_INLINE qg_affine qg_int8_range(double low, double high) {
    const double largest = fabs(low) > fabs(high) ? fabs(low) : fabs(high);
    double scale = (high - low) / 247;
    scale = scale > largest / 32512 ? scale : largest / 32512;
    scale = scale > 0x1p-100 ? scale : 0x1p-100;
    qg_affine range;
    range.scale = scale < FLT_MAX ? (float)scale : FLT_MAX;
    double zero = 127.5 - (high + low) / (2 * (double)range.scale);
    zero = zero < 32767 ? zero : 32767;
    zero = zero > -32767 ? zero : -32767;
    range.zero = (int32_t)qg_round_double(zero);
    return range;
}

/* As above, but a group whose values are all the same gets a range that holds this value exactly, as code 128. */
QG_INLINE qg_affine qg_int8_range_or_constant(double low, double high) {
    if (low == high && fabs(low) * 0x1p-14 >= 0x1p-100) {
        qg_affine range;
        range.scale = fabs(low) * 0x1p-14 < FLT_MAX ? (float)(fabs(low) * 0x1p-14) : FLT_MAX;
        range.zero = low > 0 ? 128 - 16384 : 128 + 16384;
        return range;
    }
    return qg_int8_range(low, high);
}

QG_INLINE uint8_t qg_int8_encode(float w, qg_affine range) {
    const int32_t q = qg_round(w / range.scale) + range.zero;
    return (uint8_t)(q < 0 ? 0 : q > 255 ? 255 : q);
}

QG_INLINE float qg_int8_decode(uint8_t q, qg_affine range) {
    return range.scale * (float)((int32_t)q - range.zero);
}

/* ---------------------------------------------------------------- INT8 weights: the update */

/* d, in steps of the group; step = rate / scale. */
QG_INLINE float qg_int8_distance(uint8_t q, int32_t zero, float u, float decay, float step) {
    return qg_clamp(-(decay * (float)((int32_t)q - zero)) - step * u, FLT_MAX);
}

/* No code moves further than this, which keeps the integers small; the range of the group comes from q + d itself. */
#define QG_FURTHEST 0x1p20f

/* q' - q. The threshold is rint(2^24 (d - floor d)); from 2^23 on a float is an integer already. */
QG_INLINE int32_t qg_int8_move_stochastic(float d, int32_t noise) {
    const float clamped = qg_clamp(d, QG_FURTHEST);
    const int32_t whole = qg_floor(clamped);
    const float threshold = 0x1p24f * (clamped - (float)whole);
    const float shift = threshold < 0x1p23f ? 0x1p23f : 0;
    return whole + (noise < (int32_t)((threshold + shift) - shift));
}

QG_INLINE int32_t qg_int8_move_nearest(float d) {
    return qg_round(qg_clamp(d, QG_FURTHEST));
}

/* The code of an element in a new range: relative = q + d - z in the old one, ratio = old scale / new scale. */
QG_INLINE uint8_t qg_int8_recode(double relative, double ratio, int32_t zero, int32_t noise, int stochastic) {
    double t = relative * ratio + zero;
    t = t > -1 ? t : -1;
    t = t < 256 ? t : 256;
    int32_t q = (int32_t)qg_round_double(t);
    if (stochastic) {
        q = (int32_t)t - ((double)(int32_t)t > t);
        q += noise < (int32_t)qg_round_double(0x1p24 * (t - q));
    }
    return (uint8_t)(q < 0 ? 0 : q > 255 ? 255 : q);
}

/* ---------------------------------------------------------------- projectors */

/* low <= 0 <= high, top = 2^bits - 1. The scale is a bfloat16 rounded up, so the range is never cut. */
QG_INLINE qg_affine qg_projector_range(float low, float high, int32_t top) {
    float scale = (high - low) / (float)top;
    scale = scale <= FLT_MAX ? scale : high / (float)top - low / (float)top; /* where the difference overflows */
    scale = scale > 0x1p-100f ? scale : 0x1p-100f;
    qg_affine range;
    range.scale = qg_round_up_bfloat16(scale);
    range.zero = qg_round(-low / range.scale);
    return range;
}

QG_INLINE uint8_t qg_projector_encode(float w, qg_affine range, int32_t top) {
    const int32_t q = qg_round(w / range.scale) + range.zero;
    return (uint8_t)(q < 0 ? 0 : q > top ? top : q);
}

QG_INLINE float qg_projector_decode(uint8_t q, qg_affine range) {
    return qg_int8_decode(q, range);
}

#endif
