/* emulated.h - the emulated GPU in tests: its table, its memory, and the bits that the CPU's scalar kernels leave. */
#ifndef QG_TESTS_EMULATED_H
#define QG_TESTS_EMULATED_H

#include "cuda/cuda.h"
#include "emulator/emulator.h"
#include "harness.h"

/* One GPU for the program; every launch is run in three orders, and the results compared. */
static inline const qg_backend *emulated_table(void) {
    static qg_cuda *cuda = NULL;
    if (cuda == NULL) {
        char message[512] = "";
        const qg_cuda_params params = {.struct_size = sizeof params};
        const qg_status status = qg_cuda_open(&cuda, &params, message, sizeof message);
        if (!CHECK(status == QG_SUCCESS, "%s", message))
            exit(check_finish());
        void *workspace = emulator_malloc(QG_CUDA_LEAST_WORKSPACE, 256, 0);
        CHECK(
            qg_cuda_begin(cuda, emulator_stream(), workspace, QG_CUDA_LEAST_WORKSPACE) == QG_SUCCESS, "%s",
            qg_cuda_error(cuda));
        emulator_check_races(1);
        emulator_only_device(1);
    }
    return qg_cuda_backend(cuda);
}

static inline void emulated_check(const char *what) {
    const char *sentence = "";
    const qg_backend *table = emulated_table();
    CHECK(table->failure(&sentence, table->queue) == QG_SUCCESS, "%s: %s", what, sentence);
}

/* Device memory, `offset` bytes behind a multiple of 64; all of it is freed by emulated_release. */
typedef struct emulated_memory {
    void *memory[4096];
    int count;
} emulated_memory;

static inline emulated_memory *emulated_all(void) {
    static emulated_memory all;
    return &all;
}

static inline void *emulated_poisoned(size_t size, size_t offset) {
    emulated_memory *all = emulated_all();
    if (!CHECK(all->count < 4096, "a case takes too many arrays"))
        exit(check_finish());
    return all->memory[all->count++] = emulator_malloc(size, 64, offset);
}

static inline void *emulated_copy(const void *source, size_t size, size_t offset) {
    void *copy = emulated_poisoned(size, offset);
    if (size > 0)
        memcpy(copy, source, size);
    return copy;
}

static inline void emulated_release(void) {
    emulated_memory *all = emulated_all();
    while (all->count > 0)
        emulator_free(all->memory[--all->count]);
}

#endif
