/* The linear-algebra table of an emulated GPU over stand-ins for cuBLAS and cuSOLVER: products bit for bit, Cholesky,
 * triangles, QR and SVD by their properties in double, and what is said when a library or a call of it fails. */
#include "standin.h"
#include "reference.h"

static standin blas, solver;
static qg_cuda *cuda;
static const qg_linalg *linalg;

static void fill(qg_format format, void *array, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        ref_store(format, array, i, (float)random_normal());
}

static float *device_floats(int64_t count) {
    float *values = device(NULL, (size_t)count * sizeof(float));
    fill(QG_FLOAT32, values, count);
    return values;
}

/* ---------------------------------------------------------------- products */

/* How a matrix lies in memory. Strides along single rows or columns are nonsense, which nothing may read. */
typedef struct layout {
    int64_t row_stride;
    int64_t col_stride;
    int64_t count; /* elements from the first to the last */
} layout;

static layout make_layout(int64_t rows, int64_t cols, int by_columns, int64_t padding) {
    layout l = by_columns ? (layout){1, rows + padding, 0} : (layout){cols + padding, 1, 0};
    l.count = (rows - 1) * l.row_stride + (cols - 1) * l.col_stride + 1;
    if (rows == 1)
        l.row_stride = padding == 0 ? 0 : -77;
    if (cols == 1)
        l.col_stride = padding == 0 ? 0 : 1000003;
    return l;
}

typedef struct product {
    qg_format format;
    int32_t accumulate;
    int64_t m;
    int64_t n;
    int64_t k;
    int columns_a;
    int columns_b;
    int64_t padding;
} product;

/* In double, in order; rounded to float32 and then to the format, as the stand-in does. */
static void expect_product(
    const product *p,
    void *c,
    int64_t c_row,
    const void *a,
    layout la,
    const void *b,
    layout lb) {
    for (int64_t i = 0; i < p->m; i++) {
        for (int64_t j = 0; j < p->n; j++) {
            double sum = 0.0;
            for (int64_t l = 0; l < p->k; l++) {
                const int64_t at = (p->m == 1 ? 0 : i * la.row_stride) + (p->k == 1 ? 0 : l * la.col_stride);
                const int64_t bt = (p->k == 1 ? 0 : l * lb.row_stride) + (p->n == 1 ? 0 : j * lb.col_stride);
                sum += (double)ref_load(p->format, a, at) * ref_load(p->format, b, bt);
            }
            if (p->accumulate != 0)
                sum = ref_load(p->format, c, i * c_row + j) + p->accumulate * sum;
            ref_store(p->format, c, i * c_row + j, (float)sum);
        }
    }
}

static void test_product(product p) {
    const layout la = make_layout(p.m, p.k, p.columns_a, p.padding), lb = make_layout(p.k, p.n, p.columns_b, p.padding);
    const int64_t c_row = p.n + p.padding, c_count = (p.m - 1) * c_row + p.n;
    const size_t size = ref_size(p.format), c_bytes = (size_t)c_count * size;
    void *a = device(NULL, (size_t)la.count * size), *b = device(NULL, (size_t)lb.count * size);
    void *c = device(NULL, c_bytes), *want = malloc(c_bytes);
    fill(p.format, a, la.count);
    fill(p.format, b, lb.count);
    if (p.accumulate != 0)
        fill(p.format, c, c_count); /* else NaN, which is not read */
    memcpy(want, c, c_bytes);
    expect_product(&p, want, c_row, a, la, b, lb);
    const qg_status status = linalg->gemm(
        linalg->context, p.format, p.accumulate, p.m, p.n, p.k, a, la.row_stride, la.col_stride, b, lb.row_stride,
        lb.col_stride, c, p.m == 1 ? 0 : c_row);
    CHECK(status == QG_SUCCESS, "gemm: %s", qg_cuda_error(cuda));
    CHECK_BYTES(
        c, want, c_bytes, "format %d, %lld x %lld x %lld, columns %d %d, padding %lld, accumulate %d", (int)p.format,
        (long long)p.m, (long long)p.n, (long long)p.k, p.columns_a, p.columns_b, (long long)p.padding, p.accumulate);
    free(want);
    emulated_release();
}

