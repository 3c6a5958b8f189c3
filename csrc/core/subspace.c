/* subspace.c - the basis of a projection: block power steps from an old basis, random bases, captured energy.
 *
 *   Z = orth(G P^T)    Y = orth(G^T Z)    P = Y^T        (right; left: G^T stands for G)
 *   orth  Q <- Q / ||Q||_F, then A = Q^T Q, L L^T = A + shift I, Q <- Q L^-T until max |A - I| < 1e-5; for Z one pass
 *         is nearly always enough (condition), and P is divided by ||P||_F / sqrt(r), so that one is enough for it too
 *   E     = ||G Q^T||^2 / ||G||^2
 *
 * Everything is kept as rows, like a basis: Z^T [r, k] and Y^T [r, d], so Q <- Q L^-T reads M <- L^-1 M. The products
 * that a step needs anyway give all energies but the last, which takes one more product with G; with a second step it
 * is that step's first one.
 *
 * G is never copied whole. Where its size or format is not what the GEMM takes, tiles of it are cast and scaled; a tile
 * spans the whole inner dimension, so no sum is rounded between tiles.
 *
 * Numbers of the device (`numbers`) reach the host in look() alone. A job that looks does so before each decision; one
 * that does not assumes what is usual, and usual() checks that when it is done.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>

#include "core/backend.h"
#include "core/check.h"
#include "core/scratch.h"
#include "core/status.h"

enum {
    MOST_PASSES = 6,  /* of Cholesky QR before Householder QR */
    USUAL_PASSES = 3, /* two are usual; the third makes a second attempt rare */
    BLIND_STEPS = 4,  /* the most power steps taken without looking */
    BLIND_BASES = 1 + BLIND_STEPS,
    GRAM_ROWS = 128,         /* rows of a Gram matrix or of a triangular product at a time: the rest is zero or known */
    TILE_ELEMENTS = 1 << 20, /* of G, cast at a time, */
    TILE_LEAST = 128,        /* but at least so many rows or columns */
};

static const double CLOSE = 1e-5;     /* max |Q^T Q - I| of a finished basis */
static const double TOLERABLE = 1e-4; /* the same after Householder QR */
static const double LEAST = 1e-60; /* squares below this are rounding: G is scaled to about 1, a basis has that size */
static const double MISSING = 0.9; /* of ||Z||^2 = r after one pass: every singular value is above 0.3 then */
static const double ENOUGH[] = {0.9, 0.97, 0.0};      /* E before / E after step 1, 2, 3: below this, another step */
static const float SMALL = 0x1p-20f, LARGE = 0x1p20f; /* max |G| between them is taken as it is */

/* What kernels and factorisations leave on the device. */
typedef struct numbers {
    double gradient_squares;
    double first_squares;   /* ||G P^T||^2 with the old basis */
    double product_squares; /* with the newest matrix */
    double squares;         /* of what is normalised next, where that is not a product */
    double distance[BLIND_BASES];
    int32_t failed[BLIND_BASES][USUAL_PASSES];
    int32_t failed_between[BLIND_STEPS]; /* of each step's Z, */
    double conditioned[BLIND_STEPS];     /* and its squares after its one pass */
    float gradient_absmax;
} numbers;

typedef struct plan {
    int64_t tile_rows; /* of G at a time where it is cast */
    int64_t tile_cols;
    size_t half;    /* bytes of half a buffer: of a bfloat16 matrix */
    size_t current; /* offsets */
    size_t spare;
    size_t kept;
    size_t gram;
    size_t inverse;
    size_t tile;
    size_t work;
    size_t numbers;
    size_t bytes;
} plan;

typedef struct job {
    const qg_backend *backend;
    const qg_linalg *linalg;
    const void *gradient;
    qg_format grad_format;
    qg_format gemm_format;
    int64_t rows;
    int64_t cols;
    plan plan;
    float *current; /* the matrix at work, [rank, length] */
    float *spare;   /* of the same size; holds a product with G until it is normalised */
    float *gram;
    float *inverse;
    void *tile;
    void *work;
    numbers *device;
    numbers seen;
    float scale;
    int looking;
    int bases;  /* orthonormalised so far without looking */
    int broken; /* no basis came out */
    int fallbacks;
} job;

