/* The dynamic 8-bit map: its entries against the rationals, its encoder against the search through all 256. */
#include "harness.h"
#include "reference.h"

enum { BLOCK = 256 };

static void test_map(void) {
    for (int simd = 0; simd < LEVELS; simd++) {
        const qg_backend *backend = level(simd);
        for (int is_signed = 0; backend != NULL && is_signed < 2; is_signed++) {
            uint8_t codes[256];
            float map[256], want[256], one = 1.0f;
            for (int i = 0; i < 256; i++) {
                codes[i] = (uint8_t)i;
                want[i] = ref_entry(is_signed, i);
            }
            CHECK_OK(qg_dynamic8_dequantize(map, codes, &one, 1, 256, 256, is_signed, backend));
            CHECK_BYTES(map, want, sizeof map, "the map, signed %d, level %d", is_signed, simd);
            for (int i = 1; i < 256; i++)
                CHECK(map[i] > map[i - 1], "entry %d is not above entry %d", i, i - 1);
            CHECK(map[255] == 1.0f && map[is_signed ? 127 : 0] == 0.0f, "0 and 1 are not entries");
        }
    }
    CHECK(ref_entry(1, 0) == (float)(0.1 + 0.9 * 63.5 / 64) * -1.0f, "the lowest signed entry");
    CHECK(ref_entry(0, 1) == (float)((0.1 + 0.9 * 0.25) * 1e-6), "the lowest unsigned entry above 0");
}

/* Values waiting to be encoded: full blocks whose absmax is 1, so that what is encoded is the value itself. */
static float pending[1 << 20];
static int64_t pending_count;

static void encode_pending(int is_signed, const char *what) {
    static uint8_t codes[1 << 20], want[1 << 20];
    static float absmax[(1 << 20) / BLOCK];
    while (pending_count % BLOCK != 0)
        pending[pending_count++] = 1.0f;
    for (int64_t i = 0; i < pending_count; i++)
        want[i] = (uint8_t)ref_encode(is_signed, pending[i]);
    for (int simd = 0; simd < LEVELS; simd++) {
        if (level(simd) == NULL)
            continue;
        CHECK_OK(qg_dynamic8_quantize(codes, absmax, pending, 1, pending_count, BLOCK, is_signed, level(simd)));
        for (int64_t i = 0; i < pending_count; i++) {
            if (codes[i] != want[i]) {
                CHECK(
                    0, "%s, signed %d, level %d: %a becomes %d, not %d", what, is_signed, simd, pending[i], codes[i],
                    want[i]);
                break;
            }
        }
        CHECK(1, "%s", what);
    }
    pending_count = 0;
}

static void encode(float x, int is_signed, const char *what) {
    if (pending_count % BLOCK == 0)
        pending[pending_count++] = 1.0f;
    pending[pending_count++] = x;
    if (pending_count == (int64_t)(sizeof pending / sizeof *pending))
        encode_pending(is_signed, what);
}

static void encode_around(float x, int ulps, int is_signed, const char *what) {
    float below = x;
    for (int i = 0; i < ulps; i++)
        below = nextafterf(below, -2.0f);
    for (int i = 0; i <= 2 * ulps; i++, below = nextafterf(below, 2.0f)) {
        if (below <= 1.0f && below >= (is_signed ? -1.0f : 0.0f))
            encode(below, is_signed, what);
    }
}

static void test_nearest(void) {
    int ulps = (int)check_count(300, 8);
    for (int is_signed = 0; is_signed < 2; is_signed++) {
        for (int code = 0; code < 256; code++) {
            float entry = ref_entry(is_signed, code), next = ref_entry(is_signed, code < 255 ? code + 1 : 255);
            encode_around((float)(((double)entry + next) / 2.0), ulps, is_signed, "thresholds");
            encode_around(entry, 8, is_signed, "entries");
        }
        encode_pending(is_signed, "thresholds and entries");
        for (float edge = 1.0f; edge > 1e-9f; edge /= 10.0f) {
            encode_around(edge, ulps, is_signed, "decades");
            encode_around(-edge, ulps, is_signed, "decades");
        }
        static const float special[] = {
            0.0f, -0.0f, 0x1p-149f, -0x1p-149f, 0x1p-126f, -0x1p-126f, 0x1p-130f, -1.0f, 1e-30f};
        for (int i = 0; i < 9; i++)
            encode(special[i], is_signed, "special values");
        encode_pending(is_signed, "decades and special values");
        int64_t count = check_count(1000000, 20000);
        for (int64_t i = 0; i < count; i++) {
            double x = i % 2 == 0 ? random_uniform(0.0, 1.0) : exp(-random_uniform(0.0, 20.0));
            if (i % 64 == 0)
                x = fmod(random_finite(), 1.0);
            encode((float)(is_signed && i % 4 < 2 ? -x : x), is_signed, "random values");
        }
        encode_pending(is_signed, "random values");
    }
}

