/* libraries.c - finding cuBLAS and cuSOLVER: the copy that the process has, which is torch's, else by name. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "cuda/libraries.h"

/* ---------------------------------------------------------------- opening */

typedef struct library {
    const char *title;
    const char *variable; /* of the environment: a path, which wins */
    const char *package;
    const char *names[2]; /* of CUDA 13, of CUDA 12 */
} library;

static const library CUBLAS = {"cuBLAS", "Q_GALORE_CUBLAS", "nvidia-cublas", {"libcublas.so.13", "libcublas.so.12"}};
static const library CUSOLVER = {
    "cuSOLVER", "Q_GALORE_CUSOLVER", "nvidia-cusolver", {"libcusolver.so.12", "libcusolver.so.11"}};

/* The copy that the process has, else the first that the loader finds; *reason is its words for the newer one. */
static void *open_named(const library *wanted, char *reason, size_t size) {
    void *handle = NULL;
    for (int i = 0; handle == NULL && i < 2; i++) {
        handle = dlopen(wanted->names[i], RTLD_NOW | RTLD_NOLOAD);
    }
    for (int i = 0; handle == NULL && i < 2; i++) {
        handle = dlopen(wanted->names[i], RTLD_NOW | RTLD_LOCAL);
        if (handle == NULL && i == 0) {
            snprintf(reason, size, "%s", dlerror());
        }
    }
    return handle;
}

static void *open_library(qg_cuda *cuda, const library *wanted) {
    const char *path = getenv(wanted->variable);
    if (path != NULL && path[0] != '\0') {
        void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (handle == NULL) {
            qg_cuda_fail(
                cuda, QG_UNSUPPORTED, "%s: %s cannot be opened: %s", wanted->variable, wanted->title, dlerror());
        }
        return handle;
    }
    char reason[256] = "";
    void *handle = open_named(wanted, reason, sizeof reason);
    if (handle == NULL) {
        qg_cuda_fail(
            cuda, QG_UNSUPPORTED, "%s was not found: pip install %s, or set %s to the path of %s; %s", wanted->title,
            wanted->package, wanted->variable, wanted->names[0], reason);
    }
    return handle;
}

/* POSIX lets the address of a function be kept as one of data; ISO C has no cast for it. */
static int find_function(qg_cuda *cuda, const library *from, void *handle, const char *name, void *place) {
    *(void **)place = dlsym(handle, name);
    if (*(void **)place == NULL) {
        qg_cuda_fail(
            cuda, QG_UNSUPPORTED, "%s has no %s: version 12 or newer of CUDA's libraries is needed", from->title, name);
        return 0;
    }
    return 1;
}

#define QG_FIND(type, name, arguments) &&find_function(cuda, from, handle, #name, &libraries->name)

static int find_cublas(qg_cuda *cuda, qg_libraries *libraries, void *handle) {
    const library *from = &CUBLAS;
    return 1 QG_CUBLAS_FUNCTIONS(QG_FIND);
}

static int find_cusolver(qg_cuda *cuda, qg_libraries *libraries, void *handle) {
    const library *from = &CUSOLVER;
    return 1 QG_CUSOLVER_FUNCTIONS(QG_FIND);
}

static qg_libraries *libraries_of(qg_cuda *cuda) {
    if (cuda->libraries == NULL && (cuda->libraries = calloc(1, sizeof(qg_libraries))) == NULL) {
        qg_cuda_fail(cuda, QG_OUT_OF_MEMORY, "the host has no memory left");
    }
    return cuda->libraries;
}

/* A handle is of the device that is current when it is made, and making one waits for the device. */
static int make_handle(qg_cuda *cuda, int (*create)(qg_cuda *cuda), const char *title) {
    char what[64];
    int before = 0;
    snprintf(what, sizeof what, "the first use of %s", title);
    if (!qg_cuda_may_wait(cuda, what) || !qg_cuda_enter(cuda, &before)) {
        return 0;
    }
    const int made = create(cuda);
    qg_cuda_leave(cuda, before);
    return made;
}

/* Sums stay float32 where the factors are bfloat16: cuBLAS may else add partial sums in the factors' format. */
static int create_blas(qg_cuda *cuda) {
    qg_libraries *l = cuda->libraries;
    if (!qg_blas_good(cuda, l->cublasCreate_v2(&l->blas), "cublasCreate")) {
        l->blas = NULL;
        return 0;
    }
    if (!qg_blas_good(cuda, l->cublasSetMathMode(l->blas, QG_BLAS_EXACT_REDUCTION), "cublasSetMathMode")) {
        l->cublasDestroy_v2(l->blas);
        l->blas = NULL;
        return 0;
    }
    return 1;
}

static int create_solver(qg_cuda *cuda) {
    qg_libraries *l = cuda->libraries;
    if (!qg_solver_good(cuda, l->cusolverDnCreate(&l->solver), "cusolverDnCreate")) {
        l->solver = NULL;
        return 0;
    }
    return 1;
}

