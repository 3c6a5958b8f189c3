/* The projector's formats on an emulated GPU: the bits of the scalar table. */
#include "emulated.h"
#include "reference.h"

static const qg_backend *gpu, *cpu;

enum { FORMATS = 8, SHAPES = 21, KINDS = 6, MOST = 400 };

static const qg_format formats[FORMATS] = {
    QG_INT4, QG_INT8, QG_FLOAT32, QG_BFLOAT16, QG_FP4, QG_NF4, QG_FP8_E4M3, QG_DYNAMIC8};

static const int64_t shapes[SHAPES][3] = {/* rank, dim, block */
    {0, 10, 256}, {3, 0, 256}, {1, 1, 256}, {2, 2, 1}, {7, 5, 1}, {3, 255, 256}, {3, 256, 256}, {5, 257, 256},
    {4, 1024, 256}, {2, 1009, 256}, {3, 33, 16}, {5, 77, 3}, {2, 100, 100}, {3, 1031, 100}, {2, 601, 300},
    {1, 4097, 4096}, {9, 31, 64}, {5, 67, 0}, {1, 2051, 0}, {4, 1024, 0}, {1, 1, 0}};

static int is_float(qg_format format) {
    return format == QG_FLOAT32 || format == QG_BFLOAT16;
}

static int is_affine(qg_format format) {
    return format == QG_INT4 || format == QG_INT8;
}

static int is_packed(qg_format format) {
    return format == QG_INT4 || format == QG_FP4 || format == QG_NF4;
}

static float value_of(int kind) {
    const double u = random_uniform(-1.0, 1.0);
    switch (kind) {
    case 0:
        return (float)(0.02 * random_normal());
    case 1:
        return (float)(0.5 + 0.4 * u);
    case 2: /* every scale, denormals too */
        return (float)(u * exp(random_uniform(-100.0, 30.0)));
    case 3:
        return (float)(3.3e38 * u);
    case 4:
        return random_below(2) == 0 ? 0.0f : -0.0f;
    default: /* values of every format and ties between them; the largest is mostly 1 */
        return random_below(5) == 0 ? 1.0f : (float)((double)random_below(2 * 192 + 1) / 192 - 1);
    }
}

/* ---------------------------------------------------------------- the arrays of a projector */

typedef struct sizes {
    size_t codes, scales, zeros; /* in bytes */
} sizes;

static sizes sizes_of(int64_t rank, int64_t dim, int64_t block, qg_format format) {
    const int64_t blocks = block == 0 ? 1 : rank * ((dim + block - 1) / block);
    sizes s = {(size_t)(rank * dim) * ref_size(format), 0, 0};
    if (is_packed(format))
        s.codes = (size_t)(rank * ((dim + 1) / 2));
    if (!is_float(format))
        s.scales = (size_t)blocks * 2;
    if (is_affine(format))
        s.zeros = (size_t)blocks;
    return s;
}

static qg_projector on_cpu(int64_t rank, int64_t dim, int64_t block, qg_format format) {
    const sizes s = sizes_of(rank, dim, block, format);
    return (qg_projector){guarded(s.codes, 0), guarded(s.scales, 0), guarded(s.zeros, 0), rank, dim,
        is_float(format) ? 0 : (int32_t)block, format};
}

static qg_projector on_gpu(const qg_projector *projector, size_t offset, int with_contents) {
    const sizes s = sizes_of(projector->rank, projector->dim, projector->block, projector->format);
    const size_t element = is_float(projector->format) ? ref_size(projector->format) : 1;
    qg_projector copy = *projector;
    copy.codes = emulated_poisoned(s.codes, element * offset);
    copy.scales = s.scales > 0 ? emulated_poisoned(s.scales, 2 * offset) : NULL;
    copy.zeros = s.zeros > 0 ? emulated_poisoned(s.zeros, offset) : NULL;
    if (with_contents) {
        memcpy(copy.codes, projector->codes, s.codes);
        if (s.scales > 0)
            memcpy(copy.scales, projector->scales, s.scales);
        if (s.zeros > 0)
            memcpy(copy.zeros, projector->zeros, s.zeros);
    }
    return copy;
}

