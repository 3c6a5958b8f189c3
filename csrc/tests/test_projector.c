/* The projector's formats: INT8 and packed INT4 in blocks along basis vectors, and float32. */
#include "harness.h"
#include "reference.h"

/* rank, dim, block */
static const int64_t shapes[][3] = {{0, 10, 256}, {1, 1, 256}, {2, 2, 256}, {3, 255, 256}, {3, 256, 256}, {5, 257, 256},
    {4, 512, 256}, {2, 1009, 256}, {7, 5, 1}, {3, 33, 16}, {5, 77, 7}, {1, 4097, 4096}, {9, 31, 64}, {2, 100, 3}};
enum { SHAPES = 14, KINDS = 10 };

static float value_of(int kind, int64_t i) {
    double u = random_uniform(-1.0, 1.0);
    switch (kind) {
    case 1:
        return (float)(0.5 + 0.4 * u);
    case 2:
        return (float)(-0.5 + 0.4 * u);
    case 3:
        return 0.0f;
    case 4:
        return i % 17 == 3 ? 1.0f : (float)(1e-4 * u);
    case 5:
        return (float)(1e-38 * u);
    case 6:
        return (float)(1e38 * u);
    case 7:
        return 0.25f;
    case 8:
        return i % 2 ? -0.0f : 0.0f;
    case 9:
        return (float)(u * exp(random_uniform(-60.0, 30.0)));
    default:
        return (float)(0.02 * random_normal());
    }
}

typedef struct arrays {
    uint8_t *codes;
    uint16_t *scales;
    uint8_t *zeros;
    int64_t bytes; /* of codes */
    int64_t blocks;
} arrays;

static arrays make_arrays(int64_t rank, int64_t dim, int64_t block, qg_format format, size_t offset) {
    arrays a = {.blocks = rank * ((dim + block - 1) / block)};
    a.bytes = rank * (format == QG_FLOAT32 ? 4 * dim : format == QG_INT4 ? (dim + 1) / 2 : dim);
    a.codes = guarded((size_t)a.bytes, format == QG_FLOAT32 ? 4 * offset : offset);
    a.scales = guarded((size_t)a.blocks * 2, 2 * offset);
    a.zeros = guarded((size_t)a.blocks, offset);
    return a;
}

static qg_projector as_projector(arrays a, int64_t rank, int64_t dim, int64_t block, qg_format format) {
    if (format == QG_FLOAT32)
        return (qg_projector){a.codes, NULL, NULL, rank, dim, 0, format};
    return (qg_projector){a.codes, a.scales, a.zeros, rank, dim, (int32_t)block, format};
}

static const qg_format formats[] = {QG_INT4, QG_INT8, QG_FLOAT32};

/* What encoding `values` has to give, and the decoded basis. The nibble behind an odd row stays 0. */
static void reference(arrays *want, float *back, const float *values, int64_t dim, int64_t block, qg_format f) {
    uint8_t codes[4096];
    memset(want->codes, 0, (size_t)want->bytes);
    if (f == QG_FLOAT32) {
        memcpy(want->codes, values, (size_t)want->bytes);
        memcpy(back, values, (size_t)want->bytes);
        return;
    }
    int64_t per_row = (dim + block - 1) / block, row_bytes = f == QG_INT4 ? (dim + 1) / 2 : dim;
    for (int64_t b = 0; b < want->blocks; b++) {
        int64_t row = b / per_row, first = b % per_row * block, n = dim - first < block ? dim - first : block;
        ref_projector(codes, &want->scales[b], &want->zeros[b], values + row * dim + first, n, f == QG_INT4 ? 4 : 8);
        for (int64_t i = 0; i < n; i++) {
            int64_t at = first + i;
            if (f == QG_INT4)
                want->codes[row * row_bytes + at / 2] |= (uint8_t)(codes[i] << (at % 2 * 4));
            else
                want->codes[row * row_bytes + at] = codes[i];
            back[row * dim + at] = ref_load(QG_BFLOAT16, want->scales, b) * (float)(codes[i] - want->zeros[b]);
        }
    }
}

