/* linalg.c - the linear-algebra table of a GPU: products by cuBLAS, factorisations by cuSOLVER.
 *
 * Both read matrices by columns. A row-major matrix is to them its transpose, with the same leading dimension, so
 *
 *   gemm   c = a b          is computed as c^T = b^T a^T
 *   potrf  a = L L^T        as a = U^T U with U = L^T, in the upper triangle
 *   trtri  L^-1             as the inverse of U = L^T
 *   qr     a = R^T q        as a^T = q^T R
 *   svd    a [m, n]         m <= n as a^T = (right^T) S left; else a is transposed first: gesvd wants rows >= columns
 *
 * `work` holds cuSOLVER's info (one int), then tau and signs of a QR, then its workspace.
 */
#include <limits.h>
#include <stdlib.h>

#include "core/scratch.h"
#include "cuda/kernels.h"
#include "cuda/libraries.h"

enum { WORK_ALIGNMENT = 256, INFO_BYTES = 256 };

static size_t aligned(size_t bytes) {
    return (bytes + WORK_ALIGNMENT - 1) / WORK_ALIGNMENT * WORK_ALIGNMENT;
}

static char *aligned_start(void *memory) {
    return (char *)(((uintptr_t)memory + WORK_ALIGNMENT - 1) / WORK_ALIGNMENT * WORK_ALIGNMENT);
}

/* ---------------------------------------------------------------- products */

/* How cuBLAS reads a matrix that holds the transpose of what it wants: as it lies, or transposed back. */
typedef struct operand {
    unsigned op;
    int64_t leading;
} operand;

/* rows x cols with these strides. A stride along one row or column alone is never used, whatever it is. Returns 0 where
 * the elements lie neither in rows nor in columns. */
static int read_operand(operand *as, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
    if ((col_stride == 1 || cols == 1) && (row_stride >= cols || rows == 1)) {
        *as = (operand){QG_BLAS_OP_N, rows == 1 ? qg_larger(cols, 1) : row_stride};
        return 1;
    }
    if ((row_stride == 1 || rows == 1) && (col_stride >= rows || cols == 1)) {
        *as = (operand){QG_BLAS_OP_T, cols == 1 ? qg_larger(rows, 1) : col_stride};
        return 1;
    }
    return 0;
}

static int type_of(qg_format format, unsigned *type) {
    switch (format) {
    case QG_FLOAT32:
        *type = QG_TYPE_R_32F;
        return 1;
    case QG_BFLOAT16:
        *type = QG_TYPE_R_16BF;
        return 1;
    case QG_FLOAT16:
        *type = QG_TYPE_R_16F;
        return 1;
    default:
        return 0;
    }
}

static qg_status gemm(
    void *context,
    qg_format format,
    int32_t accumulate,
    int64_t m,
    int64_t n,
    int64_t k,
    const void *a,
    int64_t a_row_stride,
    int64_t a_col_stride,
    const void *b,
    int64_t b_row_stride,
    int64_t b_col_stride,
    void *c,
    int64_t c_row_stride) {
    qg_cuda *cuda = context;
    operand first, second;
    unsigned type = 0;
    if (m == 0 || n == 0) {
        return QG_SUCCESS;
    }
    if (!type_of(format, &type)) {
        qg_cuda_fail(cuda, QG_UNSUPPORTED, "gemm: format %d is not a float format", (int)format);
        return cuda->status;
    }
    if (!read_operand(&first, m, k, a_row_stride, a_col_stride) ||
        !read_operand(&second, k, n, b_row_stride, b_col_stride) || (c_row_stride < n && m > 1)) {
        qg_cuda_fail(
            cuda, QG_UNSUPPORTED,
            "gemm: expected matrices with a stride of 1 along rows or columns, got %lld, %lld for %lld x %lld, "
            "%lld, %lld for %lld x %lld and %lld for %lld x %lld",
            (long long)a_row_stride, (long long)a_col_stride, (long long)m, (long long)k, (long long)b_row_stride,
            (long long)b_col_stride, (long long)k, (long long)n, (long long)c_row_stride, (long long)m, (long long)n);
        return cuda->status;
    }
    if (cuda->workspace == NULL) {
        qg_cuda_fail(cuda, QG_INVALID_ARGUMENT, "gemm: qg_cuda_begin was given no workspace for cuBLAS; 8 MB do");
        return cuda->status;
    }
    const qg_libraries *l = qg_libraries_blas(cuda);
    if (l == NULL) {
        return cuda->status;
    }
    const int fast = format == QG_FLOAT32 && cuda->allow_tf32;
    const float alpha = accumulate < 0 ? -1.0f : 1.0f, beta = accumulate != 0 ? 1.0f : 0.0f;
    const unsigned status = l->cublasGemmEx_64(
        l->blas, second.op, first.op, n, m, k, &alpha, b, type, second.leading, a, type, first.leading, &beta, c, type,
        m == 1 ? n : c_row_stride, fast ? QG_BLAS_COMPUTE_32F_FAST_TF32 : QG_BLAS_COMPUTE_32F, QG_BLAS_GEMM_DEFAULT);
    return qg_blas_good(cuda, status, "cublasGemmEx") ? QG_SUCCESS : cuda->status;
}

