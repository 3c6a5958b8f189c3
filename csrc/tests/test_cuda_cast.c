/* Noise, largest magnitudes and conversions on an emulated GPU: the bits of the scalar table. */
#include "emulated.h"
#include "reference.h"

static const qg_backend *gpu, *cpu;

static const qg_format formats[3] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};

/* Any bits at all, so NaNs, infinities and denormals too, or plain numbers. */
static void fill(void *data, qg_format format, int64_t count, int any) {
    for (int64_t i = 0; i < count; i++) {
        const uint64_t bits = random_bits();
        if (any)
            memcpy((char *)data + (size_t)i * ref_size(format), &bits, ref_size(format));
        else
            ref_store(format, data, i, (float)random_normal());
    }
}

static void test_noise(void) {
    const int64_t boundary = (int64_t)1 << 32;
    static const int64_t counts[] = {0, 1, 255, 1009, 20011};
    const int64_t starts[] = {0, 1, 12345, boundary - 3, boundary - 1009, boundary, 5 * boundary - 77};
    for (int c = 0; c < 5 * 7; c++) {
        const int64_t count = counts[c % 5], start = starts[c / 5];
        const qg_noise_stream stream = {random_bits(), random_bits(), (uint32_t)random_bits()};
        int32_t *want = guarded((size_t)count * 4, 0), *got = emulated_poisoned((size_t)count * 4, 4 * (size_t)(c % 2));
        cpu->noise(want, &stream, start, count, NULL);
        gpu->noise(got, &stream, start, count, gpu->queue);
        CHECK_BYTES(
            got, want, (size_t)count * 4, "noise of %lld elements from %lld", (long long)count, (long long)start);
        emulated_release();
        RELEASE("noise");
    }
}

/* One list of many arrays: every format, length, alignment, and kind of largest element. */
static void test_absmax(void) {
    enum { ARRAYS = 230 };
    static const int64_t counts[] = {0, 1, 15, 16, 17, 255, 256, 257, 2047, 2048, 2049, 5003};
    static const float special[] = {0.0f, -0.0f, 0x1p-149f, -7.5f, 65504.0f, -INFINITY, NAN};
    qg_array on_cpu[ARRAYS], on_gpu[ARRAYS];
    for (int a = 0; a < ARRAYS; a++) {
        const qg_format format = formats[a % 3];
        const int64_t count = counts[random_below(12)];
        const size_t size = (size_t)count * ref_size(format);
        void *source = guarded(size, 0);
        fill(source, format, count, 0);
        for (int64_t i = 0; a % 5 == 0 && i < count; i++)
            ref_store(format, source, i, 0.0f);
        if (a % 2 == 0 && count > 0)
            ref_store(format, source, random_below(count), special[a / 2 % 7]);
        on_cpu[a] = (qg_array){source, count, format};
        on_gpu[a] = (qg_array){emulated_copy(source, size, ref_size(format) * (size_t)(a % 2)), count, format};
        CHECK(
            gpu->finite(on_gpu[a].data, format, count, gpu->queue) == cpu->finite(source, format, count, NULL),
            "whether array %d is finite", a);
    }
    float want[ARRAYS], *got = emulated_poisoned(sizeof want, 4);
    cpu->absmax(want, on_cpu, ARRAYS, NULL);
    for (int count = 0; count <= ARRAYS; count += count < 3 ? 1 : count < 96 ? 93 : 67) {
        memset(got, 0xff, sizeof want);
        gpu->absmax(got, on_gpu, count, gpu->queue);
        CHECK_BYTES(got, want, (size_t)count * 4, "absmax of %d arrays", count);
    }
    emulated_release();
    RELEASE("absmax");
}

/* An array of more units than one grid takes at a time, whose last element is the largest. */
static void test_absmax_beyond_the_grid(void) {
    enum { COUNT = (1 << 21) + 5 };
    uint16_t *source = emulated_poisoned(COUNT * sizeof *source, 0);
    float *got = emulated_poisoned(sizeof *got, 0);
    const qg_array array = {source, COUNT, QG_BFLOAT16};
    memset(source, 0, COUNT * sizeof *source);
    ref_store(QG_BFLOAT16, source, COUNT - 1, -7.5f);
    gpu->absmax(got, &array, 1, gpu->queue);
    CHECK(*got == 7.5f, "absmax of %d elements: %g", COUNT, (double)*got);
    emulated_release();
}

