/* standin.h - the stand-ins of cuBLAS and cuSOLVER in tests, and GPUs that tests open themselves. */
#ifndef QG_TESTS_STANDIN_H
#define QG_TESTS_STANDIN_H

#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>

#include "cuda/kernels.h"
#include "cuda/libraries.h"
#include "emulated.h"

enum { WORKSPACE = 4096 };

/* The path of a stand-in. */
static inline const char *standin_path(const char *name) {
    static char path[1024];
    const ssize_t length = readlink("/proc/self/exe", path, sizeof path - 100);
    path[length > 0 ? length : 0] = '\0';
    char *slash = strrchr(path, '/');
    sprintf(slash != NULL ? slash : path, "/standin/%s", name);
    return path;
}

/* What a test asks a stand-in, which is loaded once and stays. */
typedef struct standin {
    int64_t (*calls)(const char *name);
    void (*fail)(const char *name, unsigned status);
    void (*report)(const char *name, int info);
    int (*handles)(void);
} standin;

static inline standin standin_use(const char *variable, const char *name) {
    standin s = {0};
    setenv(variable, standin_path(name), 1);
    void *library = dlopen(standin_path(name), RTLD_NOW | RTLD_LOCAL);
    if (!CHECK(library != NULL, "%s", dlerror()))
        exit(check_finish());
    *(void **)&s.calls = dlsym(library, "standin_calls");
    *(void **)&s.fail = dlsym(library, "standin_fail");
    *(void **)&s.report = dlsym(library, "standin_report");
    *(void **)&s.handles = dlsym(library, "standin_handles");
    return s;
}

static inline standin standin_cublas(void) {
    return standin_use("Q_GALORE_CUBLAS", "libcublas.so.13");
}

static inline standin standin_cusolver(void) {
    return standin_use("Q_GALORE_CUSOLVER", "libcusolver.so.12");
}

/* Device memory until emulated_release, with a copy of `source` unless that is NULL. */
static inline void *device(const void *source, size_t size) {
    return source != NULL ? emulated_copy(source, size, 0) : emulated_poisoned(size, 0);
}

static inline qg_cuda *open_device(int number, int allow_tf32) {
    const qg_cuda_params params = {sizeof params, number, allow_tf32};
    char message[512] = "";
    qg_cuda *cuda = NULL;
    if (!CHECK(qg_cuda_open(&cuda, &params, message, sizeof message) == QG_SUCCESS, "open: %s", message))
        exit(check_finish());
    return cuda;
}

/* One stream and one workspace for a whole program. */
static inline void begin(qg_cuda *cuda) {
    static cudaStream_t stream;
    static void *workspace;
    if (stream == NULL) {
        stream = emulator_stream();
        workspace = emulator_malloc(WORKSPACE, 256, 0);
    }
    CHECK(qg_cuda_begin(cuda, stream, workspace, WORKSPACE) == QG_SUCCESS, "begin: %s", qg_cuda_error(cuda));
}

/* The failure that is kept must be this one. */
#define EXPECT_FAILURE(cuda, status, text) expect_failure((cuda), (status), (text), __FILE__, __LINE__)
static inline void expect_failure(qg_cuda *cuda, qg_status want, const char *text, const char *file, int line) {
    const char *sentence = NULL;
    const qg_backend *backend = qg_cuda_backend(cuda);
    const qg_status status = backend->failure(&sentence, backend->queue);
    check_that(
        status == want && strstr(sentence, text) != NULL, file, line, "status %d, \"%s\", want %d, \"%s\"", (int)status,
        sentence, (int)want, text);
}

#endif