static plan make_plan(int64_t rows, int64_t cols, int64_t rank, int32_t sides, const qg_linalg *linalg) {
    const int64_t longest = qg_larger(rows, cols);
    const size_t square = qg_aligned_size((size_t)(rank * rank) * sizeof(float));
    plan p = {
        .tile_rows = qg_smaller(rows, qg_larger(TILE_LEAST, TILE_ELEMENTS / cols)),
        .tile_cols = qg_smaller(cols, qg_larger(TILE_LEAST, TILE_ELEMENTS / rows)),
        .half = qg_aligned_size((size_t)(rank * longest) * 2),
    };
    p.spare = p.current + 2 * p.half;
    p.kept = p.spare + 2 * p.half;
    p.gram = p.kept + (sides == 2 ? 2 * p.half : 0);
    p.inverse = p.gram + square;
    p.tile = p.inverse + square;
    p.work = p.tile + qg_aligned_size((size_t)qg_larger(p.tile_rows * cols, rows * p.tile_cols) * sizeof(float));
    p.numbers = p.work + qg_aligned_size(linalg->work_size(linalg, rank, longest));
    p.bytes = p.numbers + qg_aligned_size(sizeof(numbers)) + QG_ALIGNMENT;
    return p;
}

/* ---------------------------------------------------------------- checks */

static int is_float(qg_format format) {
    return format == QG_FLOAT32 || format == QG_BFLOAT16 || format == QG_FLOAT16;
}

static qg_status check_tables(const qg_backend *backend, const qg_linalg *linalg) {
    qg_status status = qg_check_backend(backend);
    if (status != QG_SUCCESS) {
        return status;
    }
    if (linalg == NULL || linalg->struct_size != sizeof *linalg || linalg->gemm == NULL || linalg->potrf == NULL ||
        linalg->trtri == NULL || linalg->qr == NULL || linalg->work_size == NULL) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "linalg: expected a qg_linalg with struct_size %zu and every member", sizeof *linalg);
    }
    return QG_SUCCESS;
}

static qg_status check_gradient(int64_t rows, int64_t cols, const void *gradient, qg_format format) {
    qg_status status = qg_check_sizes("gradient", rows, cols);
    if (status != QG_SUCCESS) {
        return status;
    }
    if (!is_float(format)) {
        return qg_fail(QG_UNSUPPORTED, "gradient: format %d is not a float format", (int)format);
    }
    if (gradient == NULL && rows > 0 && cols > 0) {
        return qg_fail(QG_INVALID_ARGUMENT, "gradient: expected an array, got NULL");
    }
    return QG_SUCCESS;
}

static qg_status check_basis(const char *what, const float *basis, int64_t rank, int64_t dim) {
    if (rank < 0 || rank > dim) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "%s: expected 0 to %lld vectors of length %lld, got %lld", what, (long long)dim,
            (long long)dim, (long long)rank);
    }
    if (basis == NULL && rank > 0) {
        return qg_fail(QG_INVALID_ARGUMENT, "%s: expected an array, got NULL", what);
    }
    return QG_SUCCESS;
}

qg_status qg_subspace_scratch_size(
    int64_t rows,
    int64_t cols,
    int64_t rank,
    int32_t sides,
    qg_format gemm_format,
    const qg_backend *backend,
    const qg_linalg *linalg,
    size_t *bytes) {
    qg_status status = check_tables(backend, linalg);
    if (status == QG_SUCCESS) {
        status = qg_check_sizes("gradient", rows, cols);
    }
    if (status == QG_SUCCESS) {
        status = qg_check_sizes("basis", rank, qg_larger(rows, cols));
    }
    if (status != QG_SUCCESS) {
        return status;
    }
    if (gemm_format != QG_FLOAT32 && gemm_format != QG_BFLOAT16) {
        return qg_fail(QG_UNSUPPORTED, "gemm_format %d: expected FLOAT32 or BFLOAT16", (int)gemm_format);
    }
    if (rank > qg_larger(rows, cols)) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "rank: expected at most %lld, got %lld", (long long)qg_larger(rows, cols),
            (long long)rank);
    }
    if ((sides != 1 && sides != 2) || bytes == NULL) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "expected 1 or 2 sides and a place for the size, got %d and %s", (int)sides,
            bytes == NULL ? "NULL" : "one");
    }
    *bytes = rows == 0 || cols == 0 || rank == 0 ? 0 : make_plan(rows, cols, rank, sides, linalg).bytes;
    return qg_finish(backend, QG_SUCCESS); /* work_size cannot say that it failed */
}