static void test_case(int c) {
    const int64_t *shape = shapes[c % SHAPES];
    int64_t rank = shape[0], dim = shape[1], block = shape[2], count = rank * dim;
    qg_format format = formats[c / SHAPES % 3];
    int kind = c / (3 * SHAPES) % KINDS;
    float *values = guarded((size_t)count * 4, 4 * (size_t)random_below(2)), *back = guarded((size_t)count * 4, 0);
    for (int64_t i = 0; i < count; i++)
        values[i] = value_of(kind, i);
    arrays want = make_arrays(rank, dim, block, format, 0);
    reference(&want, back, values, dim, block, format);
    void *narrow = guarded((size_t)count * 2, 0);
    for (int64_t i = 0; i < count; i++)
        ref_store(QG_BFLOAT16, narrow, i, back[i]);
    /* A tile that begins and ends inside blocks, at odd columns too. */
    int64_t row = rank / 2, rows = rank - row, col = dim > 2 ? random_below(dim) : 0;
    int64_t cols = random_below(dim - col + 1);
    for (int simd = 0; simd < LEVELS; simd++) {
        const qg_backend *backend = level(simd);
        for (int threads = 1; backend != NULL && threads <= 3; threads++) {
            arrays got = make_arrays(rank, dim, block, format, (size_t)threads - 1);
            qg_projector projector = as_projector(got, rank, dim, block, format);
            omp_set_num_threads(threads);
            CHECK_OK(qg_projector_quantize(&projector, values, backend));
            CHECK_BYTES(got.codes, want.codes, (size_t)got.bytes, "codes, case %d, level %d", c, simd);
            if (format != QG_FLOAT32) {
                CHECK_BYTES(got.scales, want.scales, (size_t)got.blocks * 2, "scales, case %d, level %d", c, simd);
                CHECK_BYTES(got.zeros, want.zeros, (size_t)got.blocks, "zeros, case %d, level %d", c, simd);
            }
            float *all = guarded((size_t)count * 4, 4), *tile = guarded((size_t)(rows * cols) * 4, 0);
            uint16_t *half = guarded((size_t)count * 2, 2), *half_tile = guarded((size_t)(rows * cols) * 2, 2);
            CHECK_OK(qg_projector_dequantize(&projector, all, QG_FLOAT32, backend));
            CHECK_BYTES(all, back, (size_t)count * 4, "decoded, case %d, level %d", c, simd);
            CHECK_OK(qg_projector_dequantize(&projector, half, QG_BFLOAT16, backend));
            CHECK_BYTES(half, narrow, (size_t)count * 2, "decoded to bfloat16, case %d, level %d", c, simd);
            backend->projector_dequantize(&projector, row, rows, col, cols, tile, QG_FLOAT32);
            backend->projector_dequantize(&projector, row, rows, col, cols, half_tile, QG_BFLOAT16);
            int equal = 1;
            for (int64_t i = 0; i < rows; i++) {
                int64_t from = (row + i) * dim + col;
                equal &= cols == 0 || memcmp(tile + i * cols, back + from, (size_t)cols * 4) == 0;
                equal &= cols == 0 || memcmp(half_tile + i * cols, (uint16_t *)narrow + from, (size_t)cols * 2) == 0;
            }
            CHECK(equal, "tile [%lld.., %lld..], case %d, level %d", (long long)row, (long long)col, c, simd);
        }
    }
    RELEASE("the projector writes outside its outputs, case %d", c);
}

