/* emulator.h - what tests tell the emulator and ask it. Functions are exported from the emulated library too. */
#ifndef QG_TESTS_EMULATOR_EMULATOR_H
#define QG_TESTS_EMULATOR_EMULATOR_H

#include "cuda_runtime.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* The order in which blocks, and the threads of a block between two barriers, are run. */
enum { EMULATOR_ASCENDING, EMULATOR_DESCENDING, EMULATOR_SHUFFLED };
void emulator_set_order(int order, uint64_t seed);

/* Run each launch in all three orders from the same start, with different poison in shared memory, and compare the bits
 * of all device memory: they differ where threads race or read what nobody wrote. */
void emulator_check_races(int on);

/* A fault aborts the program with its sentence, or, when faults are caught, is kept until it is taken: the first of them;
 * NULL for none. The sentence lives until the next one is taken. */
void emulator_catch_faults(int on);
const char *emulator_take_fault(void);

/* Device memory `offset` bytes behind a multiple of `alignment` (a power of two up to a page), ending as near to an
 * unreadable page as that allows; with emulator_place_at_start, beginning as near to one. Freed by cudaFree.
 * cudaMalloc aligns to 256. All bytes are 0xFF at first. NULL when there is no memory. */
void *emulator_malloc(size_t size, size_t alignment, size_t offset);
void emulator_place_at_start(int on);
void emulator_free(void *memory);

/* Memory of the caller that stands for device memory: it is compared too when races are looked for. */
void emulator_register(void *memory, size_t size);
void emulator_unregister(void *memory);

/* An access that a kernel notes is a fault outside of device and registered memory: a pointer of the host. */
void emulator_only_device(int on);

/* A stream, for callers without the runtime's functions: cudaStreamCreateWithFlags, cudaStreamDestroy, and the captures. */
cudaStream_t emulator_stream(void);
void emulator_stream_free(cudaStream_t stream);

/* The (skip + 1)-th call of the runtime named `call` ("cudaLaunchKernel", "cudaMalloc", ...) from now on fails. */
void emulator_fail(const char *call, int skip, cudaError_t error);

/* What a kernel has done since emulator_reset_counts; NULL: all kernels together. */
typedef struct emulator_counts {
    int64_t launches;
    int64_t loaded; /* bytes noted by emulator_note_load */
    int64_t stored;
    int64_t threads; /* of the largest block */
    int64_t blocks;  /* of the largest grid */
} emulator_counts;
emulator_counts emulator_count(const char *kernel);
void emulator_reset_counts(void);

/* Bytes that kernels have loaded and stored. */
int64_t emulator_bytes(const char *kernel);

/* Calls of the runtime that make the host wait, since emulator_reset_counts. */
int64_t emulator_waits(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
