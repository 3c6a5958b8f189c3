/* The weight update: every format against a plain writing of its formula, byte for byte. */
#include "harness.h"
#include "reference.h"
#include "single.h"

#include <float.h>

/* An INT8 weight with its own copies of everything. */
typedef struct arrays {
    uint8_t *codes;
    float *scales;
    int16_t *zeros;
    int64_t count;
    int64_t groups;
} arrays;

static arrays copy_of(const arrays *from, size_t offset) {
    return (arrays){guarded_copy(from->codes, (size_t)from->count, offset),
        guarded_copy(from->scales, (size_t)from->groups * 4, 4 * offset),
        guarded_copy(from->zeros, (size_t)from->groups * 2, 2 * offset), from->count, from->groups};
}

static void check_equal(const arrays *got, const arrays *want, const char *what, int c, int simd, int threads) {
    CHECK_BYTES(
        got->codes, want->codes, (size_t)got->count, "%s: codes, case %d, level %d, %d threads", what, c, simd,
        threads);
    CHECK_BYTES(got->scales, want->scales, (size_t)got->groups * 4, "%s: scales, case %d, level %d", what, c, simd);
    CHECK_BYTES(got->zeros, want->zeros, (size_t)got->groups * 2, "%s: zeros, case %d, level %d", what, c, simd);
}

/* Groups of every kind: full and narrow code ranges, every zero point, scales from the least to the largest. */
static void random_weight(const arrays *w, int64_t group) {
    static const int16_t zeros[] = {0, 128, 300, -3000, 32767, -32767, 32700, 131, -16256, 16512};
    for (int64_t g = 0; g < w->groups; g++) {
        int64_t end = (g + 1) * group < w->count ? (g + 1) * group : w->count;
        int lo = (int)(random_bits() % 256), hi = (int)(random_bits() % 256), kind = (int)(random_bits() % 8);
        if (kind < 4) {
            lo = 4;
            hi = 251;
        }
        if (kind == 6) { /* about half a full range: on the edge of getting a narrower one */
            lo = (int)random_below(128);
            hi = lo + 121 + (int)random_below(6);
        }
        if (kind == 7)
            hi = lo;
        w->zeros[g] = random_bits() % 3 == 0 ? zeros[random_bits() % 10] : (int16_t)random_uniform(-300, 500);
        w->scales[g] = (float)exp(random_uniform(-12.0, 3.0));
        if (kind == 4)
            w->scales[g] = random_bits() % 2 ? 0x1p-100f : 1e36f;
        for (int64_t i = g * group; i < end; i++)
            w->codes[i] = (uint8_t)(lo < hi ? lo + (int)(random_bits() % (uint64_t)(hi - lo + 1)) : lo);
    }
}

/* Updates of 1e-8 to 1e6 steps, with groups that do not move. */
static void random_update(float *u, const arrays *w, int64_t group) {
    for (int64_t g = 0; g < w->groups; g++) {
        double size = pow(10.0, random_uniform(-8.0, 3.0)), offset = random_bits() % 4 == 0 ? random_normal() : 0.0;
        int kind = (int)(random_bits() % 10);
        for (int64_t i = g * group; i < w->count && i < (g + 1) * group; i++) {
            double steps = kind == 0 ? 0.0 : size * (random_normal() + offset);
            if (kind == 1)
                steps = i % 7 == 0 ? 1e6 * size : 0.0;
            if (kind == 2)
                steps = rint(steps) + 0.5;
            u[i] = (float)fmax(-1e38, fmin(1e38, steps * w->scales[g]));
        }
    }
}

static const struct {
    int64_t rows, cols, group;
} shapes[] = {{1, 1, 256}, {1, 255, 256}, {1, 256, 256}, {1, 257, 256}, {3, 1009, 256}, {16, 256, 256}, {2, 3, 1},
    {5, 13, 4}, {10, 10, 64}, {7, 31, 100}, {1, 5000, 4096}, {64, 100, 256}};
enum { SHAPES = 12 };

