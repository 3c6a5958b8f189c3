/* device.c - what every file of this folder calls: failures, the size of a grid, the thread's current device. */
#include <stdarg.h>
#include <stdio.h>

#include "cuda/kernels.h"

/* Eight blocks of 256 threads are resident on a processor; twice that evens out the last wave. */
enum { BLOCKS_A_PROCESSOR = 16 };

/* ---------------------------------------------------------------- failures */

void qg_cuda_fail(qg_cuda *cuda, qg_status status, const char *format, ...) {
    if (cuda->status != QG_SUCCESS) {
        return;
    }
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(cuda->message, sizeof cuda->message, format, arguments);
    va_end(arguments);
    cuda->status = status;
}

static void fail_architecture(qg_cuda *cuda) {
    char built[128] = "";
    int major = 0, minor = 0;
    qg_cuda_architectures(built, sizeof built);
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, cuda->device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, cuda->device) != cudaSuccess) {
        cudaGetLastError();
    }
    qg_cuda_fail(
        cuda, QG_UNSUPPORTED,
        "the kernels are built for %s and GPU %d is sm_%d%d: rebuild with Q_GALORE_CUDA_ARCHS=%d%d", built,
        cuda->device, major, minor, major, minor);
}

int qg_cuda_good(qg_cuda *cuda, cudaError_t error, const char *what) {
    if (error == cudaSuccess) {
        return 1;
    }
    cudaGetLastError(); /* or the next call of anyone reports it again */
    const char *text = cudaGetErrorString(error);
    switch ((int)error) {
    case cudaErrorInsufficientDriver:
    case 34:  /* cudaErrorStubLibrary */
    case 803: /* cudaErrorSystemDriverMismatch */
        qg_cuda_fail(
            cuda, QG_CUDA,
            "the NVIDIA driver is missing or older than CUDA %d needs (version >= 580): install a newer one; %s: %s "
            "(%d)",
            CUDART_VERSION / 1000, what, text, (int)error);
        break;
    case cudaErrorNoDevice:
        qg_cuda_fail(
            cuda, QG_CUDA, "no GPU is seen by this process: look at nvidia-smi and CUDA_VISIBLE_DEVICES; %s: %s (%d)",
            what, text, (int)error);
        break;
    case cudaErrorNoKernelImageForDevice:
    case 98:  /* cudaErrorInvalidDeviceFunction */
    case 222: /* cudaErrorUnsupportedPtxVersion */
        fail_architecture(cuda);
        break;
    case cudaErrorMemoryAllocation:
        qg_cuda_fail(
            cuda, QG_OUT_OF_MEMORY, "%s: %s (%d): GPU %d has too little free memory", what, text, (int)error,
            cuda->device);
        break;
    default:
        qg_cuda_fail(cuda, QG_CUDA, "%s: %s (%d)", what, text, (int)error);
    }
    return 0;
}

/* The default stream never is. */
static int is_captured(qg_cuda *cuda) {
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    if (cuda->stream != NULL) {
        qg_cuda_good(cuda, cudaStreamIsCapturing(cuda->stream, &capture), "cudaStreamIsCapturing");
    }
    return capture != cudaStreamCaptureStatusNone;
}

int qg_cuda_may_wait(qg_cuda *cuda, const char *what) {
    if (is_captured(cuda)) {
        qg_cuda_fail(
            cuda, QG_UNSUPPORTED, "%s cannot be captured in a CUDA graph: call it outside of the capture", what);
    }
    return cuda->status == QG_SUCCESS;
}

qg_status qg_cuda_take(qg_cuda *cuda) {
    const qg_status status = cuda->status;
    cuda->status = QG_SUCCESS;
    return status;
}

/* ---------------------------------------------------------------- grids */

unsigned qg_cuda_grid(const qg_cuda *cuda, int64_t units, int64_t per_block) {
    const int64_t most = (int64_t)cuda->processors * BLOCKS_A_PROCESSOR;
    const int64_t blocks = units / per_block + (units % per_block != 0);
    return (unsigned)(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

/* ---------------------------------------------------------------- the thread's current device */

int qg_cuda_enter(qg_cuda *cuda, int *before) {
    return qg_cuda_good(cuda, cudaGetDevice(before), "cudaGetDevice") &&
           qg_cuda_good(cuda, cudaSetDevice(cuda->device), "cudaSetDevice");
}

void qg_cuda_leave(qg_cuda *cuda, int before) {
    if (before != cuda->device) {
        qg_cuda_good(cuda, cudaSetDevice(before), "cudaSetDevice");
    }
}
