/* Adam on an emulated GPU, alone and with the weight update: the bits of the CPU's scalar kernels, in any list. */
#include "emulated.h"
#include "reference.h"

static const qg_format float_formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};
static const float flags[] = {1.0f, QG_LARGEST_GRADIENT, 1.0001e18f, INFINITY, NAN};

enum { ITEMS = 57 }; /* more than two launches hold */
static int64_t flagged, reranged;

/* Moments on the CPU and on the GPU. */
typedef struct moments {
    qg_moments want, got;
    size_t bytes, absmax_bytes;
} moments;

/* A block of 8-bit moments in eight is still zero, some are tiny or huge. */
static double random_block(void) {
    return random_below(8) == 0 ? 0 : random_below(8) == 0 ? 1e-18 : random_below(16) == 0 ? 1e17 : 1;
}

static void random_moments(moments *a, qg_format format, int64_t rows, int64_t cols, int32_t block) {
    const size_t element = format == QG_FLOAT32 ? 4 : 1;
    const int64_t count = rows * cols, blocks = rows * ((cols + block - 1) / block);
    memset(a, 0, sizeof *a);
    a->bytes = (size_t)count * element;
    a->want.block = block;
    a->want.format = format;
    a->want.exp_avg = guarded(a->bytes, 0);
    a->want.exp_avg_sq = guarded(a->bytes, 0);
    for (int64_t i = 0; i < count; i++) {
        if (format == QG_FLOAT32) {
            ((float *)a->want.exp_avg)[i] = (float)random_normal();
            ((float *)a->want.exp_avg_sq)[i] = (float)random_uniform(0, 2);
        } else {
            ((uint8_t *)a->want.exp_avg)[i] = (uint8_t)random_bits();
            ((uint8_t *)a->want.exp_avg_sq)[i] = (uint8_t)random_bits();
        }
    }
    if (format == QG_DYNAMIC8) {
        a->absmax_bytes = (size_t)blocks * 4;
        a->want.exp_avg_absmax = guarded(a->absmax_bytes, 0);
        a->want.exp_avg_sq_absmax = guarded(a->absmax_bytes, 0);
        for (int64_t b = 0; b < blocks; b++) {
            const double size = random_block();
            a->want.exp_avg_absmax[b] = (float)(size * random_uniform(0.5, 2));
            a->want.exp_avg_sq_absmax[b] = (float)(size * size * random_uniform(0.5, 2));
        }
    }
}

static void *random_copy(const void *source, size_t size, size_t element) {
    return emulated_copy(source, size, random_below(2) ? 0 : element);
}

static void copy_moments(moments *a) {
    const size_t element = a->want.format == QG_FLOAT32 ? 4 : 1;
    a->got = a->want;
    a->got.exp_avg = random_copy(a->want.exp_avg, a->bytes, element);
    a->got.exp_avg_sq = random_copy(a->want.exp_avg_sq, a->bytes, element);
    if (a->want.format == QG_DYNAMIC8) {
        a->got.exp_avg_absmax = random_copy(a->want.exp_avg_absmax, a->absmax_bytes, 4);
        a->got.exp_avg_sq_absmax = random_copy(a->want.exp_avg_sq_absmax, a->absmax_bytes, 4);
    }
}

static void check_moments(const moments *a, const char *what, int i) {
    const int block = a->want.format == QG_DYNAMIC8 ? a->want.block : 0;
    CHECK_BYTES(a->got.exp_avg, a->want.exp_avg, a->bytes, "%s, item %d: m, block %d", what, i, block);
    CHECK_BYTES(a->got.exp_avg_sq, a->want.exp_avg_sq, a->bytes, "%s, item %d: v, block %d", what, i, block);
    CHECK_BYTES(a->got.exp_avg_absmax, a->want.exp_avg_absmax, a->absmax_bytes, "%s, item %d: absmax of m", what, i);
    CHECK_BYTES(
        a->got.exp_avg_sq_absmax, a->want.exp_avg_sq_absmax, a->absmax_bytes, "%s, item %d: absmax of v", what, i);
}

static qg_adam_coefficients random_adam(void) {
    return ref_adam_coefficients(random_below(4) ? 0.9 : 0, 0.999, random_below(4) ? 1e-8 : 0, 1 + random_below(1000));
}

