/* cuda_runtime.h - stands in front of CUDA's own, so that g++ compiles the .cu files as they are and the CPU runs them.
 *
 * A call that is missing here is a compile error. threads.cpp runs the threads, emulator.h steers it, docs/emulator.md
 * says what it finds. Names and numbers are those of the CUDA runtime API.
 */
#ifndef QG_TESTS_EMULATOR_CUDA_RUNTIME_H
#define QG_TESTS_EMULATOR_CUDA_RUNTIME_H

#define QG_EMULATED 1

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define CUDART_VERSION 13000

/* ---------------------------------------------------------------- types */

#define EMULATOR_PAIR(type, name, size)                                      \
    typedef struct __attribute__((aligned(2 * size))) name {                 \
        type x, y;                                                           \
    } name;                                                                  \
    static inline __attribute__((unused)) name make_##name(type x, type y) { \
        name pair = {x, y};                                                  \
        return pair;                                                         \
    }
#define EMULATOR_FOUR(type, name, alignment)                                                 \
    typedef struct __attribute__((aligned(alignment))) name {                                \
        type x, y, z, w;                                                                     \
    } name;                                                                                  \
    static inline __attribute__((unused)) name make_##name(type x, type y, type z, type w) { \
        name four = {x, y, z, w};                                                            \
        return four;                                                                         \
    }
EMULATOR_PAIR(int, int2, 4)
EMULATOR_PAIR(unsigned, uint2, 4)
EMULATOR_PAIR(float, float2, 4)
EMULATOR_PAIR(double, double2, 8)
EMULATOR_FOUR(unsigned char, uchar4, 4)
EMULATOR_FOUR(int, int4, 16)
EMULATOR_FOUR(unsigned, uint4, 16)
EMULATOR_FOUR(float, float4, 16)
#undef EMULATOR_PAIR
#undef EMULATOR_FOUR

typedef struct uint3 {
    unsigned x, y, z;
} uint3;

typedef struct dim3 {
    unsigned x, y, z;
#ifdef __cplusplus
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
#endif
} dim3;

/* name, number, text of cudaGetErrorString */
#define EMULATOR_ERRORS(X)                                                                               \
    X(cudaSuccess, 0, "no error")                                                                        \
    X(cudaErrorInvalidValue, 1, "invalid argument")                                                      \
    X(cudaErrorMemoryAllocation, 2, "out of memory")                                                     \
    X(cudaErrorInitializationError, 3, "initialization error")                                           \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                                \
    X(cudaErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy")                          \
    X(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient for CUDA runtime version")   \
    X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                                      \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                             \
    X(cudaErrorNoKernelImageForDevice, 209, "no kernel image is available for execution on the device")  \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                                    \
    X(cudaErrorNotReady, 600, "device not ready")                                                        \
    X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")                          \
    X(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch")                     \
    X(cudaErrorMisalignedAddress, 716, "misaligned address")                                             \
    X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                         \
    X(cudaErrorNotSupported, 801, "operation not supported")                                             \
    X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing")        \
    X(cudaErrorStreamCaptureInvalidated, 901, "operation failed due to a previous error during capture") \
    X(cudaErrorUnknown, 999, "unknown error")
#define EMULATOR_ERROR(name, number, text) name = number,
typedef enum cudaError { EMULATOR_ERRORS(EMULATOR_ERROR) } cudaError_t;
#undef EMULATOR_ERROR

typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
typedef struct CUgraph_st *cudaGraph_t;
typedef struct CUgraphExec_st *cudaGraphExec_t;

#define cudaStreamLegacy ((cudaStream_t)0x1)
#define cudaStreamPerThread ((cudaStream_t)0x2)
#define cudaStreamDefault 0x00
#define cudaStreamNonBlocking 0x01
#define cudaEventDefault 0x00
#define cudaEventBlockingSync 0x01
#define cudaEventDisableTiming 0x02

enum cudaMemcpyKind {
    cudaMemcpyHostToHost = 0,
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3,
    cudaMemcpyDefault = 4
};
enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone = 0,
    cudaStreamCaptureStatusActive = 1,
    cudaStreamCaptureStatusInvalidated = 2
};
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal = 0,
    cudaStreamCaptureModeThreadLocal = 1,
    cudaStreamCaptureModeRelaxed = 2
};
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76
};
#ifndef __cplusplus
typedef enum cudaMemcpyKind cudaMemcpyKind;
typedef enum cudaStreamCaptureStatus cudaStreamCaptureStatus;
typedef enum cudaStreamCaptureMode cudaStreamCaptureMode;
typedef enum cudaDeviceAttr cudaDeviceAttr;
#endif