/* ---------------------------------------------------------------- sizes of factorisations */

/* Bytes of cuSOLVER's own workspace, host_bytes of it on the host. */
typedef struct need {
    size_t device_bytes;
    size_t host_bytes;
} need;

static size_t floats(int count) {
    return (size_t)(count > 0 ? count : 0) * sizeof(float);
}

/* What stands for the matrices of size queries, which are never read: a query may come without a workspace. */
static float *no_matrix(qg_cuda *cuda) {
    return (float *)(void *)cuda;
}

static int need_potrf(qg_cuda *cuda, const qg_libraries *l, int n, need *out) {
    int count = 0;
    const unsigned status = l->cusolverDnSpotrf_bufferSize(l->solver, QG_BLAS_UPPER, n, no_matrix(cuda), n, &count);
    *out = (need){floats(count), 0};
    return qg_solver_good(cuda, status, "cusolverDnSpotrf_bufferSize");
}

static int need_trtri(qg_cuda *cuda, const qg_libraries *l, int n, need *out) {
    *out = (need){0, 0};
    const unsigned status = l->cusolverDnXtrtri_bufferSize(
        l->solver, QG_BLAS_UPPER, QG_BLAS_NON_UNIT, n, QG_TYPE_R_32F, no_matrix(cuda), n, &out->device_bytes,
        &out->host_bytes);
    return qg_solver_good(cuda, status, "cusolverDnXtrtri_bufferSize");
}

/* geqrf's and orgqr's, which use it one after the other, of a transposed rows x cols matrix. */
static int need_qr(qg_cuda *cuda, const qg_libraries *l, int rows, int cols, need *out) {
    int factor = 0, form = 0;
    const unsigned status = l->cusolverDnSgeqrf_bufferSize(l->solver, cols, rows, no_matrix(cuda), cols, &factor);
    if (!qg_solver_good(cuda, status, "cusolverDnSgeqrf_bufferSize")) {
        return 0;
    }
    const unsigned second =
        l->cusolverDnSorgqr_bufferSize(l->solver, cols, rows, rows, no_matrix(cuda), cols, no_matrix(cuda), &form);
    *out = (need){floats(factor > form ? factor : form), 0};
    return qg_solver_good(cuda, second, "cusolverDnSorgqr_bufferSize");
}

/* info, tau and signs of a QR, the workspace, and what an unaligned start may cost. */
static size_t work_bytes(int64_t rows, size_t workspace) {
    return INFO_BYTES + 2 * aligned((size_t)rows * sizeof(float)) + aligned(workspace) + WORK_ALIGNMENT;
}