/* Ordinary gradients, small and large ones, none, and some zeros. */
static void *random_gradient(qg_format format, int64_t count) {
    void *g = guarded((size_t)count * ref_size(format), 0);
    const int kind = (int)random_below(8);
    const double size = kind == 0 ? 0 : kind == 1 ? 1e-9 : kind == 2 && format != QG_FLOAT16 ? 1e15 : 1;
    for (int64_t i = 0; i < count; i++)
        ref_store(format, g, i, (float)(random_below(20) ? size * random_normal() : 0));
    return g;
}

/* ---------------------------------------------------------------- adam */

typedef struct tile {
    moments moments;
    void *want_n, *got_n;
    size_t n_bytes;
    float absmax;
} tile;

static void random_tile(tile *t, qg_adam_item *want, qg_adam_item *got) {
    static const int64_t cols[] = {0, 1, 15, 16, 17, 255, 256, 257, 509, 1009, 2048, 4109};
    static const int32_t blocks[] = {1, 3, 16, 100, 256, 257, 1000, 4096};
    const int64_t rows = random_below(5), all = cols[random_below(12)];
    const int32_t block = blocks[random_below(8)];
    random_moments(&t->moments, random_below(4) ? QG_DYNAMIC8 : QG_FLOAT32, rows, all, block);
    copy_moments(&t->moments);
    memset(want, 0, sizeof *want);
    want->moments = &t->moments.want;
    want->moments_cols = all;
    want->rows = rows;
    want->first_col = random_below(3) ? 0 : all / block / 2 * block;
    const int64_t left = all - want->first_col, some = left / block / 2 * block;
    want->cols = random_below(3) || some == 0 ? left : some;
    want->grad_format = float_formats[random_below(3)];
    want->normalised_format = random_below(2) ? QG_FLOAT32 : QG_BFLOAT16;
    want->gradient_row_stride = want->cols + random_below(2) * 3;
    const int in_place = want->grad_format == want->normalised_format && random_below(2);
    want->normalised_row_stride = in_place ? want->gradient_row_stride : want->cols + random_below(2) * 5;
    want->coefficients = random_adam();
    const size_t g_size = ref_size(want->grad_format), n_size = ref_size(want->normalised_format);
    const int64_t g_count = rows * want->gradient_row_stride, n_count = rows * want->normalised_row_stride;
    void *g = random_gradient(want->grad_format, g_count);
    t->n_bytes = (size_t)n_count * n_size;
    t->want_n = in_place ? g : guarded(t->n_bytes, 0);
    *got = *want;
    got->moments = &t->moments.got;
    got->gradient = random_copy(g, (size_t)g_count * g_size, g_size);
    t->got_n = in_place ? (void *)got->gradient : random_copy(t->want_n, t->n_bytes, n_size);
    want->gradient = g;
    want->normalised = t->want_n;
    got->normalised = t->got_n;
    if (random_below(2)) {
        t->absmax = flags[random_below(5)];
        want->gradient_absmax = &t->absmax;
        got->gradient_absmax = emulated_copy(&t->absmax, 4, 0);
        flagged += !(t->absmax <= QG_LARGEST_GRADIENT);
    }
}

static void test_adam(int64_t count) {
    static tile tiles[ITEMS];
    static qg_adam_item want[ITEMS], got[ITEMS];
    memset(tiles, 0, sizeof tiles);
    for (int i = 0; i < count; i++)
        random_tile(&tiles[i], &want[i], &got[i]);
    const qg_backend *scalar = level(QG_SIMD_SCALAR), *gpu = emulated_table();
    scalar->adam(want, count, scalar->queue);
    gpu->adam(got, count, gpu->queue);
    emulated_check("adam");
    for (int i = 0; i < count; i++) {
        check_moments(&tiles[i].moments, "adam", i);
        CHECK_BYTES(tiles[i].got_n, tiles[i].want_n, tiles[i].n_bytes, "adam, item %d: N", i);
    }
    emulated_release();
    RELEASE("adam writes outside of its outputs");
}

/* ---------------------------------------------------------------- adam and update */

