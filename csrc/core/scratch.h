/* scratch.h - sizes and places in the caller's scratch and in arrays of floats, for the jobs of core/. */
#ifndef QG_CORE_SCRATCH_H
#define QG_CORE_SCRATCH_H

#include <stddef.h>
#include <stdint.h>

#include "q_galore.h"

/* Every buffer starts at a multiple of this; the scratch itself may start anywhere. */
enum { QG_ALIGNMENT = 64 };

static inline int64_t qg_smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline int64_t qg_larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static inline size_t qg_aligned_size(size_t bytes) {
    return (bytes + QG_ALIGNMENT - 1) / QG_ALIGNMENT * QG_ALIGNMENT;
}

static inline void *qg_aligned(void *scratch) {
    return (void *)(((uintptr_t)scratch + QG_ALIGNMENT - 1) / QG_ALIGNMENT * QG_ALIGNMENT);
}

/* Bytes of a float: FLOAT32, BFLOAT16 or FLOAT16. */
static inline size_t qg_float_bytes(qg_format format) {
    return format == QG_FLOAT32 ? 4 : 2;
}

static inline const void *qg_float_at(const void *base, qg_format format, int64_t index) {
    return (const char *)base + index * (int64_t)qg_float_bytes(format);
}

#endif
