/* INT8 weights and the weight update on an emulated GPU: the bits of the CPU's scalar kernels, in any list. */
#include "emulated.h"
#include "reference.h"

static const int64_t counts[] = {0, 1, 2, 15, 16, 17, 255, 256, 257, 509, 1000, 4109};
static const int32_t groups[] = {1, 3, 16, 100, 256, 257, 1000, 4096};
static const qg_format formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16, QG_INT8};
enum { COUNTS = 12, GROUPS = 8, FORMATS = 4 };

/* One weight on the CPU and on the GPU. Only elements `base` and later exist, base being a multiple of the group. */
typedef struct sample {
    qg_weight want, got;
    int64_t base, count, groups;
    size_t element;
    int64_t want_stats[2], *got_stats;
    float want_rate, want_absmax;
} sample;

/* As if the array went back to element 0. */
static void *back(void *array, int64_t elements, size_t size) {
    return (void *)((uintptr_t)array - (uintptr_t)elements * size);
}

static size_t random_offset(size_t element) {
    return random_below(2) ? 0 : element;
}

/* Groups with full, narrow and constant ranges of codes, every kind of zero, scales up to the largest. */
static void random_group(const sample *s, int64_t g) {
    static const int16_t zeros[] = {0, 128, 300, -3000, 32767, -32767, 32700, 131, -16256, 16512};
    const int64_t size = s->want.group_size, first = g * size;
    int lo = (int)random_below(256), hi = (int)random_below(256);
    const int kind = (int)random_below(4);
    if (kind == 0) {
        lo = 4;
        hi = 251;
    }
    if (kind == 1) { /* about half a full range: on the edge of getting a narrower one */
        lo = (int)random_below(128);
        hi = lo + 121 + (int)random_below(6);
    }
    s->want.zeros[s->base / size + g] = random_below(3) ? (int16_t)random_uniform(-300, 500) : zeros[random_below(10)];
    s->want.scales[s->base / size + g] =
        random_below(12) ? (float)exp(random_uniform(-12, 3)) : (random_below(2) ? 0x1p-100f : 1e36f);
    for (int64_t i = first; i < s->count && i < first + size; i++)
        ((uint8_t *)s->want.data)[s->base + i] = (uint8_t)(lo < hi ? lo + random_below(hi - lo + 1) : lo);
}

static void random_weight(sample *s, qg_format format, int64_t count, int32_t group, int64_t base) {
    const int is_int8 = format == QG_INT8;
    memset(s, 0, sizeof *s);
    s->element = is_int8 ? 1 : ref_size(format);
    s->base = is_int8 ? base / group * group : base;
    s->count = count;
    s->groups = is_int8 ? (count + group - 1) / group : 0;
    s->want = (qg_weight){.rows = 1, .cols = s->base + count, .group_size = is_int8 ? group : 0, .format = format};
    s->want.data = back(guarded((size_t)count * s->element, 0), s->base, s->element);
    if (is_int8) {
        s->want.scales = back(guarded((size_t)s->groups * 4, 0), s->base / group, 4);
        s->want.zeros = back(guarded((size_t)s->groups * 2, 0), s->base / group, 2);
        for (int64_t g = 0; g < s->groups; g++)
            random_group(s, g);
    }
    for (int64_t i = 0; i < count && !is_int8; i++)
        ref_store(format, s->want.data, s->base + i, i % 97 == 3 ? INFINITY : (float)random_normal());
}

/* The same on the GPU. */
static void copy_weight(sample *s) {
    const int64_t first = s->want.group_size > 0 ? s->base / s->want.group_size : 0;
    const char *data = (const char *)s->want.data + s->base * (int64_t)s->element;
    s->got = s->want;
    s->got.data = emulated_copy(data, (size_t)s->count * s->element, random_offset(s->element));
    s->got.data = back(s->got.data, s->base, s->element);
    if (s->want.format == QG_INT8) {
        s->got.scales = emulated_copy(s->want.scales + first, (size_t)s->groups * 4, random_offset(4));
        s->got.scales = back(s->got.scales, first, 4);
        s->got.zeros = emulated_copy(s->want.zeros + first, (size_t)s->groups * 2, random_offset(2));
        s->got.zeros = back(s->got.zeros, first, 2);
    }
}

