/* INT8 weights: quantise and dequantise, group by group against the formula in double. */
#include "harness.h"
#include "reference.h"

#include <float.h>

enum { KINDS = 16 };

/* Groups that have gone wrong somewhere before. */
static float value_of(int kind, int64_t i, int64_t group) {
    double u = random_uniform(-1.0, 1.0);
    switch (kind) {
    case 1:
        return 1.0f;
    case 2:
        return -3.7f;
    case 3:
        return 0.0f;
    case 4:
        return i % group == 0 ? 1000.0f : (float)(0.01 * u);
    case 5:
        return (float)(1e-38 * u);
    case 6:
        return (float)(1e38 * u);
    case 7:
        return (float)(3e38 * u);
    case 8:
        return (float)(2.0 + u);
    case 9:
        return (float)(-500.0 + 0.01 * u);
    case 10:
        return (float)(1e6 + u);
    case 11:
        return i % 2 == 0 ? 3.3e38f : -3.3e38f; /* beyond, the nearest code may decode to infinity */
    case 12:
        return 0x1p-149f;
    case 13:
        return i % 3 == 0 ? 0.0f : i % 3 == 1 ? -0.0f : 1e-30f;
    case 14:
        return -FLT_MAX;
    case 15:
        return random_finite();
    default:
        return (float)random_normal();
    }
}

typedef struct arrays {
    uint8_t *codes;
    float *scales;
    int16_t *zeros;
} arrays;

static arrays make_arrays(int64_t count, int64_t groups, size_t offset) {
    return (arrays){guarded((size_t)count, offset), guarded((size_t)groups * 4, 4 * offset),
        guarded((size_t)groups * 2, 2 * offset)};
}

static qg_weight as_weight(arrays a, int64_t rows, int64_t cols, int64_t group) {
    return (qg_weight){a.codes, a.scales, a.zeros, rows, cols, (int32_t)group, QG_INT8};
}

/* rows, cols, group size */
static const int64_t shapes[][3] = {{0, 5, 256}, {1, 1, 256}, {1, 255, 256}, {1, 256, 256}, {1, 257, 256},
    {4, 128, 256}, {7, 73, 256}, {3, 1009, 256}, {1, 769, 256}, {2, 3, 1}, {5, 11, 4}, {1, 100, 64}, {1, 4099, 4096},
    {33, 31, 100}};
enum { SHAPES = 14 };
static const qg_format formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};

static void test_case(int c) {
    const int64_t *shape = shapes[c % SHAPES];
    int64_t group = shape[2], count = shape[0] * shape[1], groups = (count + group - 1) / group;
    qg_format format = formats[c / SHAPES % 3];
    int kind = c / (3 * SHAPES) % KINDS;
    size_t bytes = ref_size(format);
    void *source = guarded((size_t)count * bytes, bytes * (size_t)random_below(2));
    float *values = guarded((size_t)count * 4, 0);
    for (int64_t i = 0; i < count; i++) {
        float value = value_of(kind, i, group);
        ref_store(format, source, i, format == QG_FLOAT16 ? fmaxf(-6e4f, fminf(6e4f, value)) : value);
        if (isinf(ref_load(format, source, i)))
            ref_store(format, source, i, 1.0f);
        values[i] = ref_load(format, source, i);
    }
    arrays want = make_arrays(count, groups, 0);
    void *want_back[3];
    for (int64_t g = 0; g < groups; g++) {
        int64_t n = count - g * group < group ? count - g * group : group;
        ref_int8_quantize(want.codes + g * group, &want.scales[g], &want.zeros[g], values + g * group, n);
    }
    for (int f = 0; f < 3; f++) {
        want_back[f] = guarded((size_t)count * ref_size(formats[f]), 0);
        for (int64_t i = 0; i < count; i++)
            ref_store(
                formats[f], want_back[f], i, want.scales[i / group] * (float)(want.codes[i] - want.zeros[i / group]));
    }
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
            arrays got = make_arrays(count, groups, (size_t)threads - 1);
            qg_weight weight = as_weight(got, shape[0], shape[1], group);
            omp_set_num_threads(threads);
            CHECK_OK(qg_int8_quantize(&weight, source, format, level(simd)));
            CHECK_BYTES(got.scales, want.scales, (size_t)groups * 4, "scales, case %d, level %d", c, simd);
            CHECK_BYTES(got.zeros, want.zeros, (size_t)groups * 2, "zeros, case %d, level %d", c, simd);
            CHECK_BYTES(got.codes, want.codes, (size_t)count, "codes, case %d, level %d", c, simd);
            for (int f = 0; f < 3; f++) {
                size_t size = ref_size(formats[f]);
                void *back = guarded((size_t)count * size, size * (size_t)(threads % 3));
                CHECK_OK(qg_int8_dequantize(&weight, back, formats[f], level(simd)));
                CHECK_BYTES(back, want_back[f], (size_t)count * size, "decoded %d, case %d, level %d", f, c, simd);
            }
        }
    }
    RELEASE("int8 writes outside its outputs, case %d", c);
}

