/* Refreshes, random bases and captured energies over the plain gemm: orthonormality and energies against double, what
 * is kept, what is refused, what fails, and the path that looks at the device's numbers once. */
#include "harness.h"
#include "reference.h"

#include <stdio.h>

enum { ROWS = 45, COLS = 33, RANK = 9, MOST_ROWS = 64 };

static ref_gemm_context context;
static qg_linalg linalg;

/* ---------------------------------------------------------------- in double, the short way */

static double element(const void *g, qg_format format, int64_t row, int64_t col, int64_t cols) {
    return ref_load(format, g, row * cols + col);
}

/* Gram-Schmidt, twice, of the rows of a basis. */
static void orthonormal_rows(double *q, const float *basis, int64_t rank, int64_t dim) {
    for (int64_t i = 0; i < rank; i++) {
        for (int64_t k = 0; k < dim; k++)
            q[i * dim + k] = basis[i * dim + k];
        for (int twice = 0; twice < 2; twice++) {
            for (int64_t j = 0; j < i; j++) {
                double dot = 0.0;
                for (int64_t k = 0; k < dim; k++)
                    dot += q[i * dim + k] * q[j * dim + k];
                for (int64_t k = 0; k < dim; k++)
                    q[i * dim + k] -= dot * q[j * dim + k];
            }
        }
        double norm = 0.0;
        for (int64_t k = 0; k < dim; k++)
            norm += q[i * dim + k] * q[i * dim + k];
        for (int64_t k = 0; k < dim; k++)
            q[i * dim + k] /= sqrt(norm);
    }
}

static double exact_energy(
    const void *g,
    qg_format format,
    int64_t rows,
    int64_t cols,
    int right,
    const float *basis,
    int64_t rank) {
    const int64_t dim = right ? cols : rows, other = right ? rows : cols;
    double *q = malloc((size_t)(rank * dim) * sizeof(double)), captured = 0.0, total = 0.0;
    orthonormal_rows(q, basis, rank, dim);
    for (int64_t o = 0; o < other; o++) {
        for (int64_t i = 0; i < rank; i++) {
            double sum = 0.0;
            for (int64_t k = 0; k < dim; k++)
                sum += q[i * dim + k] * (right ? element(g, format, o, k, cols) : element(g, format, k, o, cols));
            captured += sum * sum;
        }
    }
    for (int64_t i = 0; i < rows * cols; i++)
        total += (double)ref_load(format, g, i) * ref_load(format, g, i);
    free(q);
    return captured / total;
}

static double gap(const float *basis, int64_t rank, int64_t dim) {
    double worst = 0.0;
    for (int64_t i = 0; i < rank; i++) {
        for (int64_t j = 0; j < rank; j++) {
            double sum = i == j ? -1.0 : 0.0;
            for (int64_t k = 0; k < dim; k++)
                sum += (double)basis[i * dim + k] * basis[j * dim + k];
            worst = isfinite(sum) ? fmax(worst, fabs(sum)) : (double)INFINITY;
        }
    }
    return worst;
}

/* ---------------------------------------------------------------- gradients and calls */

static void fill(void *g, qg_format format, int64_t rows, int64_t cols, const char *kind) {
    for (int64_t i = 0; i < rows * cols; i++) {
        const int64_t row = i / cols, col = i % cols;
        double value = random_normal();
        if (strcmp(kind, "zero") == 0 || (strcmp(kind, "one entry") == 0 && i != 0))
            value = 0.0;
        if (strcmp(kind, "constant") == 0)
            value = -2.0;
        if (strcmp(kind, "rank one") == 0)
            value = (double)(row + 1) * cos((double)col);
        if (strcmp(kind, "1e-38") == 0)
            value *= 1e-38;
        if (strcmp(kind, "3e38") == 0)
            value = 3e38 * fmax(-1.0, fmin(1.0, value));
        if (strcmp(kind, "nan") == 0 && i == rows * cols - 1)
            value = NAN;
        if (strcmp(kind, "inf") == 0 && i == 0)
            value = -INFINITY;
        if (strcmp(kind, "orthogonal") == 0 && (row < RANK || col < RANK))
            value = 0.0;
        ref_store(format, g, i, (float)value);
    }
}

typedef struct call {
    const qg_backend *backend;
    int64_t rows;
    int64_t cols;
    int64_t rank;
    qg_format grad_format;
    qg_format gemm_format;
    qg_side side;
    int32_t steps;
} call;