static void test_int8_reference(int c) {
    int64_t group = shapes[c % SHAPES].group, count = shapes[c % SHAPES].rows * shapes[c % SHAPES].cols;
    arrays start = {guarded((size_t)count, 0), NULL, NULL, count, (count + group - 1) / group};
    start.scales = guarded((size_t)start.groups * 4, 0);
    start.zeros = guarded((size_t)start.groups * 2, 0);
    random_weight(&start, group);
    float *u = guarded((size_t)count * 4, 0);
    random_update(u, &start, group);
    qg_format format = random_below(2) ? QG_FLOAT32 : QG_BFLOAT16;
    size_t size = ref_size(format);
    void *given = guarded((size_t)count * size, size);
    for (int64_t i = 0; i < count; i++) {
        ref_store(format, given, i, u[i]);
        u[i] = ref_load(format, given, i);
    }
    qg_update_coefficients coefficients = {.rate = random_below(2) ? 1.0f : 0.37f, .stochastic = random_below(4) != 0};
    coefficients.decay = random_below(3) == 0 ? 1e-3f : random_below(8) == 0 ? 0.3f : 0.0f;
    coefficients.keep = 1.0f - coefficients.decay;
    qg_noise_stream stream = {random_bits(), random_bits() >> 1, (uint32_t)random_bits()};

    /* The whole weight, or the tile between two groups. */
    int64_t first = random_below(4) == 0 ? start.groups / 3 * group : 0;
    int64_t length = first == 0 && random_below(4) == 0 ? start.groups / 2 * group : count - first;
    int64_t counted[2] = {0, 0};
    arrays want = copy_of(&start, 0);
    qg_weight wanted = {want.codes, want.scales, want.zeros, 1, count, (int32_t)group, QG_INT8};
    ref_update(&wanted, first, length, u + first, &coefficients, &stream, counted);
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
            arrays got = copy_of(&start, (size_t)threads % 3);
            int64_t stats[2] = {10, 20};
            qg_weight weight = {got.codes, got.scales, got.zeros, shapes[c % SHAPES].rows, shapes[c % SHAPES].cols,
                (int32_t)group, QG_INT8};
            omp_set_num_threads(threads);
            single_update(
                level(simd), &weight, first, length, (char *)given + first * (int64_t)size, format, &coefficients,
                &stream, threads == 3 ? NULL : stats);
            check_equal(&got, &want, "update", c, simd, threads);
            CHECK(
                threads == 3 || (stats[0] == 10 + counted[0] && stats[1] == 20 + counted[1]),
                "case %d, level %d: %lld shifted, %lld re-ranged, not %lld, %lld", c, simd, (long long)stats[0] - 10,
                (long long)stats[1] - 20, (long long)counted[0], (long long)counted[1]);
        }
    }
    RELEASE("update writes outside the weight, case %d", c);
}

static void test_int8_threads(void) {
    int64_t rows = 101, cols = check_count(2003, 53), count = rows * cols;
    arrays start = {guarded((size_t)count, 0), NULL, NULL, count, (count + 255) / 256}, want = {0};
    start.scales = guarded((size_t)start.groups * 4, 0);
    start.zeros = guarded((size_t)start.groups * 2, 0);
    random_weight(&start, 256);
    float *u = guarded((size_t)count * 4, 0);
    random_update(u, &start, 256);
    qg_update_coefficients coefficients = {0.999f, 1e-3f, 1.0f, 1};
    qg_noise_stream stream = {1, 2, 3};
    int64_t counted[2] = {0, 0};
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
            arrays got = copy_of(&start, 1);
            int64_t stats[2] = {0, 0};
            qg_weight weight = {got.codes, got.scales, got.zeros, rows, cols, 256, QG_INT8};
            omp_set_num_threads(threads);
            single_update(level(simd), &weight, 0, count, u, QG_FLOAT32, &coefficients, &stream, stats);
            if (want.codes == NULL) {
                want = got;
                memcpy(counted, stats, sizeof stats);
            }
            check_equal(&got, &want, "threads", 0, simd, threads);
            CHECK_BYTES(stats, counted, sizeof stats, "stats, level %d, %d threads", simd, threads);
        }
    }
    RELEASE("update writes outside the weight");
}

/* ---------------------------------------------------------------- float weights */