/* Properties that hold whatever the formula is. */
static void test_properties(void) {
    static float values[1000], back[1000];
    static uint8_t codes[1000];
    float scales[4];
    int16_t zeros[4];
    qg_weight weight = {codes, scales, zeros, 1, 1000, 256, QG_INT8};
    for (int kind = 0; kind < KINDS; kind++) {
        for (int64_t i = 0; i < 1000; i++)
            values[i] = value_of(kind, i, 256);
        CHECK_OK(qg_int8_quantize(&weight, values, QG_FLOAT32, level(QG_SIMD_SCALAR)));
        CHECK_OK(qg_int8_dequantize(&weight, back, QG_FLOAT32, level(QG_SIMD_SCALAR)));
        for (int g = 0; g < 4; g++) {
            int64_t first = g * 256, end = g == 3 ? 1000 : first + 256;
            int lowest = 255, highest = 0;
            double worst = 0.0;
            for (int64_t i = first; i < end; i++) {
                worst = fmax(worst, fabs((double)back[i] - values[i]) / scales[g]);
                lowest = codes[i] < lowest ? codes[i] : lowest;
                highest = codes[i] > highest ? codes[i] : highest;
                CHECK(values[i] != 0.0f || back[i] == 0.0f, "zero became %g", back[i]);
            }
            CHECK(worst <= 0.5 + 1e-2, "kind %d, group %d: off by %g steps", kind, g, worst);
            CHECK(
                lowest >= 3 && highest <= 252, "kind %d, group %d: codes %d to %d leave no head-room", kind, g, lowest,
                highest);
            if (kind == 1 || kind == 2 || kind == 14)
                CHECK_BYTES(back + first, values + first, (size_t)(end - first) * 4, "constant group %d", g);
        }
    }
}

/* A value that is not finite is refused and nothing is written. */
static void test_not_finite(void) {
    static const float bad[] = {INFINITY, -INFINITY, NAN};
    for (int c = 0; c < 3 * 5 * 3; c++) {
        static const int64_t places[] = {0, 1, 255, 600, 999};
        qg_format format = formats[c % 3];
        void *source = guarded(1000 * ref_size(format), 0);
        for (int64_t i = 0; i < 1000; i++)
            ref_store(format, source, i, (float)random_normal());
        ref_store(format, source, places[c / 3 % 5], bad[c / 15]);
        for (int simd = 0; simd < LEVELS; simd++) {
            arrays got = make_arrays(1000, 4, 0), poison = make_arrays(1000, 4, 0);
            qg_weight weight = as_weight(got, 1, 1000, 256);
            if (level(simd) == NULL)
                continue;
            CHECK(qg_int8_quantize(&weight, source, format, level(simd)) == QG_INVALID_ARGUMENT, "case %d is taken", c);
            CHECK_BYTES(got.codes, poison.codes, 1000, "codes are written");
            CHECK_BYTES(got.scales, poison.scales, 16, "scales are written");
            CHECK_BYTES(got.zeros, poison.zeros, 8, "zeros are written");
        }
        RELEASE("int8 writes outside its outputs");
    }
}

static void test_threads(void) {
    int64_t rows = 97, cols = check_count(3001, 101), count = rows * cols, groups = (count + 255) / 256;
    float *values = guarded((size_t)count * 4, 0);
    for (int64_t i = 0; i < count; i++)
        values[i] = (float)random_normal();
    arrays want = {0};
    void *want_back = NULL;
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
            arrays got = make_arrays(count, groups, 1);
            qg_weight weight = as_weight(got, rows, cols, 256);
            void *back = guarded((size_t)count * 2, 2);
            omp_set_num_threads(threads);
            CHECK_OK(qg_int8_quantize(&weight, values, QG_FLOAT32, level(simd)));
            CHECK_OK(qg_int8_dequantize(&weight, back, QG_BFLOAT16, level(simd)));
            want = want_back == NULL ? got : want;
            want_back = want_back == NULL ? back : want_back;
            CHECK_BYTES(got.codes, want.codes, (size_t)count, "codes, level %d, %d threads", simd, threads);
            CHECK_BYTES(got.scales, want.scales, (size_t)groups * 4, "scales, level %d, %d threads", simd, threads);
            CHECK_BYTES(got.zeros, want.zeros, (size_t)groups * 2, "zeros, level %d, %d threads", simd, threads);
            CHECK_BYTES(back, want_back, (size_t)count * 2, "decoded, level %d, %d threads", simd, threads);
        }
    }
    RELEASE("int8 writes outside its outputs");
}

int main(void) {
    random_seed(3);
    for (int c = 0; c < 3 * SHAPES * KINDS; c += (int)check_count(1, 5))
        test_case(c);
    test_properties();
    test_not_finite();
    test_threads();
    return check_finish();
}
