/* Whole steps, qg_adam8_step and qg_galore_step: the same bytes as a plain writing with the same sums, and the weights
 * of the formula in double. */
#include "harness.h"
#include "reference.h"

enum { BLOCK = 256 };

static const qg_format float_formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};
static const qg_format weight_formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16, QG_INT8};

static int64_t blocks_of(int64_t length, int64_t block) {
    return (length + block - 1) / block;
}

/* ---------------------------------------------------------------- tasks */

static qg_weight random_weight(int64_t rows, int64_t cols, qg_format format, int64_t group) {
    int64_t count = rows * cols, groups = blocks_of(count, group);
    qg_weight w = {
        guarded((size_t)count * ref_size(format), ref_size(format)), NULL, NULL, rows, cols, (int32_t)group, format};
    float *values = guarded((size_t)count * 4, 0);
    for (int64_t i = 0; i < count; i++)
        values[i] = (float)(0.1 * random_normal());
    for (int64_t i = 0; format != QG_INT8 && i < count; i++)
        ref_store(format, w.data, i, values[i]);
    if (format != QG_INT8)
        return w;
    w.scales = guarded((size_t)groups * 4, 4);
    w.zeros = guarded((size_t)groups * 2, 2);
    for (int64_t g = 0; g < groups; g++) {
        int64_t n = count - g * group < group ? count - g * group : group;
        ref_int8_quantize((uint8_t *)w.data + g * group, &w.scales[g], &w.zeros[g], values + g * group, n);
    }
    return w;
}

static qg_moments zero_moments(int64_t rows, int64_t cols, qg_format format, int64_t block) {
    size_t bytes = (size_t)(rows * cols) * (format == QG_FLOAT32 ? 4 : 1),
           absmax = (size_t)(rows * blocks_of(cols, block)) * 4;
    qg_moments m = {guarded(bytes, 4), guarded(bytes, 4), NULL, NULL, (int32_t)block, format};
    memset(m.exp_avg, format == QG_FLOAT32 ? 0 : 127, bytes);
    memset(m.exp_avg_sq, 0, bytes);
    if (format == QG_DYNAMIC8) {
        m.exp_avg_absmax = memset(guarded(absmax, 4), 0, absmax);
        m.exp_avg_sq_absmax = memset(guarded(absmax, 4), 0, absmax);
    }
    return m;
}

static qg_projector random_projector(int64_t rank, int64_t dim, qg_format format, int64_t block) {
    int packed = format == QG_INT4 || format == QG_FP4 || format == QG_NF4;
    int64_t count = rank * dim, blocks = block == 0 ? 1 : rank * blocks_of(dim, block);
    int64_t row = packed ? (dim + 1) / 2 : dim;
    qg_projector p = {
        guarded((size_t)(rank * row) * ref_size(format), 4), NULL, NULL, rank, dim, (int32_t)block, format};
    if (format != QG_FLOAT32 && format != QG_BFLOAT16)
        p.scales = guarded((size_t)blocks * 2, 2);
    if (format == QG_INT4 || format == QG_INT8)
        p.zeros = guarded((size_t)blocks, 1);
    float *values = guarded((size_t)count * 4, 0);
    for (int64_t i = 0; i < count; i++)
        values[i] = (float)(random_normal() / sqrt((double)dim));
    CHECK_OK(qg_projector_quantize(&p, values, level(QG_SIMD_SCALAR)));
    return p;
}

static qg_step_params some_params(void) {
    return (qg_step_params){.struct_size = sizeof(qg_step_params),
        .stochastic_round = random_below(3) != 0,
        .lr = random_uniform(0.001, 0.1),
        .beta1 = 0.9,
        .beta2 = 0.99,
        .eps = 1e-8,
        .weight_decay = random_below(2) ? random_uniform(0.0, 5.0) : 0.0,
        .scale = random_below(2) ? 0.3 : 1.0,
        .seed = random_bits(),
        .gemm_format = random_below(3) ? QG_FLOAT32 : QG_BFLOAT16};
}