/* ---------------------------------------------------------------- a job */

static job make_job(const plan *p, void *scratch, const qg_backend *backend, const qg_linalg *linalg) {
    char *memory = qg_aligned(scratch);
    return (job){
        .backend = backend,
        .linalg = linalg,
        .gemm_format = QG_FLOAT32,
        .plan = *p,
        .current = (float *)(memory + p->current),
        .spare = (float *)(memory + p->spare),
        .gram = (float *)(memory + p->gram),
        .inverse = (float *)(memory + p->inverse),
        .tile = memory + p->tile,
        .work = memory + p->work,
        .device = (numbers *)(memory + p->numbers),
        .scale = 1.0f,
        .looking = 1,
    };
}

/* The one place where the host waits for the device. */
static void look(job *j) {
    j->backend->fetch(&j->seen, j->device, sizeof j->seen, j->backend->queue);
}

static void sum_squares(const job *j, double *out, const void *source, qg_format format, int64_t count) {
    j->backend->sum_squares(out, source, format, count, j->backend->queue);
}

/* target [rows, cols] <- source, both contiguous. */
static void copy(
    const job *j,
    void *target,
    qg_format target_format,
    const void *source,
    qg_format source_format,
    int64_t rows,
    int64_t cols) {
    const qg_cast_item item = {target, source, source_format, rows, cols, cols};
    j->backend->cast(&item, 1, target_format, j->backend->queue);
}

static void swap(job *j) {
    float *other = j->current;
    j->current = j->spare;
    j->spare = other;
}

/* A power of two that brings max |G| to about 1; 1 where that is of ordinary size. Never a denormal, nor taken from one:
 * the host may read denormals as zeros. */
static float scale_of(float absmax) {
    int exponent;
    if (absmax >= SMALL && absmax <= LARGE) {
        return 1.0f;
    }
    if (absmax < FLT_MIN) {
        return 0x1p126f;
    }
    frexpf(absmax, &exponent);
    return ldexpf(1.0f, exponent > 127 ? -126 : 1 - exponent);
}

static qg_status gemm32(
    const job *j,
    int64_t m,
    int64_t n,
    int64_t k,
    const float *a,
    int64_t a_row_stride,
    const float *b,
    int64_t b_row_stride,
    int64_t b_col_stride,
    float *c,
    int64_t c_row_stride) {
    const qg_status status = j->linalg->gemm(
        j->linalg->context, QG_FLOAT32, 0, m, n, k, a, a_row_stride, 1, b, b_row_stride, b_col_stride, c, c_row_stride);
    return qg_from_linalg("gemm", status);
}

/* ---------------------------------------------------------------- orthonormal rows */

/* gram = M M^T, the lower triangle in blocks, then its distance from I and the shift. */
static qg_status make_gram(job *j, int64_t rank, int64_t length) {
    for (int64_t i = 0; i < rank; i += GRAM_ROWS) {
        const int64_t rows = qg_smaller(GRAM_ROWS, rank - i);
        qg_status status = gemm32(
            j, rows, i + rows, length, j->current + i * length, length, j->current, 1, length, j->gram + i * rank,
            rank);
        if (status != QG_SUCCESS) {
            return status;
        }
    }
    j->backend->shift_gram(&j->device->distance[j->bases], j->gram, rank, j->backend->queue);
    return QG_SUCCESS;
}

/* M <- L^-1 M with L L^T = gram. */
static qg_status divide_by_root(job *j, int64_t rank, int64_t length, int32_t *failed) {
    qg_status status = qg_from_linalg("potrf", j->linalg->potrf(j->linalg, rank, j->gram, failed, j->work));
    if (status == QG_SUCCESS && j->looking) {
        look(j);
        j->broken = j->seen.failed[0][0];
        if (j->broken) {
            return QG_SUCCESS;
        }
    }
    if (status == QG_SUCCESS) {
        status = qg_from_linalg("trtri", j->linalg->trtri(j->linalg, rank, j->gram, j->inverse, j->work));
    }
    for (int64_t i = 0; status == QG_SUCCESS && i < rank; i += GRAM_ROWS) {
        const int64_t rows = qg_smaller(GRAM_ROWS, rank - i);
        status = gemm32(
            j, rows, length, i + rows, j->inverse + i * rank, rank, j->current, length, 1, j->spare + i * length,
            length);
    }
    swap(j);
    return status;
}

