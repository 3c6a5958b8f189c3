/* The check for finite gradients (absmax), the sum of squares, and conversions between the float formats. */
#include "harness.h"
#include "reference.h"
#include "single.h"

static const qg_format formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};

/* The largest magnitude anywhere in arrays of every length; infinity as soon as one value is not finite. */
static void test_absmax(void) {
    static const int64_t counts[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 257, 1009};
    static const float special[] = {INFINITY, -INFINITY, NAN, -7.5f, 7.5f, 0x1p-20f, -0.0f};
    for (int c = 0; c < 17 * 3 * 7 * 4; c++) {
        int64_t count = counts[c % 17], place = count == 0 ? 0 : random_below(count);
        qg_format format = formats[c / 17 % 3];
        float value = special[c / 51 % 7], want = 0.0f;
        double size = c / 357 == 0 ? 0.0 : c / 357 == 1 ? 1e-6 : 1.0;
        void *source = guarded((size_t)count * ref_size(format), ref_size(format) * (size_t)(c % 3));
        for (int64_t i = 0; i < count; i++)
            ref_store(format, source, i, i == place ? value : (float)(size * random_normal()));
        for (int64_t i = 0; i < count; i++) {
            float x = ref_load(format, source, i);
            want = isfinite(x) ? fmaxf(want, fabsf(x)) : INFINITY;
        }
        for (int simd = 0; simd < LEVELS; simd++) {
            for (int threads = 1; level(simd) != NULL && threads <= 3; threads += 2) {
                float *got = guarded(4, 0);
                omp_set_num_threads(threads);
                CHECK_OK(qg_absmax(got, &(qg_array){count == 0 ? NULL : source, count, format}, 1, level(simd)));
                CHECK_BYTES(got, &want, 4, "absmax of case %d, level %d", c, simd);
            }
        }
        RELEASE("absmax writes outside its output");
    }
}

/* The same bits at every level and thread count, and the sum of the definition. */
static void test_sum_squares(void) {
    static const int64_t counts[] = {0, 1, 7, 8, 9, 63, 64, 65, 511, 513, 4099, 32767, 32768, 100003};
    for (int c = 0; c < 14 * 3; c++) {
        int64_t count = counts[c % 14];
        float *source = guarded((size_t)count * 4, 4);
        long double exact = 0.0L;
        for (int64_t i = 0; i < count; i++) {
            source[i] = (float)ldexp(random_normal(), (int)(c / 14 == 0 ? 0 : c / 14 == 1 ? -140 : 120) - (int)(i % 9));
            exact += (long double)source[i] * source[i];
        }
        double want = NAN;
        for (int simd = 0; simd < LEVELS; simd++) {
            for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
                double *got = guarded(8, 8);
                omp_set_num_threads(threads);
                level(simd)->sum_squares(got, source, QG_FLOAT32, count, NULL);
                want = simd == 0 && threads == 1 ? *got : want;
                CHECK_BYTES(got, &want, 8, "sum of %lld squares, level %d", (long long)count, simd);
            }
        }
        CHECK(fabsl(want - exact) <= 1e-13L * exact, "%lld squares: %.17g, not %.17Lg", (long long)count, want, exact);
        RELEASE("sum_squares writes outside its output");
    }
}

static void test_absmax_extremes(void) {
    static const uint32_t nans[] = {0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF}; /* the least and the greatest */
    static const uint16_t nans_half[] = {0x7C01, 0xFC01, 0x7FFF, 0xFFFF},
                          nans_bfloat[] = {0x7F81, 0xFF81, 0x7FFF, 0xFFFF};
    float least = 0x1p-149f, most = 0x1.fffffep127f, got;
    uint16_t half = 1;
    for (int simd = 0; simd < LEVELS; simd++) {
        if (level(simd) == NULL)
            continue;
        CHECK_OK(qg_absmax(&got, &(qg_array){&least, 1, QG_FLOAT32}, 1, level(simd)));
        CHECK(got == least, "the least float32 gives %g", got);
        CHECK_OK(qg_absmax(&got, &(qg_array){&most, 1, QG_FLOAT32}, 1, level(simd)));
        CHECK(got == most, "the largest float32 gives %g", got);
        CHECK_OK(qg_absmax(&got, &(qg_array){&half, 1, QG_FLOAT16}, 1, level(simd)));
        CHECK(got == 0x1p-24f, "the least float16 gives %g", got);
        CHECK_OK(qg_absmax(&got, &(qg_array){&half, 1, QG_BFLOAT16}, 1, level(simd)));
        CHECK(got == 0x1p-133f, "the least bfloat16 gives %g", got);
        for (int i = 0; i < 12; i++) {
            const void *nan = i < 4 ? (const void *)&nans[i] : i < 8 ? &nans_half[i - 4] : &nans_bfloat[i - 8];
            CHECK_OK(qg_absmax(
                &got,
                &(qg_array){nan, 1,
                    i < 4   ? QG_FLOAT32
                    : i < 8 ? QG_FLOAT16
                            : QG_BFLOAT16},
                1, level(simd)));
            CHECK(got == INFINITY, "NaN %d gives %g, level %d", i, got, simd);
        }
    }
}