/* ---------------------------------------------------------------- runtime calls */

#ifdef __cplusplus
extern "C" {
#endif

cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize(void);

cudaError_t cudaGetLastError(void);
cudaError_t cudaPeekAtLastError(void);
const char *cudaGetErrorString(cudaError_t error);
const char *cudaGetErrorName(cudaError_t error);

cudaError_t cudaMalloc(void **memory, size_t size);
cudaError_t cudaFree(void *memory);
cudaError_t cudaMallocAsync(void **memory, size_t size, cudaStream_t stream);
cudaError_t cudaFreeAsync(void *memory, cudaStream_t stream);
cudaError_t cudaMallocHost(void **memory, size_t size);
cudaError_t cudaFreeHost(void *memory);
cudaError_t cudaMemcpy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(
    void *target,
    const void *source,
    size_t size,
    enum cudaMemcpyKind kind,
    cudaStream_t stream);
cudaError_t cudaMemset(void *target, int value, size_t size);
cudaError_t cudaMemsetAsync(void *target, int value, size_t size, cudaStream_t stream);

cudaError_t cudaStreamCreate(cudaStream_t *stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);

cudaError_t cudaEventCreate(cudaEvent_t *event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);

/* ---------------------------------------------------------------- what a kernel calls */

/* Called before each access of 16 (8, 4, ...) bytes at once: its address must be a multiple of its size and lie inside an
 * allocation. The bytes are counted for the kernel. csrc/cuda/device.cuh calls them where QG_EMULATED is defined. */
void emulator_note_load(const void *address, size_t size);
void emulator_note_store(void *address, size_t size);

void emulator_barrier(const char *file, int line);

/* All lanes of mask meet at file:line. Returns the value of lane `source`, or with source < 0 the ballot of value != 0. */
uint64_t emulator_exchange(unsigned mask, uint64_t value, int source, const char *file, int line);

/* Lane 0 .. 31 of the running thread. */
int emulator_lane(void);

#ifdef __cplusplus
}

/* ---------------------------------------------------------------- the language */

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
#define warpSize 32

#define __global__
#define __device__
#define __host__
#define __constant__
/* One block runs at a time, so one copy is enough. The section is poisoned before each block. */
#define __shared__ static __attribute__((section("qg_shared")))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define __syncthreads() emulator_barrier(__FILE__, __LINE__)
#define __syncwarp(...) emulator_meet(__FILE__, __LINE__, ##__VA_ARGS__)
#define __ballot_sync(mask, predicate) ((unsigned)emulator_exchange(mask, (predicate) != 0, -1, __FILE__, __LINE__))
#define __any_sync(mask, predicate) ((int)(__ballot_sync(mask, predicate) != 0))
#define __all_sync(mask, predicate) ((int)(__ballot_sync(mask, predicate) == (mask)))
#define __shfl_sync(...) emulator_shuffle(__FILE__, __LINE__, EMULATOR_INDEX, __VA_ARGS__)
#define __shfl_up_sync(...) emulator_shuffle(__FILE__, __LINE__, EMULATOR_UP, __VA_ARGS__)
#define __shfl_down_sync(...) emulator_shuffle(__FILE__, __LINE__, EMULATOR_DOWN, __VA_ARGS__)
#define __shfl_xor_sync(...) emulator_shuffle(__FILE__, __LINE__, EMULATOR_XOR, __VA_ARGS__)

static inline void emulator_meet(const char *file, int line, unsigned mask = 0xffffffffu) {
    emulator_exchange(mask, 0, -1, file, line);
}

enum emulator_direction { EMULATOR_INDEX, EMULATOR_UP, EMULATOR_DOWN, EMULATOR_XOR };

/* The lane a shuffle reads, as the PTX manual defines shfl.sync: one outside of the segment stands for the own lane. */
static inline int emulator_source(enum emulator_direction direction, int operand, int width) {
    const int lane = emulator_lane(), first = lane & -width, last = first + width - 1;
    const int source = direction == EMULATOR_INDEX  ? first + (operand & (width - 1))
                       : direction == EMULATOR_UP   ? lane - operand
                       : direction == EMULATOR_DOWN ? lane + operand
                                                    : lane ^ operand;
    const int outside = direction == EMULATOR_UP ? source < first : source > last;
    return outside ? lane : source;
}

