/* Cholesky, the inverse of a triangle and Householder QR against the same in double, written the short way; the passes
 * of a refresh against their formulas, the same bits at every SIMD level and thread count. */
#include "harness.h"
#include "reference.h"

static const int64_t sizes[] = {1, 2, 31, 32, 33, 63, 64, 65, 128, 150};
enum { SIZES = sizeof sizes / sizeof *sizes };

static ref_gemm_context context;

static float *random_floats(int64_t count) {
    float *values = guarded((size_t)count * sizeof(float), 0);
    for (int64_t i = 0; i < count; i++)
        values[i] = (float)random_normal();
    return values;
}

static void *work_for(const qg_linalg *linalg, int64_t rows, int64_t cols) {
    return guarded(linalg->work_size(linalg, rows, cols), 0);
}

/* a = m m^T / cols + small I, in double rounded once: condition about 100. */
static float *positive_definite(int64_t n) {
    float *m = random_floats(n * n), *a = guarded((size_t)(n * n) * sizeof(float), 0);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = i == j ? 0.05 : 0.0;
            for (int64_t k = 0; k < n; k++)
                sum += (double)m[i * n + k] * m[j * n + k] / (double)n;
            a[i * n + j] = (float)sum;
        }
    }
    return a;
}

static void cholesky(double *l, const float *a, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j <= i; j++) {
            double sum = a[i * n + j];
            for (int64_t k = 0; k < j; k++)
                sum -= l[i * n + k] * l[j * n + k];
            l[i * n + j] = i == j ? sqrt(sum) : sum / l[j * n + j];
        }
    }
}

static void test_potrf_and_trtri(int64_t n) {
    const qg_linalg linalg = ref_linalg(&context);
    float *a = positive_definite(n), *inverse = guarded((size_t)(n * n) * sizeof(float), 0);
    double *l = calloc((size_t)(n * n), sizeof(double));
    void *work = work_for(&linalg, n, n);
    int32_t failed = 7;
    cholesky(l, a, n);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i + 1; j < n; j++)
            a[i * n + j] = NAN; /* must not be read */
    CHECK_OK(linalg.potrf(&linalg, n, a, &failed, work));
    CHECK(failed == 0, "n %lld: failed %d", (long long)n, failed);
    double worst = 0.0, product = 0.0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++)
            worst = fmax(worst, fabs(a[i * n + j] - l[i * n + j]));
    CHECK(worst < 1e-4, "n %lld: L differs by %g", (long long)n, worst);
    CHECK_OK(linalg.trtri(&linalg, n, a, inverse, work));
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = i == j ? -1.0 : 0.0;
            for (int64_t k = 0; k <= i; k++)
                sum += (double)a[i * n + k] * inverse[k * n + j];
            product = fmax(product, fabs(sum));
            if (j > i)
                CHECK(inverse[i * n + j] == 0.0f, "n %lld: entry %lld, %lld", (long long)n, (long long)i, (long long)j);
        }
    }
    CHECK(product < 1e-4, "n %lld: L L^-1 differs from I by %g", (long long)n, product);
    free(l);
    RELEASE("n %lld", (long long)n);
}

/* The pivot at `bad` is not positive, or not a number: said, not crashed on. */
static void test_potrf_fails(int64_t n, int64_t bad, float value) {
    const qg_linalg linalg = ref_linalg(&context);
    float *a = positive_definite(n);
    int32_t failed = 0;
    a[bad * n + bad] = value;
    CHECK_OK(linalg.potrf(&linalg, n, a, &failed, work_for(&linalg, n, n)));
    CHECK(failed == 1, "n %lld, pivot %lld = %g", (long long)n, (long long)bad, (double)value);
    RELEASE("n %lld", (long long)n);
}

/* q q^T = I, and a = T q with T lower triangular, its diagonal >= 0. */
static void check_qr(const float *a, const float *q, int64_t rows, int64_t cols, const char *what) {
    double orthonormal = 0.0, above = 0.0, negative = 0.0, rest = 0.0, size = 0.0;
    for (int64_t i = 0; i < rows * cols; i++)
        size = fmax(size, fabs((double)a[i]));
    double *left = malloc((size_t)(rows * cols) * sizeof(double));
    for (int64_t i = 0; i < rows * cols; i++)
        left[i] = a[i];
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < rows; j++) {
            double gram = i == j ? -1.0 : 0.0, t = 0.0;
            for (int64_t k = 0; k < cols; k++) {
                gram += (double)q[i * cols + k] * q[j * cols + k];
                t += (double)a[i * cols + k] * q[j * cols + k];
            }
            orthonormal = fmax(orthonormal, fabs(gram));
            if (j > i)
                above = fmax(above, fabs(t));
            if (j == i)
                negative = fmax(negative, -t);
            for (int64_t k = 0; k < cols; k++)
                left[i * cols + k] -= t * q[j * cols + k];
        }
    }
    for (int64_t i = 0; i < rows * cols; i++)
        rest = fmax(rest, fabs(left[i]));
    const double bound = 1e-5 * sqrt((double)cols) * size;
    CHECK(orthonormal < 1e-5, "%s %lld x %lld: q q^T - I %g", what, (long long)rows, (long long)cols, orthonormal);
    CHECK(above <= bound, "%s %lld x %lld: above the diagonal %g", what, (long long)rows, (long long)cols, above);
    CHECK(negative <= bound, "%s %lld x %lld: diagonal -%g", what, (long long)rows, (long long)cols, negative);
    CHECK(rest <= bound, "%s %lld x %lld: a - T q %g", what, (long long)rows, (long long)cols, rest);
    free(left);
}