static int64_t dim_of(const call *c) {
    return c->side == QG_RIGHT ? c->cols : c->rows;
}

static qg_status refresh(const call *c, float *basis, const void *gradient, qg_subspace_report *report) {
    const qg_subspace_params params = {sizeof params, c->steps, c->gemm_format};
    size_t size = 0;
    CHECK_OK(qg_subspace_scratch_size(c->rows, c->cols, c->rank, 1, c->gemm_format, c->backend, &linalg, &size));
    *report = (qg_subspace_report){.struct_size = sizeof *report, .kept = 9, .energy_new = 9.0};
    return qg_subspace_refresh(
        basis, c->rank, gradient, c->grad_format, c->rows, c->cols, c->side, &params, report, guarded(size, 4), size,
        c->backend, &linalg);
}

static float *random_rows(int64_t rank, int64_t dim) {
    float *basis = guarded((size_t)(rank * dim) * sizeof(float), 4);
    for (int64_t i = 0; i < rank * dim; i++)
        basis[i] = (float)random_normal();
    return basis;
}

static void test_refresh(call c, const char *kind) {
    const int64_t dim = dim_of(&c);
    float *basis = random_rows(c.rank, dim);
    void *gradient = guarded((size_t)(c.rows * c.cols) * ref_size(c.grad_format), ref_size(c.grad_format));
    fill(gradient, c.grad_format, c.rows, c.cols, kind);
    const int right = c.side == QG_RIGHT;
    const double before = exact_energy(gradient, c.grad_format, c.rows, c.cols, right, basis, c.rank);
    /* bfloat16 rounds G, Q and their product by 2^-9 on average; where few entries count, all in one direction. */
    const double tolerance = c.gemm_format == QG_FLOAT32 ? 3e-5 : 1.2e-2;
    qg_subspace_report report;
    CHECK_OK(refresh(&c, basis, gradient, &report));
    const double after = exact_energy(gradient, c.grad_format, c.rows, c.cols, right, basis, c.rank);
    char name[120];
    snprintf(
        name, sizeof name, "%s, %s, %lld of %lld, steps %d", c.backend->name, kind, (long long)c.rank, (long long)dim,
        c.steps);
    CHECK(
        !report.kept && gap(basis, c.rank, dim) < 1e-4, "%s: kept %d, gap %g", name, report.kept,
        gap(basis, c.rank, dim));
    CHECK(
        c.steps != 0 ? report.power_steps == c.steps : report.power_steps >= 1 && report.power_steps <= 3,
        "%s: %d steps", name, report.power_steps);
    CHECK(fabs(report.energy_old - before) < tolerance, "%s: old %g, want %g", name, report.energy_old, before);
    CHECK(fabs(report.energy_new - after) < tolerance, "%s: new %g, want %g", name, report.energy_new, after);
    CHECK(after >= before - tolerance, "%s: %g after %g", name, after, before);
    RELEASE("%s", name);
}

static void test_kept(call c, const char *kind) {
    const int64_t dim = dim_of(&c);
    float *basis = guarded((size_t)(c.rank * dim) * sizeof(float), 0);
    for (int64_t i = 0; i < c.rank * dim; i++)
        basis[i] = i / dim == i % dim ? 0.75f : 0.0f;
    float *before = malloc((size_t)(c.rank * dim) * sizeof(float));
    memcpy(before, basis, (size_t)(c.rank * dim) * sizeof(float));
    void *gradient = guarded((size_t)(c.rows * c.cols) * ref_size(c.grad_format), ref_size(c.grad_format));
    fill(gradient, c.grad_format, c.rows, c.cols, kind);
    qg_subspace_report report;
    CHECK_OK(refresh(&c, basis, gradient, &report));
    CHECK(
        report.kept == 1 && report.power_steps == 0 && report.energy_old == 0.0 && report.energy_new == 0.0,
        "%s: kept %d, %d steps", kind, report.kept, report.power_steps);
    CHECK_BYTES(basis, before, (size_t)(c.rank * dim) * sizeof(float), "%s: the basis", kind);
    free(before);
    RELEASE("%s", kind);
}

/* ---------------------------------------------------------------- one wait for the device */

static int64_t fetches;

static void counting_fetch(void *host, const void *device, size_t size, void *queue) {
    (void)queue;
    fetches++;
    memcpy(host, device, size);
}

