/* codebook.h - one element of the projector formats with a scale and no zero point: value = scale entry(code).
 *
 *     FP4       {0, 1/16, 2, 3, 4, 6, 8, 12} / 12 with both signs, the value set of bitsandbytes' fp4
 *     NF4       quantiles of a normal distribution with 0 and +-1, as printed in QLoRA (arXiv 2305.14314), appendix E
 *     FP8_E4M3  OCP 8-bit floating point, 4 bits of exponent, 3 of mantissa, no infinities; largest value 448
 *     DYNAMIC8  the signed map of dynamic8.h
 *
 * scale = absmax / top as a bfloat16 rounded up, top the largest entry: |x| = |value / scale| <= top, but for the last
 * places of a division. (Only where no bfloat16 is large enough |x| goes up to 1.004, and takes the outermost entry.)
 */
#ifndef QG_CORE_CODEBOOK_H
#define QG_CORE_CODEBOOK_H

#include "core/scalar.h"

#include <float.h>

/* ---------------------------------------------------------------- scales */

QG_INLINE float qg_absmax_scale(float absmax, float top) {
    const float scale = absmax / top;
    return qg_round_up_bfloat16(scale > 0x1p-100f ? scale : 0x1p-100f);
}

/* The largest entry of a format. */
QG_INLINE float qg_absmax_top(qg_format format) {
    return format == QG_FP8_E4M3 ? 448 : 1;
}

/* ---------------------------------------------------------------- FP4, NF4 */

/* Entries ascend. A code is the number of thresholds below x; a threshold is the largest float not above the exact
 * midpoint of its neighbours, so a tie goes to the lower code. */
typedef struct qg_codebook {
    float entry[16];
    float threshold[15];
} qg_codebook;

/* clang-format off */
/* FP4 has one zero: 15 values, and code 15, which decodes to 1 as code 14 does, is never the nearest. */
QG_TABLE qg_codebook qg_fp4 = {
    {-1, -8 / 12.f, -6 / 12.f, -4 / 12.f, -3 / 12.f, -2 / 12.f, -1 / 192.f, 0,
     1 / 192.f, 2 / 12.f, 3 / 12.f, 4 / 12.f, 6 / 12.f, 8 / 12.f, 1, 1},
    {-0x1.aaaaacp-1f, -0x1.2aaaacp-1f, -0x1.aaaaacp-2f, -0x1.2aaaacp-2f, -0x1.aaaaacp-3f, -0x1.600002p-4f,
     -0x1.555556p-9f, 0x1.555556p-9f, 0x1.6p-4f, 0x1.aaaaaap-3f, 0x1.2aaaaap-2f, 0x1.aaaaaap-2f, 0x1.2aaaaap-1f,
     0x1.aaaaaap-1f, FLT_MAX},
};

QG_TABLE qg_codebook qg_nf4 = {
    {-1, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1},
    {-0x1.b239b2p-1f, -0x1.38a4e2p-1f, -0x1.d709p-2f, -0x1.5bd4eep-2f, -0x1.e079dap-3f, -0x1.1a7178p-3f,
     -0x1.74f0e2p-5f, 0x1.45f5fep-5f, 0x1.ec90c4p-4f, 0x1.a0cfcp-3f, 0x1.2b05a8p-2f, 0x1.8ea7f2p-2f, 0x1.00da06p-1f,
     0x1.491b5ep-1f, 0x1.b913b2p-1f},
};
/* clang-format on */

QG_INLINE uint8_t qg_codebook_encode(const qg_codebook *book, float x) {
    int32_t code = 0;
    for (int i = 0; i < 15; i++) {
        code += x > book->threshold[i];
    }
    return (uint8_t)code;
}

/* ---------------------------------------------------------------- FP8_E4M3 */

/* To nearest, ties to even, |x| < 464: the codes of NaN, 0x7f and 0xff, never arise. */
QG_INLINE uint8_t qg_e4m3_encode(float x) {
    const uint32_t magnitude = qg_bits(x) & 0x7fffffff;
    /* Below 2^-6 the last place is 2^-9, the spacing of floats next to 2^14. */
    const uint32_t denormal = qg_bits(qg_float(magnitude) + 0x1p14f) - 0x46800000;
    const uint32_t normal = (magnitude - 0x3c000000 + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
    const uint32_t code = qg_choose(qg_less(magnitude, 0x3c800000), denormal, normal);
    return (uint8_t)((qg_bits(x) >> 24 & 0x80) | code);
}

/* A denormal has exponent 0 and counts in units of 2^-9: give it the exponent of 2^-6 and take that away. */
QG_INLINE float qg_e4m3_decode(uint8_t code) {
    const uint32_t magnitude = (uint32_t)(code & 0x7f) << 20;
    const uint32_t away = qg_less(magnitude, 0x00800000) & 0x3c800000;
    const float value = qg_float(magnitude + (away | 0x3c000000)) - qg_float(away);
    return qg_float(qg_bits(value) | (uint32_t)(code & 0x80) << 24);
}

#endif
