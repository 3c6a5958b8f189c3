/* layout.h - how many elements the arrays of a projector hold in each format: checks, kernels and binding ask here. */
#ifndef QG_CORE_LAYOUT_H
#define QG_CORE_LAYOUT_H

#include "q_galore.h"

/* Codes are the values themselves; there are no scales. */
static inline int qg_projector_is_float(qg_format format) {
    return format == QG_FLOAT32 || format == QG_BFLOAT16;
}

/* value = scale (code - zero): the only formats with zeros. */
static inline int qg_projector_is_affine(qg_format format) {
    return format == QG_INT8 || format == QG_INT4;
}

/* Two codes a byte. */
static inline int qg_projector_is_packed(qg_format format) {
    return format == QG_INT4 || format == QG_FP4 || format == QG_NF4;
}

/* Elements of `codes` in a row: floats, or bytes. */
static inline int64_t qg_projector_row_codes(qg_format format, int64_t dim) {
    return qg_projector_is_packed(format) ? dim / 2 + dim % 2 : dim;
}

/* Scales are an array of rows x cols; block 0 is one scale for all. */
static inline int64_t qg_projector_scale_rows(int64_t rank, int64_t block) {
    return block == 0 ? 1 : rank;
}

static inline int64_t qg_projector_scale_cols(int64_t dim, int64_t block) {
    return block == 0 ? 1 : dim / block + (dim % block != 0);
}

#endif