static void check_weight(const sample *s, const char *what, int c) {
    const int64_t first = s->want.group_size > 0 ? s->base / s->want.group_size : 0;
    const int64_t begin = s->base * (int64_t)s->element;
    CHECK_BYTES(
        (const char *)s->got.data + begin, (const char *)s->want.data + begin, (size_t)s->count * s->element,
        "%s, item %d: format %d, %lld elements, groups of %d", what, c, s->want.format, (long long)s->count,
        s->want.group_size);
    if (s->want.format == QG_INT8) {
        CHECK_BYTES(
            s->got.scales + first, s->want.scales + first, (size_t)s->groups * 4, "%s, item %d: scales", what, c);
        CHECK_BYTES(s->got.zeros + first, s->want.zeros + first, (size_t)s->groups * 2, "%s, item %d: zeros", what, c);
    }
}

/* ---------------------------------------------------------------- update */

/* Updates of no step to a million steps, by groups. */
static float random_step(const sample *s, int64_t element, double size, int kind) {
    const float scale = s->want.format == QG_INT8 ? s->want.scales[element / s->want.group_size] : 0.01f;
    double steps = kind == 0 ? 0 : kind == 1 ? (element % 7 == 0 ? 1e6 * size : 0) : size * random_normal();
    if (kind == 4 && element % s->want.group_size != s->want.group_size - 1) /* the last element decides */
        steps *= 1e-3;
    if (kind == 2)
        steps = rint(steps) + 0.5;
    if (kind == 3) /* all codes the same way: a shift */
        steps = size * (5 + random_normal());
    return (float)fmax(-1e38, fmin(1e38, steps * (double)scale));
}

/* What both are given; the rate and the flag lie in device memory. */
static void random_item(sample *s, qg_update_item *want, qg_update_item *got) {
    static const float flags[] = {1.0f, QG_LARGEST_GRADIENT, 1.0001e18f, INFINITY, NAN};
    const int64_t group = s->want.format == QG_INT8 ? s->want.group_size : 1;
    const int64_t offset = random_below(4) ? 0 : s->count / group / 3 * group;
    const int64_t left = s->count - offset, some = left / group / 2 * group;
    const int64_t n = random_below(4) || some == 0 ? left : some, unit = group > 1 ? group : 64;
    const qg_format format = random_below(2) ? QG_FLOAT32 : QG_BFLOAT16;
    void *u = guarded((size_t)n * ref_size(format), 0);
    double size = 1;
    int kind = 0;
    for (int64_t i = 0; i < n; i++) {
        if (i % unit == 0) {
            size = pow(10, random_uniform(-8, 3));
            kind = (int)random_below(s->want.format == QG_INT8 ? 8 : 4);
        }
        ref_store(format, u, i, random_step(s, s->base + offset + i, size, kind));
    }
    memset(want, 0, sizeof *want);
    want->weight = &s->want;
    want->first = s->base + offset;
    want->count = n;
    want->u = u;
    want->u_format = format;
    const float decay = random_below(3) ? 0 : random_below(3) ? 1e-3f : 0.3f;
    want->coefficients = (qg_update_coefficients){1 - decay, decay, 0.37f, random_below(3) != 0};
    want->stream = (qg_noise_stream){random_bits(), random_bits() >> 1, (uint32_t)random_bits()};
    *got = *want;
    got->weight = &s->got;
    got->u = emulated_copy(u, (size_t)n * ref_size(format), random_offset(ref_size(format)));
    if (random_below(3)) {
        s->want_stats[0] = 10;
        s->want_stats[1] = 20;
        want->stats = s->want_stats;
        got->stats = s->got_stats = emulated_copy(s->want_stats, sizeof s->want_stats, 0);
    }
    if (random_below(3) == 0) {
        s->want_rate = 1;
        want->rate = &s->want_rate;
        got->rate = emulated_copy(&s->want_rate, 4, 0);
    }
    if (random_below(2)) {
        s->want_absmax = flags[random_below(5)];
        want->gradient_absmax = &s->want_absmax;
        got->gradient_absmax = emulated_copy(&s->want_absmax, 4, 0);
    }
}