#define EMULATOR_SHUFFLE(type)                                                                                 \
    static inline type emulator_shuffle(                                                                       \
        const char *file, int line, enum emulator_direction direction, unsigned mask, type value, int operand, \
        int width = 32) {                                                                                      \
        uint64_t bits = 0;                                                                                     \
        memcpy(&bits, &value, sizeof value);                                                                   \
        bits = emulator_exchange(mask, bits, emulator_source(direction, operand, width), file, line);          \
        memcpy(&value, &bits, sizeof value);                                                                   \
        return value;                                                                                          \
    }
EMULATOR_SHUFFLE(int)
EMULATOR_SHUFFLE(unsigned)
EMULATOR_SHUFFLE(long)
EMULATOR_SHUFFLE(unsigned long)
EMULATOR_SHUFFLE(long long)
EMULATOR_SHUFFLE(unsigned long long)
EMULATOR_SHUFFLE(float)
EMULATOR_SHUFFLE(double)
#undef EMULATOR_SHUFFLE

/* Integers only: float sums in any order would not be reproducible. */
#define EMULATOR_ATOMIC(type, name, expression)          \
    static inline type name(type *address, type value) { \
        const type old = *address;                       \
        *address = expression;                           \
        return old;                                      \
    }
#define EMULATOR_ATOMICS(type)                                              \
    EMULATOR_ATOMIC(type, atomicMax, value > old ? value : old)             \
    EMULATOR_ATOMIC(type, atomicMin, value < old ? value : old)             \
    EMULATOR_ATOMIC(type, atomicOr, old | value)                            \
    EMULATOR_ATOMIC(type, atomicAnd, old &value)                            \
    EMULATOR_ATOMIC(type, atomicExch, value)                                \
    static inline type atomicCAS(type *address, type compare, type value) { \
        const type old = *address;                                          \
        *address = old == compare ? value : old;                            \
        return old;                                                         \
    }                                                                       \
    static inline type max(type a, type b) {                                \
        return a > b ? a : b;                                               \
    }                                                                       \
    static inline type min(type a, type b) {                                \
        return a < b ? a : b;                                               \
    }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(long long)
EMULATOR_ATOMICS(unsigned long long)
EMULATOR_ATOMIC(int, atomicAdd, (int)((unsigned)old + (unsigned)value))
EMULATOR_ATOMIC(unsigned, atomicAdd, old + value)
EMULATOR_ATOMIC(unsigned long long, atomicAdd, old + value)
#undef EMULATOR_ATOMICS
#undef EMULATOR_ATOMIC

static inline long min(long a, long b) {
    return a < b ? a : b;
}
static inline long max(long a, long b) {
    return a > b ? a : b;
}
static inline unsigned long min(unsigned long a, unsigned long b) {
    return a < b ? a : b;
}
static inline unsigned long max(unsigned long a, unsigned long b) {
    return a > b ? a : b;
}

template <class T> static inline T __ldg(const T *address) {
    return *address;
}
static inline void __threadfence(void) {}
static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
static inline int __ffs(int x) {
    return __builtin_ffs(x);
}
static inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz((unsigned)x);
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)(((uint64_t)a * b) >> 32);
}

/* ---------------------------------------------------------------- launches */

typedef struct emulator_launch {
    const char *kernel;
    void (*call)(void (*function)(void), const void *argument);
    void (*function)(void);
    const void *argument;
    size_t argument_size;
    dim3 grid, block;
    size_t shared;
} emulator_launch;

extern "C" cudaError_t emulator_run(const emulator_launch *launch, cudaStream_t stream);

template <class A> static void emulator_call(void (*function)(void), const void *argument) {
    ((void (*)(A))function)(*(const A *)argument);
}

template <class A>
static cudaError_t emulator_launch_kernel(
    const char *name,
    void (*kernel)(A),
    dim3 grid,
    dim3 block,
    void **arguments,
    size_t shared,
    cudaStream_t stream) {
    static_assert(sizeof(A) <= 4096, "the argument of a kernel is at most 4096 bytes");
    const emulator_launch launch = {
        name, emulator_call<A>, (void (*)(void))kernel, arguments[0], sizeof(A), grid, block, shared};
    return emulator_run(&launch, stream);
}

/* A macro, for the name of the kernel. */
#define cudaLaunchKernel(kernel, ...) emulator_launch_kernel(#kernel, kernel, __VA_ARGS__)

template <class T> static inline cudaError_t cudaMalloc(T **memory, size_t size) {
    return cudaMalloc((void **)memory, size);
}

#endif
#endif
