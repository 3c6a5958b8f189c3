/* runtime.cpp - the calls of the CUDA runtime. Work is done at once, except while a stream is captured; a copy to the
 * host arrives when the host waits for its stream.
 *
 * A call that would be wrong in a step is a fault: the default stream, and during a capture everything that waits,
 * allocates, or copies from memory that is not pinned.
 */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>

enum { DEVICES = 2, PROCESSORS = 4, MOST_STREAMS = 256, MOST_PINNED = 256, MOST_LATE = 64 };

/* One captured launch, copy or fill. */
typedef struct operation {
    enum { LAUNCH, COPY, FILL } kind;
    emulator_launch launch;
    unsigned char argument[4096];
    void *target;
    const void *source;
    int value;
    size_t size;
    cudaStream_t to_host; /* the stream of a copy to the host, which comes when that stream is waited for */
} operation;

typedef struct CUgraph_st {
    operation *operations;
    size_t count, room;
} CUgraph_st;

typedef struct CUgraphExec_st {
    CUgraph_st operations;
} CUgraphExec_st;

typedef struct CUstream_st {
    int live;
    int device;
    int capturing;
    enum cudaStreamCaptureMode mode;
    CUgraph_st *graph;
} CUstream_st;

typedef struct CUevent_st {
    cudaStream_t stream; /* where it was recorded last */
} CUevent_st;

static CUstream_st streams[MOST_STREAMS]; /* not reused, so that a destroyed one is known */
static int stream_count;
static struct late_copy {
    cudaStream_t stream; /* NULL: free */
    void *target;
    void *bytes;
    size_t size;
} late_copies[MOST_LATE];
static int device_now;
static cudaError_t last_error;
static int64_t wait_count;
static struct {
    char *memory;
    size_t size;
} pinned[MOST_PINNED];

/* ---------------------------------------------------------------- errors */

static struct {
    char call[64]; /* empty: nothing is planted */
    int skip;
    cudaError_t error;
} planted;

void emulator_fail(const char *call, int skip, cudaError_t error) {
    snprintf(planted.call, sizeof planted.call, "%s", call);
    planted.skip = skip;
    planted.error = error;
}

static cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess)
        last_error = error;
    return error;
}

/* At the begin of every call: the error that a test has planted for it. */
static cudaError_t enter(const char *call) {
    if (strcmp(planted.call, call) != 0 || planted.skip-- > 0)
        return cudaSuccess;
    planted.call[0] = 0;
    return result(planted.error);
}

#define ENTER(call)                               \
    do {                                          \
        const cudaError_t planted_ = enter(call); \
        if (planted_ != cudaSuccess)              \
            return planted_;                      \
    } while (0)
#define TRY(expression)                          \
    do {                                         \
        const cudaError_t error_ = (expression); \
        if (error_ != cudaSuccess)               \
            return result(error_);               \
    } while (0)

cudaError_t cudaPeekAtLastError(void) {
    return last_error;
}

