/* open.c - opening a GPU, its tables, and what runs where. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/kernels.h"
#include "cuda/libraries.h"

enum { WORKSPACE_ALIGNMENT = 256 };

/* ---------------------------------------------------------------- tables */

static qg_status take_failure(const char **sentence, void *queue) {
    qg_cuda *cuda = queue;
    *sentence = cuda->message;
    return qg_cuda_take(cuda);
}

/* Where nothing can be fetched, the host gets bytes of 0xff: no number of them looks like a good one. */
static void fetch(void *host, const void *device, size_t size, void *queue) {
    qg_cuda *cuda = queue;
    if (cuda->status != QG_SUCCESS || !qg_cuda_may_wait(cuda, "a call that reads numbers of the device") ||
        !qg_cuda_good(
            cuda, cudaMemcpyAsync(host, device, size, cudaMemcpyDeviceToHost, cuda->stream), "cudaMemcpyAsync") ||
        !qg_cuda_good(cuda, cudaStreamSynchronize(cuda->stream), "cudaStreamSynchronize")) {
        memset(host, 0xff, size);
    }
}

static qg_backend make_backend(qg_cuda *cuda) {
    return (qg_backend){
        .name = "cuda",
        .queue = cuda,
        .asynchronous = 1,
        .batch_bytes = (size_t)64 << 20,
        .tile_bytes = (size_t)4 << 20,
        .chunks = qg_cuda_chunks,
        .failure = take_failure,
        .fetch = fetch,
        .finite = qg_cuda_finite,
        .noise = qg_cuda_noise,
        .absmax = qg_cuda_absmax,
        .cast = qg_cuda_cast,
        .scaled_cast = qg_cuda_scaled_cast,
        .sum_squares = qg_cuda_sum_squares,
        .limit_growth = qg_cuda_limit_growth,
        .normalise = qg_cuda_normalise,
        .shift_gram = qg_cuda_shift_gram,
        .bell = qg_cuda_bell,
        .int8_quantize = qg_cuda_int8_quantize,
        .int8_dequantize = qg_cuda_int8_dequantize,
        .projector_quantize = qg_cuda_projector_quantize,
        .projector_dequantize = qg_cuda_projector_dequantize,
        .dynamic8_quantize = qg_cuda_dynamic8_quantize,
        .dynamic8_dequantize = qg_cuda_dynamic8_dequantize,
        .adam = qg_cuda_adam,
        .update = qg_cuda_update,
        .adam_update = qg_cuda_adam_update,
    };
}

QG_EXPORT const qg_backend *qg_cuda_backend(qg_cuda *cuda) {
    return &cuda->backend;
}

QG_EXPORT const qg_linalg *qg_cuda_linalg(qg_cuda *cuda) {
    return &cuda->linalg;
}

/* ---------------------------------------------------------------- begin and end */

/* The begin of the workspace is for numbers that a kernel leaves to the next, the rest is cuBLAS'. */
static void take_workspace(qg_cuda *cuda, void *workspace, size_t size) {
    cuda->numbers = workspace;
    cuda->workspace = size > QG_CUDA_LEAST_WORKSPACE ? (char *)workspace + QG_CUDA_LEAST_WORKSPACE : NULL;
    cuda->workspace_size = size > QG_CUDA_LEAST_WORKSPACE ? size - QG_CUDA_LEAST_WORKSPACE : 0;
}

QG_EXPORT qg_status qg_cuda_begin(qg_cuda *cuda, void *stream, void *workspace, size_t workspace_size) {
    cuda->status = QG_SUCCESS;
    cuda->message[0] = '\0';
    if (workspace == NULL || workspace_size < QG_CUDA_LEAST_WORKSPACE ||
        (uintptr_t)workspace % WORKSPACE_ALIGNMENT != 0) {
        qg_cuda_fail(
            cuda, QG_INVALID_ARGUMENT,
            "workspace: expected %d bytes of device memory or more at a multiple of %d bytes, got %zu at %p",
            QG_CUDA_LEAST_WORKSPACE, WORKSPACE_ALIGNMENT, workspace_size, workspace);
        return qg_cuda_take(cuda);
    }
    if (!qg_cuda_enter(cuda, &cuda->device_before)) {
        return qg_cuda_take(cuda);
    }
    cuda->stream = stream;
    take_workspace(cuda, workspace, workspace_size);
    qg_libraries_restart(cuda);
    return QG_SUCCESS;
}

