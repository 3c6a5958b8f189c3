/* single.h - the kernels that take lists, called with one item. */
#ifndef QG_TESTS_SINGLE_H
#define QG_TESTS_SINGLE_H

#include "core/backend.h"

static inline void single_cast(
    const qg_backend *backend,
    void *target,
    qg_format target_format,
    const void *source,
    qg_format source_format,
    int64_t rows,
    int64_t cols,
    int64_t source_row_stride) {
    const qg_cast_item item = {target, source, source_format, rows, cols, source_row_stride};
    backend->cast(&item, 1, target_format, backend->queue);
}

static inline void single_decode(
    const qg_backend *backend,
    const qg_projector *projector,
    int64_t first_row,
    int64_t rows,
    int64_t first_col,
    int64_t cols,
    void *target,
    qg_format target_format) {
    const qg_decode_item item = {projector, first_row, rows, first_col, cols, target};
    backend->projector_dequantize(&item, 1, target_format, backend->queue);
}

static inline void single_adam(
    const qg_backend *backend,
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
    const qg_adam_coefficients *coefficients) {
    const qg_adam_item item = {moments, moments_cols, rows, first_col, cols, gradient, grad_format, gradient_row_stride,
        normalised, QG_FLOAT32, normalised_row_stride, *coefficients, NULL};
    backend->adam(&item, 1, backend->queue);
}

static inline void single_update(
    const qg_backend *backend,
    const qg_weight *weight,
    int64_t first,
    int64_t count,
    const void *u,
    qg_format u_format,
    const qg_update_coefficients *coefficients,
    const qg_noise_stream *stream,
    int64_t *stats) {
    const qg_update_item item = {weight, first, count, u, u_format, *coefficients, NULL, *stream, stats, NULL};
    backend->update(&item, 1, backend->queue);
}

static inline void single_adam_update(
    const qg_backend *backend,
    const qg_weight *weight,
    const qg_moments *moments,
    const void *gradient,
    qg_format grad_format,
    const qg_adam_coefficients *adam,
    const qg_update_coefficients *update,
    const qg_noise_stream *stream,
    int64_t *stats,
    int64_t chunk,
    float *scratch) {
    const qg_adam_update_item item = {
        weight, moments, gradient, grad_format, *adam, *update, *stream, stats, chunk, NULL};
    backend->adam_update(&item, 1, scratch, backend->queue);
}

#endif