enum { ITEMS = 57 }; /* more than two launches hold */
static int64_t shifted, reranged, flagged;

/* base: where the weights begin to exist. */
static void test_list(int64_t count, int64_t base, const char *what) {
    static sample samples[ITEMS];
    static qg_update_item want[ITEMS], got[ITEMS];
    for (int i = 0; i < count; i++) {
        sample *s = &samples[i];
        random_weight(
            s, formats[random_below(FORMATS)], counts[random_below(COUNTS)], groups[random_below(GROUPS)], base);
        copy_weight(s);
        random_item(s, &want[i], &got[i]);
    }
    const qg_backend *scalar = level(QG_SIMD_SCALAR), *gpu = emulated_table();
    scalar->update(want, count, scalar->queue);
    gpu->update(got, count, gpu->queue);
    emulated_check(what);
    for (int i = 0; i < count; i++) {
        const sample *s = &samples[i];
        check_weight(s, what, i);
        if (s->got_stats != NULL) {
            CHECK_BYTES(s->got_stats, s->want_stats, sizeof s->want_stats, "%s, item %d: stats", what, i);
            shifted += s->want_stats[0] - 10;
            reranged += s->want_stats[1] - 20;
        }
        flagged += want[i].gradient_absmax != NULL && !(s->want_absmax <= QG_LARGEST_GRADIENT);
    }
    emulated_release();
    RELEASE("%s writes outside of its outputs", what);
}

/* The bytes that a kernel loads and stores, against the floor of its file's header. */
static void test_update_traffic(void) {
    enum { COUNT = 256 * 100 };
    static const int64_t bytes[FORMATS] = {4, 2, 2, 1};
    for (int f = 0; f < FORMATS; f++) {
        sample s;
        random_weight(&s, formats[f], COUNT, 256, 0);
        s.got = s.want;
        s.got.data = emulated_copy(s.want.data, COUNT * s.element, 0);
        if (formats[f] == QG_INT8) {
            s.got.scales = emulated_copy(s.want.scales, COUNT / 256 * 4, 0);
            s.got.zeros = emulated_copy(s.want.zeros, COUNT / 256 * 2, 0);
            for (int i = 0; i < COUNT / 256; i++) { /* groups that keep their range */
                s.got.scales[i] = 1;
                s.got.zeros[i] = 128;
            }
            for (int i = 0; i < COUNT; i++)
                ((uint8_t *)s.got.data)[i] = (uint8_t)(i * 7 % 251);
        }
        qg_update_item item = {.weight = &s.got, .count = COUNT, .u_format = QG_FLOAT32};
        item.u = emulated_poisoned(COUNT * 4, 0);
        for (int i = 0; i < COUNT; i++)
            ((float *)item.u)[i] = 0.25f;
        item.coefficients = (qg_update_coefficients){1, 0, 1, 1};
        emulator_check_races(0);
        emulator_reset_counts();
        emulated_table()->update(&item, 1, emulated_table()->queue);
        emulator_check_races(1);
        const emulator_counts counted = emulator_count(NULL);
        CHECK(
            counted.launches == 1 && counted.loaded == COUNT * (4 + bytes[f]) && counted.stored == COUNT * bytes[f],
            "format %d: %lld launches, %lld bytes loaded, %lld stored", formats[f], (long long)counted.launches,
            (long long)counted.loaded, (long long)counted.stored);
        emulated_release();
        RELEASE("the traffic of format %d", formats[f]);
    }
}