static qg_status householder(job *j, int64_t rank, int64_t length) {
    qg_status status = qg_from_linalg("qr", j->linalg->qr(j->linalg, rank, length, j->current, j->spare, j->work));
    if (status != QG_SUCCESS) {
        return status;
    }
    swap(j);
    j->fallbacks++;
    status = make_gram(j, rank, length);
    look(j);
    j->broken = !(j->seen.distance[0] < TOLERABLE);
    return status;
}

static qg_status orthonormalise_looking(job *j, int64_t rank, int64_t length) {
    for (int pass = 0; pass < MOST_PASSES; pass++) {
        qg_status status = make_gram(j, rank, length);
        look(j);
        if (status != QG_SUCCESS || j->seen.distance[0] < CLOSE) {
            return status;
        }
        status = divide_by_root(j, rank, length, &j->device->failed[0][0]);
        if (status != QG_SUCCESS || j->broken) {
            return status != QG_SUCCESS ? status : householder(j, rank, length);
        }
    }
    return householder(j, rank, length);
}

static qg_status orthonormalise_blindly(job *j, int64_t rank, int64_t length) {
    qg_status status = QG_SUCCESS;
    for (int pass = 0; status == QG_SUCCESS && pass < USUAL_PASSES; pass++) {
        status = make_gram(j, rank, length);
        if (status == QG_SUCCESS) {
            status = divide_by_root(j, rank, length, &j->device->failed[j->bases][pass]);
        }
    }
    if (status == QG_SUCCESS) {
        status = make_gram(j, rank, length);
    }
    j->bases++;
    return status;
}

/* The rows of `current` [rank, length] become orthonormal; j->broken where that cannot be. Each row keeps
 * a positive coefficient on what it was. */
static qg_status orthonormalise(job *j, int64_t rank, int64_t length) {
    return j->looking ? orthonormalise_looking(j, rank, length) : orthonormalise_blindly(j, rank, length);
}

/* After a pass with shift s the squares of Z's singular values are x / (x + s), so what is missing from r bounds the
 * least of them by 1 - MISSING. */
static int well_conditioned(double squares, int64_t rank) {
    return (double)rank - squares < MISSING;
}

/* The rows of Z: orthonormal, or after one pass as good as that. Q <- Q T with T upper triangular and positive on its
 * diagonal changes neither the span nor the orientation of Y = orth(G^T Z), so more passes would be for nothing. */
static qg_status condition(job *j, int64_t rank, int64_t length) {
    const int slot = j->looking ? 0 : j->bases - 1;
    qg_status status = make_gram(j, rank, length);
    if (status == QG_SUCCESS) {
        int32_t *failed = j->looking ? &j->device->failed[0][0] : &j->device->failed_between[slot];
        status = divide_by_root(j, rank, length, failed);
    }
    if (status != QG_SUCCESS) {
        return status;
    }
    if (j->broken) {
        return householder(j, rank, length);
    }
    sum_squares(j, &j->device->conditioned[slot], j->current, QG_FLOAT32, rank * length);
    if (j->looking) {
        look(j);
        return well_conditioned(j->seen.conditioned[0], rank) ? status : orthonormalise(j, rank, length);
    }
    return status;
}

/* The rows of a basis, orthonormal, in `current`; broken for a basis of zeros or with values that are not finite
 * (or of no size that a basis has). */
static qg_status load_basis(job *j, const float *basis, int64_t rank, int64_t dim) {
    sum_squares(j, &j->device->squares, basis, QG_FLOAT32, rank * dim);
    if (j->looking) {
        look(j);
        j->broken = !(j->seen.squares >= LEAST && j->seen.squares <= 1.0 / LEAST);
        if (j->broken) {
            return QG_SUCCESS;
        }
    }
    /* Rows of norm 1 on average: a basis that is nearly orthonormal, as a stored one is, then needs no shift, which
     * would cost it a second pass. */
    j->backend->normalise(j->current, basis, QG_FLOAT32, rank * dim, rank, &j->device->squares, j->backend->queue);
    return orthonormalise(j, rank, dim);
}