/* The same task on copies of everything that a step writes. */
static qg_step_task copy_of(const qg_step_task *task, int64_t r_rows, int64_t r_cols) {
    qg_step_task copy = *task;
    const qg_weight *w = &task->weight;
    const qg_moments *m = &task->moments;
    size_t groups = (size_t)blocks_of(w->rows * w->cols, w->group_size),
           bytes = (size_t)(r_rows * r_cols) * ref_size(m->format);
    size_t absmax = (size_t)(r_rows * blocks_of(r_cols, m->block)) * 4;
    copy.weight.data = guarded_copy(w->data, (size_t)(w->rows * w->cols) * ref_size(w->format), ref_size(w->format));
    copy.weight.scales = w->scales == NULL ? NULL : guarded_copy(w->scales, groups * 4, 4);
    copy.weight.zeros = w->zeros == NULL ? NULL : guarded_copy(w->zeros, groups * 2, 2);
    copy.moments.exp_avg = guarded_copy(m->exp_avg, bytes, 4);
    copy.moments.exp_avg_sq = guarded_copy(m->exp_avg_sq, bytes, 4);
    copy.moments.exp_avg_absmax = m->exp_avg_absmax == NULL ? NULL : guarded_copy(m->exp_avg_absmax, absmax, 4);
    copy.moments.exp_avg_sq_absmax =
        m->exp_avg_sq_absmax == NULL ? NULL : guarded_copy(m->exp_avg_sq_absmax, absmax, 4);
    copy.stats = guarded_copy(&(int64_t[2]){7, 8}, 16, 8);
    copy.norm = task->norm == NULL ? NULL : guarded_copy(task->norm, 8, 8);
    return copy;
}

static void check_same(
    const qg_step_task *got,
    const qg_step_task *want,
    int64_t r_rows,
    int64_t r_cols,
    const char *what,
    int c) {
    const qg_weight *w = &got->weight;
    const qg_moments *m = &got->moments;
    size_t groups = (size_t)blocks_of(w->rows * w->cols, w->group_size),
           bytes = (size_t)(r_rows * r_cols) * ref_size(m->format);
    size_t absmax = (size_t)(r_rows * blocks_of(r_cols, m->block)) * 4;
    CHECK_BYTES(m->exp_avg, want->moments.exp_avg, bytes, "%s: exp_avg, case %d", what, c);
    CHECK_BYTES(m->exp_avg_sq, want->moments.exp_avg_sq, bytes, "%s: exp_avg_sq, case %d", what, c);
    if (m->format == QG_DYNAMIC8) {
        CHECK_BYTES(m->exp_avg_absmax, want->moments.exp_avg_absmax, absmax, "%s: absmax, case %d", what, c);
        CHECK_BYTES(
            m->exp_avg_sq_absmax, want->moments.exp_avg_sq_absmax, absmax, "%s: absmax of squares, case %d", what, c);
    }
    CHECK_BYTES(
        w->data, want->weight.data, (size_t)(w->rows * w->cols) * ref_size(w->format), "%s: weight, case %d", what, c);
    if (w->format == QG_INT8) {
        CHECK_BYTES(w->scales, want->weight.scales, groups * 4, "%s: scales, case %d", what, c);
        CHECK_BYTES(w->zeros, want->weight.zeros, groups * 2, "%s: zeros, case %d", what, c);
    }
    CHECK_BYTES(got->stats, want->stats, 16, "%s: stats, case %d", what, c);
}

/* ---------------------------------------------------------------- the steps, written plainly */

static qg_update_coefficients update_coefficients(const qg_step_params *p, double rate) {
    return (qg_update_coefficients){
        (float)(1.0 - p->lr * p->weight_decay), (float)(p->lr * p->weight_decay), (float)rate, p->stochastic_round};
}

/* Adam on R [rows, cols] in float32, block by block; N [rows, cols] comes back. */
static void reference_adam(
    const qg_step_task *t,
    const qg_step_params *p,
    int64_t rows,
    int64_t cols,
    const float *r,
    float *n) {
    qg_adam_coefficients c = ref_adam_coefficients(p->beta1, p->beta2, p->eps, t->bias_step);
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t at = 0; at < cols; at += t->moments.block) {
            int64_t count = cols - at < t->moments.block ? cols - at : t->moments.block;
            ref_adam_block(&t->moments, row, cols, at, count, r + row * cols + at, n + row * cols + at, &c);
        }
    }
}

