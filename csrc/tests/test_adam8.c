/* Adam: a tile of moments against the formula (float32 bits, and within rounding of double), and the fused pass of
 * unprojected weights against adam followed by update. */
#include "harness.h"
#include "reference.h"
#include "single.h"

static const qg_format formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};

typedef struct arrays {
    void *exp_avg;
    void *exp_avg_sq;
    float *exp_avg_absmax;
    float *exp_avg_sq_absmax;
    size_t bytes;        /* of each moment */
    size_t absmax_bytes; /* of each absmax */
} arrays;

static arrays make_arrays(int64_t rows, int64_t cols, int64_t block, qg_format format, size_t offset) {
    size_t element = format == QG_FLOAT32 ? 4 : 1;
    arrays a = {.bytes = (size_t)(rows * cols) * element};
    a.exp_avg = guarded(a.bytes, element * offset);
    a.exp_avg_sq = guarded(a.bytes, element * offset);
    if (format == QG_DYNAMIC8) {
        a.absmax_bytes = (size_t)(rows * ((cols + block - 1) / block)) * 4;
        a.exp_avg_absmax = guarded(a.absmax_bytes, 4 * offset);
        a.exp_avg_sq_absmax = guarded(a.absmax_bytes, 4 * offset);
    }
    return a;
}

static void copy(arrays to, arrays from) {
    memcpy(to.exp_avg, from.exp_avg, from.bytes);
    memcpy(to.exp_avg_sq, from.exp_avg_sq, from.bytes);
    if (from.absmax_bytes > 0) {
        memcpy(to.exp_avg_absmax, from.exp_avg_absmax, from.absmax_bytes);
        memcpy(to.exp_avg_sq_absmax, from.exp_avg_sq_absmax, from.absmax_bytes);
    }
}

static void check_equal(arrays got, arrays want, const char *what, int c, int simd) {
    CHECK_BYTES(got.exp_avg, want.exp_avg, got.bytes, "%s: exp_avg, case %d, level %d", what, c, simd);
    CHECK_BYTES(got.exp_avg_sq, want.exp_avg_sq, got.bytes, "%s: exp_avg_sq, case %d, level %d", what, c, simd);
    CHECK_BYTES(
        got.exp_avg_absmax, want.exp_avg_absmax, got.absmax_bytes, "%s: absmax, case %d, level %d", what, c, simd);
    CHECK_BYTES(
        got.exp_avg_sq_absmax, want.exp_avg_sq_absmax, got.absmax_bytes, "%s: absmax of squares, case %d, level %d",
        what, c, simd);
}

/* Moments as if some steps had been made; a block in eight is still zero, some are tiny or huge. */
static void random_moments(arrays a, int64_t rows, int64_t cols, int64_t block, qg_format format) {
    int64_t per_row = (cols + block - 1) / block;
    for (int64_t b = 0; b < rows * per_row; b++) {
        int64_t first = b / per_row * cols + b % per_row * block, left = cols - b % per_row * block;
        double size = random_bits() % 8 == 0    ? 0.0
                      : random_bits() % 8 == 0  ? 1e-18
                      : random_bits() % 16 == 0 ? 1e17
                                                : 1.0;
        for (int64_t i = first; i < first + (left < block ? left : block); i++) {
            float m = (float)(size * random_normal()), v = (float)(size * size * random_uniform(0.0, 2.0));
            if (format == QG_FLOAT32) {
                ((float *)a.exp_avg)[i] = m;
                ((float *)a.exp_avg_sq)[i] = v;
            } else {
                ((uint8_t *)a.exp_avg)[i] = (uint8_t)(size == 0.0 ? 127 : random_bits() % 256);
                ((uint8_t *)a.exp_avg_sq)[i] = (uint8_t)(size == 0.0 ? 0 : random_bits() % 256);
            }
        }
        if (format == QG_DYNAMIC8) {
            a.exp_avg_absmax[b] = (float)(size * random_uniform(0.5, 2.0));
            a.exp_avg_sq_absmax[b] = (float)(size * size * random_uniform(0.5, 2.0));
        }
    }
}