/* ---------------------------------------------------------------- encode */

static void test_quantize(void) {
    for (int c = 0; c < SHAPES * FORMATS * KINDS; c++) {
        const int64_t *shape = shapes[c % SHAPES];
        const qg_format format = formats[c / SHAPES % FORMATS];
        const int64_t count = shape[0] * shape[1];
        const size_t offset = (size_t)(c / SHAPES / FORMATS % 2);
        float *values = guarded((size_t)count * 4, 0);
        for (int64_t i = 0; i < count; i++)
            values[i] = value_of(c / SHAPES / FORMATS);
        const qg_projector want = on_cpu(shape[0], shape[1], shape[2], format);
        const qg_projector got = on_gpu(&want, offset, 0);
        const sizes s = sizes_of(shape[0], shape[1], shape[2], format);
        if (count > 0) /* core asks for no more */
            cpu->projector_quantize(&want, values, NULL);
        gpu->projector_quantize(&got, emulated_copy(values, (size_t)count * 4, 4 * offset), gpu->queue);
        CHECK_BYTES(got.codes, want.codes, s.codes, "codes of case %d", c);
        CHECK_BYTES(got.scales, want.scales, s.scales, "scales of case %d", c);
        CHECK_BYTES(got.zeros, want.zeros, s.zeros, "zeros of case %d", c);
        emulated_release();
        RELEASE("projector_quantize");
    }
}

/* Everything that all of a basis has to find out about itself, in a basis of more than one block of threads. */
static void test_quantize_large(void) {
    enum { RANK = 7, DIM = 4099 };
    float *values = guarded(RANK * DIM * 4, 0);
    for (int f = 0; f < FORMATS; f++) {
        for (int i = 0; i < RANK * DIM; i++)
            values[i] = (float)random_normal();
        values[random_below(RANK * DIM)] = -17.0f;
        values[random_below(RANK * DIM)] = 23.0f;
        const qg_projector want = on_cpu(RANK, DIM, 0, formats[f]);
        const qg_projector got = on_gpu(&want, 0, 0);
        const sizes s = sizes_of(RANK, DIM, want.block, formats[f]);
        cpu->projector_quantize(&want, values, NULL);
        gpu->projector_quantize(&got, emulated_copy(values, RANK * DIM * 4, 0), gpu->queue);
        CHECK_BYTES(got.codes, want.codes, s.codes, "codes of format %d", formats[f]);
        CHECK_BYTES(got.scales, want.scales, s.scales, "the scale of format %d", formats[f]);
        CHECK_BYTES(got.zeros, want.zeros, s.zeros, "the zero of format %d", formats[f]);
        emulated_release();
    }
    RELEASE("projector_quantize");
}

/* A basis of more blocks and bytes than one grid takes at a time. */
static void test_beyond_the_grid(void) {
    enum { RANK = 1100, DIM = 31, BLOCK = 16 };
    float *values = guarded(RANK * DIM * 4, 0), *want_back = guarded(RANK * DIM * 4, 0);
    for (int i = 0; i < RANK * DIM; i++)
        values[i] = (float)random_normal();
    for (int f = 0; f < FORMATS; f++) {
        const qg_projector want = on_cpu(RANK, DIM, BLOCK, formats[f]);
        const qg_projector got = on_gpu(&want, 0, 0);
        const sizes s = sizes_of(RANK, DIM, BLOCK, formats[f]);
        float *back = emulated_poisoned(RANK * DIM * 4, 0);
        const qg_decode_item on_cpu_all = {&want, 0, RANK, 0, DIM, want_back}, all = {&got, 0, RANK, 0, DIM, back};
        cpu->projector_quantize(&want, values, NULL);
        gpu->projector_quantize(&got, emulated_copy(values, RANK * DIM * 4, 0), gpu->queue);
        CHECK_BYTES(got.codes, want.codes, s.codes, "codes of many blocks, format %d", formats[f]);
        CHECK_BYTES(got.scales, want.scales, s.scales, "scales of many blocks, format %d", formats[f]);
        CHECK_BYTES(got.zeros, want.zeros, s.zeros, "zeros of many blocks, format %d", formats[f]);
        cpu->projector_dequantize(&on_cpu_all, 1, QG_FLOAT32, NULL);
        gpu->projector_dequantize(&all, 1, QG_FLOAT32, gpu->queue);
        CHECK_BYTES(back, want_back, RANK * DIM * 4, "many blocks decoded, format %d", formats[f]);
        emulated_release();
    }
    RELEASE("projector_quantize");
}