static void reference_update(const qg_step_task *t, const qg_step_params *p, const float *u, double rate) {
    qg_update_coefficients c = update_coefficients(p, rate);
    qg_noise_stream stream = {p->seed, (uint64_t)t->noise_step, t->id};
    ref_update(&t->weight, 0, t->weight.rows * t->weight.cols, u, &c, &stream, t->stats);
}

/* A copy of values, rounded to the GEMM's format. */
static float *rounded(const float *values, int64_t count, qg_format format) {
    float *copy = guarded((size_t)count * 4, 0), stored;
    for (int64_t i = 0; i < count; i++) {
        ref_store(format, &stored, 0, values[i]);
        copy[i] = ref_load(format, &stored, 0);
    }
    return copy;
}

/* c[i, j] = sum over l of a[l, i] b[l, j], or of a[i, l] b[j, l]; a, b and c in the GEMM's format. */
static float *product(int64_t m, int64_t n, int64_t k, const float *a, const float *b, int by_rows, qg_format format) {
    const float *x = rounded(a, m * k, format), *y = rounded(b, k * n, format);
    float *c = guarded((size_t)(m * n) * 4, 0);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = 0.0;
            for (int64_t l = 0; l < k; l++)
                sum += by_rows ? (double)x[i * k + l] * y[j * k + l] : (double)x[l * m + i] * y[l * n + j];
            c[i * n + j] = (float)sum;
        }
    }
    return rounded(c, m * n, format);
}

static float *decoded(const qg_projector *projector) {
    float *values = guarded((size_t)(projector->rank * projector->dim) * 4, 0);
    CHECK_OK(qg_projector_dequantize(projector, values, QG_FLOAT32, level(QG_SIMD_SCALAR)));
    return values;
}

static float *transposed(const float *x, int64_t rows, int64_t cols) {
    float *out = guarded((size_t)(rows * cols) * 4, 0);
    for (int64_t i = 0; i < rows * cols; i++)
        out[i % cols * rows + i / cols] = x[i];
    return out;
}

/* The rate of a step whose N has `count` elements; the norm that is kept is updated. */
static double limited_rate(const qg_step_task *t, const qg_step_params *p, const float *normalised, int64_t count) {
    double now, most = t->norm == NULL ? 0.0 : p->norm_growth_limit * *t->norm;
    long double squares = 0.0L;
    for (int64_t i = 0; i < count; i++)
        squares += (long double)normalised[i] * normalised[i];
    now = sqrt((double)squares);
    int held = most > 0.0 && now > most;
    if (t->norm != NULL)
        *t->norm = held ? most : now;
    return p->lr * p->scale * (held ? most / now : 1.0);
}