/* One Adam step on elements of one block, or of a row of float32; N comes back and is compared with double. */
static void reference_adam(
    const qg_moments *moments,
    int64_t row,
    int64_t cols,
    int64_t first,
    int64_t n,
    const float *g,
    float *normalised,
    const qg_adam_coefficients *c) {
    float m[5000], v[5000];
    double worst = 0.0;
    ref_load_moments(m, v, moments, row, cols, first, n);
    ref_adam_block(moments, row, cols, first, n, g, normalised, c);
    for (int64_t i = 0; i < n; i++) {
        double old = (double)c->beta1 * m[i], new = (double)c->one_minus_beta1 *g[i];
        double root = sqrt((double)c->beta2 * v[i] + (double)c->one_minus_beta2 * g[i] * g[i]) * c->bias2 + c->eps;
        if (root > 1e-12)
            worst = fmax(
                worst, fabs(normalised[i] - (old + new) * c->bias1 / root) * root / (fabs(old) + fabs(new) + 1e-30));
    }
    CHECK(worst < 1e-6 * c->bias1, "the float32 formula is %g away from double", worst);
}

/* rows, columns of the moments, block, first column of the tile, its columns (-1: to the end) */
static const int64_t shapes[][5] = {{0, 5, 256, 0, -1}, {3, 0, 256, 0, -1}, {1, 1, 256, 0, -1}, {3, 255, 256, 0, -1},
    {2, 256, 256, 0, -1}, {5, 257, 256, 0, -1}, {5, 257, 256, 256, -1}, {3, 1009, 256, 512, 256},
    {2, 1009, 256, 256, -1}, {1, 769, 256, 0, 512}, {7, 13, 4, 4, 8}, {4, 10, 1, 3, 5}, {1, 5000, 4096, 0, -1},
    {3, 100, 64, 64, -1}, {130, 33, 32, 0, 32}, {40, 1009, 256, 0, -1}};
enum { SHAPES = 16 };

static void test_adam(int c) {
    const int64_t *shape = shapes[c % SHAPES];
    int64_t rows = shape[0], moments_cols = shape[1], block = shape[2], first = shape[3];
    int64_t cols = shape[4] < 0 ? moments_cols - first : shape[4], n_stride = cols + random_below(2) * 3;
    int64_t g_stride = random_below(2) ? n_stride : cols + random_below(3) * 5;
    qg_format format = c / SHAPES % 2 ? QG_DYNAMIC8 : QG_FLOAT32, g_format = formats[c / SHAPES / 2 % 3];
    qg_adam_coefficients coefficients =
        ref_adam_coefficients(random_below(4) ? 0.9 : 0.0, 0.999, random_below(4) ? 1e-8 : 0.0, 1 + random_below(1000));
    int64_t g_length = rows == 0 || cols == 0 ? 0 : (rows - 1) * g_stride + cols;
    int64_t n_length = rows == 0 || cols == 0 ? 0 : (rows - 1) * n_stride + cols;
    arrays start = make_arrays(rows, moments_cols, block, format, 0),
           want = make_arrays(rows, moments_cols, block, format, 0);
    random_moments(start, rows, moments_cols, block, format);
    copy(want, start);
    qg_moments wanted = {
        want.exp_avg, want.exp_avg_sq, want.exp_avg_absmax, want.exp_avg_sq_absmax, (int32_t)block, format};
    void *g = guarded((size_t)g_length * ref_size(g_format), ref_size(g_format));
    double size = random_below(5) == 0 ? 1e-3 : random_below(5) == 0 && g_format != QG_FLOAT16 ? 1e15 : 1.0;
    int zero = random_below(9) == 0;
    for (int64_t i = 0; i < g_length; i++)
        ref_store(g_format, g, i, (float)(zero ? 0.0 : size * random_normal()));
    /* What lies between the rows of N keeps its poison. */
    float *normalised = guarded((size_t)n_length * 4, 0);
    int64_t step = format == QG_DYNAMIC8 ? block : cols;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t at = 0; at < cols; at += step) {
            float values[5000], result[5000];
            int64_t n = cols - at < step ? cols - at : step;
            for (int64_t i = 0; i < n; i++)
                values[i] = ref_load(g_format, g, row * g_stride + at + i);
            reference_adam(&wanted, row, moments_cols, first + at, n, values, result, &coefficients);
            memcpy(normalised + row * n_stride + at, result, (size_t)n * 4);
        }
    }
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
            arrays got = make_arrays(rows, moments_cols, block, format, (size_t)threads - 1);
            copy(got, start);
            qg_moments moments = {
                got.exp_avg, got.exp_avg_sq, got.exp_avg_absmax, got.exp_avg_sq_absmax, (int32_t)block, format};
            float *n = guarded((size_t)n_length * 4, 4 * (size_t)(threads - 1));
            const void *gradient = g;
            int in_place = threads == 3 && g_format == QG_FLOAT32 && g_stride == n_stride;
            if (in_place)
                gradient = memcpy(n, g, (size_t)n_length * 4);
            omp_set_num_threads(threads);
            single_adam(
                level(simd), &moments, moments_cols, rows, first, cols, gradient, g_format, g_stride, n, n_stride,
                &coefficients);
            check_equal(got, want, "adam", c, simd);
            for (int64_t row = 0; in_place && row + 1 < rows; row++)
                memcpy(n + row * n_stride + cols, normalised + row * n_stride + cols, (size_t)(n_stride - cols) * 4);
            CHECK_BYTES(n, normalised, (size_t)n_length * 4, "N, case %d, level %d, %d threads", c, simd, threads);
        }
    }
    RELEASE("adam writes outside its outputs, case %d", c);
}