/* Columns, block; rows are 0, 1 or 3. */
static const int64_t shapes[][2] = {{0, 256}, {1, 256}, {3, 256}, {251, 256}, {255, 256}, {256, 256}, {257, 256},
    {512, 256}, {1009, 256}, {1, 1}, {5, 1}, {7, 3}, {64, 16}, {100, 32}, {777, 64}, {5000, 2048}};
enum { SHAPES = 16 };

static void fill(float *values, int64_t count, int kind, int is_signed) {
    static const float scales[] = {1.0f, 1e-3f, 1e-38f, 0x1p-140f, 1e30f, 3e38f, 0x1p-100f, 0x1p100f};
    for (int64_t i = 0; i < count; i++) {
        double x = kind == 8 ? 0.0 : kind == 9 ? exp(-random_uniform(0.0, 30.0)) : random_uniform(-1.0, 1.0);
        values[i] = (float)(x * scales[kind % 8]);
        if (!is_signed)
            values[i] = fabsf(values[i]);
    }
}

static void test_blocks(void) {
    for (int c = 0; c < SHAPES * 20; c++) {
        int64_t cols = shapes[c % SHAPES][0], block = shapes[c % SHAPES][1],
                rows = random_below(3) == 0 ? 3 : random_below(40) != 0;
        int kind = c / SHAPES / 2, is_signed = c / SHAPES % 2;
        int64_t per_row = (cols + block - 1) / block, count = rows * cols, blocks = rows * per_row;
        float *values = guarded((size_t)count * 4, 4 * (size_t)random_below(2));
        fill(values, count, kind, is_signed);
        uint8_t *want = guarded((size_t)count, 0);
        float *want_absmax = guarded((size_t)blocks * 4, 0), *want_back = guarded((size_t)count * 4, 0);
        for (int64_t b = 0; b < blocks; b++) {
            int64_t first = b / per_row * cols + b % per_row * block, left = cols - b % per_row * block;
            ref_dynamic8(want + first, &want_absmax[b], values + first, left < block ? left : block, is_signed, 0);
            for (int64_t i = first; i < first + (left < block ? left : block); i++)
                want_back[i] = ref_entry(is_signed, want[i]) * want_absmax[b];
        }
        for (int simd = 0; simd < LEVELS; simd++) {
            const qg_backend *backend = level(simd);
            for (int threads = 1; backend != NULL && threads <= 3; threads++) {
                size_t offset = (size_t)(threads - 1);
                uint8_t *codes = guarded((size_t)count, offset);
                float *absmax = guarded((size_t)blocks * 4, 4 * offset), *back = guarded((size_t)count * 4, 4 * offset);
                omp_set_num_threads(threads);
                CHECK_OK(qg_dynamic8_quantize(codes, absmax, values, rows, cols, (int32_t)block, is_signed, backend));
                CHECK_BYTES(absmax, want_absmax, (size_t)blocks * 4, "absmax, case %d, level %d", c, simd);
                CHECK_BYTES(codes, want, (size_t)count, "codes, case %d, level %d", c, simd);
                CHECK_OK(qg_dynamic8_dequantize(back, codes, absmax, rows, cols, (int32_t)block, is_signed, backend));
                CHECK_BYTES(back, want_back, (size_t)count * 4, "decoded, case %d, level %d", c, simd);
            }
        }
        RELEASE("dynamic8 writes outside its outputs, case %d", c);
    }
}

/* The same bytes at every thread count on an array large enough to be shared out. */
static void test_threads(void) {
    int64_t rows = 5, cols = check_count(60101, 3001), count = rows * cols, blocks = rows * ((cols + 255) / 256);
    float *values = guarded((size_t)count * 4, 0);
    fill(values, count, 9, 0);
    uint8_t *want = NULL;
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
            uint8_t *codes = guarded((size_t)count, 1);
            float *absmax = guarded((size_t)blocks * 4, 4), *back = guarded((size_t)count * 4, 4);
            want = want == NULL ? codes : want;
            omp_set_num_threads(threads);
            CHECK_OK(qg_dynamic8_quantize(codes, absmax, values, rows, cols, 256, 1, level(simd)));
            CHECK_BYTES(codes, want, (size_t)count, "codes, level %d, %d threads", simd, threads);
            CHECK_OK(qg_dynamic8_dequantize(back, codes, absmax, rows, cols, 256, 1, level(simd)));
            double worst = 0.0; /* half of the widest gap of the map (0.9 / 64), relative to the absmax */
            for (int64_t i = 0; i < count; i++)
                worst =
                    fmax(worst, fabs(back[i] - values[i]) / absmax[i / cols * ((cols + 255) / 256) + i % cols / 256]);
            CHECK(worst <= 0.9 / 128 + 1e-6, "the round trip is off by %g of the absmax", worst);
        }
    }
    RELEASE("dynamic8 writes outside its outputs");
}

int main(void) {
    random_seed(2);
    test_map();
    test_nearest();
    test_blocks();
    test_threads();
    return check_finish();
}