static void test_qr(int64_t rows, int64_t cols, const char *what, float size) {
    const qg_linalg linalg = ref_linalg(&context);
    float *a = random_floats(rows * cols), *q = guarded((size_t)(rows * cols) * sizeof(float), 0);
    for (int64_t i = 0; i < rows * cols; i++) {
        const int64_t row = i / cols, col = i % cols;
        if (strcmp(what, "constant") == 0)
            a[i] = 1.0f;
        if ((strcmp(what, "dead rows") == 0 && row % 3 == 1) || (strcmp(what, "dead columns") == 0 && col % 4 != 1))
            a[i] = 0.0f;
        if (strcmp(what, "twins") == 0 && row % 2 == 1)
            a[i] = -a[i - cols];
        a[i] *= size;
    }
    float *copy = malloc((size_t)(rows * cols) * sizeof(float));
    memcpy(copy, a, (size_t)(rows * cols) * sizeof(float));
    CHECK_OK(linalg.qr(&linalg, rows, cols, a, q, work_for(&linalg, rows, cols)));
    check_qr(copy, q, rows, cols, what);
    free(copy);
    RELEASE("%s", what);
}

/* ---------------------------------------------------------------- the table's passes */

enum { MOST = 40000 };

/* What the first level and thread count gave, for all others to give. */
typedef struct passes {
    float unit[MOST];
    float cast[MOST];
    float bell[MOST];
    double sum;
} passes;

static void test_passes(const qg_backend *backend, int64_t count, qg_format format, passes *first, int is_first) {
    const size_t size = ref_size(format), bytes = (size_t)count * sizeof(float);
    const qg_noise_stream stream = {.seed = 1, .step = (uint64_t)1 << 63, .id = 5};
    random_seed(17);
    void *source = guarded((size_t)count * size, size);
    double exact = 0.0, sum = 0.0;
    for (int64_t i = 0; i < count; i++) {
        ref_store(format, source, i, (float)random_normal());
        exact += (double)ref_load(format, source, i) * ref_load(format, source, i);
    }
    float *unit = guarded(bytes, 4), *cast = guarded(bytes, 4), *bell = guarded(bytes, 4);
    backend->sum_squares(&sum, source, format, count, NULL);
    backend->normalise(unit, source, format, count, 3, &sum, NULL);
    backend->scaled_cast(cast, QG_FLOAT32, source, format, 1, count, count, 0x1p-20f, NULL);
    backend->bell(bell, &stream, count, NULL);
    if (is_first) {
        memcpy(first->unit, unit, bytes);
        memcpy(first->cast, cast, bytes);
        memcpy(first->bell, bell, bytes);
        first->sum = sum;
    }
    CHECK(fabs(sum - exact) <= 1e-12 * exact, "%lld squares: %.17g, want %.17g", (long long)count, sum, exact);
    for (int64_t i = 0; is_first && i < count; i++) {
        const float x = ref_load(format, source, i);
        int64_t drawn = -2 * 0xffffff;
        for (uint64_t k = 0; k < 4; k++)
            drawn += ref_noise(&stream, 4 * (uint64_t)i + k);
        if (!CHECK(unit[i] == x * (float)sqrt(3.0 / sum), "unit %lld: %g", (long long)i, (double)unit[i]) ||
            !CHECK(cast[i] == ldexpf(x, -20), "cast %lld: %g", (long long)i, (double)cast[i]) ||
            !CHECK(bell[i] == ldexpf((float)drawn, -24), "bell %lld: %g", (long long)i, (double)bell[i]))
            break;
    }
    CHECK_BYTES(unit, first->unit, bytes, "unit, %s", backend->name);
    CHECK_BYTES(cast, first->cast, bytes, "cast, %s", backend->name);
    CHECK_BYTES(bell, first->bell, bytes, "bell, %s", backend->name);
    CHECK_BYTES(&sum, &first->sum, sizeof sum, "squares, %s", backend->name);
    RELEASE("%lld values", (long long)count);
}

