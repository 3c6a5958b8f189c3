/* factor.c - the factorisations of a subspace refresh on the CPU: Cholesky, inverse of a triangle, Householder QR.
 *
 * All are blocked: products of the linear-algebra table do the bulk, a block's own arithmetic is in double. At n = 512
 * Cholesky and inverse take 1.3e8 operations, of which the blocks' own are 1 %.
 */
#include <math.h>
#include <string.h>

#include "q_galore.h"

enum { BLOCK = 64, REFLECTORS = 32, DOT_LANES = 16 };

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* c = a b, c += a b or c -= a b in float32. */
static qg_status product(
    const qg_linalg *linalg,
    int32_t accumulate,
    int64_t m,
    int64_t n,
    int64_t k,
    const float *a,
    int64_t a_row_stride,
    int64_t a_col_stride,
    const float *b,
    int64_t b_row_stride,
    int64_t b_col_stride,
    float *c,
    int64_t c_row_stride) {
    if (m == 0 || n == 0 || k == 0) {
        return QG_SUCCESS;
    }
    return linalg->gemm(
        linalg->context, QG_FLOAT32, accumulate, m, n, k, a, a_row_stride, a_col_stride, b, b_row_stride, b_col_stride,
        c, c_row_stride);
}

size_t qg_cpu_work_size(const qg_linalg *linalg, int64_t rows, int64_t cols) {
    (void)linalg;
    (void)cols;
    return (size_t)(BLOCK * BLOCK + BLOCK * rows + rows) * sizeof(float);
}

/* ---------------------------------------------------------------- Cholesky */

/* Lower triangle of a [n, n], n <= BLOCK, <- L; 0 where a pivot is not positive. */
static int factor_block(float *a, int64_t stride, int64_t n) {
    double l[BLOCK][BLOCK], column[BLOCK];
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j <= i; j++) {
            l[i][j] = a[i * stride + j];
        }
    }
    for (int64_t j = 0; j < n; j++) {
        if (!(l[j][j] > 0.0) || isinf(l[j][j])) {
            return 0;
        }
        const double pivot = sqrt(l[j][j]);
        l[j][j] = pivot;
        for (int64_t i = j + 1; i < n; i++) {
            column[i] = l[i][j] /= pivot;
        }
        for (int64_t i = j + 1; i < n; i++) {
            const double factor = column[i];
            for (int64_t k = j + 1; k <= i; k++) {
                l[i][k] -= factor * column[k];
            }
        }
    }
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j <= i; j++) {
            a[i * stride + j] = (float)l[i][j];
        }
    }
    return 1;
}

/* inverse [n, n] contiguous = sign * L^-1, n <= BLOCK, zeros above the diagonal. */
static void invert_block(const float *lower, int64_t stride, int64_t n, double sign, float *inverse) {
    double w[BLOCK][BLOCK];
    for (int64_t i = 0; i < n; i++) {
        memset(w[i], 0, sizeof w[i]);
        w[i][i] = 1.0;
        for (int64_t k = 0; k < i; k++) {
            const double factor = lower[i * stride + k];
            for (int64_t j = 0; j <= k; j++) {
                w[i][j] -= factor * w[k][j];
            }
        }
        for (int64_t j = 0; j <= i; j++) {
            w[i][j] /= lower[i * stride + i];
        }
    }
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) {
            inverse[i * n + j] = (float)(sign * w[i][j]);
        }
    }
}

static void copy_rows(float *target, int64_t target_stride, const float *source, int64_t stride, int64_t m, int64_t n) {
    for (int64_t i = 0; i < m; i++) {
        memcpy(target + i * target_stride, source + i * stride, (size_t)n * sizeof(float));
    }
}

/* Column block by column block: what the columns before take away, the block on the diagonal, the panel below it. */
qg_status qg_cpu_potrf(const qg_linalg *linalg, int64_t n, float *a, int32_t *failed, void *work) {
    float *inverse = work, *panel = inverse + BLOCK * BLOCK;
    *failed = 0;
    for (int64_t k = 0; k < n; k += BLOCK) {
        const int64_t block = smaller(BLOCK, n - k), below = n - k - block;
        float *diagonal = a + k * n + k, *under = diagonal + block * n;
        qg_status status = product(linalg, -1, n - k, block, k, a + k * n, n, 1, a + k * n, 1, n, diagonal, n);
        if (status != QG_SUCCESS) {
            return status;
        }
        if (!factor_block(diagonal, n, block)) {
            *failed = 1;
            return QG_SUCCESS;
        }
        invert_block(diagonal, n, block, 1.0, inverse);
        copy_rows(panel, block, under, n, below, block);
        status = product(linalg, 0, below, block, block, panel, block, 1, inverse, 1, block, under, n);
        if (status != QG_SUCCESS) {
            return status;
        }
    }
    return QG_SUCCESS;
}

/* Row block by row block: W[i, :i] = -L[i, i]^-1 (L[i, :i] W[:i, :i]). */
qg_status qg_cpu_trtri(const qg_linalg *linalg, int64_t n, const float *lower, float *inverse, void *work) {
    float *own = work, *rows = own + BLOCK * BLOCK;
    memset(inverse, 0, (size_t)(n * n) * sizeof(float));
    for (int64_t i = 0; i < n; i += BLOCK) {
        const int64_t block = smaller(BLOCK, n - i);
        const float *diagonal = lower + i * n + i;
        invert_block(diagonal, n, block, -1.0, own);
        qg_status status = product(linalg, 0, block, i, i, lower + i * n, n, 1, inverse, n, 1, rows, n);
        if (status == QG_SUCCESS) {
            status = product(linalg, 0, block, i, block, own, block, 1, rows, n, 1, inverse + i * n, n);
        }
        if (status != QG_SUCCESS) {
            return status;
        }
        invert_block(diagonal, n, block, 1.0, own);
        copy_rows(inverse + i * n + i, n, own, block, block, block);
    }
    return QG_SUCCESS;
}