/* A table whose numbers are dear: as many waits as expected, and the basis of the path that looks. */
static void test_asynchronous(call c, const char *kind, int64_t usual, double close) {
    qg_backend dear = *c.backend;
    dear.asynchronous = 1;
    dear.fetch = counting_fetch;
    const int64_t dim = dim_of(&c);
    float *looked = random_rows(c.rank, dim), *blind = guarded_copy(looked, (size_t)(c.rank * dim) * sizeof(float), 0);
    void *gradient = guarded((size_t)(c.rows * c.cols) * ref_size(c.grad_format), ref_size(c.grad_format));
    fill(gradient, c.grad_format, c.rows, c.cols, kind);
    qg_subspace_report a, b;
    CHECK_OK(refresh(&c, looked, gradient, &a));
    c.backend = &dear;
    fetches = 0;
    CHECK_OK(refresh(&c, blind, gradient, &b));
    CHECK(
        usual < 0 ? fetches > -usual : fetches == usual, "%s, steps %d: %lld waits, expected %lld", kind, c.steps,
        (long long)fetches, (long long)usual);
    CHECK(
        a.kept == b.kept && a.power_steps == b.power_steps && fabs(a.energy_new - b.energy_new) < 1e-5 &&
            fabs(a.energy_old - b.energy_old) < 1e-5,
        "%s, steps %d: steps %d and %d, energies %g and %g", kind, c.steps, a.power_steps, b.power_steps, a.energy_new,
        b.energy_new);
    double worst = 0.0;
    for (int64_t i = 0; i < c.rank * dim; i++)
        worst = fmax(worst, fabs((double)looked[i] - blind[i]));
    CHECK(worst < close, "%s, steps %d: bases differ by %g", kind, c.steps, worst);
    CHECK(b.kept || gap(blind, c.rank, dim) < 1e-4, "%s: gap %g", kind, gap(blind, c.rank, dim));
    RELEASE("asynchronous, %s", kind);
}

/* ---------------------------------------------------------------- failures and refusals */

static void test_failing_gemm(call c) {
    const int64_t dim = dim_of(&c);
    for (int64_t at = 1;; at++) {
        float *basis = random_rows(c.rank, dim);
        float *gradient = guarded((size_t)(c.rows * c.cols) * sizeof(float), 0);
        float *before = malloc((size_t)(c.rank * dim) * sizeof(float));
        memcpy(before, basis, (size_t)(c.rank * dim) * sizeof(float));
        fill(gradient, QG_FLOAT32, c.rows, c.cols, "noise");
        qg_subspace_report report;
        context = (ref_gemm_context){.fail_at = at};
        const qg_status status = refresh(&c, basis, gradient, &report);
        const int reached = context.calls >= at;
        context = (ref_gemm_context){0};
        CHECK(status == (reached ? QG_INTERNAL : QG_SUCCESS), "product %lld: status %d", (long long)at, (int)status);
        if (reached)
            CHECK(strncmp(qg_last_error(), "linalg: ", 8) == 0, "product %lld: '%s'", (long long)at, qg_last_error());
        if (reached)
            CHECK_BYTES(basis, before, (size_t)(c.rank * dim) * sizeof(float), "product %lld", (long long)at);
        free(before);
        RELEASE("product %lld", (long long)at);
        if (!reached) {
            CHECK(at > 10, "only %lld products", (long long)at - 1);
            return;
        }
    }
}

#define REFUSED(status, expected, words) check_refused((status), (expected), (words), __LINE__)
static void check_refused(qg_status status, qg_status expected, const char *words, int line) {
    CHECK(
        status == expected && strstr(qg_last_error(), words) != NULL, "line %d: status %d, %s", line, (int)status,
        qg_last_error());
}