static int check_size(qg_cuda *cuda, const char *what, int64_t rows, int64_t cols) {
    if (rows < 1 || cols < 1 || rows > INT_MAX || cols > INT_MAX) {
        qg_cuda_fail(
            cuda, QG_UNSUPPORTED,
            "%s: expected 1 to %d rows and columns, which is what cuSOLVER takes, got %lld x %lld", what, INT_MAX,
            (long long)rows, (long long)cols);
        return 0;
    }
    return 1;
}

static int reserve_host(qg_cuda *cuda, qg_libraries *l, size_t bytes) {
    if (bytes <= l->host_bytes) {
        return 1;
    }
    void *memory = realloc(l->host_work, bytes);
    if (memory == NULL) {
        qg_cuda_fail(cuda, QG_OUT_OF_MEMORY, "cuSOLVER's %zu bytes on the host cannot be had", bytes);
        return 0;
    }
    l->host_work = memory;
    l->host_bytes = bytes;
    return 1;
}

/* 0 where it fails: the call that follows fails for the same reason. */
static size_t work_size(const qg_linalg *linalg, int64_t rows, int64_t cols) {
    qg_cuda *cuda = linalg->context;
    need cholesky, inverse, reflections;
    if (!check_size(cuda, "work_size", rows, cols)) {
        return 0;
    }
    qg_libraries *l = qg_libraries_solver(cuda);
    if (l == NULL || !need_potrf(cuda, l, (int)rows, &cholesky) || !need_trtri(cuda, l, (int)rows, &inverse) ||
        !need_qr(cuda, l, (int)rows, (int)cols, &reflections) || !reserve_host(cuda, l, inverse.host_bytes)) {
        return 0;
    }
    size_t most = cholesky.device_bytes > inverse.device_bytes ? cholesky.device_bytes : inverse.device_bytes;
    most = most > reflections.device_bytes ? most : reflections.device_bytes;
    l->work_bytes = work_bytes(rows, most);
    return l->work_bytes;
}

/* ---------------------------------------------------------------- factorisations */

/* The parts of the caller's `work`. */
typedef struct parts {
    int *info;
    float *tau;
    float *signs;
    void *workspace;
} parts;

static parts split(void *work, int64_t rows) {
    const size_t vector = aligned((size_t)rows * sizeof(float));
    char *start = aligned_start(work);
    return (parts){
        (int *)start,
        (float *)(start + INFO_BYTES),
        (float *)(start + INFO_BYTES + vector),
        start + INFO_BYTES + 2 * vector,
    };
}

/* cuSOLVER, ready for a factorisation that waits for the device; NULL where it is not. */
static qg_libraries *solver_for(qg_cuda *cuda, const char *what, int64_t rows, int64_t cols) {
    if (cuda->status != QG_SUCCESS || !check_size(cuda, what, rows, cols) || !qg_cuda_may_wait(cuda, what)) {
        return NULL;
    }
    return qg_libraries_solver(cuda);
}

/* A smaller matrix may need more than a larger one, for all that is written about it: better said than overrun. */
static int fits(qg_cuda *cuda, const qg_libraries *l, const char *what, int64_t rows, need n) {
    const size_t bytes = work_bytes(rows, n.device_bytes);
    if (bytes > l->work_bytes || n.host_bytes > l->host_bytes) {
        qg_cuda_fail(
            cuda, QG_INTERNAL, "%s: %zu bytes of work are needed and %zu on the host, work_size has said %zu and %zu",
            what, bytes, n.host_bytes, l->work_bytes, l->host_bytes);
        return 0;
    }
    return 1;
}

static qg_status potrf(const qg_linalg *linalg, int64_t n, float *a, int32_t *failed, void *work) {
    qg_cuda *cuda = linalg->context;
    need size;
    const qg_libraries *l = solver_for(cuda, "potrf", n, n);
    if (l == NULL || !need_potrf(cuda, l, (int)n, &size) || !fits(cuda, l, "potrf", n, size)) {
        return cuda->status;
    }
    const unsigned status = l->cusolverDnSpotrf(
        l->solver, QG_BLAS_UPPER, (int)n, a, (int)n, split(work, n).workspace, (int)(size.device_bytes / sizeof(float)),
        failed);
    return qg_solver_good(cuda, status, "cusolverDnSpotrf") ? QG_SUCCESS : cuda->status;
}