static void test_products(void) {
    static const int64_t sizes[][3] = {
        {1, 1, 1}, {1, 7, 5}, {7, 1, 5}, {7, 5, 1}, {1, 1, 9}, {13, 17, 11}, {32, 8, 16}};
    static const qg_format formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int f = 0; f < 3; f++)
            for (int layouts = 0; layouts < 8; layouts++)
                for (int32_t accumulate = -1; accumulate <= 1; accumulate++)
                    test_product((product){formats[f], accumulate, sizes[i][0], sizes[i][1], sizes[i][2], layouts & 1,
                        layouts >> 1 & 1, layouts & 4 ? 3 : 0});
}

static void test_products_refused(void) {
    float *a = device_floats(64);
    qg_status status = linalg->gemm(cuda, QG_FLOAT32, 0, 2, 2, 2, a, 4, 2, a, 2, 1, a + 32, 2);
    CHECK(status == QG_UNSUPPORTED, "no unit stride in a: %d", (int)status);
    EXPECT_FAILURE(
        cuda, QG_UNSUPPORTED,
        "gemm: expected matrices with a stride of 1 along rows or columns, got 4, 2 for 2 x 2, 2, 1 for 2 x 2 and 2 "
        "for 2 x 2");
    CHECK(linalg->gemm(cuda, QG_FLOAT32, 0, 2, 2, 2, a, 2, 1, a, 3, 2, a + 32, 2) == QG_UNSUPPORTED, "none in b");
    EXPECT_FAILURE(cuda, QG_UNSUPPORTED, "3, 2 for 2 x 2");
    CHECK(linalg->gemm(cuda, QG_FLOAT32, 0, 2, 2, 2, a, 2, 1, a, 2, 1, a + 32, 1) == QG_UNSUPPORTED, "rows overlap");
    EXPECT_FAILURE(cuda, QG_UNSUPPORTED, "and 1 for 2 x 2");
    CHECK(linalg->gemm(cuda, QG_INT8, 0, 2, 2, 2, a, 2, 1, a, 2, 1, a + 32, 2) == QG_UNSUPPORTED, "format");
    EXPECT_FAILURE(cuda, QG_UNSUPPORTED, "gemm: format 16 is not a float format");
    CHECK(linalg->gemm(cuda, QG_FLOAT32, 0, 0, 2, 2, NULL, 2, 1, NULL, 2, 1, NULL, 2) == QG_SUCCESS, "no rows");
    CHECK(linalg->gemm(cuda, QG_FLOAT32, 0, 2, 0, 2, NULL, 2, 1, NULL, 1, 1, NULL, 0) == QG_SUCCESS, "no columns");
    qg_cuda_end(cuda);
    CHECK(linalg->gemm(cuda, QG_FLOAT32, 0, 2, 2, 2, a, 2, 1, a, 2, 1, a + 32, 2) == QG_INVALID_ARGUMENT, "no begin");
    EXPECT_FAILURE(cuda, QG_INVALID_ARGUMENT, "gemm: qg_cuda_begin was given no workspace for cuBLAS; 8 MB do");
    begin(cuda);
    emulated_release();
}

/* 1 + 2^-12 is 1 in TF32. */
static void test_tf32(void) {
    qg_cuda *fast = open_device(0, 1);
    const float values[2] = {1.0f + 0x1p-12f, 1.0f};
    const uint16_t short_values[2] = {0x3f81, 0x3f80};
    float *a = device(values, sizeof values), *c = device(NULL, sizeof(float));
    uint16_t *short_a = device(short_values, sizeof short_values);
    begin(fast);
    CHECK(linalg->gemm(cuda, QG_FLOAT32, 0, 1, 1, 1, a, 1, 1, a + 1, 1, 1, c, 1) == QG_SUCCESS, "exact");
    CHECK(c[0] == values[0], "TF32 unasked: %.9g", (double)c[0]);
    const qg_linalg *table = qg_cuda_linalg(fast);
    CHECK(table->gemm(fast, QG_FLOAT32, 0, 1, 1, 1, a, 1, 1, a + 1, 1, 1, c, 1) == QG_SUCCESS, "TF32");
    CHECK(c[0] == 1.0f, "no TF32: %.9g", (double)c[0]);
    CHECK(
        table->gemm(fast, QG_BFLOAT16, 0, 1, 1, 1, short_a, 1, 1, short_a + 1, 1, 1, short_a, 1) == QG_SUCCESS, "%s",
        qg_cuda_error(fast));
    CHECK(short_a[0] == 0x3f81, "bfloat16: %x", short_a[0]);
    qg_cuda_end(fast);
    qg_cuda_close(fast);
    emulated_release();
}