static void test_refusals(const qg_backend *backend) {
    static float g[12 * 8], basis[3 * 8], left[2 * 12];
    static char scratch[1 << 20];
    const qg_status bad = QG_INVALID_ARGUMENT;
    const size_t size = sizeof scratch;
    qg_subspace_params params = {sizeof params, 0, QG_FLOAT32};
    qg_subspace_report report = {.struct_size = sizeof report, .kept = 5};
    size_t bytes = 7;
    double energy = 5.0;
    for (int i = 0; i < 12 * 8; i++)
        g[i] = (float)random_normal();
    memset(basis, 0x3d, sizeof basis);
#define REFRESH(basis, rank, g, format, rows, cols, side, params, report, scratch, size, backend, linalg) \
    qg_subspace_refresh(basis, rank, g, format, rows, cols, side, params, report, scratch, size, backend, linalg)
    REFUSED(
        REFRESH(basis, 3, g, QG_FLOAT32, 12, 8, QG_RIGHT, NULL, &report, scratch, size, backend, &linalg), bad,
        "params");
    params.steps = -1;
    REFUSED(
        REFRESH(basis, 3, g, QG_FLOAT32, 12, 8, QG_RIGHT, &params, &report, scratch, size, backend, &linalg), bad,
        "steps >= 0");
    params.steps = 0;
    params.gemm_format = QG_FLOAT16;
    REFUSED(
        REFRESH(basis, 3, g, QG_FLOAT32, 12, 8, QG_RIGHT, &params, &report, scratch, size, backend, &linalg),
        QG_UNSUPPORTED, "gemm_format 2");
    params.gemm_format = QG_FLOAT32;
    REFUSED(
        REFRESH(basis, 3, g, QG_FLOAT32, 12, 8, QG_RIGHT, &params, NULL, scratch, size, backend, &linalg), bad,
        "report");
    REFUSED(
        REFRESH(basis, 3, g, QG_FLOAT32, 12, 8, 2, &params, &report, scratch, size, backend, &linalg), QG_UNSUPPORTED,
        "side 2");
    REFUSED(
        REFRESH(basis, 3, g, QG_INT8, 12, 8, QG_RIGHT, &params, &report, scratch, size, backend, &linalg),
        QG_UNSUPPORTED, "format 16");
    REFUSED(
        REFRESH(basis, 3, g, QG_FLOAT32, -1, 8, QG_RIGHT, &params, &report, scratch, size, backend, &linalg), bad,
        "gradient: expected sizes");
    REFUSED(
        REFRESH(basis, 3, NULL, QG_FLOAT32, 12, 8, QG_RIGHT, &params, &report, scratch, size, backend, &linalg), bad,
        "gradient: expected an array");
    REFUSED(
        REFRESH(NULL, 3, g, QG_FLOAT32, 12, 8, QG_RIGHT, &params, &report, scratch, size, backend, &linalg), bad,
        "basis: expected an array");
    REFUSED(
        REFRESH(basis, 9, g, QG_FLOAT32, 12, 8, QG_RIGHT, &params, &report, scratch, size, backend, &linalg), bad,
        "expected 0 to 8 vectors of length 8, got 9");
    REFUSED(
        REFRESH(basis, 3, g, QG_FLOAT32, 12, 8, QG_RIGHT, &params, &report, scratch, 100, backend, &linalg), bad,
        "got 100");
    REFUSED(
        REFRESH(basis, 3, g, QG_FLOAT32, 12, 8, QG_RIGHT, &params, &report, NULL, size, backend, &linalg), bad,
        "scratch");
    REFUSED(
        REFRESH(basis, 3, g, QG_FLOAT32, 12, 8, QG_RIGHT, &params, &report, scratch, size, NULL, &linalg), bad,
        "backend");
    REFUSED(
        REFRESH(basis, 3, g, QG_FLOAT32, 12, 8, QG_RIGHT, &params, &report, scratch, size, backend, NULL), bad,
        "linalg");
    qg_linalg partial = linalg;
    partial.qr = NULL;
    REFUSED(
        REFRESH(basis, 3, g, QG_FLOAT32, 12, 8, QG_RIGHT, &params, &report, scratch, size, backend, &partial), bad,
        "every member");
    for (size_t i = 0; i < sizeof basis; i++)
        CHECK(((char *)basis)[i] == 0x3d, "byte %zu of a refused basis", i);
    CHECK(report.kept == 5, "the report of a refused call");
    report.kept = 5;
    CHECK_OK(REFRESH(NULL, 0, g, QG_FLOAT32, 12, 8, QG_RIGHT, &params, &report, NULL, 0, backend, &linalg));
    CHECK_OK(REFRESH(basis, 3, NULL, QG_FLOAT32, 0, 8, QG_RIGHT, &params, &report, NULL, 0, backend, &linalg));
    CHECK(report.kept == 1, "an empty gradient: kept %d", report.kept);

    REFUSED(qg_subspace_scratch_size(12, 8, 3, 1, QG_FLOAT32, backend, &linalg, NULL), bad, "NULL");
    REFUSED(qg_subspace_scratch_size(12, 8, 3, 3, QG_FLOAT32, backend, &linalg, &bytes), bad, "1 or 2 sides");
    REFUSED(qg_subspace_scratch_size(12, 8, 13, 1, QG_FLOAT32, backend, &linalg, &bytes), bad, "at most 12");
    CHECK(bytes == 7, "a refused size");

    REFUSED(qg_subspace_random(basis, 9, 8, 0, 0, 0, scratch, size, backend, &linalg), bad, "expected 0 to 8");
    REFUSED(qg_subspace_random(NULL, 3, 8, 0, 0, 0, scratch, size, backend, &linalg), bad, "an array");
    REFUSED(qg_subspace_random(basis, 3, 8, 0, 0, 0, scratch, 9, backend, &linalg), bad, "got 9");

#define ENERGY(right, rank, left, left_rank, scratch, size) \
    qg_captured_energy(                                     \
        &energy, g, QG_FLOAT32, 12, 8, right, rank, left, left_rank, QG_FLOAT32, scratch, size, backend, &linalg)
    memset(left, 0, sizeof left);
    REFUSED(ENERGY(NULL, 0, NULL, 0, scratch, size), bad, "at least one side");
    REFUSED(ENERGY(NULL, 3, NULL, 0, scratch, size), bad, "right: expected an array");
    REFUSED(ENERGY(basis, 3, left, 13, scratch, size), bad, "left: expected 0 to 12");
    REFUSED(ENERGY(basis, 3, NULL, 0, scratch, 1), bad, "got 1");
    CHECK(energy == 5.0, "a refused energy: %g", energy);
    REFUSED(ENERGY(NULL, 0, left, 2, scratch, size), bad, "not all zero");
    g[5] = NAN;
    REFUSED(ENERGY(basis, 3, NULL, 0, scratch, size), bad, "not finite");
}