static const int64_t shapes[][3] = {/* rows, cols, row stride */
    {0, 5, 5}, {5, 0, 3}, {1, 1, 1}, {1, 16, 16}, {3, 17, 17}, {1, 256, 256}, {7, 31, 40}, {2, 257, 300}, {4, 512, 528},
    {1009, 1, 1}, {300, 1, 2}, {3, 1031, 1031}, {17, 64, 64}};
enum { SHAPES = 13 };

/* Lists shorter and longer than one launch holds, of all shapes and both alignments. */
static void test_cast(void) {
    enum { ITEMS = 3 * SHAPES };
    for (int c = 0; c < 3 * 3 * 2 * 2; c++) {
        const qg_format from = formats[c % 3], to = formats[c / 3 % 3];
        const int any = c / 9 % 2, count = c / 18 == 0 ? 3 * SHAPES : 4 * 3 * SHAPES;
        qg_cast_item on_cpu[4 * ITEMS], on_gpu[4 * ITEMS];
        for (int i = 0; i < count; i++) {
            const int64_t *s = shapes[i % SHAPES];
            const size_t size = s[0] > 0 ? (size_t)((s[0] - 1) * s[2] + s[1]) * ref_size(from) : 0;
            const size_t target_size = (size_t)(s[0] * s[1]) * ref_size(to);
            if (i >= ITEMS) { /* the same sources again */
                on_cpu[i] = on_cpu[i - ITEMS];
                on_gpu[i] = on_gpu[i - ITEMS];
                on_gpu[i].target = emulated_poisoned(target_size, 0);
                continue;
            }
            void *source = guarded(size, 0);
            fill(source, from, (int64_t)(size / ref_size(from)), any);
            on_cpu[i] = (qg_cast_item){guarded(target_size, 0), source, from, s[0], s[1], s[2]};
            on_gpu[i] = on_cpu[i];
            on_gpu[i].source = emulated_copy(source, size, ref_size(from) * (size_t)(i / SHAPES % 2));
            on_gpu[i].target = emulated_poisoned(target_size, ref_size(to) * (size_t)(i / SHAPES / 2 % 2));
        }
        cpu->cast(on_cpu, count, to, NULL);
        gpu->cast(on_gpu, count, to, gpu->queue);
        for (int i = 0; i < count; i++) {
            const size_t size = (size_t)(on_cpu[i].rows * on_cpu[i].cols) * ref_size(to);
            CHECK_BYTES(on_gpu[i].target, on_cpu[i].target, size, "cast, case %d, item %d", c, i);
        }
        emulated_release();
        RELEASE("cast");
    }
}

/* A cast to the same format keeps every bit: those of a signalling NaN. */
static void test_cast_copies(void) {
    const uint32_t full[] = {0x7f800001, 0xffbfffff, 0x80000000, 1};
    const uint16_t half[] = {0x7f81, 0xff81, 0x7c01, 0xfdff, 0x8000, 1};
    const qg_cast_item items[] = {
        {emulated_poisoned(sizeof full, 0), emulated_copy(full, sizeof full, 0), QG_FLOAT32, 1, 4, 4},
        {emulated_poisoned(sizeof half, 0), emulated_copy(half, sizeof half, 0), QG_BFLOAT16, 1, 6, 6},
        {emulated_poisoned(sizeof half, 0), emulated_copy(half, sizeof half, 0), QG_FLOAT16, 1, 6, 6},
    };
    for (int i = 0; i < 3; i++)
        gpu->cast(&items[i], 1, items[i].source_format, gpu->queue);
    CHECK_BYTES(items[0].target, full, sizeof full, "float32 bits");
    CHECK_BYTES(items[1].target, half, sizeof half, "bfloat16 bits");
    CHECK_BYTES(items[2].target, half, sizeof half, "float16 bits");
    emulated_release();
}