/* ---------------------------------------------------------------- products with G */

static char *half_of(const job *j) {
    return (char *)j->spare + j->plan.half;
}

/* Where a product lies: the spare buffer, or with bfloat16 GEMMs its second half, the first one holding the factor. */
static void *product_of(const job *j) {
    return j->gemm_format == QG_FLOAT32 ? (void *)j->spare : half_of(j);
}

/* Part of the product: rows (along_rows) or columns first .. first + count of G, cast where the GEMM needs it. */
static qg_status multiply_part(const job *j, int64_t rank, int along_rows, int64_t first, int64_t count) {
    const int64_t length = along_rows ? j->cols : j->rows, out = along_rows ? j->rows : j->cols;
    const void *factor = j->gemm_format == QG_FLOAT32 ? j->current : j->spare;
    const void *g = qg_float_at(j->gradient, j->grad_format, along_rows ? first * j->cols : first);
    int64_t stride = j->cols;
    if (j->grad_format != j->gemm_format || j->scale != 1.0f) {
        const int64_t rows = along_rows ? count : j->rows, cols = along_rows ? j->cols : count;
        j->backend->scaled_cast(
            j->tile, j->gemm_format, g, j->grad_format, rows, cols, j->cols, j->scale, j->backend->queue);
        g = j->tile;
        stride = cols;
    }
    void *target = (void *)qg_float_at(product_of(j), j->gemm_format, first);
    const qg_status status = j->linalg->gemm(
        j->linalg->context, j->gemm_format, 0, rank, count, length, factor, length, 1, g, along_rows ? 1 : stride,
        along_rows ? stride : 1, target, out);
    return qg_from_linalg("gemm", status);
}

/* product = M G^T (along_rows, M [rank, cols]) or M G (M [rank, rows]) of M = current, and its squares. */
static qg_status multiply(job *j, int64_t rank, int along_rows) {
    const int64_t out = along_rows ? j->rows : j->cols, length = along_rows ? j->cols : j->rows;
    const int direct = j->grad_format == j->gemm_format && j->scale == 1.0f;
    const int64_t tile = direct ? out : along_rows ? j->plan.tile_rows : j->plan.tile_cols;
    if (j->gemm_format != QG_FLOAT32) {
        copy(j, j->spare, j->gemm_format, j->current, QG_FLOAT32, rank, length);
    }
    for (int64_t first = 0; first < out; first += tile) {
        qg_status status = multiply_part(j, rank, along_rows, first, qg_smaller(tile, out - first));
        if (status != QG_SUCCESS) {
            return status;
        }
    }
    sum_squares(j, &j->device->product_squares, product_of(j), j->gemm_format, rank * out);
    return QG_SUCCESS;
}

/* current = product / its norm; broken where it is nothing but rounding. */
static void take_product(job *j, int64_t rank, int64_t length) {
    if (j->looking) {
        look(j);
        j->broken = !(j->seen.product_squares >= LEAST);
        if (j->broken) {
            return;
        }
    }
    float *target = j->gemm_format == QG_FLOAT32 ? j->spare : j->current;
    j->backend->normalise(
        target, product_of(j), j->gemm_format, rank * length, 1, &j->device->product_squares, j->backend->queue);
    if (target == j->spare) {
        swap(j);
    }
}

/* ||G||^2 and, where the job looks, the power of two that G is scaled by; broken where G is zero or not finite. */
static void measure_gradient(job *j) {
    const int64_t count = j->rows * j->cols;
    const qg_array gradient = {j->gradient, count, j->grad_format};
    j->backend->absmax(&j->device->gradient_absmax, &gradient, 1, j->backend->queue);
    sum_squares(j, &j->device->gradient_squares, j->gradient, j->grad_format, count);
    if (j->looking) {
        look(j);
        const float absmax = j->seen.gradient_absmax;
        j->broken = !(j->seen.gradient_squares > 0.0) || isinf(absmax);
        j->scale = j->broken ? 1.0f : scale_of(absmax);
    }
}