static void test_passes_everywhere(int64_t count, qg_format format) {
    static passes first;
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int threads = 1; level((qg_simd)simd) != NULL && threads <= 3; threads++) {
            omp_set_num_threads(threads);
            test_passes(level((qg_simd)simd), count, format, &first, simd == 0 && threads == 1);
        }
    }
}

/* Tiles with a row stride, scaled and rounded to bfloat16; a product by a power of two is exact. */
static void test_scaled_tile(const qg_backend *backend) {
    enum { ROWS = 7, COLS = 1100, STRIDE = 1303 };
    float *source = random_floats(ROWS * STRIDE);
    uint16_t *target = guarded(ROWS * COLS * sizeof(uint16_t), 2), want;
    backend->scaled_cast(target, QG_BFLOAT16, source, QG_FLOAT32, ROWS, COLS, STRIDE, 0x1p100f, NULL);
    for (int64_t i = 0; i < ROWS * COLS; i++) {
        ref_store(QG_BFLOAT16, &want, 0, ldexpf(source[i / COLS * STRIDE + i % COLS], 100));
        if (!CHECK(target[i] == want, "%s, element %lld", backend->name, (long long)i))
            break;
    }
    RELEASE("scaled tile");
}

static void test_shift(const qg_backend *backend, int64_t n, float scale, float odd) {
    float *gram = guarded((size_t)(n * n) * sizeof(float), 4), *before = malloc((size_t)(n * n) * sizeof(float));
    double worst = 0.0, squares = 0.0, distance = -1.0;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++)
            gram[i * n + j] = j > i ? NAN : (float)(i == j) + scale * (float)random_uniform(-1.0, 1.0);
    }
    if (odd != 0.0f)
        gram[(n - 1) * n] = odd;
    memcpy(before, gram, (size_t)(n * n) * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j <= i; j++) {
            const double x = gram[i * n + j], from = fabs(x - (i == j));
            worst = isfinite(x) ? fmax(worst, from) : (double)INFINITY;
            squares += (i == j ? 1.0 : 2.0) * x * x;
            if (isinf(worst))
                i = j = n;
        }
    }
    backend->shift_gram(&distance, gram, n, NULL);
    CHECK(distance == worst || fabs(distance - worst) <= 1e-7, "n %lld: %g, want %g", (long long)n, distance, worst);
    const double shift = worst >= 0.5 ? 1e-6 * sqrt(squares) : 0.0;
    for (int64_t i = 0; i < n && isfinite(worst); i++) {
        const float want = before[i * n + i] + (float)shift;
        CHECK(fabsf(gram[i * n + i] - want) <= 1e-7f, "n %lld: diagonal %lld", (long long)n, (long long)i);
        gram[i * n + i] = before[i * n + i];
    }
    if (isfinite(worst))
        CHECK_BYTES(gram, before, (size_t)(n * n) * sizeof(float), "off the diagonal");
    free(before);
    RELEASE("shift");
}

static void test_table(const qg_backend *backend) {
    test_scaled_tile(backend);
    test_shift(backend, 1, 0.3f, 0.0f);
    test_shift(backend, 50, 1e-6f, 0.0f);
    test_shift(backend, 50, 0.4f, 0.0f);
    test_shift(backend, 50, 0.9f, 0.0f);
    test_shift(backend, 50, 0.1f, INFINITY);
    test_shift(backend, 50, 0.1f, NAN);
}

int main(void) {
    random_seed(3);
    for (int i = 0; i < SIZES; i++) {
        test_potrf_and_trtri(sizes[i]);
        test_potrf_fails(sizes[i], sizes[i] - 1, -1.0f);
        test_potrf_fails(sizes[i], sizes[i] / 2, NAN);
        test_potrf_fails(sizes[i], 0, INFINITY);
        test_qr(sizes[i], sizes[i], "square", 1.0f);
        test_qr(sizes[i], sizes[i] + 37, "tall", 1.0f);
    }
    test_qr(70, 90, "tiny", 1e-38f);
    test_qr(70, 90, "huge", 1e30f);
    test_qr(70, 90, "constant", 1.0f);
    test_qr(70, 90, "dead rows", 1.0f);
    test_qr(70, 90, "dead columns", 1.0f);
    test_qr(70, 90, "twins", 1.0f);
    static const int64_t counts[] = {0, 1, 15, 1024, 1025, MOST};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        for (int format = 0; format < 3; format++)
            test_passes_everywhere(counts[i], (qg_format)format);
    for (int simd = 0; simd < LEVELS; simd++)
        if (level(simd) != NULL)
            test_table(level(simd));
    return check_finish();
}