static void test_scaled_cast(void) {
    static const float scales[] = {1.0f, 0x1p-60f, 0x1p90f, 0.25f};
    for (int c = 0; c < 3 * 2 * SHAPES; c++) {
        const qg_format from = formats[c % 3], to = formats[c / 3 % 2];
        const int64_t *s = shapes[c / 6];
        const float scale = scales[random_below(4)];
        const size_t size = s[0] > 0 ? (size_t)((s[0] - 1) * s[2] + s[1]) * ref_size(from) : 0;
        const size_t target_size = (size_t)(s[0] * s[1]) * ref_size(to);
        void *source = guarded(size, 0), *want = guarded(target_size, 0);
        fill(source, from, (int64_t)(size / ref_size(from)), 0);
        if (size > 0)
            ref_store(from, source, 0, INFINITY);
        void *got = emulated_poisoned(target_size, ref_size(to) * (size_t)(c % 2));
        cpu->scaled_cast(want, to, source, from, s[0], s[1], s[2], scale, NULL);
        gpu->scaled_cast(got, to, emulated_copy(source, size, 0), from, s[0], s[1], s[2], scale, gpu->queue);
        CHECK_BYTES(got, want, target_size, "scaled cast, case %d, scale %g", c, scale);
        emulated_release();
        RELEASE("scaled_cast");
    }
}

/* Many arrays are one launch, which reads and writes each element once. */
static void test_traffic(void) {
    enum { COUNT = 3000, CASTS = 64, ARRAYS = 96 };
    float *source = emulated_poisoned(COUNT * 4, 0);
    uint16_t *target = emulated_poisoned(CASTS * COUNT * 2, 0);
    qg_cast_item items[CASTS];
    qg_array arrays[ARRAYS];
    memset(source, 0, COUNT * 4);
    for (int i = 0; i < CASTS; i++)
        items[i] = (qg_cast_item){target + i * COUNT, source, QG_FLOAT32, 30, COUNT / 30, COUNT / 30};
    for (int i = 0; i < ARRAYS; i++)
        arrays[i] = (qg_array){source, COUNT, QG_FLOAT32};
    emulator_check_races(0);
    emulator_reset_counts();
    gpu->cast(items, CASTS, QG_BFLOAT16, gpu->queue);
    emulator_counts counts = emulator_count(NULL);
    CHECK(counts.launches == 1, "%lld launches", (long long)counts.launches);
    CHECK(counts.loaded == CASTS * COUNT * 4, "%lld bytes read", (long long)counts.loaded);
    CHECK(counts.stored == CASTS * COUNT * 2, "%lld bytes written", (long long)counts.stored);
    emulator_reset_counts();
    gpu->absmax(emulated_poisoned(ARRAYS * 4, 0), arrays, ARRAYS, gpu->queue);
    counts = emulator_count(NULL);
    CHECK(counts.launches == 1, "absmax: %lld launches", (long long)counts.launches);
    CHECK(counts.loaded == ARRAYS * COUNT * 4, "absmax: %lld bytes read", (long long)counts.loaded);
    emulator_check_races(1);
    emulated_release();
}

/* After a failure a number that the host reads is no good one. */
static void test_finite_after_failure(void) {
    const float one = 1.0f;
    const char *sentence;
    const void *source = emulated_copy(&one, sizeof one, 0);
    emulator_fail("cudaLaunchKernel", 0, cudaErrorLaunchFailure);
    CHECK(!gpu->finite(source, QG_FLOAT32, 1, gpu->queue), "finite although its kernel was not launched");
    CHECK(gpu->failure(&sentence, gpu->queue) != QG_SUCCESS, "the failed launch is not told");
    CHECK(strstr(sentence, "absmax") != NULL, "%s", sentence);
    CHECK(gpu->finite(source, QG_FLOAT32, 1, gpu->queue), "one is finite");
    emulated_release();
}

int main(void) {
    random_seed(31);
    cpu = level(QG_SIMD_SCALAR);
    gpu = emulated_table();
    test_noise();
    test_absmax();
    test_absmax_beyond_the_grid();
    test_cast();
    test_cast_copies();
    test_scaled_cast();
    test_traffic();
    test_finite_after_failure();
    emulated_check("all calls");
    return check_finish();
}
