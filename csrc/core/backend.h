/* backend.h - the table of kernels that a device fills and core/ is written against.
 *
 * Kernels trust their arguments (core/ has checked them) and cannot fail. Each is parallel inside and gives the same
 * bits for every SIMD level and thread count; scalar.h, affine.h, codebook.h and dynamic8.h here define what one element computes.
 */
#ifndef QG_CORE_BACKEND_H
#define QG_CORE_BACKEND_H

#include "q_galore.h"

/* Names one stream of noise: one value for each element of one parameter in one step. */
typedef struct qg_noise_stream {
    uint64_t seed;
    uint64_t step;
    uint32_t id;
} qg_noise_stream;

/* Adam in float32: m = beta1 m + one_minus_beta1 g; v = beta2 v + one_minus_beta2 (g g);
 * N = (m bias1) / (sqrt(v) bias2 + eps), bias1 = 1 / (1 - beta1^t), bias2 = 1 / sqrt(1 - beta2^t), rounded from double. */
typedef struct qg_adam_coefficients {
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float bias1;
    float bias2;
    float eps;
} qg_adam_coefficients;

/* Float weights: w = w keep - rate u. INT8: d = -(decay (q - z)) - (rate / s) u, in steps from the code. */
typedef struct qg_update_coefficients {
    float keep;  /* 1 - lr wd */
    float decay; /* lr wd */
    float rate;  /* lr scale */
    int stochastic;
} qg_update_coefficients;

struct qg_backend {
    const char *name;

    /* Threads a kernel may use: the caller's scratch for adam8 holds one chunk for each. */
    int (*threads)(void);

    void (*noise)(int32_t *out, const qg_noise_stream *stream, int64_t start, int64_t count);

    void (*absmax)(float *out, const void *source, qg_format format, int64_t count);

    /* target [rows, cols] contiguous <- source with a row stride; both among FLOAT32, BFLOAT16, FLOAT16. */
    void (*cast)(
        void *target,
        qg_format target_format,
        const void *source,
        qg_format source_format,
        int64_t rows,
        int64_t cols,
        int64_t source_row_stride);

    /* target [rows, cols] contiguous (FLOAT32 or BFLOAT16) <- scale * source with a row stride, scale a power of two. */
    void (*scaled_cast)(
        void *target,
        qg_format target_format,
        const void *source,
        qg_format source_format,
        int64_t rows,
        int64_t cols,
        int64_t source_row_stride,
        float scale);

    /* *out = the sum of source[i]^2 in double, in an order that depends on count alone: 16 lanes of 64 ranges. */
    void (*sum_squares)(double *out, const void *source, qg_format format, int64_t count);

    /* target = source sqrt(rows / *squares); target may be source's own memory where that is float32. */
    void (*normalise)(
        float *target,
        const void *source,
        qg_format format,
        int64_t count,
        int64_t rows,
        const double *squares);

    /* *distance = max |A - I| of a symmetric matrix given by its lower triangle, infinity where it is not finite; where
     * the distance is at least 0.5, A's diagonal grows by 1e-6 ||A||_F (the shift of Cholesky QR). */
    void (*shift_gram)(double *distance, float *gram, int64_t n);

    /* out[i] = sum of the noise of elements 4 i .. 4 i + 3, less its mean, times 2^-24: nearly normal. */
    void (*bell)(float *out, const qg_noise_stream *stream, int64_t count);

    /* Waits for the device and copies its numbers to the host. asynchronous: a wait costs more than a pass too many. */
    void (*fetch)(void *host, const void *device, size_t size);
    int asynchronous;

    void (*int8_quantize)(const qg_weight *weight, const void *source, qg_format source_format);
    void (*int8_dequantize)(const qg_weight *weight, void *target, qg_format target_format);

    void (*projector_quantize)(const qg_projector *projector, const float *source);

    /* target [rows, cols] contiguous (FLOAT32 or BFLOAT16) <- basis vectors first_row.., their elements first_col.. */
    void (*projector_dequantize)(
        const qg_projector *projector,
        int64_t first_row,
        int64_t rows,
        int64_t first_col,
        int64_t cols,
        void *target,
        qg_format target_format);

    void (*dynamic8_quantize)(
        uint8_t *codes,
        float *absmax,
        const float *source,
        int64_t rows,
        int64_t cols,
        int32_t block,
        int is_signed);
    void (*dynamic8_dequantize)(
        float *target,
        const uint8_t *codes,
        const float *absmax,
        int64_t rows,
        int64_t cols,
        int32_t block,
        int is_signed);

    /* One Adam step on the tile [rows, cols] that begins at column first_col of moments whose rows have moments_cols
     * elements. first_col is a multiple of the moments' block, and the tile ends at one or at the row's end.
     * normalised (N) may be the gradient's own memory when that is float32. */
    void (*adam)(
        const qg_moments *moments,
        int64_t moments_cols,
        int64_t rows,
        int64_t first_col,
        int64_t cols,
        const void *gradient,
        qg_format grad_format,
        int64_t gradient_row_stride,
        float *normalised,
        int64_t normalised_row_stride,
        const qg_adam_coefficients *coefficients);

    /* Elements first.. (count of them, row-major) of the weight, u [count] FLOAT32 or BFLOAT16. For INT8, first is a
     * multiple of the group size and the range ends at one or at the weight's end. stats may be NULL. */
    void (*update)(
        const qg_weight *weight,
        int64_t first,
        int64_t count,
        const void *u,
        qg_format u_format,
        const qg_update_coefficients *coefficients,
        const qg_noise_stream *stream,
        int64_t *stats);

    /* adam and update in one pass over a weight that is not projected; the moments run along the flat weight.
     * chunk is a multiple of the moments' block and of the weight's group size, or the whole weight; scratch holds
     * threads() chunks of float32. */
    void (*adam_update)(
        const qg_weight *weight,
        const qg_moments *moments,
        const void *gradient,
        qg_format grad_format,
        const qg_adam_coefficients *adam,
        const qg_update_coefficients *update,
        const qg_noise_stream *stream,
        int64_t *stats,
        int64_t chunk,
        float *scratch);
};

#endif
