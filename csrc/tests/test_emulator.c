/* The emulator: each kind of fault is planted and has to be found, and the same kernel without it has to pass. */
#include "emulator/emulator.h"
#include "emulator/faults.h"
#include "harness.h"

#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

static cudaStream_t stream;

enum { MOST = 2048 };

/* Device memory with values 1, 2, ... and a result. */
static fault_case make_case(int64_t count, int threads, int blocks) {
    fault_case c = {.count = count, .threads = threads, .blocks = blocks};
    c.out = emulator_malloc((size_t)count * 4, 16, 0);
    int *in = emulator_malloc((size_t)count * 4, 16, 0);
    for (int64_t i = 0; i < count; i++)
        in[i] = (int)i + 1;
    for (int64_t i = 0; i < count; i++)
        c.out[i] = 0;
    c.in = in;
    return c;
}

static void free_case(fault_case *c) {
    emulator_free(c->out);
    emulator_free((void *)(uintptr_t)c->in);
}

/* The right twin passes in every order; the wrong one gives a sentence that holds `expected`. */
static void expect(fault_launch *run, const char *name, fault_case c, const char *expected) {
    for (int order = EMULATOR_ASCENDING; order <= EMULATOR_SHUFFLED; order++) {
        emulator_set_order(order, 7);
        const cudaError_t error = run(&c, stream);
        const char *fault = emulator_take_fault();
        CHECK(error == cudaSuccess && fault == NULL, "%s: %s", name, fault);
    }
    c.wrong = 1;
    for (int order = EMULATOR_ASCENDING; order <= EMULATOR_SHUFFLED; order++) {
        emulator_set_order(order, 7);
        const cudaError_t error = run(&c, stream);
        const char *fault = emulator_take_fault();
        CHECK(
            error == cudaErrorLaunchFailure && fault != NULL && strstr(fault, expected) != NULL &&
                strncmp(fault, name, strlen(name)) == 0,
            "%s: \"%s\" without \"%s\"", name, fault != NULL ? fault : "no fault", expected);
    }
    emulator_set_order(EMULATOR_ASCENDING, 0);
    free_case(&c);
}
#define EXPECT(name, count, threads, blocks, expected) \
    expect(name, #name "_kernel, block (", make_case(count, threads, blocks), expected)

static void test_meeting_places(void) {
    EXPECT(fault_barrier_in_branch, 64, 64, 1, "waits at the barrier of emulator/faults.cu");
    EXPECT(fault_barrier_after_end, 64, 64, 1, "but thread (3, 0, 0) has ended");
    EXPECT(fault_barrier_rounds, 64, 64, 1, "but thread (3, 0, 0) has ended");
    EXPECT(fault_shuffle_after_end, 64, 32, 2, "the mask 0xffffffff");
    EXPECT(fault_shuffle_in_branch, 64, 64, 1, "waits at the barrier of");
    EXPECT(fault_shuffle_mask, 64, 32, 2, "is not in its own mask 0x0000ffff");
    EXPECT(fault_shuffle_source, 64, 64, 1, "lane 15 reads lane 16, which is not in the mask 0x0000ffff");
    EXPECT(fault_shuffle_two_masks, 64, 64, 1, "lane");
    fault_case half = make_case(64, 40, 1);
    CHECK(fault_shuffle_after_end(&half, stream) != cudaSuccess, "a mask names lanes beyond the block");
    const char *fault = emulator_take_fault();
    CHECK(fault != NULL && strstr(fault, "which the block does not have") != NULL, "lanes beyond the block: %s", fault);
    free_case(&half);
}

static void test_bounds(void) {
    /* The sizes end at a page, and not. */
    static const int64_t counts[] = {4, 64, 1024, 1028};
    for (int i = 0; i < 4; i++) {
        EXPECT(fault_global_read, counts[i], 32, 1, "0 bytes behind the end of the allocation");
        EXPECT(fault_global_write, counts[i], 32, 1, "0 bytes behind the end of the allocation");
    }
    EXPECT(fault_vector_read, 66, 32, 1, "reads 16 bytes at byte 256 of the allocation of 264 bytes");
    EXPECT(fault_misaligned, 8, 1, 1, "misaligned: reads 16 bytes at once");
#ifndef __SANITIZE_ADDRESS__ /* the sanitizers end the program at these */
    EXPECT(fault_null, 4, 1, 1, "address (nil), which is not device memory");
    EXPECT(fault_shared_index, 32, 32, 1, "an index is outside of its array");
    EXPECT(fault_stack, 4, 1, 1, "the stack of the thread is full");
#endif
}

/* Run a case in a child that ends at the fault; whether it wrote `expected` to stderr and failed. */
static int child_fails(fault_launch *run, const fault_case *c, const char *expected) {
    int ends[2], status = 0;
    char text[8192];
    size_t used = 0;
    fflush(stdout);
    if (pipe(ends) != 0)
        return 0;
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        emulator_catch_faults(0);
        run(c, stream);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t got; used < sizeof text - 1 && (got = read(ends[0], text + used, sizeof text - 1 - used)) > 0;)
        used += (size_t)got;
    close(ends[0]);
    waitpid(child, &status, 0);
    text[used] = 0;
    return !(WIFEXITED(status) && WEXITSTATUS(status) == 0) && strstr(text, expected) != NULL;
}

