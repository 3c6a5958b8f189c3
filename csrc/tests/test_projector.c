/* The projector's formats, in blocks along basis vectors or with one scale for all. */
#include "harness.h"
#include "reference.h"
#include "single.h"

/* rank, dim, block */
static const int64_t shapes[][3] = {{0, 10, 256}, {1, 1, 256}, {2, 2, 256}, {3, 255, 256}, {3, 256, 256}, {5, 257, 256},
    {4, 512, 256}, {2, 1009, 256}, {7, 5, 1}, {3, 33, 16}, {5, 77, 7}, {1, 4097, 4096}, {9, 31, 64}, {2, 100, 3},
    {5, 67, 0}, {1, 2050, 0}};
enum { SHAPES = 16, KINDS = 12, FORMATS = 8, LARGEST = 4200 };

static const qg_format formats[FORMATS] = {
    QG_INT4, QG_INT8, QG_FLOAT32, QG_BFLOAT16, QG_FP4, QG_NF4, QG_FP8_E4M3, QG_DYNAMIC8};

static int is_float(qg_format format) {
    return format == QG_FLOAT32 || format == QG_BFLOAT16;
}

static int is_affine(qg_format format) {
    return format == QG_INT4 || format == QG_INT8;
}

static int is_packed(qg_format format) {
    return format == QG_INT4 || format == QG_FP4 || format == QG_NF4;
}

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
    case 10:
        return (float)(3.3e38 * u);
    case 11: /* values of every format and ties between them; the largest is 1 */
        return i % 5 == 0 ? 1.0f : (float)((double)random_below(2 * 192 + 1) / 192 - 1);
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
    size_t element = format == QG_FLOAT32 ? 4 : format == QG_BFLOAT16 ? 2 : 1;
    arrays a = {.blocks = block == 0 ? 1 : rank * ((dim + block - 1) / block)};
    a.bytes = rank * (is_packed(format) ? (dim + 1) / 2 : dim) * (int64_t)element;
    a.codes = guarded((size_t)a.bytes, element * offset);
    a.scales = guarded((size_t)a.blocks * 2, 2 * offset);
    a.zeros = guarded((size_t)a.blocks, offset);
    return a;
}

static qg_projector as_projector(arrays a, int64_t rank, int64_t dim, int64_t block, qg_format format) {
    if (is_float(format))
        return (qg_projector){a.codes, NULL, NULL, rank, dim, 0, format};
    return (qg_projector){a.codes, a.scales, is_affine(format) ? a.zeros : NULL, rank, dim, (int32_t)block, format};
}

/* What encoding `values` has to give, and the decoded basis. The nibble behind an odd row stays 0. */
static void reference(
    arrays *want,
    float *back,
    const float *values,
    int64_t rank,
    int64_t dim,
    int64_t block,
    qg_format f) {
    uint8_t codes[LARGEST];
    memset(want->codes, 0, (size_t)want->bytes);
    if (is_float(f)) {
        for (int64_t i = 0; i < rank * dim; i++) {
            ref_store(f, want->codes, i, values[i]);
            back[i] = ref_load(f, want->codes, i);
        }
        return;
    }
    int64_t per_row = block == 0 ? 1 : (dim + block - 1) / block, row_bytes = is_packed(f) ? (dim + 1) / 2 : dim;
    for (int64_t b = 0; b < want->blocks; b++) {
        int64_t start = b / per_row * dim + b % per_row * block, n = rank * dim;
        if (block != 0)
            n = dim - b % per_row * block < block ? dim - b % per_row * block : block;
        ref_projector(codes, &want->scales[b], &want->zeros[b], values + start, n, f);
        for (int64_t i = 0; i < n; i++) {
            int64_t row = (start + i) / dim, col = (start + i) % dim;
            float scale = ref_load(QG_BFLOAT16, want->scales, b);
            if (is_packed(f))
                want->codes[row * row_bytes + col / 2] |= (uint8_t)(codes[i] << (col % 2 * 4));
            else
                want->codes[row * row_bytes + col] = codes[i];
            back[start + i] =
                scale * (is_affine(f) ? (float)(codes[i] - want->zeros[b]) : ref_projector_entry(f, codes[i]));
        }
    }
}

