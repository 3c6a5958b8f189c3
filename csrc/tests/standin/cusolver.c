/* cusolver.c - stands in for libcusolver.so.12: the functions of csrc/cuda/libraries.h in reference C and double, with
 * the checks that cuSOLVER documents. Matrices are stored by columns. There is no default stream, and every workspace is
 * spoiled to its last byte, so that one that is too short is seen. */
#define STANDIN_FUNCTIONS(X) QG_CUSOLVER_FUNCTIONS(X)
#include "standin.h"

#include <math.h>

enum { NOT_INITIALIZED = 1, ALLOC_FAILED = 2, INVALID_VALUE = 3, EXECUTION_FAILED = 6, NOT_SUPPORTED = 9 };

struct cusolverDnContext {
    const void *self; /* of a handle that is alive */
    cudaStream_t stream;
};

static int is_handle(qg_solver handle) {
    return handle != NULL && handle->self == handle;
}

/* A handle with a stream, a matrix of rows x cols, and room for what the call needs. */
static unsigned check(qg_solver handle, int64_t rows, int64_t cols, int64_t leading) {
    REQUIRE(is_handle(handle), NOT_INITIALIZED);
    REQUIRE(rows >= 0 && cols >= 0 && leading >= 1 && leading >= rows, INVALID_VALUE);
    return 0;
}

static unsigned check_work(qg_solver handle, void *work, int have, int need, const int *info) {
    REQUIRE(handle->stream != NULL, EXECUTION_FAILED);
    REQUIRE(have >= need && work != NULL && info != NULL, INVALID_VALUE);
    memset(work, 0x5a, (size_t)have * sizeof(float));
    return 0;
}

unsigned cusolverDnCreate(qg_solver *handle) {
    ENTER(cusolverDnCreate);
    *handle = calloc(1, sizeof **handle);
    REQUIRE(*handle != NULL, ALLOC_FAILED);
    (*handle)->self = *handle;
    handles++;
    return 0;
}

unsigned cusolverDnDestroy(qg_solver handle) {
    ENTER(cusolverDnDestroy);
    REQUIRE(is_handle(handle), NOT_INITIALIZED);
    handle->self = NULL;
    free(handle);
    handles--;
    return 0;
}

unsigned cusolverDnSetStream(qg_solver handle, cudaStream_t stream) {
    ENTER(cusolverDnSetStream);
    REQUIRE(is_handle(handle), NOT_INITIALIZED);
    handle->stream = stream;
    return 0;
}

static double *doubles(const float *a, int64_t rows, int64_t cols, int64_t leading) {
    double *copy = malloc((size_t)(rows * cols) * sizeof(double) + 1);
    for (int64_t j = 0; copy != NULL && j < cols; j++) {
        for (int64_t i = 0; i < rows; i++) {
            copy[i + j * rows] = a[i + j * leading];
        }
    }
    return copy;
}

static double dot(const double *x, const double *y, int64_t count) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++) {
        sum += x[i] * y[i];
    }
    return sum;
}

/* ---------------------------------------------------------------- Cholesky: a = U^T U */

static int potrf_floats(int n) {
    return 8 * n + 16;
}

unsigned cusolverDnSpotrf_bufferSize(qg_solver handle, unsigned uplo, int n, float *a, int lda, int *lwork) {
    ENTER(cusolverDnSpotrf_bufferSize);
    const unsigned status = check(handle, n, n, lda);
    REQUIRE(status == 0, status);
    REQUIRE(uplo == QG_BLAS_UPPER && a != NULL, NOT_SUPPORTED);
    *lwork = potrf_floats(n);
    return 0;
}

unsigned cusolverDnSpotrf(
    qg_solver handle,
    unsigned uplo,
    int n,
    float *a,
    int lda,
    float *work,
    int lwork,
    int *info) {
    ENTER(cusolverDnSpotrf);
    unsigned status = check(handle, n, n, lda);
    status = status != 0 ? status : check_work(handle, work, lwork, potrf_floats(n), info);
    REQUIRE(status == 0, status);
    REQUIRE(uplo == QG_BLAS_UPPER, NOT_SUPPORTED);
    double *u = doubles(a, n, n, lda);
    REQUIRE(u != NULL, ALLOC_FAILED);
    *info = 0;
    for (int j = 0; j < n && *info == 0; j++) {
        for (int i = 0; i <= j; i++) {
            const double rest = u[i + j * n] - dot(u + i * n, u + j * n, i);
            if (i < j) {
                u[i + j * n] = rest / u[i + i * n];
            } else if (rest > 0.0 && isfinite(rest)) {
                u[i + i * n] = sqrt(rest);
            } else {
                *info = j + 1;
            }
        }
        for (int i = 0; i <= j; i++) {
            a[i + (int64_t)j * lda] = (float)u[i + j * n];
        }
    }
    free(u);
    return 0;
}