/* One projected step on copies; its weights are compared with the formula in double. */
static void reference_galore(const qg_step_task *t, const qg_step_params *p, int c) {
    int64_t m = t->weight.rows, n = t->weight.cols, rank = t->projector.rank, right = t->side == QG_RIGHT,
            full = t->side == QG_FULL,
            k = right  ? m
                : full ? rank
                       : n;
    int64_t dim = t->projector.dim, g_count = t->low_rank_gradient ? rank * k : m * n;
    float *basis = decoded(&t->projector), *right_basis = full ? decoded(&t->right_projector) : NULL;
    float *g = guarded((size_t)g_count * 4, 0), *normalised = guarded((size_t)(rank * k) * 4, 0),
          *before = guarded((size_t)(m * n) * 4, 0);
    for (int64_t i = 0; i < g_count; i++)
        g[i] = ref_load(t->grad_format, t->gradient, i);
    for (int64_t i = 0; i < m * n; i++) {
        const qg_weight *w = &t->weight;
        before[i] = w->format != QG_INT8
                        ? ref_load(w->format, w->data, i)
                        : w->scales[i / w->group_size] * (float)(((uint8_t *)w->data)[i] - w->zeros[i / w->group_size]);
    }
    const float *r = g;
    if (!t->low_rank_gradient) {
        r = product(rank, right ? m : n, dim, basis, right ? g : transposed(g, m, n), 1, p->gemm_format);
        r = full ? product(rank, rank, n, r, right_basis, 1, p->gemm_format) : r;
    }
    reference_adam(t, p, rank, k, r, normalised);
    double keep = 1.0 - p->lr * p->weight_decay, rate = limited_rate(t, p, normalised, rank * k), worst = 0.0;
    const float *direction = normalised;
    if (full)
        direction = product(rank, n, rank, transposed(normalised, rank, rank), right_basis, 0, p->gemm_format);
    reference_update(
        t, p, product(m, n, rank, right ? direction : basis, right ? basis : direction, 0, p->gemm_format), rate);
    /* U = A^T B with A [rank, m], B [rank, n]; B_size: what the sums in B are made of. */
    double *b = guarded((size_t)(rank * n) * 8, 0), *b_size = guarded((size_t)(rank * n) * 8, 0);
    for (int64_t i = 0; i < rank * n; i++) {
        b[i] = right ? basis[i] : full ? 0.0 : normalised[i];
        b_size[i] = fabs(b[i]);
        for (int64_t l = 0; full && l < rank; l++) {
            double term = (double)normalised[i / n * rank + l] * right_basis[l * n + i % n];
            b[i] += term;
            b_size[i] += fabs(term);
        }
    }
    for (int64_t i = 0; i < m * n; i++) {
        const qg_weight *w = &t->weight;
        double exact = 0.0, size = 0.0, room, after;
        for (int64_t l = 0; l < rank; l++) {
            double a = (right ? normalised : basis)[l * m + i / n];
            exact += a * b[l * n + i % n];
            size += fabs(a) * b_size[l * n + i % n];
        }
        exact = before[i] * keep - rate * exact;
        if (w->format == QG_INT8) {
            float s = w->scales[i / w->group_size];
            after = s * (double)(((uint8_t *)w->data)[i] - w->zeros[i / w->group_size]);
            room = 1.001 * s;
        } else {
            after = ref_load(w->format, w->data, i);
            room = fabs(exact) * (w->format == QG_FLOAT32 ? 1e-6 : w->format == QG_BFLOAT16 ? 0x1p-7 : 0x1p-10) + 1e-7;
        }
        room += rate * size * (p->gemm_format == QG_BFLOAT16 ? 0x1p-6 : 1e-6);
        worst = fmax(worst, fabs(after - exact) / room);
    }
    CHECK(worst <= 1.0, "case %d: a weight is %g times the room away from the formula", c, worst);
}

/* ---------------------------------------------------------------- galore */

/* rows, cols, rank */
static const int64_t shapes[][3] = {{40, 24, 8}, {24, 56, 8}, {37, 53, 7}, {1, 9, 1}, {9, 1, 1}, {530, 19, 4},
    {19, 530, 4}, {300, 31, 5}, {31, 300, 5}, {140, 24, 131}, {257, 64, 3}, {5, 5, 5}, {24, 300, 40}};
enum { SHAPES = 13 };

/* A task of any kind with its shape by c; *k is R's columns. The gradient is left to the caller. */
static qg_step_task random_task(int c, const qg_step_params *params, double *norm, int64_t *k) {
    int64_t m = shapes[c % SHAPES][0], n = shapes[c % SHAPES][1], rank = shapes[c % SHAPES][2];
    qg_side side = (qg_side)random_below(3);
    int64_t dim = side == QG_RIGHT ? n : m;
    int64_t block = random_below(3) ? BLOCK : 16, basis_block = (int64_t[]){BLOCK, 16, 0}[random_below(3)];
    static const qg_format bases[] = {
        QG_FLOAT32, QG_INT8, QG_INT4, QG_BFLOAT16, QG_FP8_E4M3, QG_FP4, QG_NF4, QG_DYNAMIC8};
    *k = side == QG_RIGHT ? m : side == QG_LEFT ? n : rank;
    *norm = c % 5 == 0 ? 0.0 : random_uniform(0.01, 3.0);
    qg_step_task task = {.side = side,
        .norm = params->norm_growth_limit > 0.0 ? norm : NULL,
        .low_rank_gradient = (int32_t)random_below(2),
        .id = (uint32_t)random_bits(),
        .grad_format = float_formats[random_below(3)],
        .noise_step = random_below(1000),
        .bias_step = 1 + random_below(3)};
    task.weight = random_weight(m, n, weight_formats[random_below(4)], random_below(3) ? BLOCK : 48);
    task.moments = zero_moments(rank, *k, random_below(2) ? QG_DYNAMIC8 : QG_FLOAT32, block);
    task.projector = random_projector(rank, dim, bases[random_below(8)], basis_block);
    if (side == QG_FULL) /* its format is its own */
        task.right_projector = random_projector(rank, n, bases[random_below(8)], basis_block);
    return task;
}