/* One value that is not finite is found in a long array at any thread count. */
static void test_absmax_threads(void) {
    int64_t count = check_count(400003, 5003);
    for (int c = 0; c < 6; c++) {
        qg_format format = formats[c % 3];
        void *source = guarded((size_t)count * ref_size(format), 0);
        for (int64_t i = 0; i < count; i++)
            ref_store(format, source, i, (float)(i % 1000) * 0x1p-10f);
        int64_t place = random_below(count);
        ref_store(format, source, place, c < 3 ? -100.0f : NAN);
        for (int simd = 0; simd < LEVELS; simd++) {
            for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
                float got = -1.0f;
                omp_set_num_threads(threads);
                CHECK_OK(qg_absmax(&got, &(qg_array){source, count, format}, 1, level(simd)));
                CHECK(got == (c < 3 ? 100.0f : INFINITY), "absmax %g, level %d, %d threads", got, simd, threads);
            }
        }
        RELEASE("absmax writes outside its output");
    }
}

/* Values of interest in float32: every 16-bit pattern, the thresholds between 16-bit neighbours, random bits. */
static int64_t interesting(float *values, qg_format target, int64_t most) {
    int64_t count = 0, stride = check_count(1, 97);
    for (int64_t bits = 0; bits < 65536 && count + 4 <= most; bits += stride) {
        uint16_t pair[2] = {(uint16_t)bits, (uint16_t)(bits + 1)};
        qg_format half = target == QG_FLOAT32 ? QG_BFLOAT16 : target;
        double a = ref_load(half, pair, 0), b = ref_load(half, pair, 1), middle = (a + b) / 2.0;
        if (isinf(b) && isfinite(a))
            middle = a + (half == QG_FLOAT16 ? 16.0 : 0x1p119) * (a < 0.0 ? -1.0 : 1.0); /* overflow begins here */
        values[count++] = (float)a;
        values[count++] = (float)middle;
        values[count++] = nextafterf((float)middle, -INFINITY);
        values[count++] = nextafterf((float)middle, INFINITY);
    }
    for (int64_t i = 0; i < most / 4 && count < most; i++)
        values[count++] = i % 2 ? random_finite() : (float)random_normal();
    return count;
}

/* Equal bits, or both not a number. */
static int same(qg_format format, const void *a, const void *b, int64_t index) {
    size_t size = ref_size(format);
    if (memcmp((const char *)a + index * (int64_t)size, (const char *)b + index * (int64_t)size, size) == 0)
        return 1;
    return isnan(ref_load(format, a, index)) && isnan(ref_load(format, b, index));
}

static void test_cast_values(void) {
    enum { MOST = 350000 };
    static float values[MOST];
    for (int c = 0; c < 9; c++) {
        qg_format from = formats[c % 3], to = formats[c / 3];
        int64_t count = interesting(values, to, check_count(MOST, 4000));
        void *source = guarded((size_t)count * ref_size(from), ref_size(from)),
             *want = guarded((size_t)count * ref_size(to), 0);
        for (int64_t i = 0; i < count; i++) {
            ref_store(from, source, i, values[i]);
            ref_store(to, want, i, ref_load(from, source, i));
        }
        for (int simd = 0; simd < LEVELS; simd++) {
            for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
                void *got = guarded((size_t)count * ref_size(to), ref_size(to) * (size_t)(threads - 1));
                omp_set_num_threads(threads);
                single_cast(level(simd), got, to, source, from, 1, count, count);
                int64_t wrong = 0;
                for (int64_t i = 0; i < count; i++)
                    wrong += !same(to, got, want, i) &&
                             (wrong > 0 || !CHECK(
                                               0, "format %d to %d, level %d: %a becomes %a, not %a", from, to, simd,
                                               ref_load(from, source, i), ref_load(to, got, i), ref_load(to, want, i)));
                CHECK(wrong == 0, "format %d to %d, level %d: %lld wrong", from, to, simd, (long long)wrong);
            }
        }
        RELEASE("cast writes outside its output");
    }
}

/* Rows with a stride: only the rows' own elements are read, the target is contiguous and fully written. */
static void test_cast_shapes(void) {
    static const int64_t shapes[][3] = {{0, 5, 5}, {5, 0, 3}, {1, 1, 1}, {3, 7, 7}, {3, 7, 11}, {2, 16, 17},
        {5, 33, 40}, {257, 3, 5}, {11, 127, 128}, {64, 64, 200}};
    for (int c = 0; c < 90; c++) {
        int64_t rows = shapes[c % 10][0], cols = shapes[c % 10][1], stride = shapes[c % 10][2];
        int64_t count = rows * cols, length = rows == 0 ? 0 : (rows - 1) * stride + cols;
        qg_format from = formats[c / 10 % 3], to = formats[c / 30];
        void *source = guarded((size_t)length * ref_size(from), ref_size(from)),
             *want = guarded((size_t)count * ref_size(to), 0);
        for (int64_t i = 0; i < length; i++)
            ref_store(from, source, i, (float)random_normal());
        for (int64_t i = 0; i < count; i++)
            ref_store(to, want, i, ref_load(from, source, i / cols * stride + i % cols));
        for (int simd = 0; simd < LEVELS; simd++) {
            for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
                void *got = guarded((size_t)count * ref_size(to), ref_size(to) * (size_t)(threads - 1));
                omp_set_num_threads(threads);
                single_cast(level(simd), got, to, source, from, rows, cols, stride);
                CHECK_BYTES(
                    got, want, (size_t)count * ref_size(to), "shape %d, format %d to %d, level %d", c % 10, from, to,
                    simd);
            }
        }
        RELEASE("cast writes outside its output");
    }
}

int main(void) {
    random_seed(7);
    test_absmax();
    test_absmax_extremes();
    test_sum_squares();
    test_absmax_threads();
    test_cast_values();
    test_cast_shapes();
    return check_finish();
}
