/* factor.cu - what the factorisations of linalg.c need besides cuSOLVER, which reads a row-major matrix as its transpose.
 *
 *   copy_lower   8 bytes an element of the lower triangle, 4 above it: cuSOLVER inverts a triangle in place
 *   signs        s_i = -1 where R_ii < 0, else 1: geqrf leaves the signs of R's diagonal to chance
 *   scale_rows   q_i = s_i a_i, 8 bytes an element
 *
 * Exact: values are copied or negated. A refresh runs them once for each factorisation, so nothing here is vectorised.
 */
#include <stdio.h>

#include "cuda/kernels.h"

enum { THREADS = 256 };

struct lower_list {
    float *target;
    const float *source;
    int64_t n;
};

static __global__ void copy_lower(struct lower_list list) {
    const int64_t count = list.n * list.n, step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += step) {
        list.target[i] = i % list.n <= i / list.n ? list.source[i] : 0.0f;
    }
}

struct sign_list {
    float *signs;
    const float *diagonal;
    int64_t stride;
    int64_t count;
};

static __global__ void signs_of(struct sign_list list) {
    const int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < list.count; i += step) {
        list.signs[i] = list.diagonal[i * list.stride] < 0.0f ? -1.0f : 1.0f;
    }
}

struct scale_list {
    float *target;
    const float *source;
    const float *signs;
    int64_t rows;
    int64_t cols;
};

static __global__ void scale_rows(struct scale_list list) {
    const int64_t count = list.rows * list.cols, step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += step) {
        list.target[i] = list.signs[i / list.cols] * list.source[i];
    }
}

extern "C" void qg_cuda_copy_lower(float *target, const float *source, int64_t n, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    struct lower_list list = {target, source, n};
    if (n > 0) {
        QG_LAUNCH(cuda, copy_lower, qg_cuda_grid(cuda, n * n, THREADS), THREADS, list);
    }
}

extern "C" void qg_cuda_signs(float *signs, const float *diagonal, int64_t stride, int64_t count, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    struct sign_list list = {signs, diagonal, stride, count};
    if (count > 0) {
        QG_LAUNCH(cuda, signs_of, qg_cuda_grid(cuda, count, THREADS), THREADS, list);
    }
}

extern "C" void qg_cuda_scale_rows(
    float *target,
    const float *source,
    const float *signs,
    int64_t rows,
    int64_t cols,
    void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    struct scale_list list = {target, source, signs, rows, cols};
    if (rows > 0 && cols > 0) {
        QG_LAUNCH(cuda, scale_rows, qg_cuda_grid(cuda, rows * cols, THREADS), THREADS, list);
    }
}

/* nvcc lists them as 800,900 for host and device alike; nothing does under the emulator. */
#ifdef __CUDA_ARCH_LIST__
static const int architectures[] = {__CUDA_ARCH_LIST__};
#else
static const int architectures[] = {0};
#endif

extern "C" void qg_cuda_architectures(char *text, size_t size) {
    size_t used = 0;
    for (size_t i = 0; i < sizeof architectures / sizeof *architectures && used < size; i++) {
        used += (size_t)snprintf(text + used, size - used, "%ssm_%d", i == 0 ? "" : ", ", architectures[i] / 10);
    }
}