/* The round trip is within half a step, zero stays zero, the scale is a rounded-up bfloat16. */
static void test_properties(void) {
    enum { DIM = 1001, BLOCKS = 4 };
    static float values[DIM], back[DIM];
    uint8_t codes[DIM], zeros[BLOCKS];
    uint16_t scales[BLOCKS];
    for (int c = 0; c < 2 * KINDS; c++) {
        int bits = c % 2 ? 8 : 4;
        qg_projector projector = {codes, scales, zeros, 1, DIM, 256, c % 2 ? QG_INT8 : QG_INT4};
        for (int i = 0; i < DIM; i++)
            values[i] = value_of(c / 2, i);
        CHECK_OK(qg_projector_quantize(&projector, values, level(QG_SIMD_SCALAR)));
        CHECK_OK(qg_projector_dequantize(&projector, back, QG_FLOAT32, level(QG_SIMD_SCALAR)));
        for (int b = 0; b < BLOCKS; b++) {
            double lo = 0.0, hi = 0.0, worst = 0.0, scale = ref_load(QG_BFLOAT16, scales, b);
            for (int i = b * 256; i < DIM && i < (b + 1) * 256; i++) {
                lo = fmin(lo, values[i]);
                hi = fmax(hi, values[i]);
                worst = fmax(worst, fabs((double)back[i] - values[i]) / scale);
                CHECK(values[i] != 0.0f || back[i] == 0.0f, "zero became %g", back[i]);
            }
            double least = fmax((hi - lo) / ((1 << bits) - 1), 0x1p-100);
            CHECK(worst <= 0.5 + 1e-4, "kind %d, %d bits: off by %g steps", c / 2, bits, worst);
            CHECK(scale >= least * (1 - 1e-7) && scale <= least * (1 + 0x1p-7), "scale %g for %g", scale, least);
        }
    }
}

static void test_not_finite(void) {
    static const float bad[] = {INFINITY, -INFINITY, NAN};
    for (int c = 0; c < 27; c++) {
        qg_format format = formats[c % 3];
        float *values = guarded(3 * 301 * 4, 0);
        for (int i = 0; i < 3 * 301; i++)
            values[i] = (float)random_normal();
        values[c / 9 == 0 ? 0 : c / 9 == 1 ? 400 : 902] = bad[c / 3 % 3];
        for (int simd = 0; simd < LEVELS; simd++) {
            arrays got = make_arrays(3, 301, 256, format, 0), poison = make_arrays(3, 301, 256, format, 0);
            qg_projector projector = as_projector(got, 3, 301, 256, format);
            if (level(simd) == NULL)
                continue;
            CHECK(qg_projector_quantize(&projector, values, level(simd)) == QG_INVALID_ARGUMENT, "case %d is taken", c);
            CHECK_BYTES(got.codes, poison.codes, (size_t)got.bytes, "codes are written");
            CHECK_BYTES(got.scales, poison.scales, (size_t)got.blocks * 2, "scales are written");
            CHECK_BYTES(got.zeros, poison.zeros, (size_t)got.blocks, "zeros are written");
        }
        RELEASE("the projector writes outside its outputs");
    }
}

/* A basis large enough to be shared out among threads. */
static void test_threads(void) {
    int64_t rank = 65, dim = check_count(4099, 301), count = rank * dim;
    float *values = guarded((size_t)count * 4, 0);
    for (int64_t i = 0; i < count; i++)
        values[i] = (float)random_normal();
    for (int f = 0; f < 2; f++) {
        arrays want = {0};
        void *want_back = NULL;
        for (int simd = 0; simd < LEVELS; simd++) {
            for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
                arrays got = make_arrays(rank, dim, 256, formats[f], 1);
                qg_projector projector = as_projector(got, rank, dim, 256, formats[f]);
                void *back = guarded((size_t)count * 2, 2);
                omp_set_num_threads(threads);
                CHECK_OK(qg_projector_quantize(&projector, values, level(simd)));
                CHECK_OK(qg_projector_dequantize(&projector, back, QG_BFLOAT16, level(simd)));
                want = want_back == NULL ? got : want;
                want_back = want_back == NULL ? back : want_back;
                CHECK_BYTES(got.codes, want.codes, (size_t)got.bytes, "codes, level %d, %d threads", simd, threads);
                CHECK_BYTES(back, want_back, (size_t)count * 2, "decoded, level %d, %d threads", simd, threads);
            }
        }
    }
    RELEASE("the projector writes outside its outputs");
}

int main(void) {
    random_seed(6);
    for (int c = 0; c < 3 * SHAPES * KINDS; c += (int)check_count(1, 5))
        test_case(c);
    test_properties();
    test_not_finite();
    test_threads();
    return check_finish();
}
