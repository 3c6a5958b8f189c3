/* kernels.h - the kernels of the CUDA table (core/backend.h says what each does). queue is a qg_cuda. */
#ifndef QG_CUDA_KERNELS_H
#define QG_CUDA_KERNELS_H

#include "cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cast.cu */
void qg_cuda_noise(int32_t *out, const qg_noise_stream *stream, int64_t start, int64_t count, void *queue);
void qg_cuda_absmax(float *out, const qg_array *arrays, int64_t count, void *queue);
int qg_cuda_finite(const void *source, qg_format format, int64_t count, void *queue);
void qg_cuda_cast(const qg_cast_item *items, int64_t count, qg_format target_format, void *queue);
void qg_cuda_scaled_cast(
    void *target,
    qg_format target_format,
    const void *source,
    qg_format source_format,
    int64_t rows,
    int64_t cols,
    int64_t source_row_stride,
    float scale,
    void *queue);

/* subspace.cu */
void qg_cuda_sum_squares(double *out, const void *source, qg_format format, int64_t count, void *queue);
void qg_cuda_limit_growth(
    float *rate_out,
    double *norm,
    const double *squares,
    double growth,
    double rate,
    const float *gradient_absmax,
    void *queue);
void qg_cuda_normalise(
    float *target,
    const void *source,
    qg_format format,
    int64_t count,
    int64_t rows,
    const double *squares,
    void *queue);
void qg_cuda_shift_gram(double *distance, float *gram, int64_t n, void *queue);
void qg_cuda_bell(float *out, const qg_noise_stream *stream, int64_t count, void *queue);

/* int8.cu */
void qg_cuda_int8_quantize(const qg_weight *weight, const void *source, qg_format source_format, void *queue);
void qg_cuda_int8_dequantize(const qg_weight *weight, void *target, qg_format target_format, void *queue);

/* projector.cu */
void qg_cuda_projector_quantize(const qg_projector *projector, const float *source, void *queue);
void qg_cuda_projector_dequantize(const qg_decode_item *items, int64_t count, qg_format target_format, void *queue);

/* dynamic8.cu */
void qg_cuda_dynamic8_quantize(
    uint8_t *codes,
    float *absmax,
    const float *source,
    int64_t rows,
    int64_t cols,
    int32_t block,
    int is_signed,
    void *queue);
void qg_cuda_dynamic8_dequantize(
    float *target,
    const uint8_t *codes,
    const float *absmax,
    int64_t rows,
    int64_t cols,
    int32_t block,
    int is_signed,
    void *queue);

/* adam8.cu */
int64_t qg_cuda_chunks(void *queue);
void qg_cuda_adam(const qg_adam_item *items, int64_t count, void *queue);
void qg_cuda_adam_update(const qg_adam_update_item *items, int64_t count, float *scratch, void *queue);

/* update.cu */
void qg_cuda_update(const qg_update_item *items, int64_t count, void *queue);

/* factor.cu: what the factorisations of linalg.c need besides their library */

/* target [n, n] = the lower triangle of source, zeros above. */
void qg_cuda_copy_lower(float *target, const float *source, int64_t n, void *queue);

/* signs[i] = -1 where diagonal[i * stride] < 0, else 1. */
void qg_cuda_signs(float *signs, const float *diagonal, int64_t stride, int64_t count, void *queue);

/* target [rows, cols] = signs[row] source. */
void qg_cuda_scale_rows(
    float *target,
    const float *source,
    const float *signs,
    int64_t rows,
    int64_t cols,
    void *queue);

/* The GPUs that the kernels are built for: "sm_80, sm_90". */
void qg_cuda_architectures(char *text, size_t size);

#ifdef __cplusplus
}
#endif
#endif