/* ---------------------------------------------------------------- factorisations */

/* Exactly the bytes that are asked for, from an odd place. */
static void *work_for(int64_t rows, int64_t cols) {
    const size_t size = linalg->work_size(linalg, rows, cols);
    CHECK(size > 0, "work_size: %s", qg_cuda_error(cuda));
    return emulator_malloc(size, 256, 4);
}

static double identity_error(const float *q, int64_t rows, int64_t cols) {
    double worst = 0.0;
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < rows; j++) {
            double sum = i == j ? -1.0 : 0.0;
            for (int64_t k = 0; k < cols; k++)
                sum += (double)q[i * cols + k] * q[j * cols + k];
            worst = isfinite(sum) ? fmax(worst, fabs(sum)) : (double)INFINITY;
        }
    }
    return worst;
}

static float *positive_definite(int64_t n) {
    float *m = device_floats(n * n), *a = device(NULL, (size_t)(n * n) * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = i == j ? 0.05 : 0.0;
            for (int64_t k = 0; k < n; k++)
                sum += (double)m[i * n + k] * m[j * n + k] / (double)n;
            a[i * n + j] = j > i ? NAN : (float)sum; /* above the diagonal nothing is read */
        }
    }
    return a;
}

static void test_triangles(int64_t n) {
    float *a = positive_definite(n), *inverse = device(NULL, (size_t)(n * n) * sizeof(float));
    const size_t bytes = (size_t)(n * n) * sizeof(float);
    float *want = malloc(bytes), *cpu_inverse = malloc(bytes);
    int32_t *failed = device(NULL, sizeof *failed), cpu_failed = 0;
    void *work = work_for(n, n + 3);
    ref_gemm_context context = {0};
    const qg_linalg cpu = ref_linalg(&context);
    void *cpu_work = malloc(cpu.work_size(&cpu, n, n));
    memcpy(want, a, bytes);
    CHECK_OK(cpu.potrf(&cpu, n, want, &cpu_failed, cpu_work));
    CHECK_OK(cpu.trtri(&cpu, n, want, cpu_inverse, cpu_work));
    CHECK(linalg->potrf(linalg, n, a, failed, work) == QG_SUCCESS, "potrf: %s", qg_cuda_error(cuda));
    CHECK(*failed == 0, "n %lld: failed %d", (long long)n, *failed);
    CHECK(linalg->trtri(linalg, n, a, inverse, work) == QG_SUCCESS, "trtri: %s", qg_cuda_error(cuda));
    double lower = 0.0, inverted = 0.0;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j <= i; j++)
            lower = fmax(lower, fabs((double)a[i * n + j] - want[i * n + j]));
        for (int64_t j = 0; j < n; j++)
            inverted = fmax(inverted, fabs((double)inverse[i * n + j] - cpu_inverse[i * n + j]));
        for (int64_t j = i + 1; j < n; j++)
            CHECK(
                inverse[i * n + j] == 0.0f, "n %lld: above the diagonal %g", (long long)n, (double)inverse[i * n + j]);
    }
    CHECK(lower < 1e-5 && inverted < 1e-3, "n %lld: L differs by %g, L^-1 by %g", (long long)n, lower, inverted);
    a[0] = -1.0f;
    CHECK(linalg->potrf(linalg, n, a, failed, work) == QG_SUCCESS, "potrf: %s", qg_cuda_error(cuda));
    CHECK(*failed != 0, "n %lld: not positive definite", (long long)n);
    free(want);
    free(cpu_inverse);
    free(cpu_work);
    emulator_free(work);
    emulated_release();
}

/* q q^T = I and a = T q with T lower triangular, its diagonal >= 0. `dead`: a row of zeros, -1 for none; where it is
 * `rows`, they are small multiples of the first, and what is left after each reflection is rounding of rounding. */
