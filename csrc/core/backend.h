/* backend.h - the table of kernels that a device fills and core/ is written against.
 *
 * Kernels trust their arguments (core/ has checked them). Each is parallel inside and gives the same bits for every
 * device, SIMD level and thread count; scalar.h, affine.h, codebook.h and dynamic8.h here define what one element
 * computes. Memory is the device's. The last argument of each is the table's `queue`: a kernel of an asynchronous device
 * is put there in order, and what fails there is told by `failure`; on the CPU nothing can fail.
 *
 * The kernels of a step take lists: a device launches once for many matrices. Items that write the same memory are not
 * put into one list.
 */
#ifndef QG_CORE_BACKEND_H
#define QG_CORE_BACKEND_H

#include "q_galore.h"

#ifdef __cplusplus
extern "C" {
#endif

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

/* ---------------------------------------------------------------- items of lists */

/* target [rows, cols] contiguous (FLOAT32 or BFLOAT16) <- basis vectors first_row.., their elements first_col.. */
typedef struct qg_decode_item {
    const qg_projector *projector;
    int64_t first_row;
    int64_t rows;
    int64_t first_col;
    int64_t cols;
    void *target;
} qg_decode_item;

/* target [rows, cols] contiguous <- source with a row stride; both among FLOAT32, BFLOAT16, FLOAT16. */
typedef struct qg_cast_item {
    void *target;
    const void *source;
    qg_format source_format;
    int64_t rows;
    int64_t cols;
    int64_t source_row_stride;
} qg_cast_item;

/* One Adam step on the tile [rows, cols] that begins at column first_col of moments whose rows have moments_cols
 * elements. first_col is a multiple of the moments' block, and the tile ends at one or at the row's end.
 * normalised (N) may be the gradient's own memory where both have one format and one row stride. Nothing is written
 * where *gradient_absmax is above QG_LARGEST_GRADIENT (NULL: it is not). */
typedef struct qg_adam_item {
    const qg_moments *moments;
    int64_t moments_cols;
    int64_t rows;
    int64_t first_col;
    int64_t cols;
    const void *gradient;
    qg_format grad_format;
    int64_t gradient_row_stride;
    void *normalised; /* FLOAT32 or BFLOAT16 */
    qg_format normalised_format;
    int64_t normalised_row_stride;
    qg_adam_coefficients coefficients;
    const float *gradient_absmax;
} qg_adam_item;

/* Elements first.. (count of them, row-major) of the weight, u [count] FLOAT32 or BFLOAT16. For INT8, first is a
 * multiple of the group size and the range ends at one or at the weight's end. stats may be NULL. *rate, where it is
 * not NULL, stands for coefficients.rate. gradient_absmax as above. */
typedef struct qg_update_item {
    const qg_weight *weight;
    int64_t first;
    int64_t count;
    const void *u;
    qg_format u_format;
    qg_update_coefficients coefficients;
    const float *rate;
    qg_noise_stream stream;
    int64_t *stats;
    const float *gradient_absmax;
} qg_update_item;

/* Adam and update in one pass over a weight that is not projected; the moments run along the flat weight. chunk is a
 * multiple of the moments' block and of the weight's group size, or the whole weight. */
typedef struct qg_adam_update_item {
    const qg_weight *weight;
    const qg_moments *moments;
    const void *gradient;
    qg_format grad_format;
    qg_adam_coefficients adam;
    qg_update_coefficients update;
    qg_noise_stream stream;
    int64_t *stats;
    int64_t chunk;
    const float *gradient_absmax;
} qg_adam_update_item;

/* ---------------------------------------------------------------- the table */

struct qg_backend {
    const char *name;
    void *queue;

    /* Waiting for the device costs more than a pass too many, and its memory is not the host's. */
    int asynchronous;

    /* A step works on as many matrices at a time as fit in batch_bytes of scratch (one at least), and on tiles of U of
     * tile_bytes, or of some 256 rows where that is more. */
    size_t batch_bytes;
    size_t tile_bytes;

    /* How many chunks adam_update works on at a time. */
    int64_t (*chunks)(void *queue);

    /* What has failed since it was asked last, and the sentence; NULL: nothing can fail. */
    qg_status (*failure)(const char **sentence, void *queue);

    /* Waits for the device and copies its numbers to the host. */
    void (*fetch)(void *host, const void *device, size_t size, void *queue);

    /* Whether all elements are finite; the host waits. */
    int (*finite)(const void *source, qg_format format, int64_t count, void *queue);

    void (*noise)(int32_t *out, const qg_noise_stream *stream, int64_t start, int64_t count, void *queue);

    /* out[i] = max |x| of arrays[i], infinity where an element is not finite, 0 where there is none. */
    void (*absmax)(float *out, const qg_array *arrays, int64_t count, void *queue);

    void (*cast)(const qg_cast_item *items, int64_t count, qg_format target_format, void *queue);

    /* target [rows, cols] contiguous (FLOAT32 or BFLOAT16) <- scale * source with a row stride, scale a power of two. */
    void (*scaled_cast)(
        void *target,
        qg_format target_format,
        const void *source,
        qg_format source_format,
        int64_t rows,
        int64_t cols,
        int64_t source_row_stride,
        float scale,
        void *queue);

    /* *out = the sum of source[i]^2 in double, in an order that depends on count alone: 16 lanes of 64 ranges. */
    void (*sum_squares)(double *out, const void *source, qg_format format, int64_t count, void *queue);

    /* *norm is the norm of the step before (0: none), *squares that of this one's N, squared. Where the norm has grown to
     * more than growth times the one before, *rate_out = rate most / norm and *norm = most, that product; else *rate_out
     * = rate and *norm is this one's. gradient_absmax as in the items: *norm stays as it is then. */
    void (*limit_growth)(
        float *rate_out,
        double *norm,
        const double *squares,
        double growth,
        double rate,
        const float *gradient_absmax,
        void *queue);

    /* target = source sqrt(rows / *squares); target may be source's own memory where that is float32. */
    void (*normalise)(
        float *target,
        const void *source,
        qg_format format,
        int64_t count,
        int64_t rows,
        const double *squares,
        void *queue);

    /* *distance = max |A - I| of a symmetric matrix given by its lower triangle, infinity where it is not finite; where
     * the distance is at least 0.5, A's diagonal grows by 1e-6 ||A||_F (the shift of Cholesky QR). */
    void (*shift_gram)(double *distance, float *gram, int64_t n, void *queue);

    /* out[i] = sum of the noise of elements 4 i .. 4 i + 3, less its mean, times 2^-24: nearly normal. */
    void (*bell)(float *out, const qg_noise_stream *stream, int64_t count, void *queue);

    void (*int8_quantize)(const qg_weight *weight, const void *source, qg_format source_format, void *queue);
    void (*int8_dequantize)(const qg_weight *weight, void *target, qg_format target_format, void *queue);

    void (*projector_quantize)(const qg_projector *projector, const float *source, void *queue);
    void (*projector_dequantize)(const qg_decode_item *items, int64_t count, qg_format target_format, void *queue);

    void (*dynamic8_quantize)(
        uint8_t *codes,
        float *absmax,
        const float *source,
        int64_t rows,
        int64_t cols,
        int32_t block,
        int is_signed,
        void *queue);
    void (*dynamic8_dequantize)(
        float *target,
        const uint8_t *codes,
        const float *absmax,
        int64_t rows,
        int64_t cols,
        int32_t block,
        int is_signed,
        void *queue);

    void (*adam)(const qg_adam_item *items, int64_t count, void *queue);
    void (*update)(const qg_update_item *items, int64_t count, void *queue);

    /* scratch holds chunks() chunks of float32 of each item, or as many as the item has. */
    void (*adam_update)(const qg_adam_update_item *items, int64_t count, float *scratch, void *queue);
};

#ifdef __cplusplus
}
#endif
#endif