cudaError_t cudaGetLastError(void) {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char *cudaGetErrorString(cudaError_t error) {
#define TEXT(name, number, text) \
    case name:                   \
        return text;
    switch (error) { EMULATOR_ERRORS(TEXT) }
#undef TEXT
    return "unrecognized error code";
}

const char *cudaGetErrorName(cudaError_t error) {
#define NAME(name, number, text) \
    case name:                   \
        return #name;
    switch (error) { EMULATOR_ERRORS(NAME) }
#undef NAME
    return "unrecognized error code";
}

/* ---------------------------------------------------------------- what is refused */

static cudaError_t check_stream(const char *call, cudaStream_t stream) {
    if (stream == NULL || stream == cudaStreamLegacy || stream == cudaStreamPerThread) {
        emulator_fault("%s uses the default stream", call);
        return cudaErrorInvalidResourceHandle;
    }
    if (stream < streams || stream >= streams + stream_count || !stream->live) {
        emulator_fault("%s uses a stream that does not exist: %p", call, (void *)stream);
        return cudaErrorInvalidResourceHandle;
    }
    return cudaSuccess;
}

/* A call that no capture may see, whichever stream it is for. */
static cudaError_t check_no_capture(const char *call) {
    for (int i = 0; i < stream_count; i++) {
        if (!streams[i].capturing || streams[i].mode == cudaStreamCaptureModeRelaxed)
            continue;
        emulator_fault("%s is called while a stream is captured", call);
        return cudaErrorStreamCaptureUnsupported;
    }
    return cudaSuccess;
}

static cudaError_t refuse(const char *call, const char *why) {
    emulator_fault("%s %s", call, why);
    return cudaErrorNotSupported;
}

static cudaError_t wait_for_work(const char *call) {
    TRY(check_no_capture(call));
    wait_count++;
    return cudaSuccess;
}

int64_t emulator_waits(void) {
    return wait_count;
}

void emulator_reset_counts(void) {
    wait_count = 0;
    emulator_reset_kernels();
}

/* ---------------------------------------------------------------- devices */

cudaError_t cudaRuntimeGetVersion(int *version) {
    ENTER("cudaRuntimeGetVersion");
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    ENTER("cudaDriverGetVersion");
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
    ENTER("cudaGetDeviceCount");
    *count = DEVICES;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    ENTER("cudaGetDevice");
    *device = device_now;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    ENTER("cudaSetDevice");
    if (device < 0 || device >= DEVICES)
        return result(cudaErrorInvalidDevice);
    device_now = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    ENTER("cudaDeviceGetAttribute");
    if (device < 0 || device >= DEVICES)
        return result(cudaErrorInvalidDevice);
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
        *value = 1024;
        return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = 48 * 1024;
        return cudaSuccess;
    case cudaDevAttrWarpSize:
        *value = 32;
        return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
        *value = PROCESSORS;
        return cudaSuccess;
    case cudaDevAttrL2CacheSize:
        *value = 50 * 1024 * 1024;
        return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        *value = 2048;
        return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
        *value = 9;
        return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
        *value = 0;
        return cudaSuccess;
    }
    return result(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceSynchronize(void) {
    ENTER("cudaDeviceSynchronize");
    return result(refuse("cudaDeviceSynchronize", "waits for every stream"));
}

/* ---------------------------------------------------------------- memory */

cudaError_t cudaMalloc(void **memory, size_t size) {
    ENTER("cudaMalloc");
    TRY(check_no_capture("cudaMalloc"));
    *memory = size == 0 ? NULL : emulator_malloc(size, 256, 0);
    return *memory == NULL && size > 0 ? result(cudaErrorMemoryAllocation) : cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    ENTER("cudaFree");
    TRY(check_no_capture("cudaFree"));
    emulator_free(memory);
    return cudaSuccess;
}

cudaError_t cudaMallocAsync(void **memory, size_t size, cudaStream_t stream) {
    ENTER("cudaMallocAsync");
    TRY(check_stream("cudaMallocAsync", stream));
    return cudaMalloc(memory, size);
}

cudaError_t cudaFreeAsync(void *memory, cudaStream_t stream) {
    ENTER("cudaFreeAsync");
    TRY(check_stream("cudaFreeAsync", stream));
    return cudaFree(memory);
}

cudaError_t cudaMallocHost(void **memory, size_t size) {
    ENTER("cudaMallocHost");
    TRY(check_no_capture("cudaMallocHost"));
    for (int i = 0; i < MOST_PINNED; i++) {
        if (pinned[i].memory != NULL)
            continue;
        *memory = pinned[i].memory = (char *)malloc(size);
        pinned[i].size = size;
        return cudaSuccess;
    }
    return result(cudaErrorMemoryAllocation);
}

cudaError_t cudaFreeHost(void *memory) {
    ENTER("cudaFreeHost");
    TRY(check_no_capture("cudaFreeHost"));
    for (int i = 0; i < MOST_PINNED; i++) {
        if (memory == NULL || pinned[i].memory != memory)
            continue;
        free(memory);
        pinned[i].memory = NULL;
        return cudaSuccess;
    }
    return memory == NULL ? cudaSuccess : result(cudaErrorInvalidValue);
}

static int is_pinned(const void *memory) {
    const char *at = (const char *)memory;
    for (int i = 0; i < MOST_PINNED; i++)
        if (pinned[i].memory != NULL && at >= pinned[i].memory && at < pinned[i].memory + pinned[i].size)
            return 1;
    return 0;
}

static cudaError_t check_range(const char *call, const void *memory, size_t size) {
    char text[256];
    if (!emulator_is_device(memory) || emulator_inside(memory, size))
        return cudaSuccess;
    emulator_fault("%s of %zu bytes at %s", call, size, emulator_describe(memory, text, sizeof text));
    return cudaErrorInvalidValue;
}

/* What the host would read before it has waited is 0xFF. */
static cudaError_t copy_late(const operation *o) {
    for (int i = 0; i < MOST_LATE; i++) {
        struct late_copy *l = &late_copies[i];
        if (l->stream != NULL)
            continue;
        l->stream = o->to_host;
        l->target = o->target;
        l->size = o->size;
        l->bytes = malloc(o->size + 1);
        memcpy(l->bytes, o->source, o->size);
        memset(o->target, 0xFF, o->size);
        return cudaSuccess;
    }
    return refuse("cudaMemcpyAsync", "to the host is called many times before anybody waits");
}

/* The copies of this stream reach the host, or, after an error, never do: their memory may be gone. */
static void end_late_copies(cudaStream_t stream, int reach) {
    for (int i = 0; i < MOST_LATE; i++) {
        struct late_copy *l = &late_copies[i];
        if (stream == NULL || l->stream != stream)
            continue;
        if (reach)
            memcpy(l->target, l->bytes, l->size);
        free(l->bytes);
        l->stream = NULL;
    }
}

/* Do it now. */
static cudaError_t perform(const operation *o) {
    switch (o->kind) {
    case operation::LAUNCH:
        return result(emulator_execute(&o->launch));
    case operation::COPY:
        if (o->to_host != NULL && o->size > 0)
            return result(copy_late(o));
        memcpy(o->target, o->source, o->size);
        return cudaSuccess;
    case operation::FILL:
        memset(o->target, o->value, o->size);
        return cudaSuccess;
    }
    return cudaErrorUnknown;
}

/* Do it now, or keep it for the graph of a captured stream. */
static cudaError_t submit(operation *o, cudaStream_t stream) {
    if (!stream->capturing)
        return perform(o);
    CUgraph_st *g = stream->graph;
    if (g->count == g->room) {
        g->room = g->room * 2 + 16;
        g->operations = (operation *)realloc((void *)g->operations, g->room * sizeof *g->operations);
    }
    g->operations[g->count++] = *o;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *, const void *, size_t, enum cudaMemcpyKind) {
    ENTER("cudaMemcpy");
    return result(refuse("cudaMemcpy", "uses the default stream and waits: cudaMemcpyAsync"));
}

cudaError_t cudaMemset(void *, int, size_t) {
    ENTER("cudaMemset");
    return result(refuse("cudaMemset", "uses the default stream: cudaMemsetAsync"));
}

cudaError_t cudaMemcpyAsync(
    void *target,
    const void *source,
    size_t size,
    enum cudaMemcpyKind kind,
    cudaStream_t stream) {
    ENTER("cudaMemcpyAsync");
    TRY(check_stream("cudaMemcpyAsync", stream));
    TRY(check_range("cudaMemcpyAsync to", target, size));
    TRY(check_range("cudaMemcpyAsync from", source, size));
    if ((kind == cudaMemcpyHostToDevice || kind == cudaMemcpyHostToHost) && emulator_is_device(source))
        return result(refuse("cudaMemcpyAsync", "from the host is given device memory"));
    if ((kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyHostToHost) && emulator_is_device(target))
        return result(refuse("cudaMemcpyAsync", "to the host is given device memory"));
    const void *const host = kind == cudaMemcpyHostToDevice ? source : kind == cudaMemcpyDeviceToHost ? target : NULL;
    if (host != NULL && !is_pinned(host)) {
        TRY(check_no_capture("cudaMemcpyAsync with memory that is not pinned"));
        wait_count++;
    }
    operation o = {};
    o.kind = operation::COPY;
    o.target = target;
    o.source = source;
    o.size = size;
    o.to_host = kind == cudaMemcpyDeviceToHost ? stream : NULL;
    return submit(&o, stream);
}

cudaError_t cudaMemsetAsync(void *target, int value, size_t size, cudaStream_t stream) {
    ENTER("cudaMemsetAsync");
    TRY(check_stream("cudaMemsetAsync", stream));
    TRY(check_range("cudaMemsetAsync", target, size));
    operation o = {};
    o.kind = operation::FILL;
    o.target = target;
    o.value = value;
    o.size = size;
    return submit(&o, stream);
}

/* ---------------------------------------------------------------- streams */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    ENTER("cudaStreamCreateWithFlags");
    if (stream_count == MOST_STREAMS)
        return result(cudaErrorMemoryAllocation);
    *stream = &streams[stream_count++];
    (*stream)->live = 1;
    (*stream)->device = device_now;
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    ENTER("cudaStreamDestroy");
    TRY(check_stream("cudaStreamDestroy", stream));
    TRY(check_no_capture("cudaStreamDestroy"));
    end_late_copies(stream, 0);
    stream->live = 0;
    return cudaSuccess;
}

cudaStream_t emulator_stream(void) {
    cudaStream_t stream = NULL;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    return stream;
}

void emulator_stream_free(cudaStream_t stream) {
    cudaStreamDestroy(stream);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const cudaError_t error = enter("cudaStreamSynchronize");
    if (error != cudaSuccess) {
        end_late_copies(stream, 0);
        return error;
    }
    TRY(check_stream("cudaStreamSynchronize", stream));
    TRY(wait_for_work("cudaStreamSynchronize"));
    end_late_copies(stream, 1);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    ENTER("cudaStreamQuery");
    TRY(check_stream("cudaStreamQuery", stream));
    return result(check_no_capture("cudaStreamQuery"));
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t, unsigned) {
    ENTER("cudaStreamWaitEvent");
    return result(check_stream("cudaStreamWaitEvent", stream));
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    ENTER("cudaStreamIsCapturing");
    TRY(check_stream("cudaStreamIsCapturing", stream));
    *status = stream->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    ENTER("cudaStreamBeginCapture");
    TRY(check_stream("cudaStreamBeginCapture", stream));
    if (stream->capturing)
        return result(cudaErrorStreamCaptureUnsupported);
    stream->capturing = 1;
    stream->mode = mode;
    stream->graph = (CUgraph_st *)calloc(1, sizeof *stream->graph);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    ENTER("cudaStreamEndCapture");
    TRY(check_stream("cudaStreamEndCapture", stream));
    if (!stream->capturing)
        return result(cudaErrorInvalidValue);
    stream->capturing = 0;
    *graph = stream->graph;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long) {
    ENTER("cudaGraphInstantiate");
    *executable = (CUgraphExec_st *)calloc(1, sizeof **executable);
    CUgraph_st *copy = &(*executable)->operations;
    copy->count = graph->count;
    copy->operations = (operation *)calloc(graph->count + 1, sizeof *copy->operations);
    for (size_t i = 0; i < graph->count; i++)
        copy->operations[i] = graph->operations[i];
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    ENTER("cudaGraphLaunch");
    TRY(check_stream("cudaGraphLaunch", stream));
    for (size_t i = 0; i < executable->operations.count; i++) {
        operation *o = &executable->operations.operations[i];
        o->launch.argument = o->argument;
        o->to_host = o->to_host != NULL ? stream : NULL;
        TRY(perform(o));
    }
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    free((void *)executable->operations.operations);
    free(executable);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    free((void *)graph->operations);
    free(graph);
    return cudaSuccess;
}

/* ---------------------------------------------------------------- events: nothing is ever outstanding */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    ENTER("cudaEventCreateWithFlags");
    *event = (CUevent_st *)calloc(1, sizeof **event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    ENTER("cudaEventDestroy");
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ENTER("cudaEventRecord");
    TRY(check_stream("cudaEventRecord", stream));
    event->stream = stream;
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    ENTER("cudaEventSynchronize");
    TRY(wait_for_work("cudaEventSynchronize"));
    end_late_copies(event->stream, 1);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t) {
    ENTER("cudaEventQuery");
    return result(check_no_capture("cudaEventQuery"));
}

/* ---------------------------------------------------------------- launches */

static int good_shape(const emulator_launch *l) {
    const uint64_t threads = (uint64_t)l->block.x * l->block.y * l->block.z;
    return threads >= 1 && threads <= 1024 && l->block.z <= 64 && l->grid.x >= 1 && l->grid.x <= INT32_MAX &&
           l->grid.y >= 1 && l->grid.y <= 65535 && l->grid.z >= 1 && l->grid.z <= 65535;
}

cudaError_t emulator_run(const emulator_launch *wanted, cudaStream_t stream) {
    ENTER("cudaLaunchKernel");
    TRY(check_stream("cudaLaunchKernel", stream));
    if (stream->device != device_now)
        return result(cudaErrorInvalidResourceHandle);
    if (!good_shape(wanted))
        return result(cudaErrorInvalidConfiguration);
    if (wanted->shared != 0)
        return result(refuse("cudaLaunchKernel", "asks for dynamic shared memory, which this project does not use"));
    operation o = {};
    o.kind = operation::LAUNCH;
    o.launch = *wanted;
    memcpy(o.argument, wanted->argument, wanted->argument_size);
    if (!stream->capturing)
        o.launch.argument = o.argument;
    return submit(&o, stream);
}
