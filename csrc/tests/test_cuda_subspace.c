/* The passes of a subspace refresh on an emulated GPU: the bits of the scalar table, but for the shift of a Gram matrix,
 * whose sum has an order of its own. */
#include "emulated.h"
#include "reference.h"

static const qg_backend *gpu, *cpu;

static const qg_format formats[3] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};

/* Magnitudes far apart: another order of the sums has other bits. */
static void fill(qg_format format, void *data, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        ref_store(format, data, i, (float)ldexp(random_normal(), -(int)random_below(12)));
}

static void test_sum_squares(void) {
    static const int64_t counts[] = {0, 1, 15, 17, 255, 1023, 1024, 1025, 4096, 4097, 65535, 65536, 65537, 300007};
    for (int c = 0; c < 14 * 3; c++) {
        const qg_format format = formats[c % 3];
        const int64_t count = counts[c / 3];
        const size_t size = (size_t)count * ref_size(format);
        void *source = guarded(size, 0);
        fill(format, source, count);
        double want, *got = emulated_poisoned(8, 8);
        cpu->sum_squares(&want, source, format, count, NULL);
        const void *on_gpu = emulated_copy(source, size, ref_size(format) * (size_t)(c % 2));
        gpu->sum_squares(got, on_gpu, format, count, gpu->queue);
        CHECK_BYTES(got, &want, 8, "%lld squares: %.17g, not %.17g", (long long)count, *got, want);
        emulated_release();
        RELEASE("sum_squares");
    }
    const float special[3] = {1.0f, -INFINITY, 0x1p-149f};
    double *got = emulated_poisoned(8, 0);
    gpu->sum_squares(got, emulated_copy(special, sizeof special, 0), QG_FLOAT32, 3, gpu->queue);
    CHECK(*got == (double)INFINITY, "an infinity squared: %g", *got);
    emulated_release();
}

static void test_limit_growth(void) {
    static const double norms[] = {0.0, 1.0, 3.0, 1e-300}, squares[] = {0.0, 1.0, 9.5, 1e300, 1.02};
    static const float flags[] = {0.0f, 1e18f, 2e18f, INFINITY, NAN};
    for (int c = 0; c < 4 * 5 * 6; c++) {
        double want_norm = norms[c % 4];
        const double now = squares[c / 4 % 5];
        const float *flag = c / 20 == 5 ? NULL : &flags[c / 20];
        float want, *got = emulated_poisoned(4, 0);
        memset(&want, 0xff, 4);
        double *norm = emulated_copy(&want_norm, 8, 0);
        cpu->limit_growth(&want, &want_norm, &now, 1.01, 0.3, flag, NULL);
        gpu->limit_growth(
            got, norm, emulated_copy(&now, 8, 0), 1.01, 0.3, flag == NULL ? NULL : emulated_copy(flag, 4, 0),
            gpu->queue);
        CHECK_BYTES(got, &want, 4, "rate of case %d: %g, not %g", c, *got, want);
        CHECK_BYTES(norm, &want_norm, 8, "norm of case %d: %g, not %g", c, *norm, want_norm);
        emulated_release();
    }
}

static void test_normalise(void) {
    static const int64_t counts[] = {0, 1, 16, 255, 257, 270001}; /* the last: more than one grid takes at a time */
    for (int c = 0; c < 6 * 3 * 2; c++) {
        const qg_format format = formats[c % 3];
        const int64_t count = counts[c / 3 % 6];
        const size_t size = (size_t)count * ref_size(format), offset = (size_t)(c / 18) * ref_size(format);
        const double squares = exp(random_uniform(-20.0, 20.0));
        void *source = guarded(size, 0);
        fill(format, source, count);
        float *want = guarded((size_t)count * 4, 0);
        void *on_gpu = emulated_copy(source, size, offset);
        float *got = emulated_poisoned((size_t)count * 4, 4 * (size_t)(c / 18));
        const double *device_squares = emulated_copy(&squares, 8, 0);
        cpu->normalise(want, source, format, count, 7, &squares, NULL);
        gpu->normalise(got, on_gpu, format, count, 7, device_squares, gpu->queue);
        CHECK_BYTES(got, want, (size_t)count * 4, "normalise, case %d", c);
        if (format == QG_FLOAT32) {
            gpu->normalise(on_gpu, on_gpu, format, count, 7, device_squares, gpu->queue);
            CHECK_BYTES(on_gpu, want, (size_t)count * 4, "normalise in place, case %d", c);
        }
        emulated_release();
        RELEASE("normalise");
    }
}

static float ulps(float got, float want) {
    return fabsf(got - want) / (nextafterf(fabsf(want), INFINITY) - fabsf(want));
}

/* Near to and far from orthonormal rows, and not finite; above its diagonal the matrix is never read. */
static void test_shift_gram(void) {
    static const int64_t sizes[] = {0, 1, 2, 31, 32, 33, 101};
    static const double noises[] = {1e-3, 0.3, 5.0, 1e30};
    for (int c = 0; c < 7 * 5; c++) {
        const int64_t n = sizes[c % 7];
        const size_t size = (size_t)(n * n) * 4;
        float *want = guarded(size, 0);
        for (int64_t i = 0; i < n * n; i++)
            if (i % n <= i / n)
                want[i] = (float)((i % n == i / n) + noises[c / 7 % 4] * random_uniform(-1.0, 1.0));
        if (c / 7 == 4 && n > 0)
            want[(n - 1) * n] = n % 2 == 0 ? NAN : INFINITY;
        float *got = emulated_copy(want, size, 4 * (size_t)(c % 2));
        double want_distance, *distance = emulated_poisoned(8, 0);
        cpu->shift_gram(&want_distance, want, n, NULL);
        gpu->shift_gram(distance, got, n, gpu->queue);
        CHECK_BYTES(distance, &want_distance, 8, "distance %g, not %g, n %lld", *distance, want_distance, (long long)n);
        for (int64_t i = 0; i < n; i++) {
            float *own = &got[i * n + i], expected = want[i * n + i];
            const int close = isfinite(expected) ? ulps(*own, expected) <= 1.0f : !isfinite(*own);
            CHECK(close, "diagonal %lld of %lld: %.9g, not %.9g", (long long)i, (long long)n, *own, expected);
            *own = expected;
        }
        CHECK_BYTES(got, want, size, "the rest of a Gram matrix of size %lld", (long long)n);
        emulated_release();
        RELEASE("shift_gram");
    }
}

static void test_bell(void) {
    static const int64_t counts[] = {0, 1, 255, 257, 20011};
    for (int c = 0; c < 5 * 3; c++) {
        const qg_noise_stream stream = {random_bits(), random_bits(), (uint32_t)random_bits()};
        const int64_t count = counts[c % 5];
        float *want = guarded((size_t)count * 4, 0), *got = emulated_poisoned((size_t)count * 4, 4 * (size_t)(c % 2));
        cpu->bell(want, &stream, count, NULL);
        gpu->bell(got, &stream, count, gpu->queue);
        CHECK_BYTES(got, want, (size_t)count * 4, "%lld nearly normal numbers", (long long)count);
        emulated_release();
        RELEASE("bell");
    }
}

int main(void) {
    random_seed(32);
    cpu = level(QG_SIMD_SCALAR);
    gpu = emulated_table();
    test_sum_squares();
    test_limit_growth();
    test_normalise();
    test_shift_gram();
    test_bell();
    emulated_check("all calls");
    return check_finish();
}