/* ---------------------------------------------------------------- random bases, energies */

static float *random_basis(
    const qg_backend *backend,
    int64_t rank,
    int64_t dim,
    uint64_t seed,
    uint32_t id,
    uint32_t draw) {
    float *basis = guarded((size_t)(rank * dim) * sizeof(float), 0);
    size_t size = 0;
    CHECK_OK(qg_subspace_scratch_size(1, dim, rank, 1, QG_FLOAT32, backend, &linalg, &size));
    CHECK_OK(qg_subspace_random(basis, rank, dim, seed, id, draw, guarded(size, 0), size, backend, &linalg));
    CHECK(
        gap(basis, rank, dim) < 1e-5, "random %lld x %lld: gap %g", (long long)rank, (long long)dim,
        gap(basis, rank, dim));
    return basis;
}

static void test_random(const qg_backend *backend) {
    const float *first = random_basis(backend, 5, 30, 1, 2, 3);
    /* With the plain gemm, whose sums have one order, the whole basis is the same bits at every level. */
    const float *scalar = random_basis(level(QG_SIMD_SCALAR), 5, 30, 1, 2, 3);
    CHECK_BYTES(first, scalar, 5 * 30 * sizeof(float), "%s", backend->name);
    CHECK(memcmp(first, random_basis(backend, 5, 30, 2, 2, 3), 5 * 30 * sizeof(float)) != 0, "seed");
    CHECK(memcmp(first, random_basis(backend, 5, 30, 1, 3, 3), 5 * 30 * sizeof(float)) != 0, "id");
    CHECK(memcmp(first, random_basis(backend, 5, 30, 1, 2, 4), 5 * 30 * sizeof(float)) != 0, "draw");
    random_basis(backend, 1, 1, 0, 0, 0);
    random_basis(backend, 20, 20, 0, 0, 0);
    random_basis(backend, MOST_ROWS + 6, 200, 0, UINT32_MAX, UINT32_MAX);
    RELEASE("random");
}