/* A first moment that is not zero keeps its sign, and a second one does not become zero, whatever their size beside the
 * block's largest. */
static void test_nothing_vanishes(void) {
    enum { COUNT = 300 };
    qg_adam_coefficients coefficients = ref_adam_coefficients(0.9, 0.999, 1e-8, 1);
    for (int simd = 0; simd < LEVELS; simd++) {
        uint8_t m[COUNT], v[COUNT];
        float m_absmax[2] = {0}, v_absmax[2] = {0}, g[COUNT], n[COUNT];
        qg_moments moments = {m, v, m_absmax, v_absmax, 256, QG_DYNAMIC8};
        for (int i = 0; i < COUNT; i++) {
            m[i] = 127;
            v[i] = 0;
            g[i] = i % 256 == 0 ? 1.0f : i % 3 == 0 ? 0.0f : i % 3 == 1 ? 1e-12f : -1e-12f;
        }
        if (level(simd) == NULL)
            continue;
        single_adam(level(simd), &moments, COUNT, 1, 0, COUNT, g, QG_FLOAT32, COUNT, n, COUNT, &coefficients);
        for (int i = 0; i < COUNT; i++) {
            int want = i % 256 == 0 ? 255 : i % 3 == 0 ? 127 : i % 3 == 1 ? 128 : 126;
            CHECK(m[i] == want, "element %d has code %d, not %d", i, m[i], want);
            CHECK(v[i] == (i % 256 == 0 ? 255 : i % 3 != 0), "square %d has code %d", i, v[i]);
        }
    }
}

/* ---------------------------------------------------------------- the fused pass */

/* rows, cols, block, group size, chunk */
static const int64_t fused[][5] = {{1, 1, 256, 256, 256}, {1, 255, 256, 256, 4096}, {1, 257, 256, 256, 256},
    {3, 1009, 256, 256, 512}, {4, 4096, 256, 256, 4096}, {7, 73, 256, 64, 256}, {5, 13, 4, 6, 12},
    {1, 40011, 256, 256, 4096}, {2, 500, 64, 100, 1600}, {0, 3, 256, 256, 256}};
enum { FUSED = 10 };