typedef struct parameter {
    moments moments;
    qg_weight want, got;
    size_t bytes, groups;
    int64_t want_stats[2], *got_stats;
    float absmax;
} parameter;

static int64_t common_multiple(int64_t a, int64_t b) {
    int64_t multiple = a;
    while (multiple % b != 0)
        multiple += a;
    return multiple;
}

static void random_weight(parameter *p, qg_format format, int64_t count, int32_t group) {
    const size_t element = format == QG_INT8 ? 1 : ref_size(format);
    p->bytes = (size_t)count * element;
    p->want = (qg_weight){.rows = 1, .cols = count, .format = format};
    p->want.data = guarded(p->bytes, 0);
    for (int64_t i = 0; i < count && format != QG_INT8; i++)
        ref_store(format, p->want.data, i, (float)random_normal());
    if (format == QG_INT8) {
        p->groups = (size_t)((count + group - 1) / group);
        p->want.group_size = group;
        p->want.scales = guarded(p->groups * 4, 0);
        p->want.zeros = guarded(p->groups * 2, 0);
        for (size_t g = 0; g < p->groups; g++) {
            p->want.scales[g] = random_below(4) ? 0.01f : 3;
            p->want.zeros[g] = (int16_t)random_below(300);
        }
        const int64_t narrow = random_below(4) ? 1 : 3;
        for (int64_t i = 0; i < count; i++)
            ((uint8_t *)p->want.data)[i] = (uint8_t)random_below(256 / narrow);
    }
    p->got = p->want;
    p->got.data = random_copy(p->want.data, p->bytes, element);
    if (format == QG_INT8) {
        p->got.scales = random_copy(p->want.scales, p->groups * 4, 4);
        p->got.zeros = random_copy(p->want.zeros, p->groups * 2, 2);
    }
}

static void random_parameter(parameter *p, qg_adam_update_item *want, qg_adam_update_item *got) {
    static const qg_format formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16, QG_INT8};
    static const int64_t counts[] = {0, 1, 16, 100, 255, 256, 257, 1009, 2048, 5003};
    static const int32_t sizes[][2] = {
        {256, 256}, {256, 256}, {16, 16}, {1, 3}, {256, 64}, {100, 256}, {4096, 256}, {1000, 1000}, {3, 1}, {257, 100}};
    const int32_t *size = sizes[random_below(10)];
    const int64_t count = counts[random_below(10)];
    random_moments(&p->moments, random_below(4) ? QG_DYNAMIC8 : QG_FLOAT32, 1, count, size[0]);
    copy_moments(&p->moments);
    random_weight(p, random_below(2) ? QG_INT8 : formats[random_below(4)], count, size[1]);
    const int64_t block = p->moments.want.format == QG_DYNAMIC8 ? size[0] : 1;
    const int64_t chunk = common_multiple(block, p->want.format == QG_INT8 ? size[1] : 1);
    const float decay = random_below(2) ? 0 : 1e-3f, rate = random_below(3) ? 0.02f : 20;
    memset(want, 0, sizeof *want);
    want->weight = &p->want;
    want->moments = &p->moments.want;
    want->grad_format = float_formats[random_below(3)];
    want->gradient = random_gradient(want->grad_format, count);
    want->adam = random_adam();
    want->update = (qg_update_coefficients){1 - decay, decay, rate, random_below(3) != 0};
    want->stream = (qg_noise_stream){random_bits(), random_bits() >> 1, (uint32_t)random_bits()};
    want->chunk = chunk < count || count == 0 ? chunk : count;
    *got = *want;
    got->weight = &p->got;
    got->moments = &p->moments.got;
    const size_t g_size = ref_size(want->grad_format);
    got->gradient = random_copy(want->gradient, (size_t)count * g_size, g_size);
    if (random_below(3)) {
        want->stats = p->want_stats;
        got->stats = p->got_stats = emulated_copy(p->want_stats, sizeof p->want_stats, 0);
    }
    if (random_below(2)) {
        p->absmax = flags[random_below(5)];
        want->gradient_absmax = &p->absmax;
        got->gradient_absmax = emulated_copy(&p->absmax, 4, 0);
        flagged += !(p->absmax <= QG_LARGEST_GRADIENT);
    }
}