static double share(const job *j, double squares) {
    const double scale = j->scale, energy = squares / (j->seen.gradient_squares * scale * scale);
    return energy < 1.0 ? energy : 1.0;
}

/* ---------------------------------------------------------------- refresh */

typedef struct refresh {
    job *j;
    float *basis;
    int64_t rank;
    int64_t dim;
    int64_t other;
    int right;
    int32_t steps;
} refresh;

/* From the product G P^T in place to the product with the new basis, which is `current` then. */
static qg_status power_step(const refresh *r) {
    job *j = r->j;
    qg_status status = QG_SUCCESS;
    take_product(j, r->rank, r->other);
    if (!j->broken && r->rank <= r->other) { /* more vectors than Z has rows: any factor of the right range will do */
        status = condition(j, r->rank, r->other);
    }
    if (status == QG_SUCCESS && !j->broken) {
        status = multiply(j, r->rank, !r->right);
    }
    if (status == QG_SUCCESS && !j->broken) {
        take_product(j, r->rank, r->dim);
    }
    if (status == QG_SUCCESS && !j->broken) {
        status = orthonormalise(j, r->rank, r->dim);
    }
    return status == QG_SUCCESS && !j->broken ? multiply(j, r->rank, r->right) : status;
}

/* Whether all that a job which did not look has assumed was so. */
static int usual(const job *j, int64_t rank, int has_z) {
    int good = j->seen.gradient_absmax >= SMALL && j->seen.gradient_absmax <= LARGE;
    for (int i = 0; i < j->bases; i++) {
        good = good && j->seen.distance[i] < CLOSE;
        for (int pass = 0; pass < USUAL_PASSES; pass++) {
            good = good && j->seen.failed[i][pass] == 0;
        }
    }
    for (int i = 0; has_z && i + 1 < j->bases; i++) {
        good = good && j->seen.failed_between[i] == 0 && well_conditioned(j->seen.conditioned[i], rank);
    }
    return good;
}

/* The steps from the old basis; `report` and the new basis in `current`, unless j->broken. */
static qg_status take_steps(const refresh *r, qg_subspace_report *report) {
    job *j = r->j;
    measure_gradient(j);
    qg_status status = j->broken ? QG_SUCCESS : load_basis(j, r->basis, r->rank, r->dim);
    if (status == QG_SUCCESS && !j->broken) {
        status = multiply(j, r->rank, r->right);
    }
    if (status == QG_SUCCESS && !j->broken) {
        sum_squares(j, &j->device->first_squares, product_of(j), j->gemm_format, r->rank * r->other);
    }
    const int32_t most = r->steps == 0 ? (int32_t)(sizeof ENOUGH / sizeof *ENOUGH) : r->steps;
    double before = 0.0;
    while (status == QG_SUCCESS && !j->broken && report->power_steps < most) {
        status = power_step(r);
        if (status != QG_SUCCESS || j->broken) {
            break;
        }
        report->power_steps++;
        if (report->power_steps < most && r->steps != 0) {
            continue;
        }
        look(j);
        j->broken = !j->looking && !usual(j, r->rank, r->rank <= r->other);
        report->energy_old = share(j, j->seen.first_squares);
        report->energy_new = share(j, j->seen.product_squares);
        before = report->power_steps == 1 ? report->energy_old : before;
        if (r->steps == 0 && before >= ENOUGH[report->power_steps - 1] * report->energy_new) {
            break;
        }
        before = report->energy_new;
    }
    return status;
}

static qg_status check_refresh(
    const float *basis,
    int64_t rank,
    const void *gradient,
    qg_format grad_format,
    int64_t rows,
    int64_t cols,
    qg_side side,
    const qg_subspace_params *params,
    const qg_subspace_report *report) {
    if (params == NULL || params->struct_size != sizeof *params || params->steps < 0) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "params: expected a qg_subspace_params with struct_size %zu and steps >= 0",
            sizeof *params);
    }
    if (report == NULL || report->struct_size != sizeof *report) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "report: expected a qg_subspace_report with struct_size %zu", sizeof *report);
    }
    if (side != QG_RIGHT && side != QG_LEFT) {
        return qg_fail(QG_UNSUPPORTED, "side %d is neither right (0) nor left (1)", (int)side);
    }
    qg_status status = check_gradient(rows, cols, gradient, grad_format);
    return status != QG_SUCCESS ? status : check_basis("basis", basis, rank, side == QG_RIGHT ? cols : rows);
}