/* The extremes that decide the one scale are the last elements. */
static void test_extremes_beyond_the_grid(void) {
    enum { RANK = 16, DIM = 1 << 17, COUNT = RANK * DIM + RANK * 200 };
    float *values = guarded(COUNT * 4, 0);
    memset(values, 0, COUNT * 4);
    values[COUNT - 2] = -17.0f;
    values[COUNT - 1] = 23.0f;
    const qg_projector want = on_cpu(RANK, COUNT / RANK, 0, QG_INT8);
    const qg_projector got = on_gpu(&want, 0, 0);
    cpu->projector_quantize(&want, values, NULL);
    gpu->projector_quantize(&got, emulated_copy(values, COUNT * 4, 0), gpu->queue);
    CHECK_BYTES(got.codes, want.codes, COUNT, "codes of a large basis");
    CHECK_BYTES(got.scales, want.scales, 2, "the scale of a large basis");
    CHECK_BYTES(got.zeros, want.zeros, 1, "the zero of a large basis");
    emulated_release();
    RELEASE("projector_quantize");
}

/* ---------------------------------------------------------------- decode */

/* Any codes, scales and zeros at all, but scales that are finite. */
static void fill(const qg_projector *projector) {
    const sizes s = sizes_of(projector->rank, projector->dim, projector->block, projector->format);
    for (size_t i = 0; i < s.codes; i++)
        ((uint8_t *)projector->codes)[i] = (uint8_t)random_bits();
    for (size_t i = 0; i < s.codes / ref_size(projector->format) && is_float(projector->format); i++)
        ref_store(projector->format, projector->codes, (int64_t)i, (float)random_normal());
    for (size_t i = 0; i < s.scales / 2; i++)
        ref_store(QG_BFLOAT16, projector->scales, (int64_t)i, (float)exp(random_uniform(-10.0, 10.0)));
    for (size_t i = 0; i < s.zeros; i++)
        projector->zeros[i] = (uint8_t)random_bits();
}

typedef struct windows {
    qg_decode_item cpu[MOST], gpu[MOST];
    qg_projector cpu_projectors[MOST], gpu_projectors[MOST];
    int count;
} windows;

static void add_window(windows *w, int64_t row, int64_t rows, int64_t col, int64_t cols, qg_format target) {
    const int i = w->count++;
    const size_t size = (size_t)(rows * cols) * ref_size(target);
    w->cpu[i] = (qg_decode_item){&w->cpu_projectors[i], row, rows, col, cols, guarded(size, 0)};
    w->gpu[i] = w->cpu[i];
    w->gpu[i].projector = &w->gpu_projectors[i];
    w->gpu[i].target = emulated_poisoned(size, ref_size(target) * (size_t)random_below(2));
}

/* In one list, which changes its format on the way. */
static void check_windows(windows *w, qg_format target, const char *what) {
    cpu->projector_dequantize(w->cpu, w->count, target, NULL);
    gpu->projector_dequantize(w->gpu, w->count, target, gpu->queue);
    for (int i = 0; i < w->count; i++) {
        const size_t size = (size_t)(w->cpu[i].rows * w->cpu[i].cols) * ref_size(target);
        CHECK_BYTES(
            w->gpu[i].target, w->cpu[i].target, size, "%s %d: rows %lld + %lld, cols %lld + %lld, format %d, target %d",
            what, i, (long long)w->cpu[i].first_row, (long long)w->cpu[i].rows, (long long)w->cpu[i].first_col,
            (long long)w->cpu[i].cols, (int)w->cpu[i].projector->format, (int)target);
    }
    w->count = 0;
    emulated_release();
    RELEASE("%s", what);
}