static void test_energy(const qg_backend *backend, int64_t rows, int64_t cols, int64_t right_rank, int64_t left_rank) {
    float *right = random_rows(right_rank, cols), *left = random_rows(left_rank, rows);
    float *gradient = random_rows(rows, cols);
    double *qr = malloc((size_t)(right_rank * cols + 1) * sizeof(double));
    double *ql = malloc((size_t)(left_rank * rows + 1) * sizeof(double));
    const int both = right_rank > 0 && left_rank > 0;
    double want = 0.0, total = 0.0, energy = -1.0;
    if (both) {
        orthonormal_rows(qr, right, right_rank, cols);
        orthonormal_rows(ql, left, left_rank, rows);
        for (int64_t a = 0; a < left_rank; a++) {
            for (int64_t b = 0; b < right_rank; b++) {
                double sum = 0.0;
                for (int64_t i = 0; i < rows * cols; i++)
                    sum += ql[a * rows + i / cols] * gradient[i] * qr[b * cols + i % cols];
                want += sum * sum;
            }
        }
        for (int64_t i = 0; i < rows * cols; i++)
            total += (double)gradient[i] * gradient[i];
        want /= total;
    } else if (right_rank > 0) {
        want = exact_energy(gradient, QG_FLOAT32, rows, cols, 1, right, right_rank);
    } else {
        want = exact_energy(gradient, QG_FLOAT32, rows, cols, 0, left, left_rank);
    }
    for (int format = QG_FLOAT32; format <= QG_BFLOAT16; format++) {
        const int64_t rank = right_rank > left_rank ? right_rank : left_rank;
        size_t size = 0;
        CHECK_OK(qg_subspace_scratch_size(rows, cols, rank, both ? 2 : 1, format, backend, &linalg, &size));
        CHECK_OK(qg_captured_energy(
            &energy, gradient, QG_FLOAT32, rows, cols, right, right_rank, left, left_rank, format, guarded(size, 0),
            size, backend, &linalg));
        CHECK(
            fabs(energy - want) < (format == QG_FLOAT32 ? 1e-5 : 5e-3), "%lld x %lld, ranks %lld and %lld: %g, want %g",
            (long long)rows, (long long)cols, (long long)right_rank, (long long)left_rank, energy, want);
    }
    free(qr);
    free(ql);
    RELEASE("energy");
}

static void test_level(const qg_backend *backend) {
    static const char *const kinds[] = {"noise", "constant", "rank one", "one entry", "1e-38", "3e38"};
    static const char *const without[] = {"zero", "nan", "inf", "orthogonal"};
    call c = {backend, ROWS, COLS, RANK, QG_FLOAT32, QG_FLOAT32, QG_RIGHT, 0};
    for (int wide = 0; wide < 2; wide++) {
        c.rows = wide ? COLS : ROWS;
        c.cols = wide ? ROWS : COLS;
        for (int i = 0; i < 8; i++) {
            c.side = i % 2 ? QG_LEFT : QG_RIGHT;
            c.gemm_format = i & 2 ? QG_BFLOAT16 : QG_FLOAT32;
            c.steps = i & 4 ? 2 : 0;
            for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
                const int64_t ranks[] = {1, RANK, dim_of(&c)};
                for (int rank = 0; rank < 3; rank++) {
                    c.rank = ranks[rank];
                    test_refresh(c, kinds[k]);
                }
            }
            c.rank = RANK;
            for (size_t k = 0; k < sizeof without / sizeof *without; k++)
                test_kept(c, without[k]);
        }
    }
    c = (call){backend, 20, 30, 6, QG_BFLOAT16, QG_FLOAT32, QG_RIGHT, 1};
    test_refresh(c, "noise");
    c.gemm_format = QG_BFLOAT16;
    test_refresh(c, "noise");
    c.grad_format = QG_FLOAT16;
    test_refresh(c, "noise");
    test_kept(c, "inf");
    test_random(backend);
    test_energy(backend, 20, 31, 4, 0);
    test_energy(backend, 20, 31, 0, 7);
    test_energy(backend, 20, 31, 4, 7);
    test_energy(backend, 31, 20, 20, 31);
    test_refusals(backend);
}

int main(void) {
    linalg = ref_linalg(&context);
    random_seed(23);
    for (int simd = 0; simd < LEVELS; simd++)
        if (level(simd) != NULL && check_count(1, simd == 0))
            test_level(level(simd));
    call c = {level(QG_SIMD_SCALAR), ROWS, COLS, RANK, QG_FLOAT32, QG_FLOAT32, QG_RIGHT, 1};
    test_failing_gemm(c);
    for (int side = 0; side < 2; side++) {
        c.side = side;
        for (c.steps = 0; c.steps < 5; c.steps++)
            test_asynchronous(c, "noise", c.steps == 0 ? 3 : 1, 1e-3); /* steps 0: all three are needed here */
        c.steps = 5;
        test_asynchronous(c, "noise", -5, 1e-6); /* looked at throughout */
        c.steps = 1;
        test_asynchronous(c, "1e-38", -5, 1e-6); /* not of ordinary size: a second attempt */
        test_asynchronous(c, "one entry", -5, 1e-6);
        test_asynchronous(c, "zero", 2, 1e-9);
        test_asynchronous(c, "nan", 2, 1e-9);
    }
    return check_finish();
}
