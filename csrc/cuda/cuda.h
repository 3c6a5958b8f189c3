/* cuda.h - one GPU: where its work goes, what has failed, its tables. Plain C, for .c and .cu files alike. */
#ifndef QG_CUDA_CUDA_H
#define QG_CUDA_CUDA_H

#include <cuda_runtime.h>

#include "core/backend.h"

#define QG_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

struct qg_libraries; /* libraries.h */

struct qg_cuda {
    qg_backend backend;
    qg_linalg linalg;
    int device;
    int device_before; /* current in the thread at qg_cuda_begin */
    int processors;    /* streaming multiprocessors */
    int allow_tf32;
    cudaStream_t stream;
    void *workspace; /* cuBLAS' */
    size_t workspace_size;
    /* What one kernel leaves to the next, or to the host: the begin of the caller's workspace, as other work may be queued
     * in another stream meanwhile. */
    float *numbers;
    qg_status status;               /* of the first call that failed since it was asked for, */
    char message[512];              /* and its sentence */
    struct qg_libraries *libraries; /* NULL until they are needed first */
};

/* Keep the first failure. */
void qg_cuda_fail(qg_cuda *cuda, qg_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* The failure that was kept; there is none from then on. */
qg_status qg_cuda_take(qg_cuda *cuda);

/* Whether a call of the runtime succeeded; keeps "<what>: <text of the error> (<number>)" where it did not. Returns 1 for
 * success. */
int qg_cuda_good(qg_cuda *cuda, cudaError_t error, const char *what);

/* Whether the host may wait in this stream; keeps the failure where it may not: a stream that is being captured runs
 * nothing. `what` is what would wait. */
int qg_cuda_may_wait(qg_cuda *cuda, const char *what);

/* Make the GPU the thread's current device; *before is what it was, for leave. enter returns 1 for success. */
int qg_cuda_enter(qg_cuda *cuda, int *before);
void qg_cuda_leave(qg_cuda *cuda, int before);

/* The grid of `units` units of work for blocks that take `per_block` of them each: enough blocks, but no more than keep
 * the GPU busy; kernels loop over what is left with a stride of gridDim.x. */
unsigned qg_cuda_grid(const qg_cuda *cuda, int64_t units, int64_t per_block);

/* Put kernel(argument) in the stream. argument is a struct of at most 4000 bytes, passed by value. After a failure
 * nothing more is launched. Used by .cu files only: the runtime's typed launch is C++. */
#define QG_LAUNCH(cuda, kernel, blocks, threads, argument)                                                      \
    do {                                                                                                        \
        void *arguments_[] = {(void *)&(argument)};                                                             \
        if ((cuda)->status == QG_SUCCESS) {                                                                     \
            qg_cuda_good(                                                                                       \
                (cuda), cudaLaunchKernel((kernel), dim3(blocks), dim3(threads), arguments_, 0, (cuda)->stream), \
                #kernel);                                                                                       \
        }                                                                                                       \
    } while (0)

#ifdef __cplusplus
}
#endif
#endif