static void test_qr(int64_t rows, int64_t cols, int64_t dead) {
    float *a = device_floats(rows * cols), *q = device(NULL, (size_t)(rows * cols) * sizeof(float));
    void *work = work_for(rows, cols);
    for (int64_t i = 0; dead == rows && i < rows * cols; i++)
        a[i] = i % cols != 0 ? a[i - 1] : i == 0 ? -0.1f : 1e-26f * a[i];
    if (dead >= 0 && dead < rows)
        memset(a + dead * cols, 0, (size_t)cols * sizeof(float));
    float *before = malloc((size_t)(rows * cols) * sizeof(float));
    memcpy(before, a, (size_t)(rows * cols) * sizeof(float));
    CHECK(linalg->qr(linalg, rows, cols, a, q, work) == QG_SUCCESS, "qr: %s", qg_cuda_error(cuda));
    double above = 0.0, negative = 0.0;
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = i; j < rows; j++) {
            double t = 0.0;
            for (int64_t k = 0; k < cols; k++)
                t += (double)before[i * cols + k] * q[j * cols + k];
            above = j > i ? fmax(above, fabs(t)) : above;
            negative = j == i ? fmax(negative, -t) : negative;
        }
    }
    const double error = identity_error(q, rows, cols);
    CHECK(
        error < 1e-5 && above < 1e-4 && negative < 1e-4, "%lld x %lld: q q^T - I %g, above %g, diagonal -%g",
        (long long)rows, (long long)cols, error, above, negative);
    free(before);
    emulator_free(work);
    emulated_release();
}

/* What goes around cuSOLVER's calls, with more elements than one grid takes at a time. */
static void test_beyond_the_grid(void) {
    enum { N = 150, COUNT = N * N };
    float *source = device_floats(COUNT), *target = device(NULL, COUNT * sizeof(float));
    qg_cuda_copy_lower(target, source, N, cuda);
    for (int i = 0; i < COUNT; i++)
        CHECK(target[i] == (i % N <= i / N ? source[i] : 0.0f), "copy_lower: element %d is %g", i, (double)target[i]);
    qg_cuda_signs(target, source, 1, COUNT, cuda);
    for (int i = 0; i < COUNT; i++)
        CHECK(target[i] == (source[i] < 0.0f ? -1.0f : 1.0f), "signs: element %d is %g", i, (double)target[i]);
    float *scaled = device(NULL, COUNT * sizeof(float));
    qg_cuda_scale_rows(scaled, source, target, N, N, cuda);
    for (int i = 0; i < COUNT; i++)
        CHECK(scaled[i] == target[i / N] * source[i], "scale_rows: element %d is %g", i, (double)scaled[i]);
    EXPECT_FAILURE(cuda, QG_SUCCESS, "");
    emulated_release();
}

static void test_factorisations_refused(void) {
    float *a = device_floats(64 * 64);
    int32_t *failed = device(NULL, sizeof *failed);
    void *work = work_for(8, 8);
    CHECK(linalg->potrf(linalg, 64, a, failed, work) == QG_INTERNAL, "potrf beyond its work");
    EXPECT_FAILURE(cuda, QG_INTERNAL, "potrf: ");
    CHECK(linalg->trtri(linalg, 64, a, a, work) == QG_INTERNAL, "trtri beyond its work");
    EXPECT_FAILURE(cuda, QG_INTERNAL, "bytes of work are needed");
    CHECK(linalg->qr(linalg, 64, 64, a, a, work) == QG_INTERNAL, "qr beyond its work");
    EXPECT_FAILURE(cuda, QG_INTERNAL, "qr: ");
    CHECK(linalg->work_size(linalg, 1, (int64_t)1 << 31) == 0, "more than cuSOLVER counts");
    EXPECT_FAILURE(
        cuda, QG_UNSUPPORTED, "work_size: expected 1 to 2147483647 rows and columns, which is what cuSOLVER");
    CHECK(linalg->potrf(linalg, 0, a, failed, work) == QG_UNSUPPORTED, "nothing to factor");
    EXPECT_FAILURE(cuda, QG_UNSUPPORTED, "potrf: expected 1 to");
    cudaGraph_t graph;
    cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeGlobal);
    CHECK(linalg->potrf(linalg, 8, a, failed, work) == QG_UNSUPPORTED, "potrf in a capture");
    EXPECT_FAILURE(cuda, QG_UNSUPPORTED, "potrf cannot be captured in a CUDA graph");
    CHECK(linalg->gemm(cuda, QG_FLOAT32, 0, 2, 2, 2, a, 2, 1, a, 2, 1, a + 32, 2) == QG_SUCCESS, "gemm in a capture");
    cudaStreamEndCapture(cuda->stream, &graph);
    cudaGraphDestroy(graph);
    emulator_free(work);
    emulated_release();
}