static int64_t gradient_count(const qg_step_task *task, int64_t k) {
    return task->low_rank_gradient ? task->projector.rank * k : task->weight.rows * task->weight.cols;
}

static void test_galore(int c) {
    double norm;
    int64_t k, rank = shapes[c % SHAPES][2];
    qg_step_params params = some_params();
    params.norm_growth_limit = random_below(2) ? 1.1 : 0.0;
    qg_step_task task = random_task(c, &params, &norm, &k);
    int64_t g_count = gradient_count(&task, k);
    size_t g_bytes = (size_t)g_count * ref_size(task.grad_format);
    void *g = guarded(g_bytes, ref_size(task.grad_format));
    task.gradient = g;
    qg_step_task want = copy_of(&task, rank, k), got[LEVELS];
    for (int simd = 0; simd < LEVELS; simd++)
        got[simd] = copy_of(&task, rank, k);
    for (int step = 0; step < 2; step++) {
        for (int64_t i = 0; i < g_count; i++)
            ref_store(task.grad_format, g, i, (float)random_normal());
        void *g_before = guarded_copy(g, g_bytes, 0);
        reference_galore(&want, &params, c);
        for (int simd = 0; simd < LEVELS; simd++) {
            ref_gemm_context context = {0, 0};
            qg_linalg linalg = ref_linalg(&context);
            size_t size = 0;
            if (level(simd) == NULL)
                continue;
            omp_set_num_threads(1 + (c + simd) % 3);
            CHECK_OK(qg_galore_scratch_size(&got[simd], 1, &params, level(simd), &size));
            void *scratch = guarded(size, (size_t)(c % 5));
            CHECK_OK(qg_galore_step(&got[simd], 1, &params, scratch, size, level(simd), &linalg));
            check_same(&got[simd], &want, rank, k, "galore", c);
            if (task.norm != NULL) {
                CHECK(
                    fabs(*got[simd].norm - *want.norm) <= 1e-14 * *want.norm, "case %d: norm %.17g, not %.17g", c,
                    *got[simd].norm, *want.norm);
                CHECK_BYTES(got[simd].norm, got[0].norm, 8, "case %d: the norm at level %d", c, simd);
            }
            CHECK_BYTES(g, g_before, g_bytes, "case %d: the gradient is written", c);
            got[simd].noise_step++;
            got[simd].bias_step++;
        }
        want.noise_step++;
        want.bias_step++;
    }
    RELEASE("a galore step writes outside its outputs, case %d", c);
}

/* Kernels that were started by a table that counts. */
static int64_t started;
static const qg_backend *counted;

static void count_adam(const qg_adam_item *items, int64_t count, void *queue) {
    started++;
    counted->adam(items, count, queue);
}

static void count_update(const qg_update_item *items, int64_t count, void *queue) {
    started++;
    counted->update(items, count, queue);
}

static void count_decode(const qg_decode_item *items, int64_t count, qg_format format, void *queue) {
    started++;
    counted->projector_dequantize(items, count, format, queue);
}