/* ---------------------------------------------------------------- the inverse of an upper triangle */

static size_t trtri_device(int64_t n) {
    return (size_t)(40 * n + 100);
}

static size_t trtri_host(int64_t n) {
    return (size_t)(24 * n + 36);
}

unsigned cusolverDnXtrtri_bufferSize(
    qg_solver handle,
    unsigned uplo,
    unsigned diag,
    int64_t n,
    unsigned type,
    void *a,
    int64_t lda,
    size_t *device_bytes,
    size_t *host_bytes) {
    ENTER(cusolverDnXtrtri_bufferSize);
    const unsigned status = check(handle, n, n, lda);
    REQUIRE(status == 0, status);
    REQUIRE(uplo == QG_BLAS_UPPER && diag == QG_BLAS_NON_UNIT && type == QG_TYPE_R_32F && a != NULL, NOT_SUPPORTED);
    *device_bytes = trtri_device(n);
    *host_bytes = trtri_host(n);
    return 0;
}

unsigned cusolverDnXtrtri(
    qg_solver handle,
    unsigned uplo,
    unsigned diag,
    int64_t n,
    unsigned type,
    void *a,
    int64_t lda,
    void *device,
    size_t device_bytes,
    void *host,
    size_t host_bytes,
    int *info) {
    ENTER(cusolverDnXtrtri);
    const unsigned status = check(handle, n, n, lda);
    REQUIRE(status == 0, status);
    REQUIRE(handle->stream != NULL, EXECUTION_FAILED);
    REQUIRE(uplo == QG_BLAS_UPPER && diag == QG_BLAS_NON_UNIT && type == QG_TYPE_R_32F, NOT_SUPPORTED);
    REQUIRE(device_bytes >= trtri_device(n) && host_bytes >= trtri_host(n), INVALID_VALUE);
    REQUIRE(device != NULL && host != NULL && info != NULL, INVALID_VALUE);
    memset(device, 0x5a, device_bytes);
    memset(host, 0x5a, host_bytes);
    float *out = a;
    double *u = doubles(a, n, n, lda), *x = calloc((size_t)n + 1, sizeof *x);
    REQUIRE(u != NULL && x != NULL, ALLOC_FAILED);
    for (int64_t j = 0; j < n; j++) {
        memset(x, 0, (size_t)n * sizeof *x);
        for (int64_t i = j; i >= 0; i--) {
            double rest = i == j;
            for (int64_t k = i + 1; k <= j; k++) {
                rest -= u[i + k * n] * x[k];
            }
            x[i] = rest / u[i + i * n];
            out[i + j * lda] = (float)x[i];
        }
    }
    *info = 0;
    free(u);
    free(x);
    return 0;
}

/* ---------------------------------------------------------------- Householder QR, signs as LAPACK's: R's diagonal < 0 */

static int geqrf_floats(int m, int n) {
    return m + 32 * n;
}

static int orgqr_floats(int m, int n) {
    return 2 * m + 16 * n;
}

unsigned cusolverDnSgeqrf_bufferSize(qg_solver handle, int m, int n, float *a, int lda, int *lwork) {
    ENTER(cusolverDnSgeqrf_bufferSize);
    const unsigned status = check(handle, m, n, lda);
    REQUIRE(status == 0, status);
    REQUIRE(a != NULL, INVALID_VALUE);
    *lwork = geqrf_floats(m, n);
    return 0;
}

/* x <- x - tau v (v^T x), v = (1, tail). */
static void reflect(double *x, const double *tail, double tau, int64_t count) {
    const double along = tau * (x[0] + dot(x + 1, tail, count - 1));
    x[0] -= along;
    for (int64_t i = 1; i < count; i++) {
        x[i] -= along * tail[i - 1];
    }
}