static void test_adam_update(int c) {
    static const qg_format weights[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16, QG_INT8};
    const int64_t *shape = fused[c % FUSED];
    int64_t count = shape[0] * shape[1], block = shape[2], group = shape[3], chunk = shape[4],
            groups = (count + group - 1) / group;
    qg_format format = weights[c / FUSED % 4], m_format = random_below(3) ? QG_DYNAMIC8 : QG_FLOAT32,
              g_format = formats[random_below(3)];
    size_t element = ref_size(format);
    arrays start = make_arrays(1, count, block, m_format, 0), want = make_arrays(1, count, block, m_format, 0);
    random_moments(start, 1, count, block, m_format);
    copy(want, start);
    void *g = guarded((size_t)count * ref_size(g_format), ref_size(g_format)),
         *data = guarded((size_t)count * element, 0);
    float *scales = guarded((size_t)groups * 4, 0), *n = guarded((size_t)count * 4, 0);
    int16_t *zeros = guarded((size_t)groups * 2, 0);
    for (int64_t i = 0; i < count; i++) {
        ref_store(g_format, g, i, (float)random_normal());
        if (format == QG_INT8)
            ((uint8_t *)data)[i] = (uint8_t)random_bits();
        else
            ref_store(format, data, i, (float)random_normal());
        scales[i / group] = 0.01f;
        zeros[i / group] = 120;
    }
    qg_adam_coefficients adam = ref_adam_coefficients(0.9, 0.95, 1e-8, 3);
    qg_update_coefficients update = {0.999f, 0.001f, random_below(2) ? 0.02f : 1.0f, random_below(4) != 0};
    qg_noise_stream stream = {random_bits(), (uint64_t)c, 77};
    /* The same in two passes, by the scalar kernels that are tested on their own. */
    const qg_backend *scalar = level(QG_SIMD_SCALAR);
    void *data_want = guarded_copy(data, (size_t)count * element, 0);
    float *scales_want = guarded_copy(scales, (size_t)groups * 4, 0);
    int16_t *zeros_want = guarded_copy(zeros, (size_t)groups * 2, 0);
    int64_t stats_want[2] = {3, 4};
    qg_moments moments = {
        want.exp_avg, want.exp_avg_sq, want.exp_avg_absmax, want.exp_avg_sq_absmax, (int32_t)block, m_format};
    int is_int8 = format == QG_INT8;
    qg_weight weight = {data_want, is_int8 ? scales_want : NULL, is_int8 ? zeros_want : NULL, shape[0], shape[1],
        (int32_t)group, format};
    omp_set_num_threads(1);
    single_adam(scalar, &moments, count, 1, 0, count, g, g_format, count, n, count, &adam);
    single_update(scalar, &weight, 0, count, n, QG_FLOAT32, &update, &stream, stats_want);
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
            arrays got = make_arrays(1, count, block, m_format, (size_t)threads - 1);
            copy(got, start);
            size_t offset = (size_t)threads % 3;
            int64_t stats[2] = {3, 4};
            omp_set_num_threads(threads);
            const int64_t chunks = level(simd)->chunks(NULL);
            CHECK(chunks >= 1 && chunks <= 64, "%lld chunks", (long long)chunks);
            float *scratch = guarded((size_t)(chunk * chunks) * 4, 0);
            moments = (qg_moments){
                got.exp_avg, got.exp_avg_sq, got.exp_avg_absmax, got.exp_avg_sq_absmax, (int32_t)block, m_format};
            weight.data = guarded_copy(data, (size_t)count * element, element * offset);
            weight.scales = is_int8 ? guarded_copy(scales, (size_t)groups * 4, 4 * offset) : NULL;
            weight.zeros = is_int8 ? guarded_copy(zeros, (size_t)groups * 2, 2 * offset) : NULL;
            single_adam_update(
                level(simd), &weight, &moments, g, g_format, &adam, &update, &stream, stats, chunk, scratch);
            check_equal(got, want, "adam_update", c, simd);
            CHECK_BYTES(
                weight.data, data_want, (size_t)count * element, "weight, case %d, level %d, %d threads", c, simd,
                threads);
            if (is_int8) {
                CHECK_BYTES(weight.scales, scales_want, (size_t)groups * 4, "scales, case %d, level %d", c, simd);
                CHECK_BYTES(weight.zeros, zeros_want, (size_t)groups * 2, "zeros, case %d, level %d", c, simd);
                CHECK_BYTES(stats, stats_want, sizeof stats, "stats, case %d, level %d, %d threads", c, simd, threads);
            }
        }
    }
    RELEASE("adam_update writes outside its outputs, case %d", c);
}

int main(void) {
    random_seed(8);
    for (int c = 0; c < check_count(12 * SHAPES, 2 * SHAPES); c++)
        test_adam(c);
    test_nothing_vanishes();
    for (int c = 0; c < 12 * FUSED; c += (int)check_count(1, 7))
        test_adam_update(c);
    return check_finish();
}