static int open_blas(qg_cuda *cuda, qg_libraries *libraries) {
    void *handle = open_library(cuda, &CUBLAS);
    if (handle == NULL) {
        return 0;
    }
    if (!find_cublas(cuda, libraries, handle)) {
        dlclose(handle);
        return 0;
    }
    libraries->cublas = handle;
    return 1;
}

static int open_solver(qg_cuda *cuda, qg_libraries *libraries) {
    void *handle = open_library(cuda, &CUSOLVER);
    if (handle == NULL) {
        return 0;
    }
    if (!find_cusolver(cuda, libraries, handle)) {
        dlclose(handle);
        return 0;
    }
    libraries->cusolver = handle;
    return 1;
}

/* ---------------------------------------------------------------- handles */

/* cublasSetStream takes the workspace away again, so it comes first. */
static int place_blas(qg_cuda *cuda, qg_libraries *l) {
    l->blas_placed =
        qg_blas_good(cuda, l->cublasSetStream_v2(l->blas, cuda->stream), "cublasSetStream") &&
        qg_blas_good(
            cuda, l->cublasSetWorkspace_v2(l->blas, cuda->workspace, cuda->workspace_size), "cublasSetWorkspace");
    return l->blas_placed;
}

qg_libraries *qg_libraries_blas(qg_cuda *cuda) {
    qg_libraries *l = cuda->status == QG_SUCCESS ? libraries_of(cuda) : NULL;
    if (l == NULL || (l->cublas == NULL && !open_blas(cuda, l)) ||
        (l->blas == NULL && !make_handle(cuda, create_blas, CUBLAS.title)) ||
        (!l->blas_placed && !place_blas(cuda, l))) {
        return NULL;
    }
    return l;
}

static int place_solver(qg_cuda *cuda, qg_libraries *l) {
    l->solver_placed = qg_solver_good(cuda, l->cusolverDnSetStream(l->solver, cuda->stream), "cusolverDnSetStream");
    return l->solver_placed;
}

qg_libraries *qg_libraries_solver(qg_cuda *cuda) {
    qg_libraries *l = cuda->status == QG_SUCCESS ? libraries_of(cuda) : NULL;
    if (l == NULL || (l->cusolver == NULL && !open_solver(cuda, l)) ||
        (l->solver == NULL && !make_handle(cuda, create_solver, CUSOLVER.title)) ||
        (!l->solver_placed && !place_solver(cuda, l))) {
        return NULL;
    }
    return l;
}

void qg_libraries_restart(qg_cuda *cuda) {
    if (cuda->libraries != NULL) {
        cuda->libraries->blas_placed = 0;
        cuda->libraries->solver_placed = 0;
    }
}

void qg_libraries_close(qg_cuda *cuda) {
    qg_libraries *l = cuda->libraries;
    if (l == NULL) {
        return;
    }
    if (l->blas != NULL) {
        l->cublasDestroy_v2(l->blas);
    }
    if (l->solver != NULL) {
        l->cusolverDnDestroy(l->solver);
    }
    if (l->cusolver != NULL) {
        dlclose(l->cusolver);
    }
    if (l->cublas != NULL) {
        dlclose(l->cublas);
    }
    free(l->host_work);
    free(l);
    cuda->libraries = NULL;
}

/* ---------------------------------------------------------------- failures */

int qg_blas_good(qg_cuda *cuda, unsigned status, const char *what) {
    if (status != 0) {
        qg_cuda_fail(
            cuda, status == QG_BLAS_ALLOC_FAILED ? QG_OUT_OF_MEMORY : QG_CUDA, "cuBLAS: %s failed: %s (%u)", what,
            cuda->libraries->cublasGetStatusString(status), status);
    }
    return status == 0;
}

/* cuSOLVER has no texts: the names of cusolver_common.h. */
static const char *solver_name(unsigned status) {
    static const char *const names[] = {
        "CUSOLVER_STATUS_SUCCESS",
        "CUSOLVER_STATUS_NOT_INITIALIZED",
        "CUSOLVER_STATUS_ALLOC_FAILED",
        "CUSOLVER_STATUS_INVALID_VALUE",
        "CUSOLVER_STATUS_ARCH_MISMATCH",
        "CUSOLVER_STATUS_MAPPING_ERROR",
        "CUSOLVER_STATUS_EXECUTION_FAILED",
        "CUSOLVER_STATUS_INTERNAL_ERROR",
        "CUSOLVER_STATUS_MATRIX_TYPE_NOT_SUPPORTED",
        "CUSOLVER_STATUS_NOT_SUPPORTED",
    };
    return status < sizeof names / sizeof *names ? names[status] : "a status of cusolver_common.h";
}

int qg_solver_good(qg_cuda *cuda, unsigned status, const char *what) {
    if (status != 0) {
        qg_cuda_fail(
            cuda, status == QG_SOLVER_ALLOC_FAILED ? QG_OUT_OF_MEMORY : QG_CUDA, "cuSOLVER: %s failed: %s (%u)", what,
            solver_name(status), status);
    }
    return status == 0;
}