unsigned cusolverDnSgeqrf(
    qg_solver handle,
    int m,
    int n,
    float *a,
    int lda,
    float *tau,
    float *work,
    int lwork,
    int *info) {
    ENTER(cusolverDnSgeqrf);
    unsigned status = check(handle, m, n, lda);
    status = status != 0 ? status : check_work(handle, work, lwork, geqrf_floats(m, n), info);
    REQUIRE(status == 0, status);
    REQUIRE(m >= n && tau != NULL, INVALID_VALUE);
    double *w = doubles(a, m, n, lda);
    REQUIRE(w != NULL, ALLOC_FAILED);
    for (int j = 0; j < n; j++) {
        double *x = w + j + (int64_t)j * m;
        const double norm = sqrt(dot(x, x, m - j)), beta = x[0] > 0.0 ? -norm : norm, first = x[0];
        double t = 0.0;
        /* What exactly dependent columns leave gets smaller with each of them, until its squares are none. */
        if (norm > 1e-100 && first != beta) {
            t = (beta - first) / beta;
            for (int i = 1; i < m - j; i++) {
                x[i] /= first - beta;
            }
            x[0] = beta;
            for (int k = j + 1; k < n; k++) {
                reflect(w + j + (int64_t)k * m, x + 1, t, m - j);
            }
        }
        tau[j] = (float)t;
    }
    for (int j = 0; j < n; j++) {
        for (int i = 0; i < m; i++) {
            a[i + (int64_t)j * lda] = (float)w[i + (int64_t)j * m];
        }
    }
    *info = 0;
    free(w);
    return 0;
}

unsigned cusolverDnSorgqr_bufferSize(
    qg_solver handle,
    int m,
    int n,
    int k,
    const float *a,
    int lda,
    const float *tau,
    int *lwork) {
    ENTER(cusolverDnSorgqr_bufferSize);
    const unsigned status = check(handle, m, n, lda);
    REQUIRE(status == 0, status);
    REQUIRE(a != NULL && tau != NULL && k <= n, INVALID_VALUE);
    *lwork = orgqr_floats(m, n);
    return 0;
}

unsigned cusolverDnSorgqr(
    qg_solver handle,
    int m,
    int n,
    int k,
    float *a,
    int lda,
    const float *tau,
    float *work,
    int lwork,
    int *info) {
    ENTER(cusolverDnSorgqr);
    unsigned status = check(handle, m, n, lda);
    status = status != 0 ? status : check_work(handle, work, lwork, orgqr_floats(m, n), info);
    REQUIRE(status == 0, status);
    REQUIRE(m >= n && k == n && tau != NULL, INVALID_VALUE);
    double *w = doubles(a, m, n, lda), *x = calloc((size_t)m + 1, sizeof *x);
    REQUIRE(w != NULL && x != NULL, ALLOC_FAILED);
    for (int col = 0; col < n; col++) {
        memset(x, 0, (size_t)m * sizeof *x);
        x[col] = 1.0;
        for (int j = k - 1; j >= 0; j--) {
            reflect(x + j, w + j + 1 + (int64_t)j * m, tau[j], m - j);
        }
        for (int i = 0; i < m; i++) {
            a[i + (int64_t)col * lda] = (float)x[i];
        }
    }
    *info = 0;
    free(w);
    free(x);
    return 0;
}

/* ---------------------------------------------------------------- singular values: one-sided Jacobi */

static int gesvd_floats(int m, int n) {
    return m + 5 * n + 64;
}

unsigned cusolverDnSgesvd_bufferSize(qg_solver handle, int m, int n, int *lwork) {
    ENTER(cusolverDnSgesvd_bufferSize);
    const unsigned status = check(handle, m, n, m);
    REQUIRE(status == 0, status);
    REQUIRE(m >= n, INVALID_VALUE);
    *lwork = gesvd_floats(m, n);
    return 0;
}