/* ---------------------------------------------------------------- singular values */

static void test_svd(int64_t rows, int64_t cols, int64_t rank) {
    const int64_t k = rows < cols ? rows : cols;
    float *a = device(NULL, (size_t)(rows * cols) * sizeof(float)), *x = device_floats(rows * k);
    float *y = device_floats(k * cols), *left = device(NULL, (size_t)(k * rows) * sizeof(float));
    float *right = device(NULL, (size_t)(k * cols) * sizeof(float)), *values = device(NULL, (size_t)k * sizeof(float));
    for (int64_t i = 0; i < rows * cols; i++) {
        a[i] = 0.0f;
        for (int64_t l = 0; l < rank; l++)
            a[i] += x[i / cols * k + l] * y[l * cols + i % cols];
    }
    float *before = malloc((size_t)(rows * cols) * sizeof(float));
    memcpy(before, a, (size_t)(rows * cols) * sizeof(float));
    size_t size = 0;
    CHECK(qg_cuda_svd_scratch_size(cuda, rows, cols, &size) == QG_SUCCESS, "%s", qg_cuda_error(cuda));
    void *scratch = emulator_malloc(size, 256, 4);
    const qg_status status = qg_cuda_svd(cuda, left, values, right, a, rows, cols, scratch, size);
    CHECK(status == QG_SUCCESS, "%lld x %lld: %s", (long long)rows, (long long)cols, qg_cuda_error(cuda));
    double worst = 0.0;
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < cols; j++) {
            double sum = before[i * cols + j];
            for (int64_t l = 0; l < k; l++)
                sum -= (double)left[l * rows + i] * values[l] * right[l * cols + j];
            worst = isfinite(sum) ? fmax(worst, fabs(sum)) : (double)INFINITY;
        }
    }
    const double of_left = identity_error(left, k, rows), of_right = identity_error(right, k, cols);
    CHECK(
        worst < 1e-5 * (1.0 + values[0]) && of_left < 1e-5 && of_right < 1e-5,
        "%lld x %lld of rank %lld: a - left^T S right %g, left %g, right %g", (long long)rows, (long long)cols,
        (long long)rank, worst, of_left, of_right);
    for (int64_t i = 0; i < k; i++)
        CHECK(values[i] >= 0.0f && (i == 0 || values[i] <= values[i - 1]), "value %lld", (long long)i);
    if (rank < k)
        CHECK(values[rank] < 1e-4f * (1.0f + values[0]), "rank %lld: %g", (long long)rank, (double)values[rank]);
    free(before);
    emulator_free(scratch);
    emulated_release();
}

static void test_svd_refused(void) {
    float *a = device_floats(12), *out = device(NULL, 64 * sizeof(float));
    size_t size = 7;
    CHECK(qg_cuda_svd_scratch_size(cuda, 0, 4, &size) == QG_SUCCESS && size == 0, "nothing: %zu", size);
    CHECK(qg_cuda_svd(cuda, NULL, NULL, NULL, NULL, 0, 4, NULL, 0) == QG_SUCCESS, "nothing to decompose");
    CHECK(qg_cuda_svd_scratch_size(cuda, 4, 3, NULL) == QG_INVALID_ARGUMENT, "no place for the size");
    CHECK(qg_cuda_svd_scratch_size(cuda, -1, 3, &size) == QG_UNSUPPORTED, "a negative size");
    CHECK(qg_cuda_svd_scratch_size(cuda, 4, 3, &size) == QG_SUCCESS, "%s", qg_cuda_error(cuda));
    void *scratch = device(NULL, size);
    CHECK(qg_cuda_svd(cuda, out, out + 16, out + 32, a, 4, 3, scratch, size - 1) == QG_INVALID_ARGUMENT, "scratch");
    CHECK(strstr(qg_cuda_error(cuda), "svd: expected ") != NULL, "%s", qg_cuda_error(cuda));
    solver.report("cusolverDnSgesvd", 2);
    CHECK(qg_cuda_svd(cuda, out, out + 16, out + 32, a, 4, 3, scratch, size) == QG_INTERNAL, "no convergence");
    CHECK(strstr(qg_cuda_error(cuda), "did not converge (info 2)") != NULL, "%s", qg_cuda_error(cuda));
    a[11] = INFINITY;
    CHECK(qg_cuda_svd(cuda, out, out + 16, out + 32, a, 4, 3, scratch, size) == QG_INVALID_ARGUMENT, "infinity");
    CHECK(strcmp(qg_cuda_error(cuda), "svd: a holds a value that is not finite") == 0, "%s", qg_cuda_error(cuda));
    qg_cuda_end(cuda);
    void *small = device(NULL, QG_CUDA_LEAST_WORKSPACE);
    CHECK(
        qg_cuda_begin(cuda, emulator_stream(), small, QG_CUDA_LEAST_WORKSPACE) == QG_SUCCESS, "%s",
        qg_cuda_error(cuda));
    CHECK(qg_cuda_svd(cuda, out, out + 16, out + 32, a, 4, 3, scratch, size) == QG_INVALID_ARGUMENT, "workspace");
    CHECK(strstr(qg_cuda_error(cuda), "svd: qg_cuda_begin was given no workspace") != NULL, "%s", qg_cuda_error(cuda));
    qg_cuda_end(cuda);
    begin(cuda);
    emulated_release();
}