static qg_status trtri(const qg_linalg *linalg, int64_t n, const float *lower, float *inverse, void *work) {
    qg_cuda *cuda = linalg->context;
    need size;
    const qg_libraries *l = solver_for(cuda, "trtri", n, n);
    if (l == NULL || !need_trtri(cuda, l, (int)n, &size) || !fits(cuda, l, "trtri", n, size)) {
        return cuda->status;
    }
    const parts p = split(work, n);
    qg_cuda_copy_lower(inverse, lower, n, cuda);
    const unsigned status = l->cusolverDnXtrtri(
        l->solver, QG_BLAS_UPPER, QG_BLAS_NON_UNIT, n, QG_TYPE_R_32F, inverse, n, p.workspace, size.device_bytes,
        l->host_work, size.host_bytes, p.info);
    qg_solver_good(cuda, status, "cusolverDnXtrtri");
    return cuda->status;
}

static qg_status qr(const qg_linalg *linalg, int64_t rows, int64_t cols, float *a, float *q, void *work) {
    qg_cuda *cuda = linalg->context;
    need size;
    const qg_libraries *l = solver_for(cuda, "qr", rows, cols);
    if (l == NULL || !need_qr(cuda, l, (int)rows, (int)cols, &size) || !fits(cuda, l, "qr", rows, size)) {
        return cuda->status;
    }
    const int count = (int)(size.device_bytes / sizeof(float)), m = (int)cols, n = (int)rows;
    const parts p = split(work, rows);
    unsigned status = l->cusolverDnSgeqrf(l->solver, m, n, a, m, p.tau, p.workspace, count, p.info);
    if (!qg_solver_good(cuda, status, "cusolverDnSgeqrf")) {
        return cuda->status;
    }
    qg_cuda_signs(p.signs, a, cols + 1, rows, cuda);
    status = l->cusolverDnSorgqr(l->solver, m, n, n, a, m, p.tau, p.workspace, count, p.info);
    if (qg_solver_good(cuda, status, "cusolverDnSorgqr")) {
        qg_cuda_scale_rows(q, a, p.signs, rows, cols, cuda);
    }
    return cuda->status;
}

qg_linalg qg_cuda_make_linalg(qg_cuda *cuda) {
    return (qg_linalg){
        .struct_size = sizeof(qg_linalg),
        .context = cuda,
        .gemm = gemm,
        .potrf = potrf,
        .trtri = trtri,
        .qr = qr,
        .work_size = work_size,
    };
}

/* ---------------------------------------------------------------- singular values */

/* Offsets in the scratch of a decomposition, and its total. */
typedef struct svd_plan {
    int m; /* what gesvd sees: m >= n */
    int n;
    size_t small;      /* [n, n]: singular vectors that have to be transposed */
    size_t transposed; /* [m, n] where a has more rows than columns */
    size_t workspace;
    int count; /* floats of it */
    size_t bytes;
} svd_plan;

static int plan_svd(qg_cuda *cuda, int64_t rows, int64_t cols, svd_plan *out) {
    const qg_libraries *l = solver_for(cuda, "svd", rows, cols);
    if (l == NULL) {
        return 0;
    }
    svd_plan p = {.m = (int)qg_larger(rows, cols), .n = (int)qg_smaller(rows, cols)};
    if (!qg_solver_good(
            cuda, l->cusolverDnSgesvd_bufferSize(l->solver, p.m, p.n, &p.count), "cusolverDnSgesvd_bufferSize")) {
        return 0;
    }
    p.small = INFO_BYTES;
    p.transposed = p.small + aligned((size_t)p.n * (size_t)p.n * sizeof(float));
    p.workspace = p.transposed + (rows > cols ? aligned((size_t)p.m * (size_t)p.n * sizeof(float)) : 0);
    p.bytes = p.workspace + floats(p.count) + WORK_ALIGNMENT;
    *out = p;
    return 1;
}