static void test_case(int c) {
    const int64_t *shape = shapes[c % SHAPES];
    int64_t rank = shape[0], dim = shape[1], block = shape[2], count = rank * dim;
    qg_format format = formats[c / SHAPES % FORMATS];
    int kind = c / (FORMATS * SHAPES) % KINDS;
    float *values = guarded((size_t)count * 4, 4 * (size_t)random_below(2)), *back = guarded((size_t)count * 4, 0);
    for (int64_t i = 0; i < count; i++)
        values[i] = value_of(kind, i);
    arrays want = make_arrays(rank, dim, block, format, 0);
    reference(&want, back, values, rank, dim, block, format);
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
            if (!is_float(format) && count > 0)
                CHECK_BYTES(got.scales, want.scales, (size_t)got.blocks * 2, "scales, case %d, level %d", c, simd);
            if (is_affine(format) && count > 0)
                CHECK_BYTES(got.zeros, want.zeros, (size_t)got.blocks, "zeros, case %d, level %d", c, simd);
            float *all = guarded((size_t)count * 4, 4), *tile = guarded((size_t)(rows * cols) * 4, 0);
            uint16_t *half = guarded((size_t)count * 2, 2), *half_tile = guarded((size_t)(rows * cols) * 2, 2);
            CHECK_OK(qg_projector_dequantize(&projector, all, QG_FLOAT32, backend));
            CHECK_BYTES(all, back, (size_t)count * 4, "decoded, case %d, level %d", c, simd);
            CHECK_OK(qg_projector_dequantize(&projector, half, QG_BFLOAT16, backend));
            CHECK_BYTES(half, narrow, (size_t)count * 2, "decoded to bfloat16, case %d, level %d", c, simd);
            single_decode(backend, &projector, row, rows, col, cols, tile, QG_FLOAT32);
            single_decode(backend, &projector, row, rows, col, cols, half_tile, QG_BFLOAT16);
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

/* How far a value may be from its decoded one, in scales: half the gap between the entries on both sides of it. */
static double half_step(qg_format format, double x) {
    double below = -1e9, above = 1e9;
    int count = format == QG_FP4 || format == QG_NF4 ? 16 : 256;
    if (is_affine(format))
        return 0.5;
    for (int code = 0; code < count; code++) {
        double entry = ref_projector_entry(format, code);
        if (format == QG_FP8_E4M3 && fabs(entry) > 448)
            continue;
        below = entry <= x && entry > below ? entry : below;
        above = entry >= x && entry < above ? entry : above;
    }
    return below < -1e8 ? above - x : above > 1e8 ? x - below : (above - below) / 2;
}

/* The round trip is within half a step, zero stays zero, the scale is a rounded-up bfloat16. */
static void test_properties(void) {
    enum { DIM = 1001, BLOCKS = 4 };
    static float values[DIM], back[DIM];
    uint8_t codes[DIM], zeros[BLOCKS];
    uint16_t scales[BLOCKS];
    for (int c = 0; c < FORMATS * KINDS; c++) {
        qg_format format = formats[c % FORMATS];
        int kind = c / FORMATS;
        qg_projector projector = {codes, scales, zeros, 1, DIM, 256, format};
        if (is_float(format))
            continue;
        for (int i = 0; i < DIM; i++)
            values[i] = value_of(kind, i);
        CHECK_OK(qg_projector_quantize(&projector, values, level(QG_SIMD_SCALAR)));
        CHECK_OK(qg_projector_dequantize(&projector, back, QG_FLOAT32, level(QG_SIMD_SCALAR)));
        for (int b = 0; b < BLOCKS; b++) {
            double lo = 0.0, hi = 0.0, worst = 0.0, scale = ref_load(QG_BFLOAT16, scales, b);
            for (int i = b * 256; i < DIM && i < (b + 1) * 256; i++) {
                double allowed = half_step(format, values[i] / scale);
                lo = fmin(lo, values[i]);
                hi = fmax(hi, values[i]);
                worst = fmax(worst, fabs((double)back[i] - values[i]) / scale - allowed);
                CHECK(values[i] != 0.0f || back[i] == 0.0f, "zero became %g", back[i]);
            }
            double top = format == QG_INT4 ? 15 : format == QG_INT8 ? 255 : format == QG_FP8_E4M3 ? 448 : 1;
            double least = fmax((is_affine(format) ? hi - lo : fmax(hi, -lo)) / top, 0x1p-100);
            CHECK(worst <= 1e-4, "kind %d, format %d: %g scales beyond half a step", kind, format, worst);
            CHECK(scale >= least * (1 - 1e-7) && scale <= least * (1 + 0x1p-7), "scale %g for %g", scale, least);
        }
    }
}

static void test_not_finite(void) {
    static const float bad[] = {INFINITY, -INFINITY, NAN};
    for (int c = 0; c < 9 * FORMATS; c++) {
        qg_format format = formats[c % FORMATS];
        float *values = guarded(3 * 301 * 4, 0);
        int where = c / (3 * FORMATS), block = where == 0 ? 0 : 256;
        for (int i = 0; i < 3 * 301; i++)
            values[i] = (float)random_normal();
        values[where == 0 ? 0 : where == 1 ? 400 : 902] = bad[c / FORMATS % 3];
        for (int simd = 0; simd < LEVELS; simd++) {
            arrays got = make_arrays(3, 301, block, format, 0), poison = make_arrays(3, 301, block, format, 0);
            qg_projector projector = as_projector(got, 3, 301, block, format);
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
    for (int f = 0; f < 2 * FORMATS; f++) {
        qg_format format = formats[f % FORMATS];
        int64_t block = f < FORMATS ? 256 : 0;
        arrays want = {0};
        void *want_back = NULL;
        for (int simd = 0; simd < LEVELS; simd++) {
            for (int threads = 1; level(simd) != NULL && threads <= 3; threads++) {
                arrays got = make_arrays(rank, dim, block, format, 1);
                qg_projector projector = as_projector(got, rank, dim, block, format);
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
    for (int c = 0; c < FORMATS * SHAPES * KINDS; c += (int)check_count(1, 13))
        test_case(c);
    test_properties();
    test_not_finite();
    test_threads();
    return check_finish();
}