qg_status qg_subspace_refresh(
    float *basis,
    int64_t rank,
    const void *gradient,
    qg_format grad_format,
    int64_t rows,
    int64_t cols,
    qg_side side,
    const qg_subspace_params *params,
    qg_subspace_report *report,
    void *scratch,
    size_t scratch_size,
    const qg_backend *backend,
    const qg_linalg *linalg) {
    size_t need = 0;
    qg_status status = check_refresh(basis, rank, gradient, grad_format, rows, cols, side, params, report);
    if (status == QG_SUCCESS) {
        status = qg_subspace_scratch_size(rows, cols, rank, 1, params->gemm_format, backend, linalg, &need);
    }
    if (status != QG_SUCCESS || (status = qg_check_scratch(scratch, scratch_size, need)) != QG_SUCCESS) {
        return status;
    }
    const qg_subspace_report nothing = {.struct_size = sizeof *report, .kept = 1};
    *report = nothing;
    if (need == 0) {
        return QG_SUCCESS;
    }
    const plan p = make_plan(rows, cols, rank, 1, linalg);
    const int right = side == QG_RIGHT;
    for (int looking = !backend->asynchronous || params->steps > BLIND_STEPS; looking < 2; looking++) {
        job j = make_job(&p, scratch, backend, linalg);
        j.gradient = gradient;
        j.grad_format = grad_format;
        j.gemm_format = params->gemm_format;
        j.rows = rows;
        j.cols = cols;
        j.looking = looking;
        const refresh r = {
            &j,
            basis,
            rank,
            right ? cols : rows,
            right ? rows : cols,
            right,
            params->steps,
        };
        qg_subspace_report found = nothing;
        status = take_steps(&r, &found);
        if (status != QG_SUCCESS) {
            return qg_finish(backend, status);
        }
        report->fallbacks = j.fallbacks;
        if (!j.broken) {
            found.kept = 0;
            found.fallbacks = j.fallbacks;
            *report = found;
            copy(&j, basis, QG_FLOAT32, j.current, QG_FLOAT32, rank, r.dim);
            return qg_finish(backend, QG_SUCCESS);
        }
    }
    return qg_finish(backend, QG_SUCCESS);
}

/* ---------------------------------------------------------------- random bases */

qg_status qg_subspace_random(
    float *basis,
    int64_t rank,
    int64_t dim,
    uint64_t seed,
    uint32_t id,
    uint32_t draw,
    void *scratch,
    size_t scratch_size,
    const qg_backend *backend,
    const qg_linalg *linalg) {
    size_t need = 0;
    qg_status status = qg_check_sizes("basis", rank, dim);
    if (status == QG_SUCCESS) {
        status = check_basis("basis", basis, rank, dim);
    }
    if (status == QG_SUCCESS) {
        status = qg_subspace_scratch_size(1, dim, rank, 1, QG_FLOAT32, backend, linalg, &need);
    }
    if (status != QG_SUCCESS || (status = qg_check_scratch(scratch, scratch_size, need)) != QG_SUCCESS || need == 0) {
        return status;
    }
    const plan p = make_plan(1, dim, rank, 1, linalg);
    const qg_noise_stream stream = {.seed = seed, .step = (UINT64_C(1) << 63) + draw, .id = id};
    job j = make_job(&p, scratch, backend, linalg);
    backend->bell(j.spare, &stream, rank * dim, backend->queue);
    status = load_basis(&j, j.spare, rank, dim);
    if (status == QG_SUCCESS && !j.broken) {
        copy(&j, basis, QG_FLOAT32, j.current, QG_FLOAT32, rank, dim);
    }
    status = qg_finish(backend, status);
    if (status == QG_SUCCESS && j.broken) {
        return qg_fail(QG_INTERNAL, "the random vectors could not be orthonormalised");
    }
    return status;
}

/* ---------------------------------------------------------------- captured energy */