/* ---------------------------------------------------------------- libraries that fail */

static qg_status multiply(qg_cuda *with, float *a) {
    return qg_cuda_linalg(with)->gemm(with, QG_FLOAT32, 0, 2, 2, 2, a, 2, 1, a + 4, 2, 1, a + 8, 2);
}

/* Before a stand-in is loaded. Where the machine has the real libraries there is nothing to see. */
static void test_libraries_are_missing(void) {
    qg_cuda *bare = open_device(0, 0);
    const qg_linalg *table = qg_cuda_linalg(bare);
    float *a = device_floats(12);
    begin(bare);
    if (dlopen("libcublas.so.13", RTLD_LAZY) == NULL && dlopen("libcublas.so.12", RTLD_LAZY) == NULL) {
        CHECK(multiply(bare, a) == QG_UNSUPPORTED, "a product without cuBLAS");
        EXPECT_FAILURE(
            bare, QG_UNSUPPORTED,
            "cuBLAS was not found: pip install nvidia-cublas, or set Q_GALORE_CUBLAS to the path of libcublas.so.13; "
            "lib");
    }
    if (dlopen("libcusolver.so.12", RTLD_LAZY) == NULL && dlopen("libcusolver.so.11", RTLD_LAZY) == NULL) {
        CHECK(table->work_size(table, 2, 2) == 0, "a size without cuSOLVER");
        EXPECT_FAILURE(bare, QG_UNSUPPORTED, "cuSOLVER was not found: pip install nvidia-cusolver, or set");
    }
    setenv("Q_GALORE_CUBLAS", "/nowhere/libcublas.so", 1);
    CHECK(multiply(bare, a) == QG_UNSUPPORTED, "cuBLAS nowhere");
    EXPECT_FAILURE(bare, QG_UNSUPPORTED, "Q_GALORE_CUBLAS: cuBLAS cannot be opened: /nowhere/libcublas.so");
    setenv("Q_GALORE_CUBLAS", "libm.so.6", 1);
    setenv("Q_GALORE_CUSOLVER", "libm.so.6", 1);
    CHECK(multiply(bare, a) == QG_UNSUPPORTED, "cuBLAS is another library");
    EXPECT_FAILURE(bare, QG_UNSUPPORTED, "cuBLAS has no cublasCreate_v2: version 12 or newer of CUDA's libraries");
    CHECK(table->potrf(table, 2, a, (int32_t *)(void *)a, a) == QG_UNSUPPORTED, "cuSOLVER is another library");
    EXPECT_FAILURE(bare, QG_UNSUPPORTED, "cuSOLVER has no cusolverDnCreate");
    qg_cuda_end(bare);
    qg_cuda_close(bare);
    emulated_release();
}

/* The stand-ins are loaded, under the real ones' names, and no variable says so: what torch does. */
static void test_loaded_libraries_are_found(void) {
    float *a = device_floats(12);
    unsetenv("Q_GALORE_CUBLAS");
    unsetenv("Q_GALORE_CUSOLVER");
    qg_cuda *other = open_device(0, 0);
    begin(other);
    const int64_t calls = blas.calls("cublasGemmEx_64");
    CHECK(multiply(other, a) == QG_SUCCESS, "%s", qg_cuda_error(other));
    CHECK(blas.calls("cublasGemmEx_64") == calls + 1, "another cuBLAS");
    CHECK(qg_cuda_linalg(other)->work_size(qg_cuda_linalg(other), 2, 2) > 0, "%s", qg_cuda_error(other));
    qg_cuda_end(other);
    qg_cuda_close(other);
    emulated_release();
}