static void check_parameter(const parameter *p, int i) {
    check_moments(&p->moments, "adam_update", i);
    CHECK_BYTES(p->got.data, p->want.data, p->bytes, "adam_update, item %d: weight of format %d", i, p->want.format);
    CHECK_BYTES(p->got.scales, p->want.scales, p->groups * 4, "adam_update, item %d: scales", i);
    CHECK_BYTES(p->got.zeros, p->want.zeros, p->groups * 2, "adam_update, item %d: zeros", i);
    if (p->got_stats != NULL) {
        CHECK_BYTES(p->got_stats, p->want_stats, sizeof p->want_stats, "adam_update, item %d: stats", i);
        reranged += p->want_stats[1];
    }
}

static void test_adam_update(int64_t count) {
    static parameter parameters[ITEMS];
    static qg_adam_update_item want[ITEMS], got[ITEMS];
    memset(parameters, 0, sizeof parameters);
    int64_t chunk = 0;
    for (int i = 0; i < count; i++) {
        random_parameter(&parameters[i], &want[i], &got[i]);
        chunk = want[i].chunk > chunk ? want[i].chunk : chunk;
    }
    const qg_backend *scalar = level(QG_SIMD_SCALAR), *gpu = emulated_table();
    float *scratch = guarded((size_t)(scalar->chunks(scalar->queue) * chunk) * 4, 0);
    scalar->adam_update(want, count, scratch, scalar->queue);
    gpu->adam_update(got, count, emulated_poisoned((size_t)(gpu->chunks(gpu->queue) * chunk) * 4, 4), gpu->queue);
    emulated_check("adam_update");
    for (int i = 0; i < count; i++)
        check_parameter(&parameters[i], i);
    emulated_release();
    RELEASE("adam_update writes outside of its outputs");
}

/* The bytes of one pass with the default sizes, against the floor of the file's header. */
static void test_traffic(void) {
    enum { COUNT = 256 * 40 };
    parameter p = {0};
    qg_adam_update_item item = {.weight = &p.got, .moments = &p.moments.got, .grad_format = QG_BFLOAT16};
    random_moments(&p.moments, QG_DYNAMIC8, 1, COUNT, 256);
    p.moments.got = p.moments.want;
    p.moments.got.exp_avg = emulated_copy(p.moments.want.exp_avg, COUNT, 0);
    p.moments.got.exp_avg_sq = emulated_copy(p.moments.want.exp_avg_sq, COUNT, 0);
    p.moments.got.exp_avg_absmax = emulated_copy(p.moments.want.exp_avg_absmax, COUNT / 256 * 4, 0);
    p.moments.got.exp_avg_sq_absmax = emulated_copy(p.moments.want.exp_avg_sq_absmax, COUNT / 256 * 4, 0);
    p.got = (qg_weight){.data = emulated_poisoned(COUNT * 2, 0), .rows = 1, .cols = COUNT, .format = QG_BFLOAT16};
    memset(p.got.data, 0, COUNT * 2);
    item.gradient = emulated_copy(random_gradient(QG_BFLOAT16, COUNT), COUNT * 2, 0);
    item.adam = random_adam();
    item.update = (qg_update_coefficients){1, 0, 0.01f, 1};
    item.chunk = 256;
    const qg_backend *gpu = emulated_table();
    emulator_check_races(0);
    emulator_reset_counts();
    gpu->adam_update(&item, 1, NULL, gpu->queue);
    emulator_check_races(1);
    const emulator_counts counted = emulator_count(NULL);
    CHECK(
        counted.launches == 1 && counted.loaded == COUNT * 6 && counted.stored == COUNT * 4,
        "%lld launches, %lld bytes loaded, %lld stored", (long long)counted.launches, (long long)counted.loaded,
        (long long)counted.stored);
    emulated_release();
    RELEASE("the traffic of adam_update");
}

int main(void) {
    random_seed(32);
    for (int c = 0; c < 6; c++)
        test_adam(ITEMS);
    for (int c = 0; c < 6; c++)
        test_adam_update(ITEMS);
    test_adam(0);
    test_adam_update(0);
    test_traffic();
    CHECK(flagged > 50 && reranged > 50, "%lld flagged, %lld re-ranged", (long long)flagged, (long long)reranged);
    return check_finish();
}