/* ---------------------------------------------------------------- Householder QR, of the rows */

static double dot(const float *a, const float *b, int64_t n) {
    double lanes[DOT_LANES] = {0.0}, sum = 0.0;
    int64_t i = 0;
    for (; i + DOT_LANES <= n; i += DOT_LANES) {
        for (int lane = 0; lane < DOT_LANES; lane++) {
            lanes[lane] += (double)a[i + lane] * b[i + lane];
        }
    }
    for (; i < n; i++) {
        sum += (double)a[i] * b[i];
    }
    for (int lane = 0; lane < DOT_LANES; lane++) {
        sum += lanes[lane];
    }
    return sum;
}

/* x [n] becomes the unit vector v with (I - 2 v v^T) x = (beta, 0, ..): zeros stay zeros. Returns beta's sign. */
static float reflector(float *x, int64_t n) {
    const double norm = sqrt(dot(x, x, n));
    if (norm == 0.0) {
        return 1.0f;
    }
    const double beta = x[0] > 0.0f ? -norm : norm; /* no cancellation in x[0] - beta */
    const double first = x[0] - beta;
    const double length = sqrt(2.0 * norm * (norm + fabs((double)x[0])));
    for (int64_t i = 1; i < n; i++) {
        x[i] = (float)(x[i] / length);
    }
    x[0] = (float)(first / length);
    return beta < 0.0 ? -1.0f : 1.0f;
}

/* The rows of v [count, n] become reflectors, each applied to the rows after it; row i starts at its column i. */
static void factor_rows(float *v, int64_t stride, int64_t count, int64_t n, float *signs) {
    for (int64_t j = 0; j < count; j++) {
        float *own = v + j * stride;
        signs[j] = reflector(own + j, n - j);
        memset(own, 0, (size_t)j * sizeof(float));
        for (int64_t i = j + 1; i < count; i++) {
            float *row = v + i * stride;
            const float twice = (float)(2.0 * dot(row + j, own + j, n - j));
            for (int64_t k = j; k < n; k++) {
                row[k] -= twice * own[k];
            }
        }
    }
}

/* t [count, count], upper triangular, with H_0 H_1 .. = I - V^T t V, from the Gram matrix of V. */
static void join_reflectors(float *t, const float *gram, int64_t count) {
    for (int64_t j = 0; j < count; j++) {
        for (int64_t i = 0; i < count; i++) {
            double sum = 0.0;
            for (int64_t l = i; l < j; l++) {
                sum += (double)t[i * count + l] * gram[l * count + j];
            }
            t[i * count + j] = i == j ? 2.0f : i < j ? (float)(-2.0 * sum) : 0.0f;
        }
    }
}

/* c [rows, n] -= (c V^T) t V, or with t^T: the reflectors V [count, n] of one block from the right. */
static qg_status reflect(
    const qg_linalg *linalg,
    float *c,
    int64_t rows,
    const float *v,
    int64_t count,
    int64_t n,
    int64_t stride,
    int transposed,
    float *work) {
    float *gram = work, *t = gram + REFLECTORS * REFLECTORS;
    float *first = work + BLOCK * BLOCK, *second = first + rows * count;
    qg_status status = product(linalg, 0, count, count, n, v, stride, 1, v, 1, stride, gram, count);
    if (status != QG_SUCCESS) {
        return status;
    }
    join_reflectors(t, gram, count);
    status = product(linalg, 0, rows, count, n, c, stride, 1, v, 1, stride, first, count);
    if (status == QG_SUCCESS) {
        const int64_t t_row = transposed ? 1 : count, t_col = transposed ? count : 1;
        status = product(linalg, 0, rows, count, count, first, count, 1, t, t_row, t_col, second, count);
    }
    if (status == QG_SUCCESS) {
        status = product(linalg, -1, rows, n, count, second, count, 1, v, stride, 1, c, stride);
    }
    return status;
}

qg_status qg_cpu_qr(const qg_linalg *linalg, int64_t rows, int64_t cols, float *a, float *q, void *work) {
    float *signs = (float *)work + BLOCK * BLOCK + BLOCK * rows;
    qg_status status = QG_SUCCESS;
    for (int64_t i = 0; status == QG_SUCCESS && i < rows; i += REFLECTORS) {
        const int64_t count = smaller(REFLECTORS, rows - i);
        float *v = a + i * cols + i;
        factor_rows(v, cols, count, cols - i, signs + i);
        status = reflect(linalg, v + count * cols, rows - i - count, v, count, cols - i, cols, 0, work);
    }
    memset(q, 0, (size_t)(rows * cols) * sizeof(float));
    for (int64_t i = 0; i < rows; i++) {
        q[i * cols + i] = signs[i];
    }
    for (int64_t i = (rows - 1) / REFLECTORS * REFLECTORS; status == QG_SUCCESS && i >= 0; i -= REFLECTORS) {
        const int64_t count = smaller(REFLECTORS, rows - i);
        status = reflect(linalg, q + i * cols + i, rows - i, a + i * cols + i, count, cols - i, cols, 1, work);
    }
    return status;
}