/* target [cols, rows] = the transpose of source [rows, cols]. */
static int transpose(qg_cuda *cuda, float *target, const float *source, int64_t rows, int64_t cols) {
    const float one = 1.0f, zero = 0.0f;
    const qg_libraries *l = qg_libraries_blas(cuda);
    return l != NULL && qg_blas_good(
                            cuda,
                            l->cublasSgeam_64(
                                l->blas, QG_BLAS_OP_T, QG_BLAS_OP_N, rows, cols, &one, source, cols, &zero, target,
                                rows, target, rows),
                            "cublasSgeam");
}

static int check_svd(qg_cuda *cuda, const svd_plan *p, const float *a, const void *scratch, size_t scratch_size) {
    if (scratch == NULL || scratch_size < p->bytes) {
        qg_cuda_fail(
            cuda, QG_INVALID_ARGUMENT, "svd: expected %zu bytes of scratch, got %zu", p->bytes,
            scratch == NULL ? 0 : scratch_size);
        return 0;
    }
    if (cuda->workspace == NULL) {
        qg_cuda_fail(cuda, QG_INVALID_ARGUMENT, "svd: qg_cuda_begin was given no workspace for cuBLAS; 8 MB do");
        return 0;
    }
    if (!qg_cuda_finite(a, QG_FLOAT32, (int64_t)p->m * p->n, cuda)) {
        qg_cuda_fail(cuda, QG_INVALID_ARGUMENT, "svd: a holds a value that is not finite");
        return 0;
    }
    return cuda->status == QG_SUCCESS;
}

static int converged(qg_cuda *cuda, const int *info) {
    int seen = 0;
    cuda->backend.fetch(&seen, info, sizeof seen, cuda);
    if (seen != 0) {
        qg_cuda_fail(cuda, QG_INTERNAL, "svd: cusolverDnSgesvd did not converge (info %d)", seen);
    }
    return cuda->status == QG_SUCCESS;
}

QG_EXPORT qg_status qg_cuda_svd_scratch_size(qg_cuda *cuda, int64_t rows, int64_t cols, size_t *bytes) {
    svd_plan p = {0};
    if (bytes == NULL) {
        qg_cuda_fail(cuda, QG_INVALID_ARGUMENT, "svd: expected a place for the size, got NULL");
    } else if (rows == 0 || cols == 0 || plan_svd(cuda, rows, cols, &p)) {
        *bytes = p.bytes;
    }
    return qg_cuda_take(cuda);
}

static void decompose(
    qg_cuda *cuda,
    const svd_plan *p,
    float *left,
    float *values,
    float *right,
    float *a,
    int transposed,
    void *scratch) {
    char *memory = aligned_start(scratch);
    int *info = (int *)memory;
    float *small = (float *)(memory + p->small), *matrix = a;
    if (transposed) {
        matrix = (float *)(memory + p->transposed);
        if (!transpose(cuda, matrix, a, p->m, p->n)) {
            return;
        }
    }
    const qg_libraries *l = qg_libraries_solver(cuda);
    if (l != NULL &&
        qg_solver_good(
            cuda,
            l->cusolverDnSgesvd(
                l->solver, 'S', 'S', p->m, p->n, matrix, p->m, values, transposed ? left : right, p->m, small, p->n,
                (float *)(memory + p->workspace), p->count, NULL, info),
            "cusolverDnSgesvd") &&
        converged(cuda, info)) {
        transpose(cuda, transposed ? right : left, small, p->n, p->n);
    }
}

QG_EXPORT qg_status qg_cuda_svd(
    qg_cuda *cuda,
    float *left,
    float *values,
    float *right,
    float *a,
    int64_t rows,
    int64_t cols,
    void *scratch,
    size_t scratch_size) {
    svd_plan p;
    if (rows != 0 && cols != 0 && plan_svd(cuda, rows, cols, &p) && check_svd(cuda, &p, a, scratch, scratch_size)) {
        decompose(cuda, &p, left, values, right, a, rows > cols, scratch);
    }
    return qg_cuda_take(cuda);
}