QG_EXPORT void qg_cuda_end(qg_cuda *cuda) {
    cuda->stream = NULL;
    take_workspace(cuda, NULL, 0);
    qg_libraries_restart(cuda);
    qg_cuda_leave(cuda, cuda->device_before);
}

/* ---------------------------------------------------------------- open and close */

/* Whether this GPU runs what was built: one kernel, on a stream that nobody else has. */
static void try_kernel(qg_cuda *cuda, float *memory) {
    if (!qg_cuda_good(
            cuda, cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags")) {
        return;
    }
    if (qg_cuda_good(cuda, cudaMemsetAsync(memory, 0, sizeof *memory, cuda->stream), "cudaMemsetAsync")) {
        qg_cuda_signs(memory + 1, memory, 1, 1, cuda);
    }
    if (cuda->status == QG_SUCCESS) {
        qg_cuda_good(cuda, cudaStreamSynchronize(cuda->stream), "the first kernel");
    }
    qg_cuda_good(cuda, cudaStreamDestroy(cuda->stream), "cudaStreamDestroy");
    cuda->stream = NULL;
}

static void set_up(qg_cuda *cuda) {
    float *memory = NULL;
    if (qg_cuda_good(
            cuda, cudaDeviceGetAttribute(&cuda->processors, cudaDevAttrMultiProcessorCount, cuda->device),
            "cudaDeviceGetAttribute") &&
        qg_cuda_good(cuda, cudaMalloc((void **)&memory, 2 * sizeof *memory), "cudaMalloc")) {
        try_kernel(cuda, memory);
        qg_cuda_good(cuda, cudaFree(memory), "cudaFree");
    }
}

static void check_device(qg_cuda *cuda) {
    int count = 0;
    if (qg_cuda_good(cuda, cudaGetDeviceCount(&count), "cudaGetDeviceCount") &&
        (cuda->device < 0 || cuda->device >= count)) {
        qg_cuda_fail(
            cuda, QG_INVALID_ARGUMENT, "device %d: expected 0 to %d, the GPUs that this process sees", cuda->device,
            count - 1);
    }
}

static qg_status refuse(qg_status status, const char *sentence, char *message, size_t message_size) {
    if (message != NULL && message_size > 0) {
        snprintf(message, message_size, "%s", sentence);
    }
    return status;
}

QG_EXPORT qg_status qg_cuda_open(qg_cuda **cuda, const qg_cuda_params *params, char *message, size_t message_size) {
    if (cuda == NULL || params == NULL || params->struct_size != sizeof *params) {
        char sentence[128];
        snprintf(
            sentence, sizeof sentence,
            "qg_cuda_open: expected a place for the GPU and a qg_cuda_params with struct_size %zu", sizeof *params);
        return refuse(QG_INVALID_ARGUMENT, sentence, message, message_size);
    }
    *cuda = NULL;
    qg_cuda *opened = calloc(1, sizeof *opened);
    if (opened == NULL) {
        return refuse(QG_OUT_OF_MEMORY, "qg_cuda_open: the host has no memory left", message, message_size);
    }
    opened->device = params->device;
    opened->allow_tf32 = params->allow_tf32 != 0;
    int before = 0;
    check_device(opened);
    if (opened->status == QG_SUCCESS && qg_cuda_enter(opened, &before)) {
        set_up(opened);
        qg_cuda_leave(opened, before);
    }
    if (opened->status != QG_SUCCESS) {
        const qg_status status = refuse(opened->status, opened->message, message, message_size);
        qg_cuda_close(opened);
        return status;
    }
    opened->backend = make_backend(opened);
    opened->linalg = qg_cuda_make_linalg(opened);
    *cuda = opened;
    return QG_SUCCESS;
}

QG_EXPORT void qg_cuda_close(qg_cuda *cuda) {
    if (cuda == NULL) {
        return;
    }
    int before = 0;
    cuda->status = QG_SUCCESS;
    if (cuda->libraries != NULL && qg_cuda_enter(cuda, &before)) {
        qg_libraries_close(cuda);
        qg_cuda_leave(cuda, before);
    }
    free(cuda);
}

QG_EXPORT const char *qg_cuda_version(void) {
    return QG_VERSION;
}

QG_EXPORT const char *qg_cuda_error(const qg_cuda *cuda) {
    return cuda->message;
}