/* What AddressSanitizer sees itself. */
static void test_shared_bounds(void) {
    fault_case c = make_case(32, 32, 1);
    CHECK(fault_shared_pointer(&c, stream) == cudaSuccess, "shared memory inside its bounds");
#ifdef __SANITIZE_ADDRESS__
    c.wrong = 1;
    CHECK(
        child_fails(fault_shared_pointer, &c, "AddressSanitizer: global-buffer-overflow"),
        "a pointer past an array of shared memory");
#endif
    free_case(&c);
}

/* A write between the end of the data and the unreadable page is found when the kernel ends, and when memory is freed. */
static void test_guard_bytes(void) {
#ifndef __SANITIZE_ADDRESS__
    fault_case c = make_case(64, 32, 1);
    emulator_free(c.out);
    c.out = emulator_malloc(63 * 4, 256, 0);
    c.count = 63;
    CHECK(fault_global_write(&c, stream) == cudaSuccess, "63 of 63 elements");
    c.wrong = 1;
    CHECK(fault_global_write(&c, stream) == cudaErrorLaunchFailure, "64 of 63 elements");
    const char *fault = emulator_take_fault();
    CHECK(fault != NULL && strstr(fault, "a guard byte was overwritten") != NULL, "guard bytes: %s", fault);
    free_case(&c);

    unsigned char *bytes = emulator_malloc(5, 16, 3);
    CHECK((uintptr_t)bytes % 16 == 3, "3 bytes off");
    bytes[-1] = 0;
    emulator_free(bytes);
    CHECK(emulator_take_fault() != NULL, "a byte before the data");
#endif
    emulator_place_at_start(1);
    volatile int *first = emulator_malloc(20, 16, 0);
    emulator_place_at_start(0);
    CHECK((uintptr_t)first % 4096 == 0, "at the start of a page");
    CHECK(first[0] == -1 && first[4] == -1, "new memory is poisoned");
    fault_case before = make_case(4, 1, 1);
    int *const out = before.out;
    before.out = (int *)(uintptr_t)first - 1;
    CHECK(fault_global_write(&before, stream) == cudaErrorLaunchFailure, "a write before the start");
    const char *sentence = emulator_take_fault();
    CHECK(sentence != NULL && strstr(sentence, "4 bytes before the allocation of 20 bytes") != NULL, "%s", sentence);
    emulator_free((void *)(uintptr_t)first);
    before.out = (int *)(uintptr_t)first;
    CHECK(fault_global_write(&before, stream) == cudaErrorLaunchFailure, "a write to freed memory");
    CHECK(emulator_take_fault() != NULL, "freed memory");
    before.out = out;
    free_case(&before);
    emulator_free(&before);
    CHECK(emulator_take_fault() != NULL, "memory that was not allocated is freed");
}

