/* gpu.h - what the tests of single CUDA kernels share: the emulated GPU's table, and its memory.
 *
 * Emulated memory is the host's, so results are compared where they lie. Each launch is run with threads and blocks in
 * three orders (emulator_check_races), and an access outside of an array ends the program. */
#ifndef QG_TESTS_GPU_H
#define QG_TESTS_GPU_H

#include "emulator/emulator.h"
#include "harness.h"

enum { GPU_POISON = 0xCB, GPU_MOST_ARRAYS = 1024 };

static void *gpu_arrays[GPU_MOST_ARRAYS];
static int gpu_array_count;

/* `size` bytes of poison, `offset` bytes behind a multiple of 256. */
static inline void *gpu_memory(size_t size, size_t offset) {
    void *memory = gpu_array_count < GPU_MOST_ARRAYS ? emulator_malloc(size, 256, offset) : NULL;
    if (memory == NULL) {
        CHECK(0, "no emulated memory of %zu bytes", size);
        exit(check_finish());
    }
    memset(memory, GPU_POISON, size);
    gpu_arrays[gpu_array_count++] = memory;
    return memory;
}

static inline void *gpu_copy(const void *source, size_t size, size_t offset) {
    void *memory = gpu_memory(size, offset);
    if (size > 0)
        memcpy(memory, source, size);
    return memory;
}

/* Give all of it back. */
static inline void gpu_release(void) {
    while (gpu_array_count > 0)
        emulator_free(gpu_arrays[--gpu_array_count]);
}

/* The table of the one GPU there is; until gpu_close. */
static qg_cuda *gpu_device;
static cudaStream_t gpu_stream;

static inline const qg_backend *gpu_open(void) {
    const qg_cuda_params params = {.struct_size = sizeof params};
    char message[256] = "";
    gpu_stream = emulator_stream();
    if (!CHECK(
            qg_cuda_open(&gpu_device, &params, message, sizeof message) == QG_SUCCESS &&
                qg_cuda_begin(gpu_device, gpu_stream, NULL, 0) == QG_SUCCESS,
            "no GPU: %s", message))
        exit(check_finish());
    emulator_check_races(1);
    return qg_cuda_backend(gpu_device);
}

/* Nothing has failed on the way; returns the program's exit status. */
static inline int gpu_close(void) {
    const char *sentence = NULL;
    const qg_backend *gpu = qg_cuda_backend(gpu_device);
    CHECK(gpu->failure(&sentence, gpu->queue) == QG_SUCCESS, "a call of the runtime failed: %s", sentence);
    qg_cuda_end(gpu_device);
    qg_cuda_close(gpu_device);
    emulator_stream_free(gpu_stream);
    return check_finish();
}

#endif