/* Columns p and q of w [m, n] become orthogonal, v [n, n] keeps the rotation; 0 where they are. */
static int rotate(double *w, double *v, int64_t m, int64_t n, int64_t p, int64_t q) {
    double *x = w + p * m, *y = w + q * m;
    const double xx = dot(x, x, m), yy = dot(y, y, m), xy = dot(x, y, m);
    if (fabs(xy) <= 1e-14 * sqrt(xx * yy)) {
        return 0;
    }
    const double ratio = (yy - xx) / (2.0 * xy);
    const double t = (ratio >= 0.0 ? 1.0 : -1.0) / (fabs(ratio) + sqrt(1.0 + ratio * ratio));
    const double c = 1.0 / sqrt(1.0 + t * t), s = c * t;
    for (int64_t i = 0; i < m + n; i++) {
        double *from = i < m ? x + i : v + p * n + (i - m), *to = i < m ? y + i : v + q * n + (i - m);
        const double old = *from;
        *from = c * old - s * *to;
        *to = s * old + c * *to;
    }
    return 1;
}

/* Column j of w [m, n] where its singular value is zero: a unit vector orthogonal to the columns before it. */
static void complete(double *w, int64_t m, int64_t j) {
    double *x = w + j * m, best = 0.0;
    for (int64_t unit = 0; unit < m && best < 0.5; unit++) {
        memset(x, 0, (size_t)m * sizeof *x);
        x[unit] = 1.0;
        for (int64_t k = 0; k < 2 * j; k++) {
            const double *other = w + k % j * m, along = dot(x, other, m);
            for (int64_t i = 0; i < m; i++) {
                x[i] -= along * other[i];
            }
        }
        best = sqrt(dot(x, x, m));
    }
    for (int64_t i = 0; i < m; i++) {
        x[i] /= best;
    }
}

static void swap_columns(double *a, int64_t rows, int64_t p, int64_t q) {
    for (int64_t i = 0; i < rows; i++) {
        const double old = a[p * rows + i];
        a[p * rows + i] = a[q * rows + i];
        a[q * rows + i] = old;
    }
}

unsigned cusolverDnSgesvd(
    qg_solver handle,
    signed char jobu,
    signed char jobvt,
    int m,
    int n,
    float *a,
    int lda,
    float *s,
    float *u,
    int ldu,
    float *vt,
    int ldvt,
    float *work,
    int lwork,
    float *rwork,
    int *info) {
    ENTER(cusolverDnSgesvd);
    unsigned status = check(handle, m, n, lda);
    status = status != 0 ? status : check_work(handle, work, lwork, gesvd_floats(m, n), info);
    REQUIRE(status == 0, status);
    REQUIRE(m >= n && ldu >= m && ldvt >= n && jobu == 'S' && jobvt == 'S' && rwork == NULL, INVALID_VALUE);
    double *w = doubles(a, m, n, lda), *v = calloc((size_t)n * (size_t)n + 1, sizeof *v);
    REQUIRE(w != NULL && v != NULL, ALLOC_FAILED);
    for (int i = 0; i < n; i++) {
        v[i + i * n] = 1.0;
    }
    for (int sweep = 0, rotated = 1; sweep < 40 && rotated; sweep++) {
        rotated = 0;
        for (int p = 0; p < n; p++) {
            for (int q = p + 1; q < n; q++) {
                rotated |= rotate(w, v, m, n, p, q);
            }
        }
    }
    for (int j = 0; j < n; j++) {
        for (int k = j + 1; k < n; k++) {
            if (dot(w + k * m, w + k * m, m) > dot(w + j * m, w + j * m, m)) {
                swap_columns(w, m, j, k);
                swap_columns(v, n, j, k);
            }
        }
        const double norm = sqrt(dot(w + j * m, w + j * m, m));
        s[j] = (float)norm;
        if (norm > 1e-12 * s[0]) {
            for (int i = 0; i < m; i++) {
                w[i + j * m] /= norm;
            }
        } else {
            complete(w, m, j);
        }
    }
    for (int j = 0; j < n; j++) {
        for (int i = 0; i < m; i++) {
            u[i + (int64_t)j * ldu] = (float)w[i + j * m];
            a[i + (int64_t)j * lda] = NAN;
        }
        for (int i = 0; i < n; i++) {
            vt[j + (int64_t)i * ldvt] = (float)v[i + j * n];
        }
    }
    *info = reports[NUMBER_cusolverDnSgesvd];
    reports[NUMBER_cusolverDnSgesvd] = 0;
    free(w);
    free(v);
    return 0;
}