/* A pointer of the host, unless it is registered. */
static void test_host_memory(void) {
    static int own[8] __attribute__((aligned(16)));
    fault_case c = make_case(8, 2, 1);
    int *const out = c.out;
    c.out = own;
    CHECK(fault_vector_read(&c, stream) == cudaSuccess, "memory of the caller");
    emulator_only_device(1);
    CHECK(fault_vector_read(&c, stream) == cudaErrorLaunchFailure, "a pointer of the host");
    const char *fault = emulator_take_fault();
    CHECK(fault != NULL && strstr(fault, "which is not device memory") != NULL, "a pointer of the host: %s", fault);
    emulator_register(own, sizeof own);
    CHECK(fault_vector_read(&c, stream) == cudaSuccess, "a registered pointer");
    emulator_unregister(own);
    emulator_only_device(0);
    c.out = out;
    free_case(&c);
}

static void race(fault_launch *run, const char *name, fault_case c, const char *expected) {
    emulator_check_races(1);
    cudaError_t error = run(&c, stream);
    const char *fault = emulator_take_fault();
    CHECK(error == cudaSuccess && fault == NULL, "%s: %s", name, fault);
    c.wrong = 1;
    error = run(&c, stream);
    fault = emulator_take_fault();
    CHECK(
        error == cudaErrorLaunchFailure && fault != NULL && strstr(fault, expected) != NULL, "%s: \"%s\"", name,
        fault != NULL ? fault : "no fault");
    emulator_check_races(0);
    free_case(&c);
}
#define RACE(name, count, threads, blocks, expected) race(name, #name, make_case(count, threads, blocks), expected)

static void test_races(void) {
    RACE(fault_shared_race, 64, 64, 1, "a race: ascending and descending threads leave different bits at byte");
    RACE(fault_global_race, 64, 64, 1, "of the allocation of 256 bytes");
    RACE(fault_block_race, 64, 32, 8, "a race: ");
    RACE(fault_shared_unwritten, 32, 32, 1, "a race: ");

    /* Memory of the caller counts when it is registered. */
    static int own[64];
    fault_case c = make_case(64, 64, 1);
    int *const out = c.out;
    c.out = own;
    c.wrong = 1;
    emulator_check_races(1);
    CHECK(fault_global_race(&c, stream) == cudaSuccess, "memory that is not registered is not compared");
    emulator_register(own, sizeof own);
    CHECK(fault_global_race(&c, stream) == cudaErrorLaunchFailure, "memory that is registered is compared");
    CHECK(emulator_take_fault() != NULL, "a race in memory of the caller");
    emulator_unregister(own);
    emulator_check_races(0);
    c.out = out;
    free_case(&c);
}

/* ---------------------------------------------------------------- results */

static void test_shuffles(void) {
    for (int order = EMULATOR_ASCENDING; order <= EMULATOR_SHUFFLED; order++) {
        fault_case c = make_case(352, 32, 1);
        emulator_set_order(order, 3);
        CHECK(right_shuffles(&c, stream) == cudaSuccess, "shuffles: %s", emulator_take_fault());
        for (int i = 0; i < 32; i++) {
            const int value = i + 1; /* in[lane] */
            const int want[11] = {6, i / 8 * 8 + 4, i < 2 ? value : value - 2, i % 16 > 12 ? value : value + 3,
                (i ^ 16) + 1, ((i ^ 1) + 1) / 2, 1, 32 - i, 0x24924924, 1, 1};
            for (int k = 0; k < 11; k++)
                CHECK(
                    c.out[32 * k + i] == want[k], "shuffle %d, lane %d: %d, not %d", k, i, c.out[32 * k + i], want[k]);
        }
        free_case(&c);
    }
    emulator_set_order(EMULATOR_ASCENDING, 0);
}