/* A device that takes many matrices at a time gives the bits of one at a time. */
static void test_batches(int c) {
    enum { TASKS = 39 };
    qg_step_task alone[TASKS], together[TASKS];
    double norms[TASKS];
    int64_t k[TASKS];
    qg_step_params params = some_params();
    params.norm_growth_limit = c % 2 ? 1.1 : 0.0;
    qg_backend device = *level(QG_SIMD_SCALAR);
    device.batch_bytes = (size_t)(c % 3) << 19;
    device.tile_bytes = (size_t)(c % 2) << 15;
    ref_gemm_context context = {0, 0};
    qg_linalg linalg = ref_linalg(&context);
    size_t size = 0;
    for (int i = 0; i < TASKS; i++) {
        qg_step_task task = random_task(i, &params, &norms[i], &k[i]);
        int64_t count = gradient_count(&task, k[i]);
        void *g = guarded((size_t)count * ref_size(task.grad_format), 4);
        for (int64_t e = 0; e < count; e++)
            ref_store(task.grad_format, g, e, (float)random_normal());
        task.gradient = g;
        task.weight.rows = i % 13 == 4 ? 0 : task.weight.rows; /* an empty one among them */
        alone[i] = copy_of(&task, task.projector.rank, k[i]);
        together[i] = copy_of(&task, task.projector.rank, k[i]);
        CHECK_OK(qg_galore_scratch_size(&alone[i], 1, &params, level(QG_SIMD_SCALAR), &size));
        void *scratch = guarded(size, 0);
        CHECK_OK(qg_galore_step(&alone[i], 1, &params, scratch, size, level(QG_SIMD_SCALAR), &linalg));
    }
    CHECK_OK(qg_galore_scratch_size(together, TASKS, &params, &device, &size));
    CHECK(size <= device.batch_bytes || c % 3 == 0, "a batch of %zu bytes", size);
    void *scratch = guarded(size, 8);
    CHECK_OK(qg_galore_step(together, TASKS, &params, scratch, size, &device, &linalg));
    for (int i = 0; i < TASKS; i++) {
        check_same(&together[i], &alone[i], together[i].projector.rank, k[i], "batch", i);
        if (together[i].norm != NULL)
            CHECK_BYTES(together[i].norm, alone[i].norm, 8, "the norm of task %d of a batch", i);
    }
    RELEASE("a batch writes outside its outputs, case %d", c);
}

/* 56 small matrices: a handful of kernels. */
static void test_batch_starts(void) {
    enum { TASKS = 56 };
    qg_step_task tasks[TASKS];
    qg_step_params params = some_params();
    params.gemm_format = QG_FLOAT32;
    counted = level(QG_SIMD_SCALAR);
    qg_backend device = *counted;
    device.batch_bytes = 64 << 20;
    device.tile_bytes = 4 << 20;
    device.adam = count_adam;
    device.update = count_update;
    device.projector_dequantize = count_decode;
    ref_gemm_context context = {0, 0};
    qg_linalg linalg = ref_linalg(&context);
    for (int i = 0; i < TASKS; i++) {
        int64_t m = i % 7 == 6 ? 32 : 88, n = i % 7 == 6 ? 88 : 32;
        tasks[i] = (qg_step_task){.side = m >= n ? QG_RIGHT : QG_LEFT, .low_rank_gradient = 1, .bias_step = 1};
        tasks[i].weight = random_weight(m, n, QG_INT8, BLOCK);
        tasks[i].moments = zero_moments(8, m + n - 32, QG_DYNAMIC8, BLOCK);
        tasks[i].projector = random_projector(8, 32, QG_INT4, BLOCK);
        tasks[i].gradient = guarded((size_t)(8 * 88) * 4, 0);
        memset((void *)(uintptr_t)tasks[i].gradient, 0, (size_t)(8 * 88) * 4);
    }
    size_t size = 0;
    CHECK_OK(qg_galore_scratch_size(tasks, TASKS, &params, &device, &size));
    void *scratch = guarded(size, 0);
    started = 0;
    CHECK_OK(qg_galore_step(tasks, TASKS, &params, scratch, size, &device, &linalg));
    CHECK(started <= 10, "%lld kernels were started", (long long)started);
    CHECK(context.calls == TASKS, "%lld products", (long long)context.calls);
    RELEASE("a batch of small matrices writes outside its outputs");
}