static void test_float_reference(int c) {
    static const qg_format formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};
    qg_format format = formats[c % 3], u_format = random_below(2) ? QG_FLOAT32 : QG_BFLOAT16;
    size_t size = ref_size(format), u_size = ref_size(u_format);
    int64_t cols = random_below(11) == 0 ? check_count(70001, 1001) : 1 + random_below(300), rows = 1 + random_below(3);
    int64_t count = rows * cols, first = random_below(4) == 0 ? count / 3 : 0;
    int64_t length = random_below(7) == 0 ? 0 : count - first;
    void *start = guarded((size_t)count * size, size), *want = guarded((size_t)count * size, 0);
    void *u = guarded((size_t)length * u_size, u_size * (size_t)(c % 2));
    double spread = random_below(4) == 0 ? 1e-3 : 1.0;
    for (int64_t i = 0; i < count; i++) {
        double value = i % 50 == 0 ? random_finite() : i % 97 == 3 ? INFINITY : random_normal();
        ref_store(format, start, i, (float)value); /* what is too large for float16 becomes infinite, and stays so */
    }
    for (int64_t i = 0; i < length; i++)
        ref_store(u_format, u, i, (float)(i % 31 == 0 ? 0.0 : spread * random_normal()));
    qg_update_coefficients coefficients = {
        .keep = 0.999f, .decay = 1e-3f, .rate = 0.01f, .stochastic = (int)random_below(2)};
    if (random_below(3) == 0)
        coefficients.keep = 1.0f;
    qg_noise_stream stream = {random_bits(), random_bits() >> 1, (uint32_t)random_bits()};
    memcpy(want, start, (size_t)count * size);
    float *exact = guarded((size_t)length * 4, 0);
    for (int64_t i = 0; i < length; i++)
        exact[i] = ref_load(u_format, u, i);
    qg_weight wanted = {want, NULL, NULL, rows, cols, 0, format};
    ref_update(&wanted, first, length, exact, &coefficients, &stream, NULL);
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
            void *got = guarded_copy(start, (size_t)count * size, size * (size_t)(threads % 3));
            int64_t stats[2] = {5, 5};
            qg_weight weight = {got, NULL, NULL, rows, cols, 0, format};
            omp_set_num_threads(threads);
            single_update(
                level(simd), &weight, first, length, u, u_format, &coefficients, &stream, threads == 2 ? stats : NULL);
            CHECK_BYTES(got, want, (size_t)count * size, "format %d, case %d, level %d", format, c, simd);
            CHECK(stats[0] == 5 && stats[1] == 5, "a float weight has no groups to count");
        }
    }
    RELEASE("update writes outside the weight, case %d", c);
}

/* A finite bfloat16 weight stays finite, and the mean of many roundings is the exact value. */
static void test_bfloat16_unbiased(void) {
    enum { COUNT = 1024 };
    static uint16_t weights[COUNT];
    static float u[COUNT];
    qg_weight weight = {weights, NULL, NULL, 1, COUNT, 0, QG_BFLOAT16};
    qg_update_coefficients coefficients = {1.0f, 0.0f, 1.0f, 1};
    int64_t steps = check_count(100, 5);
    for (int c = 0; c < 6; c++) {
        static const double shares[] = {0.01, 0.1, 0.25, 0.5, 0.9, 1.7};
        double up = 0.0, share = shares[c], whole = floor(share), part = share - whole, n = (double)(steps * COUNT);
        for (int64_t step = 0; step < steps; step++) {
            for (int i = 0; i < COUNT; i++) {
                weights[i] = 0x3F80; /* 1: the next one up is 2^-7 away */
                u[i] = (float)(-share * 0x1p-7);
            }
            qg_noise_stream stream = {5, (uint64_t)step, 9};
            single_update(level(QG_SIMD_SCALAR), &weight, 0, COUNT, u, QG_FLOAT32, &coefficients, &stream, NULL);
            for (int i = 0; i < COUNT; i++)
                up += weights[i] - 0x3F80 - whole;
        }
        CHECK(fabs(up - n * part) < 5.0 * sqrt(n * part * (1.0 - part)), "share %g: %g of %g go up", share, up, n);
    }
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int i = 0; i < COUNT; i++) {
            weights[i] = i % 2 ? 0x7F7F : 0xFF7F;
            u[i] = i % 2 ? -1e36f : 1e36f; /* most of the way to infinity, finite in float32 */
        }
        if (level(simd) == NULL)
            continue;
        single_update(level(simd), &weight, 0, COUNT, u, QG_FLOAT32, &coefficients, &(qg_noise_stream){1, 1, 1}, NULL);
        for (int i = 0; i < COUNT; i++)
            CHECK(
                weights[i] == (i % 2 ? 0x7F7F : 0xFF7F), "the largest bfloat16 became %x, level %d", weights[i], simd);
    }
}

int main(void) {
    random_seed(4);
    for (int c = 0; c < check_count(1200, 36); c++)
        test_int8_reference(c);
    test_int8_threads();
    for (int c = 0; c < check_count(400, 33); c++)
        test_float_reference(c);
    test_bfloat16_unbiased();
    return check_finish();
}