static void test_sums(void) {
    for (int order = EMULATOR_ASCENDING; order <= EMULATOR_SHUFFLED; order++) {
        emulator_set_order(order, 5);
        fault_case c = make_case(64, 64, 1);
        CHECK(right_halves(&c, stream) == cudaSuccess, "teams: %s", emulator_take_fault());
        for (int i = 0; i < 64; i++)
            CHECK(c.out[i] == 136 + 256 * (i / 16), "team of thread %d: %d", i, c.out[i]);
        free_case(&c);

        c = make_case(MOST, 256, 3);
        CHECK(right_sum(&c, stream) == cudaSuccess, "sums: %s", emulator_take_fault());
        CHECK(c.out[0] + c.out[1] + c.out[2] == MOST * (MOST + 1) / 2, "the sums of three blocks");
        free_case(&c);

        c = make_case(100, 32, 2);
        c.out[4] = -1;
        c.out[2] = 5;
        CHECK(right_atomics(&c, stream) == cudaSuccess, "atomics: %s", emulator_take_fault());
        static const int want[7] = {5050, 100, 1, 0xffff, (int)0xffff0000u, 42, 43};
        CHECK_BYTES(c.out, want, sizeof want, "atomics, order %d", order);
        free_case(&c);

        c = make_case(3 * 4 * 5 * 4, 5, 3);
        CHECK(right_indices(&c, stream) == cudaSuccess, "indices: %s", emulator_take_fault());
        for (int i = 0; i < 240; i++)
            CHECK(c.out[i] == i, "index %d", i);
        free_case(&c);
    }
    emulator_set_order(EMULATOR_ASCENDING, 0);
}

static void test_counts(void) {
    fault_case c = make_case(64, 4, 1);
    emulator_reset_counts();
    for (int races = 0; races < 2; races++) {
        emulator_check_races(races);
        CHECK(fault_vector_read(&c, stream) == cudaSuccess, "a copy");
    }
    emulator_check_races(0);
    const emulator_counts counts = emulator_count("fault_vector_read_kernel");
    CHECK(counts.launches == 2 && counts.threads == 4 && counts.blocks == 1, "launches");
    CHECK(counts.loaded == 512 && counts.stored == 512, "bytes: %lld", (long long)counts.loaded);
    CHECK(emulator_bytes(NULL) == 1024 && emulator_bytes("another") == 0, "bytes of all kernels");
    free_case(&c);
}

/* ---------------------------------------------------------------- runtime */

static void expect_fault(cudaError_t error, cudaError_t wanted, const char *expected) {
    const char *fault = emulator_take_fault();
    CHECK(error == wanted, "%s: %s", expected, cudaGetErrorName(error));
    CHECK(fault != NULL && strstr(fault, expected) != NULL, "\"%s\" without \"%s\"", fault ? fault : "-", expected);
}

static void test_default_stream(void) {
    const cudaStream_t defaults[] = {NULL, cudaStreamLegacy, cudaStreamPerThread};
    fault_case c = make_case(4, 1, 1);
    for (int i = 0; i < 3; i++) {
        const cudaError_t bad = cudaErrorInvalidResourceHandle;
        expect_fault(right_indices(&c, defaults[i]), bad, "cudaLaunchKernel uses the default stream");
        expect_fault(cudaMemsetAsync(c.out, 0, 4, defaults[i]), bad, "cudaMemsetAsync uses the default stream");
        expect_fault(
            cudaMemcpyAsync(c.out, c.in, 4, cudaMemcpyDeviceToDevice, defaults[i]), bad,
            "cudaMemcpyAsync uses the default stream");
        expect_fault(cudaStreamSynchronize(defaults[i]), bad, "cudaStreamSynchronize uses the default stream");
    }
    CHECK(c.out[0] == 0, "nothing has run");
    expect_fault(cudaMemcpy(c.out, c.in, 4, cudaMemcpyDeviceToDevice), cudaErrorNotSupported, "cudaMemcpyAsync");
    expect_fault(cudaMemset(c.out, 0, 4), cudaErrorNotSupported, "cudaMemsetAsync");
    expect_fault(cudaDeviceSynchronize(), cudaErrorNotSupported, "every stream");
    cudaStream_t gone = emulator_stream();
    CHECK(cudaStreamDestroy(gone) == cudaSuccess, "destroy");
    expect_fault(right_indices(&c, gone), cudaErrorInvalidResourceHandle, "a stream that does not exist");
    free_case(&c);
    cudaGetLastError();
}