/* A gradient that is too large or not finite changes nothing of its task, and everything of the others. */
static void test_flags(int c) {
    static const float flags[] = {INFINITY, NAN, 1.01e18f, 1e18f, 0.0f};
    qg_step_params params = some_params();
    params.norm_growth_limit = c % 2 ? 1.1 : 0.0;
    double norm;
    int64_t k;
    ref_gemm_context context = {0, 0};
    qg_linalg linalg = ref_linalg(&context);
    qg_step_task task = random_task(c, &params, &norm, &k);
    qg_step_task got = copy_of(&task, task.projector.rank, k), want = copy_of(&task, task.projector.rank, k);
    int64_t count = gradient_count(&task, k);
    void *g = guarded((size_t)count * ref_size(task.grad_format), 4);
    for (int64_t e = 0; e < count; e++)
        ref_store(task.grad_format, g, e, (float)random_normal());
    got.gradient = g;
    got.gradient_absmax = &flags[c % 5];
    for (int simd = 0; simd < LEVELS; simd++) {
        size_t size = 0;
        if (level(simd) == NULL || (c % 5 > 2 && simd > 0))
            continue;
        CHECK_OK(qg_galore_scratch_size(&got, 1, &params, level(simd), &size));
        void *scratch = guarded(size, 0);
        CHECK_OK(qg_galore_step(&got, 1, &params, scratch, size, level(simd), &linalg));
    }
    if (c % 5 > 2) {
        int64_t moved = 0;
        for (int64_t i = 0; i < task.projector.rank * k * (int64_t)ref_size(task.moments.format); i++)
            moved += ((uint8_t *)got.moments.exp_avg)[i] != ((uint8_t *)task.moments.exp_avg)[i];
        CHECK(moved > 0, "case %d: a gradient of %g is refused", c, flags[c % 5]);
    } else {
        check_same(&got, &want, task.projector.rank, k, "flagged", c);
        if (got.norm != NULL)
            CHECK_BYTES(got.norm, want.norm, 8, "case %d: the norm of a flagged task", c);
    }
    RELEASE("a flagged task writes outside its outputs, case %d", c);
}

/* Peak memory beside the weight: below one byte a weight for a matrix of usual proportions. */
static void test_galore_scratch(void) {
    qg_weight weight = {&weight, NULL, NULL, 2048, 5461, BLOCK, QG_BFLOAT16};
    for (int c = 0; c < 12; c++) {
        double norm = 1.0;
        qg_side side = (qg_side)(c / 2 % 3);
        qg_step_params params = some_params();
        params.gemm_format = c % 2 ? QG_FLOAT32 : QG_BFLOAT16;
        params.norm_growth_limit = c / 6;
        qg_projector right = {&weight, (uint16_t *)&weight, (uint8_t *)&weight, 128, 5461, BLOCK, QG_INT4};
        qg_projector left = {&weight, (uint16_t *)&weight, (uint8_t *)&weight, 128, 2048, BLOCK, QG_INT4};
        qg_step_task task = {.weight = weight,
            .moments = {&weight, &weight, (float *)&weight, (float *)&weight, BLOCK, QG_DYNAMIC8},
            .projector = side == QG_RIGHT ? right : left,
            .right_projector = right,
            .gradient = &weight,
            .side = side,
            .norm = &norm,
            .bias_step = 1};
        size_t size = 0;
        CHECK_OK(qg_galore_scratch_size(&task, 1, &params, level(QG_SIMD_SCALAR), &size));
        CHECK(size > 0 && (double)size < 1.0 * 2048 * 5461, "side %d: %zu bytes of scratch", task.side, size);
    }
}

/* ---------------------------------------------------------------- adam8 */

static qg_step_task adam8_task(int64_t rows, int64_t cols) {
    qg_step_task task = {.id = (uint32_t)random_bits(),
        .noise_step = random_below(99),
        .bias_step = 1 + random_below(9),
        .grad_format = float_formats[random_below(3)]};
    task.weight = random_weight(rows, cols, weight_formats[random_below(4)], random_below(2) ? BLOCK : 100);
    task.moments = zero_moments(1, rows * cols, random_below(2) ? QG_DYNAMIC8 : QG_FLOAT32, BLOCK);
    void *g = guarded((size_t)(rows * cols) * ref_size(task.grad_format), ref_size(task.grad_format));
    for (int64_t i = 0; i < rows * cols; i++)
        ref_store(task.grad_format, g, i, (float)random_normal());
    task.gradient = g;
    return task;
}