static void test_first_use_in_a_capture(void) {
    float *a = device_floats(12);
    qg_cuda *other = open_device(0, 0);
    cudaGraph_t graph;
    begin(other);
    cudaStreamBeginCapture(other->stream, cudaStreamCaptureModeGlobal);
    CHECK(multiply(other, a) == QG_UNSUPPORTED, "the first product in a capture");
    EXPECT_FAILURE(other, QG_UNSUPPORTED, "the first use of cuBLAS cannot be captured in a CUDA graph");
    cudaStreamEndCapture(other->stream, &graph);
    cudaGraphDestroy(graph);
    qg_cuda_end(other);
    qg_cuda_close(other);
    emulated_release();
}

/* Each begin places the handles once; a size may be asked for outside of it, on any device. */
static void test_placing(void) {
    float *a = device_floats(12);
    qg_cuda *other = open_device(1, 0);
    int now = -1;
    CHECK(qg_cuda_linalg(other)->work_size(qg_cuda_linalg(other), 2, 2) > 0, "%s", qg_cuda_error(other));
    CHECK(cudaGetDevice(&now) == cudaSuccess && now == 0, "a size query has left device %d", now);
    for (int round = 0; round < 2; round++) {
        const int64_t streams = blas.calls("cublasSetStream_v2"), workspaces = blas.calls("cublasSetWorkspace_v2");
        begin(other);
        CHECK(multiply(other, a) == QG_SUCCESS && multiply(other, a) == QG_SUCCESS, "%s", qg_cuda_error(other));
        qg_cuda_end(other);
        CHECK(
            blas.calls("cublasSetStream_v2") == streams + 1 && blas.calls("cublasSetWorkspace_v2") == workspaces + 1,
            "stream and workspace were not set once");
    }
    for (int round = 0; round < 2; round++) {
        const int64_t streams = solver.calls("cusolverDnSetStream");
        begin(other);
        for (int i = 0; i < 2; i++)
            CHECK(qg_cuda_linalg(other)->work_size(qg_cuda_linalg(other), 2, 2) > 0, "%s", qg_cuda_error(other));
        qg_cuda_end(other);
        CHECK(solver.calls("cusolverDnSetStream") == streams + 1, "cuSOLVER's stream was not set once");
    }
    qg_cuda_close(other);
    emulated_release();
}

static void test_blas_failure(const char *name, unsigned code, qg_status want, const char *text) {
    float *a = device_floats(12);
    qg_cuda *other = open_device(0, 0);
    begin(other);
    blas.fail(name, code);
    CHECK(multiply(other, a) == want, "%s fails", name);
    EXPECT_FAILURE(other, want, text);
    CHECK(multiply(other, a) == QG_SUCCESS, "after %s has failed once: %s", name, qg_cuda_error(other));
    qg_cuda_end(other);
    qg_cuda_close(other);
    emulated_release();
}

static qg_status factor_all(qg_cuda *with, float *a, void *work) {
    const qg_linalg *table = qg_cuda_linalg(with);
    qg_status status = table->potrf(table, 4, a, (int32_t *)(void *)(a + 60), work);
    status = status == QG_SUCCESS ? table->trtri(table, 4, a, a + 16, work) : status;
    return status == QG_SUCCESS ? table->qr(table, 4, 4, a + 32, a + 16, work) : status;
}

static void test_solver_failure(const char *name, unsigned code, qg_status want, const char *text) {
    float *a = device_floats(64);
    qg_cuda *other = open_device(0, 0);
    const qg_linalg *table = qg_cuda_linalg(other);
    begin(other);
    void *work = emulator_malloc(4096, 256, 0);
    CHECK(table->work_size(table, 4, 4) <= 4096, "work");
    for (int i = 0; i < 16; i++)
        a[i] = i % 5 == 0;
    solver.fail(name, code);
    CHECK(factor_all(other, a, work) == want, "%s fails", name);
    EXPECT_FAILURE(other, want, text);
    CHECK(factor_all(other, a, work) == QG_SUCCESS, "after %s has failed once: %s", name, qg_cuda_error(other));
    emulator_free(work);
    qg_cuda_end(other);
    qg_cuda_close(other);
    emulated_release();
}