static void test_copies(void) {
    fault_case c = make_case(4, 1, 1);
    int host[5] = {9, 8, 7, 6, 5};
    CHECK(cudaMemcpyAsync(c.out, host, 16, cudaMemcpyHostToDevice, stream) == cudaSuccess, "to the device");
    CHECK(c.out[3] == 6, "copied");
    CHECK(cudaMemcpyAsync(host, c.in, 16, cudaMemcpyDeviceToHost, stream) == cudaSuccess, "to the host");
    CHECK(host[0] == -1 && host[3] == -1 && host[4] == 5, "nobody has waited");
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess, "wait");
    CHECK(host[0] == 1 && host[3] == 4 && host[4] == 5, "copied back");
    CHECK(cudaMemcpyAsync(host, c.in, 16, cudaMemcpyDeviceToHost, stream) == cudaSuccess, "to the host");
    emulator_fail("cudaStreamSynchronize", 0, cudaErrorLaunchFailure);
    CHECK(cudaStreamSynchronize(stream) == cudaErrorLaunchFailure, "wait in vain");
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess && host[0] == -1, "never copied back");
    CHECK(cudaMemsetAsync(c.out, 1, 16, stream) == cudaSuccess && c.out[3] == 0x01010101, "filled");
    cudaEvent_t event;
    CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess, "an event");
    CHECK(cudaMemcpyAsync(host, c.in, 16, cudaMemcpyDeviceToHost, stream) == cudaSuccess, "to the host");
    CHECK(cudaEventRecord(event, stream) == cudaSuccess && host[0] == -1, "record");
    CHECK(cudaEventSynchronize(event) == cudaSuccess && host[0] == 1, "wait for the event");
    CHECK(cudaEventDestroy(event) == cudaSuccess, "destroy");
    expect_fault(
        cudaMemcpyAsync(c.out, host, 20, cudaMemcpyHostToDevice, stream), cudaErrorInvalidValue, "cudaMemcpyAsync to");
    expect_fault(
        cudaMemcpyAsync(host, c.in, 20, cudaMemcpyDeviceToHost, stream), cudaErrorInvalidValue, "cudaMemcpyAsync from");
    expect_fault(cudaMemsetAsync(c.out, 1, 17, stream), cudaErrorInvalidValue, "cudaMemsetAsync of 17 bytes");
    expect_fault(
        cudaMemcpyAsync(c.out, c.in, 4, cudaMemcpyHostToDevice, stream), cudaErrorNotSupported, "given device memory");
    free_case(&c);
    cudaGetLastError();
}

/* During a capture work is kept, not done, and what waits or allocates is refused. */
static void test_capture(void) {
    fault_case c = make_case(16, 1, 1);
    enum cudaStreamCaptureStatus status;
    cudaStream_t other = emulator_stream();
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    void *memory = NULL;
    int host = 3, *pinned = NULL;
    const cudaError_t refused = cudaErrorStreamCaptureUnsupported;
    CHECK(cudaMallocHost((void **)&pinned, sizeof *pinned) == cudaSuccess, "pinned memory");
    *pinned = 77;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "begin");
    CHECK(cudaStreamIsCapturing(stream, &status) == cudaSuccess && status == cudaStreamCaptureStatusActive, "active");
    CHECK(cudaStreamIsCapturing(other, &status) == cudaSuccess && status == cudaStreamCaptureStatusNone, "not active");
    expect_fault(cudaStreamSynchronize(stream), refused, "cudaStreamSynchronize is called while");
    expect_fault(cudaStreamSynchronize(other), refused, "cudaStreamSynchronize is called while");
    expect_fault(cudaMalloc(&memory, 8), refused, "cudaMalloc is called while");
    expect_fault(cudaMallocAsync(&memory, 8, stream), refused, "cudaMalloc is called while");
    expect_fault(cudaFree(c.out), refused, "cudaFree is called while");
    expect_fault(cudaEventQuery(NULL), refused, "cudaEventQuery is called while");
    expect_fault(cudaMemcpyAsync(c.out, &host, 4, cudaMemcpyHostToDevice, stream), refused, "not pinned");
    CHECK(right_indices(&(fault_case){.out = c.out, .threads = 1, .blocks = 1}, stream) == cudaSuccess, "a launch");
    CHECK(cudaMemcpyAsync(c.out, pinned, 4, cudaMemcpyHostToDevice, stream) == cudaSuccess, "pinned copy");
    CHECK(c.out[0] == 0 && c.out[3] == 0, "nothing is done during a capture");
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess, "end");
    CHECK(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess, "instantiate");
    CHECK(cudaGraphDestroy(graph) == cudaSuccess, "destroy");
    for (int i = 0; i < 2; i++) {
        *pinned += i;
        CHECK(cudaGraphLaunch(executable, stream) == cudaSuccess, "replay");
        CHECK(c.out[0] == 77 + i, "replay %d: %d", i, c.out[0]);
    }
    CHECK(cudaGraphExecDestroy(executable) == cudaSuccess, "destroy");
    CHECK(cudaFreeHost(pinned) == cudaSuccess, "free pinned memory");
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess, "after the capture");
    emulator_stream_free(other);
    free_case(&c);
    cudaGetLastError();
}