/* A list of small weights is a few launches. */
static void test_launches(void) {
    static const float u = 1;
    float *weights = emulated_poisoned(ITEMS * 4, 0);
    memset(weights, 0, ITEMS * 4);
    qg_weight weight[ITEMS];
    qg_update_item items[ITEMS];
    for (int i = 0; i < ITEMS; i++) {
        weight[i] = (qg_weight){.data = weights + i, .rows = 1, .cols = 1, .format = QG_FLOAT32};
        items[i] = (qg_update_item){.weight = &weight[i], .count = 1, .u_format = QG_FLOAT32};
        items[i].u = emulated_copy(&u, 4, 0);
        items[i].coefficients = (qg_update_coefficients){1, 0, 1, 0};
    }
    emulator_check_races(0);
    emulator_reset_counts();
    emulated_table()->update(items, ITEMS, emulated_table()->queue);
    emulator_check_races(1);
    CHECK(emulator_count(NULL).launches <= 3, "%lld launches", (long long)emulator_count(NULL).launches);
    for (int i = 0; i < ITEMS; i++)
        CHECK(weights[i] == -1, "weight %d is %g", i, (double)weights[i]);
    emulated_release();
}

/* ---------------------------------------------------------------- encode and decode */

/* Spread values, constants, zeros, the largest and the least. */
static float random_value(int kind, int64_t i) {
    return kind == 0   ? 0
           : kind == 1 ? 0.37f
           : kind == 2 ? (float)(random_normal() * 1e-30)
           : kind == 3 ? random_finite()
                       : (float)(random_normal() + (i % 2 ? 3 : 0));
}

static void test_int8(int c) {
    const int64_t count = counts[c % COUNTS];
    const int32_t group = groups[c / COUNTS % GROUPS];
    const qg_format format = formats[random_below(3)];
    const size_t size = ref_size(format);
    const int kind = (int)random_below(6);
    void *source = guarded((size_t)count * size, 0), *decoded = guarded((size_t)count * size, 0);
    for (int64_t i = 0; i < count; i++) {
        ref_store(format, source, i, random_value(kind, i / group * 5));
        if (!isfinite(ref_load(format, source, i)))
            ref_store(format, source, i, -1);
    }
    sample s;
    random_weight(&s, QG_INT8, count, group, 0);
    s.got = s.want;
    s.got.data = emulated_poisoned((size_t)count, random_offset(1));
    s.got.scales = emulated_poisoned((size_t)s.groups * 4, random_offset(4));
    s.got.zeros = emulated_poisoned((size_t)s.groups * 2, random_offset(2));
    const void *given = emulated_copy(source, (size_t)count * size, random_offset(size));
    void *got = emulated_poisoned((size_t)count * size, random_offset(size));
    const qg_backend *scalar = level(QG_SIMD_SCALAR), *gpu = emulated_table();
    scalar->int8_quantize(&s.want, source, format, scalar->queue);
    scalar->int8_dequantize(&s.want, decoded, format, scalar->queue);
    gpu->int8_quantize(&s.got, given, format, gpu->queue);
    gpu->int8_dequantize(&s.got, got, format, gpu->queue);
    emulated_check("int8");
    check_weight(&s, "int8_quantize", c);
    CHECK_BYTES(got, decoded, (size_t)count * size, "int8_dequantize, case %d, format %d", c, format);
    emulated_release();
    RELEASE("int8 writes outside of its outputs, case %d", c);
}

int main(void) {
    random_seed(31);
    for (int c = 0; c < COUNTS * GROUPS; c++)
        test_int8(c);
    for (int c = 0; c < 30; c++)
        test_list(ITEMS, 0, "update");
    for (int c = 0; c < 12; c++) {
        test_list(ITEMS, (INT64_C(1) << 32) - 300, "update across 2^32");
        test_list(ITEMS, (INT64_C(3) << 32) - 301, "update across 3 2^32");
    }
    test_list(0, 0, "update of nothing");
    test_update_traffic();
    test_launches();
    CHECK(
        shifted > 100 && reranged > 1000 && flagged > 100, "%lld shifted, %lld re-ranged, %lld flagged",
        (long long)shifted, (long long)reranged, (long long)flagged);
    return check_finish();
}
