/* libraries.h - cuBLAS and cuSOLVER, opened at run time by name: the functions and numbers of them that are used.
 *
 * They are declared here so that no header of theirs is needed to build. Names, arguments and numbers are those of
 * cublas_api.h and cusolverDn.h of CUDA 13 (csrc/tests/standin/headers.c compares them); their enums are unsigned but
 * for cublasGemmAlgo_t. The same functions of CUDA 12 have the same ABI.
 */
#ifndef QG_CUDA_LIBRARIES_H
#define QG_CUDA_LIBRARIES_H

#include "cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct cublasContext *qg_blas;
typedef struct cusolverDnContext *qg_solver;

enum {
    QG_BLAS_OP_N = 0,
    QG_BLAS_OP_T = 1,
    QG_BLAS_UPPER = 1,
    QG_BLAS_NON_UNIT = 0,
    QG_BLAS_EXACT_REDUCTION = 16, /* CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION */
    QG_BLAS_COMPUTE_32F = 68,
    QG_BLAS_COMPUTE_32F_FAST_TF32 = 77,
    QG_BLAS_GEMM_DEFAULT = -1,
    QG_BLAS_ALLOC_FAILED = 3,
    QG_SOLVER_ALLOC_FAILED = 2,
    QG_TYPE_R_32F = 0, /* cudaDataType */
    QG_TYPE_R_16F = 2,
    QG_TYPE_R_16BF = 14
};

/* X(type, name, arguments) */
#define QG_CUBLAS_FUNCTIONS(X)                                                                                   \
    X(unsigned, cublasCreate_v2, (qg_blas * handle))                                                             \
    X(unsigned, cublasDestroy_v2, (qg_blas handle))                                                              \
    X(unsigned, cublasSetStream_v2, (qg_blas handle, cudaStream_t stream))                                       \
    X(unsigned, cublasSetWorkspace_v2, (qg_blas handle, void *workspace, size_t size))                           \
    X(unsigned, cublasSetMathMode, (qg_blas handle, unsigned mode))                                              \
    X(const char *, cublasGetStatusString, (unsigned status))                                                    \
    X(unsigned, cublasGemmEx_64,                                                                                 \
        (qg_blas handle, unsigned op_a, unsigned op_b, int64_t m, int64_t n, int64_t k, const void *alpha,       \
            const void *a, unsigned a_type, int64_t lda, const void *b, unsigned b_type, int64_t ldb,            \
            const void *beta, void *c, unsigned c_type, int64_t ldc, unsigned compute_type, int algo))           \
    X(unsigned, cublasSgeam_64,                                                                                  \
        (qg_blas handle, unsigned op_a, unsigned op_b, int64_t m, int64_t n, const float *alpha, const float *a, \
            int64_t lda, const float *beta, const float *b, int64_t ldb, float *c, int64_t ldc))

#define QG_CUSOLVER_FUNCTIONS(X)                                                                                       \
    X(unsigned, cusolverDnCreate, (qg_solver * handle))                                                                \
    X(unsigned, cusolverDnDestroy, (qg_solver handle))                                                                 \
    X(unsigned, cusolverDnSetStream, (qg_solver handle, cudaStream_t stream))                                          \
    X(unsigned, cusolverDnSpotrf_bufferSize, (qg_solver handle, unsigned uplo, int n, float *a, int lda, int *lwork))  \
    X(unsigned, cusolverDnSpotrf,                                                                                      \
        (qg_solver handle, unsigned uplo, int n, float *a, int lda, float *work, int lwork, int *info))                \
    X(unsigned, cusolverDnXtrtri_bufferSize,                                                                           \
        (qg_solver handle, unsigned uplo, unsigned diag, int64_t n, unsigned type, void *a, int64_t lda,               \
            size_t *device_bytes, size_t *host_bytes))                                                                 \
    X(unsigned, cusolverDnXtrtri,                                                                                      \
        (qg_solver handle, unsigned uplo, unsigned diag, int64_t n, unsigned type, void *a, int64_t lda, void *device, \
            size_t device_bytes, void *host, size_t host_bytes, int *info))                                            \
    X(unsigned, cusolverDnSgeqrf_bufferSize, (qg_solver handle, int m, int n, float *a, int lda, int *lwork))          \
    X(unsigned, cusolverDnSgeqrf,                                                                                      \
        (qg_solver handle, int m, int n, float *a, int lda, float *tau, float *work, int lwork, int *info))            \
    X(unsigned, cusolverDnSorgqr_bufferSize,                                                                           \
        (qg_solver handle, int m, int n, int k, const float *a, int lda, const float *tau, int *lwork))                \
    X(unsigned, cusolverDnSorgqr,                                                                                      \
        (qg_solver handle, int m, int n, int k, float *a, int lda, const float *tau, float *work, int lwork,           \
            int *info))                                                                                                \
    X(unsigned, cusolverDnSgesvd_bufferSize, (qg_solver handle, int m, int n, int *lwork))                             \
    X(unsigned, cusolverDnSgesvd,                                                                                      \
        (qg_solver handle, signed char jobu, signed char jobvt, int m, int n, float *a, int lda, float *s, float *u,   \
            int ldu, float *vt, int ldvt, float *work, int lwork, float *rwork, int *info))

typedef struct qg_libraries {
#define QG_MEMBER(type, name, arguments) type(*name) arguments;
    QG_CUBLAS_FUNCTIONS(QG_MEMBER)
    QG_CUSOLVER_FUNCTIONS(QG_MEMBER)
#undef QG_MEMBER
    void *cublas; /* of dlopen */
    void *cusolver;
    qg_blas blas;
    qg_solver solver;
    int blas_placed; /* the handle has the stream, and cuBLAS the workspace, of this begin */
    int solver_placed;
    void *host_work; /* of cusolverDnXtrtri */
    size_t host_bytes;
    size_t work_bytes; /* what work_size has said last */
} qg_libraries;

/* Have the library open, with a handle that works in the stream (and workspace). NULL where that failed, which is kept in
 * `cuda` as a sentence. */
qg_libraries *qg_libraries_blas(qg_cuda *cuda);
qg_libraries *qg_libraries_solver(qg_cuda *cuda);

/* Stream and workspace are other ones from now on. */
void qg_libraries_restart(qg_cuda *cuda);

void qg_libraries_close(qg_cuda *cuda);

/* Whether a call succeeded; keeps its name with the library's own words for the failure. Returns 1 for success. */
int qg_blas_good(qg_cuda *cuda, unsigned status, const char *what);
int qg_solver_good(qg_cuda *cuda, unsigned status, const char *what);

/* linalg.c */
qg_linalg qg_cuda_make_linalg(qg_cuda *cuda);

#ifdef __cplusplus
}
#endif
#endif