static void test_errors(void) {
    fault_case c = make_case(4, 1, 1);
    void *memory = NULL;
    emulator_fail("cudaLaunchKernel", 1, cudaErrorLaunchOutOfResources);
    CHECK(fault_null(&c, stream) == cudaSuccess, "skipped");
    CHECK(fault_null(&c, stream) == cudaErrorLaunchOutOfResources, "a planted error");
    CHECK(fault_null(&c, stream) == cudaSuccess, "once");
    CHECK(cudaPeekAtLastError() == cudaErrorLaunchOutOfResources, "peek");
    CHECK(cudaGetLastError() == cudaErrorLaunchOutOfResources && cudaGetLastError() == cudaSuccess, "the last error");
    emulator_fail("cudaMalloc", 0, cudaErrorMemoryAllocation);
    CHECK(cudaMalloc(&memory, 4) == cudaErrorMemoryAllocation, "no memory");
    CHECK(cudaMalloc(&memory, 4) == cudaSuccess && (uintptr_t)memory % 256 == 0, "memory");
    CHECK(cudaFree(memory) == cudaSuccess, "free");
    CHECK(cudaMalloc(&memory, SIZE_MAX / 2) == cudaErrorMemoryAllocation, "too much memory");
    CHECK(strcmp(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory") == 0, "its text");
    CHECK(strcmp(cudaGetErrorName(cudaErrorMemoryAllocation), "cudaErrorMemoryAllocation") == 0, "its name");
    c.threads = 1025;
    CHECK(fault_null(&c, stream) == cudaErrorInvalidConfiguration, "too many threads");
    c.threads = 1;
    c.blocks = 0;
    CHECK(fault_null(&c, stream) == cudaErrorInvalidConfiguration, "no block");
    c.blocks = 1;
    int device = -1;
    CHECK(cudaSetDevice(1) == cudaSuccess && cudaGetDevice(&device) == cudaSuccess && device == 1, "device 1");
    CHECK(fault_null(&c, stream) == cudaErrorInvalidResourceHandle, "a stream of another device");
    CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice && cudaSetDevice(0) == cudaSuccess, "device 2");
    CHECK(emulator_take_fault() == NULL, "none of these is a fault");
    free_case(&c);
    cudaGetLastError();
}

/* Not caught, a fault ends the program. */
static void test_abort(void) {
    fault_case c = make_case(4, 1, 1);
    c.wrong = 1;
    CHECK(
        child_fails(fault_misaligned, &c, "emulator: fault_misaligned_kernel, block (0, 0, 0), thread (0, 0, 0): "),
        "a fault that is not caught");
    free_case(&c);
}

int main(void) {
    emulator_catch_faults(1);
    stream = emulator_stream();
    test_meeting_places();
    test_bounds();
    test_shared_bounds();
    test_guard_bytes();
    test_host_memory();
    test_races();
    test_shuffles();
    test_sums();
    test_counts();
    test_default_stream();
    test_copies();
    test_capture();
    test_errors();
    test_abort();
    return check_finish();
}