static void test_creation_failure(void) {
    qg_cuda *other = open_device(0, 0);
    const qg_linalg *table = qg_cuda_linalg(other);
    begin(other);
    solver.fail("cusolverDnCreate", 1);
    CHECK(table->work_size(table, 4, 4) == 0, "no handle, and a size");
    EXPECT_FAILURE(other, QG_CUDA, "cuSOLVER: cusolverDnCreate failed: CUSOLVER_STATUS_NOT_INITIALIZED (1)");
    solver.fail("cusolverDnSetStream", 31);
    CHECK(table->work_size(table, 4, 4) == 0, "no stream, and a size");
    EXPECT_FAILURE(other, QG_CUDA, "cusolverDnSetStream failed: a status of cusolver_common.h (31)");
    CHECK(table->work_size(table, 4, 4) > 0, "%s", qg_cuda_error(other));
    qg_cuda_end(other);
    qg_cuda_close(other);
}

static void test_failures(void) {
    test_blas_failure(
        "cublasCreate_v2", 1, QG_CUDA, "cuBLAS: cublasCreate failed: the library was not initialized (1)");
    test_blas_failure("cublasCreate_v2", 3, QG_OUT_OF_MEMORY, "the resource allocation failed (3)");
    test_blas_failure("cublasSetMathMode", 7, QG_CUDA, "cublasSetMathMode failed: an unsupported value");
    test_blas_failure("cublasSetStream_v2", 14, QG_CUDA, "cublasSetStream failed: an internal operation failed (14)");
    test_blas_failure("cublasSetWorkspace_v2", 7, QG_CUDA, "cublasSetWorkspace failed: an unsupported value");
    test_blas_failure("cublasGemmEx_64", 7, QG_CUDA, "cublasGemmEx failed: an unsupported value or parameter");
    static const char *const calls[] = {
        "cusolverDnSpotrf_bufferSize",
        "cusolverDnSpotrf",
        "cusolverDnXtrtri_bufferSize",
        "cusolverDnXtrtri",
        "cusolverDnSgeqrf_bufferSize",
        "cusolverDnSgeqrf",
        "cusolverDnSorgqr_bufferSize",
        "cusolverDnSorgqr",
    };
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        char text[100];
        snprintf(text, sizeof text, "cuSOLVER: %s failed: CUSOLVER_STATUS_EXECUTION_FAILED (6)", calls[i]);
        test_solver_failure(calls[i], 6, QG_CUDA, text);
    }
    test_solver_failure("cusolverDnSpotrf", 2, QG_OUT_OF_MEMORY, "CUSOLVER_STATUS_ALLOC_FAILED (2)");
    test_creation_failure();
}

int main(void) {
    random_seed(11);
    test_libraries_are_missing();
    blas = standin_cublas();
    solver = standin_cusolver();
    cuda = open_device(0, 0);
    linalg = qg_cuda_linalg(cuda);
    begin(cuda);
    test_products();
    test_products_refused();
    test_tf32();
    static const int64_t sizes[] = {1, 2, 17, 64};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        test_triangles(sizes[i]);
        test_qr(sizes[i], sizes[i], -1);
        test_qr(sizes[i], sizes[i] + 13, sizes[i] / 2);
    }
    for (int i = 0; i < 8; i++)
        test_qr(16, 96, 16);
    test_beyond_the_grid();
    test_factorisations_refused();
    static const int64_t shapes[][2] = {{1, 1}, {1, 5}, {5, 1}, {6, 6}, {9, 4}, {4, 9}, {31, 20}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const int64_t k = shapes[i][0] < shapes[i][1] ? shapes[i][0] : shapes[i][1];
        test_svd(shapes[i][0], shapes[i][1], k);
        test_svd(shapes[i][0], shapes[i][1], k / 2);
    }
    test_svd_refused();
    qg_cuda_end(cuda);
    test_placing();
    test_failures();
    test_loaded_libraries_are_found();
    test_first_use_in_a_capture();
    CHECK(blas.handles() == 1 && solver.handles() == 1, "%d and %d handles are open", blas.handles(), solver.handles());
    qg_cuda_close(cuda);
    CHECK(blas.handles() == 0 && solver.handles() == 0, "%d and %d handles are left", blas.handles(), solver.handles());
    return check_finish();
}