/* product = what a basis on one side captures, of a gradient already measured. */
static qg_status capture(job *j, const float *basis, int64_t rank, int right) {
    qg_status status = load_basis(j, basis, rank, right ? j->cols : j->rows);
    return status == QG_SUCCESS && !j->broken ? multiply(j, rank, right) : status;
}

/* product = Q_left (G Q_right^T); the orthonormal left basis waits in `kept` meanwhile. */
static qg_status capture_both(job *j, const float *right, int64_t right_rank, const float *left, int64_t left_rank) {
    float *kept = (float *)((char *)j->current + j->plan.kept); /* current is the first buffer still */
    qg_status status = load_basis(j, left, left_rank, j->rows);
    if (status != QG_SUCCESS || j->broken) {
        return status;
    }
    copy(j, kept, QG_FLOAT32, j->current, QG_FLOAT32, left_rank, j->rows);
    status = capture(j, right, right_rank, 1);
    if (status != QG_SUCCESS || j->broken) {
        return status;
    }
    if (j->gemm_format != QG_FLOAT32) {
        copy(j, j->current, QG_FLOAT32, product_of(j), j->gemm_format, right_rank, j->rows);
        swap(j);
    }
    status = gemm32(j, left_rank, right_rank, j->rows, kept, j->rows, j->spare, 1, j->rows, j->current, right_rank);
    sum_squares(j, &j->device->product_squares, j->current, QG_FLOAT32, left_rank * right_rank);
    return status;
}

qg_status qg_captured_energy(
    double *energy,
    const void *gradient,
    qg_format grad_format,
    int64_t rows,
    int64_t cols,
    const float *right,
    int64_t right_rank,
    const float *left,
    int64_t left_rank,
    qg_format gemm_format,
    void *scratch,
    size_t scratch_size,
    const qg_backend *backend,
    const qg_linalg *linalg) {
    if (energy == NULL) {
        return qg_fail(QG_INVALID_ARGUMENT, "expected a place for the energy, got NULL");
    }
    const int64_t rank = qg_larger(right_rank, left_rank);
    const int32_t sides = right_rank > 0 && left_rank > 0 ? 2 : 1;
    size_t need = 0;
    qg_status status = check_gradient(rows, cols, gradient, grad_format);
    if (status == QG_SUCCESS) {
        status = check_basis("right", right, right_rank, cols);
    }
    if (status == QG_SUCCESS) {
        status = check_basis("left", left, left_rank, rows);
    }
    if (status == QG_SUCCESS) {
        status = qg_subspace_scratch_size(rows, cols, rank, sides, gemm_format, backend, linalg, &need);
    }
    if (status != QG_SUCCESS || (status = qg_check_scratch(scratch, scratch_size, need)) != QG_SUCCESS) {
        return status;
    }
    if (rank == 0) {
        return qg_fail(QG_INVALID_ARGUMENT, "expected vectors on at least one side, got none");
    }
    *energy = 0.0;
    if (need == 0) {
        return QG_SUCCESS;
    }
    const plan p = make_plan(rows, cols, rank, sides, linalg);
    job j = make_job(&p, scratch, backend, linalg);
    j.gradient = gradient;
    j.grad_format = grad_format;
    j.gemm_format = gemm_format;
    j.rows = rows;
    j.cols = cols;
    measure_gradient(&j);
    if ((status = qg_finish(backend, QG_SUCCESS)) != QG_SUCCESS) {
        return status;
    }
    if (isinf(j.seen.gradient_absmax)) {
        return qg_fail(QG_INVALID_ARGUMENT, "gradient: holds a value that is not finite");
    }
    if (j.broken) {
        return QG_SUCCESS; /* zero */
    }
    status = sides == 2       ? capture_both(&j, right, right_rank, left, left_rank)
             : right_rank > 0 ? capture(&j, right, right_rank, 1)
                              : capture(&j, left, left_rank, 0);
    look(&j);
    status = qg_finish(backend, status);
    if (status == QG_SUCCESS && j.broken) {
        return qg_fail(QG_INVALID_ARGUMENT, "basis: expected finite vectors, not all zero");
    }
    if (status == QG_SUCCESS) {
        *energy = share(&j, j.seen.product_squares);
    }
    return status;
}