/* A list of parameters, among them an empty one, in one call; blocks run along the flat weight. */
static void test_adam8(int c) {
    static const int64_t sizes[][2] = {{1, 1}, {1, 255}, {1, 5000}, {0, 7}, {3, 512}, {1, 257}, {7, 73}};
    enum { TASKS = 7 };
    qg_step_params params = some_params();
    qg_step_task task[TASKS], want[TASKS], got[TASKS];
    for (int i = 0; i < TASKS; i++) {
        int64_t rows = sizes[i][0], cols = sizes[i][1], count = rows * cols;
        static const float too_large = 1.1e18f;
        task[i] = adam8_task(rows, cols);
        task[i].gradient_absmax = (c + i) % 5 == 0 ? &too_large : NULL;
        want[i] = copy_of(&task[i], 1, count);
        float *r = guarded((size_t)count * 4, 0), *n = guarded((size_t)count * 4, 0);
        for (int64_t k = 0; k < count; k++)
            r[k] = ref_load(task[i].grad_format, task[i].gradient, k);
        if (task[i].gradient_absmax != NULL)
            continue;
        reference_adam(&want[i], &params, 1, count, r, n);
        reference_update(&want[i], &params, n, params.lr * params.scale);
    }
    for (int simd = 0; simd < LEVELS; simd++) {
        size_t size = 0;
        for (int i = 0; i < TASKS; i++)
            got[i] = copy_of(&task[i], 1, sizes[i][0] * sizes[i][1]);
        if (level(simd) == NULL)
            continue;
        omp_set_num_threads(1 + (c + simd) % 3);
        CHECK_OK(qg_adam8_scratch_size(got, TASKS, &params, level(simd), &size));
        CHECK_OK(qg_adam8_step(got, TASKS, &params, guarded(size, (size_t)(c % 5)), size, level(simd)));
        for (int i = 0; i < TASKS; i++)
            check_same(&got[i], &want[i], 1, sizes[i][0] * sizes[i][1], "adam8", c);
    }
    RELEASE("an adam8 step writes outside its outputs, case %d", c);
}

/* Empty lists and empty matrices are successes. */
static void test_empty(void) {
    qg_step_params params = some_params();
    ref_gemm_context context = {0, 0};
    qg_linalg linalg = ref_linalg(&context);
    qg_step_task empty = {.weight = {.rows = 0, .cols = 5, .group_size = 1}};
    size_t size = 1;
    for (int count = 0; count < 2; count++) {
        const qg_step_task *list = count == 0 ? NULL : &empty;
        CHECK_OK(qg_adam8_scratch_size(list, count, &params, level(QG_SIMD_SCALAR), &size));
        CHECK_OK(qg_adam8_step(list, count, &params, NULL, size, level(QG_SIMD_SCALAR)));
        CHECK_OK(qg_galore_scratch_size(list, count, &params, level(QG_SIMD_SCALAR), &size));
        CHECK_OK(qg_galore_step(list, count, &params, NULL, size, level(QG_SIMD_SCALAR), &linalg));
    }
    CHECK(
        size == 0 && context.calls == 0, "an empty list needs %zu bytes and %lld products", size,
        (long long)context.calls);
}

int main(void) {
    random_seed(10);
    for (int c = 0; c < check_count(30 * SHAPES, SHAPES); c++)
        test_galore(c);
    for (int c = 0; c < check_count(6, 2); c++)
        test_batches(c);
    test_batch_starts();
    for (int c = 0; c < check_count(5 * SHAPES, 5); c++)
        test_flags(c);
    test_galore_scratch();
    for (int c = 0; c < check_count(60, 3); c++)
        test_adam8(c);
    test_empty();
    return check_finish();
}