/* The whole of each basis, and a window that begins and ends inside blocks and bytes. */
static void test_dequantize(void) {
    static windows w;
    for (int c = 0; c < 2 * 2; c++) {
        const qg_format target = c % 2 == 0 ? QG_FLOAT32 : QG_BFLOAT16;
        for (int p = 0; p < SHAPES * FORMATS; p++) {
            const int64_t *s = shapes[p % SHAPES];
            const qg_projector projector = on_cpu(s[0], s[1], s[2], formats[p / SHAPES]);
            fill(&projector);
            const qg_projector device = on_gpu(&projector, (size_t)(c / 2), 1);
            for (int k = 0; k < 2; k++) {
                w.cpu_projectors[w.count] = projector;
                w.gpu_projectors[w.count] = device;
                const int64_t row = k == 0 ? 0 : s[0] / 2, col = k == 0 || s[1] < 3 ? 0 : random_below(s[1]);
                const int64_t cols = k == 0 ? s[1] : random_below(s[1] - col + 1);
                add_window(&w, row, s[0] - row, col, cols, target);
            }
        }
        check_windows(&w, target, "window");
    }
}

/* Windows of every first column and length around a thread's share, and around two blocks of 16. */
static void test_windows(void) {
    static windows w;
    for (int f = 0; f < FORMATS; f++) {
        const int64_t block = f % 2 == 0 ? 16 : 40;
        const qg_projector projector = on_cpu(2, 101, block, formats[f]);
        fill(&projector);
        const qg_projector device = on_gpu(&projector, 0, 1);
        for (int64_t col = 0; col < 19; col++) {
            static const int64_t counts[] = {0, 1, 2, 15, 16, 17, 31, 32, 33, 34, 50, 82};
            for (int k = 0; k < 12; k++) {
                w.cpu_projectors[w.count] = projector;
                w.gpu_projectors[w.count] = device;
                add_window(&w, (col + k) % 2, 1, col, counts[k], QG_FLOAT32);
            }
        }
        check_windows(&w, QG_FLOAT32, "small window");
    }
}

/* 40 aligned windows are one launch, which reads each code once and writes each value once. */
static void test_traffic(void) {
    enum { ITEMS = 40, RANK = 3, DIM = 2048 };
    qg_decode_item items[ITEMS];
    emulator_check_races(0);
    for (int f = 0; f < FORMATS; f++) {
        const qg_projector projector = on_cpu(RANK, DIM, 256, formats[f]);
        fill(&projector);
        const qg_projector device = on_gpu(&projector, 0, 1);
        for (int i = 0; i < ITEMS; i++)
            items[i] = (qg_decode_item){&device, 0, RANK, 0, DIM, emulated_poisoned(RANK * DIM * 2, 0)};
        emulator_reset_counts();
        gpu->projector_dequantize(items, ITEMS, QG_BFLOAT16, gpu->queue);
        const emulator_counts counts = emulator_count(NULL);
        const int64_t codes = ITEMS * (int64_t)sizes_of(RANK, DIM, 256, formats[f]).codes;
        CHECK(counts.launches == 1, "format %d: %lld launches", (int)formats[f], (long long)counts.launches);
        CHECK(
            counts.loaded == codes, "format %d: %lld of %lld bytes read", (int)formats[f], (long long)counts.loaded,
            (long long)codes);
        CHECK(
            counts.stored == ITEMS * RANK * DIM * 2, "format %d: %lld bytes written", (int)formats[f],
            (long long)counts.stored);
        emulated_release();
        RELEASE("traffic");
    }
    emulator_check_races(1);
}

int main(void) {
    random_seed(34);
    cpu = level(QG_SIMD_SCALAR);
    gpu = emulated_table();
    test_quantize();
    test_quantize_large();
    test_beyond_the_grid();
    test_extremes_beyond_the_grid();
    test_dequantize();
    test_windows();
    test_traffic();
    emulated_check("all calls");
    return check_finish();
}
