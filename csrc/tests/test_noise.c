/* The noise: against Philox's published answers and a second writing, and that it looks like noise. */
#include "harness.h"
#include "reference.h"

static void test_philox_known_answers(void) {
    /* Random123's kat_vectors, "philox4x32 10": counter, key, answer. */
    static const uint32_t known[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
            0x24126ea1},
    };
    for (int i = 0; i < 3; i++) {
        uint32_t out[4];
        ref_philox(out, known[i], known[i] + 4);
        CHECK_BYTES(out, known[i] + 6, sizeof out, "Philox4x32-10 known answer %d", i);
    }
}

static void test_noise_reference(void) {
    static const uint64_t seeds[] = {0, 1, 0xDEADBEEF, UINT64_MAX, 0x0123456789ABCDEF};
    static const uint64_t steps[] = {0, 1, 70001, UINT64_C(1) << 40, INT64_MAX};
    static const int64_t starts[] = {0, 1, 7, 255, (INT64_C(1) << 31) - 3, (INT64_C(1) << 32) - 20, INT64_C(1) << 32,
        3 * (INT64_C(1) << 32) - 33, (INT64_C(1) << 33) + 12345, (INT64_C(1) << 62) - 5};
    static const int64_t counts[] = {0, 1, 2, 7, 8, 15, 16, 17, 31, 64, 101, 1000};
    for (int simd = 0; simd < LEVELS; simd++) {
        const qg_backend *backend = level(simd);
        for (int s = 0; backend != NULL && s < 10; s++) {
            for (int c = 0; c < 12; c++) {
                qg_noise_stream stream = {seeds[(s + c) % 5], steps[(s + 2 * c) % 5], (uint32_t)random_bits()};
                int32_t want[1000];
                for (int64_t i = 0; i < counts[c]; i++)
                    want[i] = (int32_t)ref_noise(&stream, (uint64_t)(starts[s] + i));
                int32_t *got = guarded((size_t)counts[c] * 4, 4 * (size_t)(c % 3));
                CHECK_OK(qg_noise(got, stream.seed, stream.id, stream.step, starts[s], counts[c], backend));
                CHECK_BYTES(
                    got, want, (size_t)counts[c] * 4, "noise at %lld, count %lld, level %d", (long long)starts[s],
                    (long long)counts[c], simd);
                RELEASE("noise writes outside its output");
            }
        }
    }
}

/* A range gives the same numbers in one call, in pieces and at any thread count. */
static void test_noise_pieces(void) {
    enum { COUNT = 300007 };
    int64_t start = (INT64_C(1) << 32) - 150001;
    int32_t *whole = guarded(COUNT * 4, 0);
    omp_set_num_threads(1);
    CHECK_OK(qg_noise(whole, 9, 3, 5, start, COUNT, level(QG_SIMD_SCALAR)));
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
            int32_t *pieces = guarded(COUNT * 4, 4);
            omp_set_num_threads(threads);
            for (int64_t at = 0, size = 0; at < COUNT; at += size) {
                size = 1 + (int64_t)(random_bits() % 100000);
                size = size < COUNT - at ? size : COUNT - at;
                CHECK_OK(qg_noise(pieces + at, 9, 3, 5, start + at, size, level(simd)));
            }
            CHECK_BYTES(pieces, whole, COUNT * 4, "pieces, level %d, %d threads", simd, threads);
        }
    }
    RELEASE("noise writes outside its output");
}

/* |z| of a sum of `count` values that has this mean and variance. */
static double z_score(double sum, double count, double mean, double variance) {
    return fabs(sum - count * mean) / sqrt(count * variance);
}

/* Uniform in each of the 24 bits and in 256 cells; neighbours in element, step, id and seed are not related. */
static void test_noise_statistics(void) {
    int64_t count = check_count(1 << 20, 1 << 12);
    int32_t *a = guarded((size_t)count * 4, 0), *b = guarded((size_t)count * 4, 0);
    CHECK_OK(qg_noise(a, 42, 7, 100, 0, count, level(QG_SIMD_SCALAR)));
    double cells[256] = {0}, n = (double)count, sum = 0.0, chi = 0.0, mean = (0x1p24 - 1.0) / 2.0;
    for (int64_t i = 0; i < count; i++) {
        sum += a[i];
        cells[a[i] >> 16]++;
    }
    CHECK(z_score(sum, n, mean, 0x1p48 / 12.0) < 5.0, "the mean is %g", sum / n);
    for (int i = 0; i < 256; i++)
        chi += (cells[i] - n / 256.0) * (cells[i] - n / 256.0) / (n / 256.0);
    CHECK(fabs(chi - 255.0) < 5.0 * sqrt(2.0 * 255.0), "chi squared of 256 cells is %g", chi);
    static const struct {
        uint64_t seed, step;
        uint32_t id;
        int64_t start;
    } other[] = {{42, 100, 7, 1}, {42, 101, 7, 0}, {42, 100, 8, 0}, {43, 100, 7, 0}, {42, 100, 7, INT64_C(1) << 32},
        {UINT64_C(42) << 32, 100, 7, 0}, {42, UINT64_C(100) << 32, 7, 0}, {42, 7, 100, 0}, {42, 100, 7, 256}};
    for (int o = 0; o < 9; o++) {
        CHECK_OK(qg_noise(b, other[o].seed, other[o].id, other[o].step, other[o].start, count, level(QG_SIMD_SCALAR)));
        double product = 0.0;
        int64_t equal = 0, bits[24] = {0};
        for (int64_t i = 0; i < count; i++) {
            product += (a[i] - mean) * (b[i] - mean);
            equal += a[i] == b[i];
            for (int bit = 0; bit < 24; bit++)
                bits[bit] += (a[i] ^ b[i]) >> bit & 1;
        }
        CHECK(fabs(product) < 5.0 * 0x1p48 / 12.0 * sqrt(n), "stream %d is correlated: %g", o, product / n);
        CHECK(equal < 10, "stream %d repeats %lld values", o, (long long)equal);
        for (int bit = 0; bit < 24; bit++)
            CHECK(
                z_score((double)bits[bit], n, 0.5, 0.25) < 5.0, "stream %d, bit %d: %lld", o, bit,
                (long long)bits[bit]);
    }
    RELEASE("noise writes outside its output");
}

int main(void) {
    random_seed(1);
    test_philox_known_answers();
    test_noise_reference();
    test_noise_pieces();
    test_noise_statistics();
    return check_finish();
}
