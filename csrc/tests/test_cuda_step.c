/* Whole steps and refreshes by an emulated GPU. Steps are the CPU's bit for bit: its products are summed as the stand-in
 * for cuBLAS sums them. Refreshes are close to the CPU's, whose factorisations are others. */
#include "standin.h"
#include "reference.h"

enum { BLOCK = 256 };

static standin blas;
static qg_cuda *cuda;
static const qg_backend *gpu, *cpu;
static const qg_linalg *gpu_linalg;
static ref_gemm_context context;
static qg_linalg cpu_linalg;

static const qg_format floats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};

/* ---------------------------------------------------------------- tasks in device memory, which the CPU can read too */

static int64_t blocks_of(int64_t length, int64_t block) {
    return (length + block - 1) / block;
}

static void *random_array(qg_format format, int64_t count, double size) {
    void *array = device(NULL, (size_t)count * ref_size(format));
    for (int64_t i = 0; i < count; i++)
        ref_store(format, array, i, (float)(size * random_normal()));
    return array;
}

static qg_weight make_weight(int64_t rows, int64_t cols, qg_format format, int64_t group) {
    const int64_t count = rows * cols, groups = blocks_of(count, group);
    qg_weight w = {NULL, NULL, NULL, rows, cols, (int32_t)group, format};
    if (format != QG_INT8) {
        w.data = random_array(format, count, 0.1);
        return w;
    }
    w.data = device(NULL, (size_t)count);
    w.scales = device(NULL, (size_t)groups * sizeof(float));
    w.zeros = device(NULL, (size_t)groups * sizeof(int16_t));
    CHECK_OK(qg_int8_quantize(&w, random_array(QG_FLOAT32, count, 0.1), QG_FLOAT32, cpu));
    return w;
}

static qg_moments make_moments(int64_t rows, int64_t cols, qg_format format, int64_t block) {
    const size_t bytes = (size_t)(rows * cols) * (format == QG_FLOAT32 ? 4 : 1);
    const size_t absmax = (size_t)(rows * blocks_of(cols, block)) * sizeof(float);
    qg_moments m = {device(NULL, bytes), device(NULL, bytes), NULL, NULL, (int32_t)block, format};
    memset(m.exp_avg, format == QG_FLOAT32 ? 0 : 127, bytes);
    memset(m.exp_avg_sq, 0, bytes);
    if (format == QG_DYNAMIC8) {
        m.exp_avg_absmax = memset(device(NULL, absmax), 0, absmax);
        m.exp_avg_sq_absmax = memset(device(NULL, absmax), 0, absmax);
    }
    return m;
}

static qg_projector make_projector(int64_t rank, int64_t dim, qg_format format, int64_t block) {
    const int packed = format == QG_INT4 || format == QG_FP4 || format == QG_NF4;
    const int64_t row = packed ? (dim + 1) / 2 : dim, blocks = block == 0 ? 1 : rank * blocks_of(dim, block);
    qg_projector p = {
        device(NULL, (size_t)(rank * row) * ref_size(format)), NULL, NULL, rank, dim, (int32_t)block, format};
    if (format != QG_FLOAT32 && format != QG_BFLOAT16)
        p.scales = device(NULL, (size_t)blocks * sizeof(uint16_t));
    if (format == QG_INT4 || format == QG_INT8)
        p.zeros = device(NULL, (size_t)blocks);
    CHECK_OK(qg_projector_quantize(&p, random_array(QG_FLOAT32, rank * dim, 1.0 / sqrt((double)dim)), cpu));
    return p;
}

static qg_step_params some_params(void) {
    return (qg_step_params){
        .struct_size = sizeof(qg_step_params),
        .stochastic_round = random_below(3) != 0,
        .lr = random_uniform(0.001, 0.1),
        .beta1 = 0.9,
        .beta2 = 0.99,
        .eps = 1e-8,
        .weight_decay = random_below(2) ? random_uniform(0.0, 5.0) : 0.0,
        .scale = 0.3,
        .seed = random_bits(),
        .gemm_format = random_below(2) ? QG_FLOAT32 : QG_BFLOAT16,
    };
}

/* A task and the size of what its moments are of. */
typedef struct sized_task {
    qg_step_task task;
    int64_t rows;
    int64_t cols;
} sized_task;

static size_t weight_bytes(const qg_weight *w) {
    return (size_t)(w->rows * w->cols) * ref_size(w->format);
}

static size_t group_count(const qg_weight *w) {
    return w->format == QG_INT8 ? (size_t)blocks_of(w->rows * w->cols, w->group_size) : 0;
}

static size_t moment_bytes(const sized_task *t) {
    return (size_t)(t->rows * t->cols) * ref_size(t->task.moments.format);
}

static size_t absmax_bytes(const sized_task *t) {
    const qg_moments *m = &t->task.moments;
    return m->format == QG_DYNAMIC8 ? (size_t)(t->rows * blocks_of(t->cols, m->block)) * sizeof(float) : 0;
}

static void *again(const void *array, size_t size) {
    return array == NULL ? NULL : device(array, size);
}

/* The same task on copies of all that a step writes. */
static sized_task copy_of(const sized_task *t) {
    sized_task copy = *t;
    const qg_weight *w = &t->task.weight;
    const qg_moments *m = &t->task.moments;
    copy.task.weight.data = again(w->data, weight_bytes(w));
    copy.task.weight.scales = again(w->scales, group_count(w) * sizeof(float));
    copy.task.weight.zeros = again(w->zeros, group_count(w) * sizeof(int16_t));
    copy.task.moments.exp_avg = again(m->exp_avg, moment_bytes(t));
    copy.task.moments.exp_avg_sq = again(m->exp_avg_sq, moment_bytes(t));
    copy.task.moments.exp_avg_absmax = again(m->exp_avg_absmax, absmax_bytes(t));
    copy.task.moments.exp_avg_sq_absmax = again(m->exp_avg_sq_absmax, absmax_bytes(t));
    copy.task.stats = again(t->task.stats, 2 * sizeof(int64_t));
    copy.task.norm = again(t->task.norm, sizeof(double));
    return copy;
}

static void check_same(const sized_task *got, const sized_task *want, const char *what, int number) {
    const qg_weight *w = &got->task.weight, *x = &want->task.weight;
    const qg_moments *m = &got->task.moments, *n = &want->task.moments;
    CHECK_BYTES(w->data, x->data, weight_bytes(w), "%s %d: weight", what, number);
    CHECK_BYTES(w->scales, x->scales, group_count(w) * sizeof(float), "%s %d: scales", what, number);
    CHECK_BYTES(w->zeros, x->zeros, group_count(w) * sizeof(int16_t), "%s %d: zeros", what, number);
    CHECK_BYTES(m->exp_avg, n->exp_avg, moment_bytes(got), "%s %d: exp_avg", what, number);
    CHECK_BYTES(m->exp_avg_sq, n->exp_avg_sq, moment_bytes(got), "%s %d: exp_avg_sq", what, number);
    CHECK_BYTES(m->exp_avg_absmax, n->exp_avg_absmax, absmax_bytes(got), "%s %d: absmax", what, number);
    CHECK_BYTES(
        m->exp_avg_sq_absmax, n->exp_avg_sq_absmax, absmax_bytes(got), "%s %d: absmax of squares", what, number);
    CHECK_BYTES(got->task.stats, want->task.stats, 2 * sizeof(int64_t), "%s %d: stats", what, number);
    if (got->task.norm != NULL)
        CHECK_BYTES(got->task.norm, want->task.norm, sizeof(double), "%s %d: norm", what, number);
}

/* A gradient_absmax on the device. */
static const float *flag(float value) {
    return device(&value, sizeof value);
}

/* ---------------------------------------------------------------- galore */

static const int64_t shapes[][3] = {
    {40, 24, 8}, {24, 40, 8}, {13, 53, 7}, {1, 9, 1}, {9, 1, 1}, {300, 11, 4}, {11, 300, 4}, {5, 5, 5}};
enum { SHAPES = 8 };

static sized_task galore_task(int c, const qg_step_params *params) {
    static const qg_format weights[] = {QG_INT8, QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};
    static const qg_format bases[] = {
        QG_INT4, QG_FLOAT32, QG_INT8, QG_BFLOAT16, QG_FP8_E4M3, QG_DYNAMIC8, QG_NF4, QG_FP4};
    const int64_t *shape = shapes[c % SHAPES];
    const int64_t m = shape[0], n = shape[1], rank = shape[2];
    const qg_side side = (qg_side)(c / 2 % 3);
    const int64_t dim = side == QG_RIGHT ? n : m, k = side == QG_RIGHT ? m : side == QG_LEFT ? n : rank;
    const int64_t block = random_below(3) ? BLOCK : 16;
    const double before = random_uniform(0.01, 3.0);
    sized_task t = {.rows = rank, .cols = k};
    t.task = (qg_step_task){
        .weight = make_weight(m, n, weights[random_below(4)], random_below(3) ? BLOCK : 48),
        .moments = make_moments(rank, k, random_below(3) ? QG_DYNAMIC8 : QG_FLOAT32, block),
        .projector = make_projector(rank, dim, bases[random_below(8)], block),
        .grad_format = floats[random_below(3)],
        .side = side,
        .low_rank_gradient = c % 2,
        .id = (uint32_t)random_bits(),
        .noise_step = random_below(1000),
        .bias_step = 1 + random_below(3),
        .stats = device((int64_t[2]){7, 8}, 2 * sizeof(int64_t)),
        .norm = params->norm_growth_limit > 0.0 ? device(&before, sizeof before) : NULL,
        .gradient_absmax = random_below(4) == 0 ? flag(random_below(2) ? 5.0f : INFINITY) : NULL,
    };
    if (side == QG_FULL)
        t.task.right_projector = make_projector(rank, n, bases[random_below(8)], block);
    t.task.gradient = random_array(t.task.grad_format, t.task.low_rank_gradient ? rank * k : m * n, 1.0);
    return t;
}

/* The scratch is what is asked for, from an odd place, fenced. */
static qg_status step_galore(
    qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    const qg_backend *backend,
    const qg_linalg *linalg) {
    size_t size = 0;
    CHECK_OK(qg_galore_scratch_size(tasks, count, params, backend, &size));
    void *scratch = emulator_malloc(size, 64, 4);
    const qg_status status = qg_galore_step(tasks, count, params, scratch, size, backend, linalg);
    emulator_free(scratch);
    return status;
}

static void test_galore(int c) {
    qg_step_params params = some_params();
    params.norm_growth_limit = c % 5 < 2 ? 1.1 : 0.0;
    sized_task got = galore_task(c, &params), want = copy_of(&got);
    for (int step = 0; step < 2; step++) {
        CHECK_OK(step_galore(&got.task, 1, &params, gpu, gpu_linalg));
        CHECK_OK(step_galore(&want.task, 1, &params, cpu, &cpu_linalg));
        check_same(&got, &want, "galore", c);
        got.task.bias_step = ++want.task.bias_step;
        got.task.noise_step = ++want.task.noise_step;
    }
    emulated_release();
}

/* More tasks than a batch holds, and batches of some memory each. */
static void test_galore_together(size_t batch_bytes) {
    enum { TASKS = 41 };
    sized_task got[TASKS], want[TASKS];
    qg_step_task tasks[TASKS];
    qg_step_params params = some_params();
    params.norm_growth_limit = 1.1;
    qg_backend device_of_batches = *gpu;
    device_of_batches.batch_bytes = batch_bytes;
    for (int i = 0; i < TASKS; i++) {
        got[i] = galore_task(i, &params);
        got[i].task.weight.rows = i == 17 ? 0 : got[i].task.weight.rows; /* an empty one among them */
        want[i] = copy_of(&got[i]);
        tasks[i] = got[i].task;
        CHECK_OK(step_galore(&want[i].task, 1, &params, cpu, &cpu_linalg));
    }
    CHECK_OK(step_galore(tasks, TASKS, &params, &device_of_batches, gpu_linalg));
    for (int i = 0; i < TASKS; i++)
        check_same(&got[i], &want[i], "together", i);
    emulated_release();
}

/* A norm on the device is not for the host to look at; the CPU refuses this one. */
static void test_norm_is_not_read(void) {
    qg_step_params params = some_params();
    params.norm_growth_limit = 1.1;
    sized_task t = galore_task(0, &params);
    const double nothing = NAN;
    size_t size = 0;
    t.task.norm = device(&nothing, sizeof nothing);
    CHECK_OK(qg_galore_scratch_size(&t.task, 1, &params, gpu, &size));
    CHECK(qg_galore_scratch_size(&t.task, 1, &params, cpu, &size) == QG_INVALID_ARGUMENT, "a norm of NaN");
    emulated_release();
}

/* 56 matrices, as a model of 60 million weights has: what starts a kernel is a batch, not a matrix. */
static void test_launches(void) {
    enum { TASKS = 56 };
    qg_step_task tasks[TASKS];
    qg_step_params params = some_params();
    params.gemm_format = QG_FLOAT32;
    for (int i = 0; i < TASKS; i++) {
        const int64_t m = i % 7 == 6 ? 16 : 40, n = i % 7 == 6 ? 40 : 16;
        tasks[i] = (qg_step_task){
            .weight = make_weight(m, n, QG_INT8, BLOCK),
            .moments = make_moments(4, 40, QG_DYNAMIC8, BLOCK),
            .projector = make_projector(4, 16, QG_INT4, BLOCK),
            .side = m >= n ? QG_RIGHT : QG_LEFT,
            .low_rank_gradient = 1,
            .gradient = random_array(QG_FLOAT32, 4 * 40, 1.0),
            .bias_step = 1,
        };
    }
    const int64_t products = blas.calls("cublasGemmEx_64");
    emulator_reset_counts();
    CHECK_OK(step_galore(tasks, TASKS, &params, gpu, gpu_linalg));
    const int64_t launches = emulator_count(NULL).launches;
    CHECK(launches > 0 && launches <= 16, "%lld launches", (long long)launches);
    CHECK(blas.calls("cublasGemmEx_64") == products + TASKS, "%lld products", (long long)blas.calls("cublasGemmEx_64"));
    CHECK(emulator_waits() == 0, "the host has waited %lld times", (long long)emulator_waits());
    emulated_release();
}

/* ---------------------------------------------------------------- adam8 */

static sized_task adam8_task(int c) {
    static const qg_format weights[] = {QG_INT8, QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};
    static const int64_t sizes[][2] = {{1, 1}, {1, 255}, {30, 40}, {1, 4099}, {64, 150}, {1, 16}, {3, 257}};
    const int64_t rows = sizes[c % 7][0], cols = sizes[c % 7][1];
    sized_task t = {.rows = 1, .cols = rows * cols};
    t.task = (qg_step_task){
        .weight = make_weight(rows, cols, weights[c % 4], c % 3 ? BLOCK : 48),
        .moments = make_moments(1, rows * cols, c % 5 == 0 ? QG_FLOAT32 : QG_DYNAMIC8, c % 2 ? BLOCK : 64),
        .grad_format = floats[c % 3],
        .gradient = random_array(floats[c % 3], rows * cols, 1.0),
        .id = (uint32_t)c,
        .noise_step = 5,
        .bias_step = 2,
        .stats = c % 2 ? device((int64_t[2]){1, 2}, 2 * sizeof(int64_t)) : NULL,
        .gradient_absmax = c % 6 == 1   ? flag(NAN)
                           : c % 6 == 2 ? flag(1e18f)
                                        : NULL,
    };
    return t;
}

static qg_status step_adam8(
    qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    const qg_backend *backend) {
    size_t size = 0;
    CHECK_OK(qg_adam8_scratch_size(tasks, count, params, backend, &size));
    void *scratch = emulator_malloc(size, 64, 4);
    const qg_status status = qg_adam8_step(tasks, count, params, scratch, size, backend);
    emulator_free(scratch);
    return status;
}

static void test_adam8(void) {
    enum { TASKS = 35 };
    sized_task got[TASKS], want[TASKS];
    qg_step_task tasks[TASKS];
    const qg_step_params params = some_params();
    for (int i = 0; i < TASKS; i++) {
        got[i] = adam8_task(i);
        if (got[i].task.stats == NULL)
            got[i].task.stats = device((int64_t[2]){1, 2}, 2 * sizeof(int64_t));
        got[i].task.weight.rows = i == 3 || i == TASKS - 1 ? 0 : got[i].task.weight.rows; /* the last is empty, too */
        want[i] = copy_of(&got[i]);
        tasks[i] = got[i].task;
        CHECK_OK(step_adam8(&want[i].task, 1, &params, cpu));
    }
    emulator_reset_counts();
    CHECK_OK(step_adam8(tasks, TASKS, &params, gpu));
    CHECK(emulator_count(NULL).launches <= 16, "%lld launches", (long long)emulator_count(NULL).launches);
    CHECK(emulator_waits() == 0, "the host has waited %lld times", (long long)emulator_waits());
    for (int i = 0; i < TASKS; i++)
        check_same(&got[i], &want[i], "adam8", i);
    emulated_release();
}

/* ---------------------------------------------------------------- refreshes */

typedef struct refresh {
    int64_t rows;
    int64_t cols;
    int64_t rank;
    qg_format grad_format;
    qg_format gemm_format;
    qg_side side;
    int32_t steps;
    double size; /* of the gradient */
} refresh;

static qg_status run_refresh(
    const refresh *r,
    float *basis,
    const void *gradient,
    qg_subspace_report *report,
    const qg_backend *backend,
    const qg_linalg *linalg) {
    const qg_subspace_params params = {sizeof params, r->steps, r->gemm_format};
    size_t size = 0;
    CHECK_OK(qg_subspace_scratch_size(r->rows, r->cols, r->rank, 1, r->gemm_format, backend, linalg, &size));
    void *scratch = emulator_malloc(size, 64, 4);
    *report = (qg_subspace_report){.struct_size = sizeof *report};
    const qg_status status = qg_subspace_refresh(
        basis, r->rank, gradient, r->grad_format, r->rows, r->cols, r->side, &params, report, scratch, size, backend,
        linalg);
    emulator_free(scratch);
    return status;
}

static double distance(const float *a, const float *b, int64_t count) {
    double worst = 0.0;
    for (int64_t i = 0; i < count; i++)
        worst = isfinite(a[i]) ? fmax(worst, fabs((double)a[i] - b[i])) : (double)INFINITY;
    return worst;
}

/* A matrix of falling singular values. */
static void *gradient_of(const refresh *r) {
    float *x = random_array(QG_FLOAT32, r->rows * r->rank, 1.0), *y = random_array(QG_FLOAT32, r->rank * r->cols, 1.0);
    void *g = random_array(r->grad_format, r->rows * r->cols, 0.1 * r->size);
    for (int64_t i = 0; i < r->rows * r->cols && r->size > 0.0; i++) {
        double sum = ref_load(r->grad_format, g, i);
        for (int64_t l = 0; l < r->rank; l++)
            sum += r->size * x[i / r->cols * r->rank + l] * y[l * r->cols + i % r->cols] / (double)(l + 1);
        ref_store(r->grad_format, g, i, (float)sum);
    }
    return g;
}

/* `fetches`: how often the host waits for numbers; each fetch is a copy and a wait for the stream. 0: not counted. */
static void test_refresh(refresh r, int64_t fetches) {
    const int64_t dim = r.side == QG_RIGHT ? r.cols : r.rows, count = r.rank * dim;
    const size_t bytes = (size_t)count * sizeof(float);
    void *gradient = gradient_of(&r);
    float *basis = random_array(QG_FLOAT32, count, 1.0), *want = device(basis, bytes), *before = device(basis, bytes);
    qg_subspace_report report, expected;
    CHECK_OK(run_refresh(&r, want, gradient, &expected, cpu, &cpu_linalg));
    emulator_reset_counts();
    CHECK_OK(run_refresh(&r, basis, gradient, &report, gpu, gpu_linalg));
    const int64_t waits = emulator_waits();
    const double tolerance = r.gemm_format == QG_FLOAT32 ? 2e-4 : 3e-2, off = distance(basis, want, count);
    CHECK(fetches == 0 || waits == 2 * fetches, "%lld waits, want %lld", (long long)waits, (long long)(2 * fetches));
    CHECK(off < tolerance, "%lld x %lld: %g from the CPU's", (long long)r.rows, (long long)r.cols, off);
    CHECK(
        report.kept == expected.kept && report.power_steps == expected.power_steps, "kept %d, %d steps, want %d, %d",
        report.kept, report.power_steps, expected.kept, expected.power_steps);
    CHECK(
        fabs(report.energy_old - expected.energy_old) < 1e-4 && fabs(report.energy_new - expected.energy_new) < 1e-4,
        "energies %g and %g, want %g and %g", report.energy_old, report.energy_new, expected.energy_old,
        expected.energy_new);
    if (report.kept)
        CHECK_BYTES(basis, before, bytes, "a basis that is kept");
    emulated_release();
}

static void test_refreshes(void) {
    for (int i = 0; i < 3; i++) {
        const qg_format format = floats[i];
        test_refresh((refresh){45, 33, 9, format, QG_FLOAT32, QG_RIGHT, 1, 1.0}, 1);
        test_refresh((refresh){33, 45, 9, format, QG_BFLOAT16, QG_LEFT, 2, 1.0}, 1);
    }
    test_refresh((refresh){20, 31, 1, QG_FLOAT32, QG_FLOAT32, QG_LEFT, 0, 1.0}, 0);
    test_refresh((refresh){20, 31, 12, QG_BFLOAT16, QG_FLOAT32, QG_RIGHT, 0, 1.0}, 0);
    test_refresh((refresh){5, 40, 16, QG_FLOAT32, QG_FLOAT32, QG_RIGHT, 1, 1.0}, 0);   /* more vectors than rows */
    test_refresh((refresh){45, 33, 9, QG_FLOAT32, QG_FLOAT32, QG_RIGHT, 1, 1e-20}, 0); /* not usual: a second attempt */
    test_refresh((refresh){45, 33, 9, QG_FLOAT32, QG_FLOAT32, QG_RIGHT, 5, 1.0}, 0);
    test_refresh((refresh){45, 33, 9, QG_FLOAT32, QG_FLOAT32, QG_LEFT, 1, 0.0}, 0);
}

static void test_random_basis(void) {
    enum { RANK = 11, DIM = 50 };
    float *got = device(NULL, RANK * DIM * sizeof(float)), *want = device(NULL, RANK * DIM * sizeof(float));
    size_t size = 0;
    CHECK_OK(qg_subspace_scratch_size(1, DIM, RANK, 1, QG_FLOAT32, gpu, gpu_linalg, &size));
    CHECK_OK(qg_subspace_random(got, RANK, DIM, 3, 4, 5, device(NULL, size), size, gpu, gpu_linalg));
    CHECK_OK(qg_subspace_scratch_size(1, DIM, RANK, 1, QG_FLOAT32, cpu, &cpu_linalg, &size));
    CHECK_OK(qg_subspace_random(want, RANK, DIM, 3, 4, 5, device(NULL, size), size, cpu, &cpu_linalg));
    CHECK(distance(got, want, RANK * DIM) < 1e-5, "%g from the CPU's", distance(got, want, RANK * DIM));
    emulated_release();
}

static double energy_of(const refresh *r, const void *gradient, const float *right, const float *left, int on_gpu) {
    const qg_backend *backend = on_gpu ? gpu : cpu;
    const qg_linalg *linalg = on_gpu ? gpu_linalg : &cpu_linalg;
    size_t size = 0;
    double energy = -1.0;
    CHECK_OK(qg_subspace_scratch_size(r->rows, r->cols, r->rank, 2, r->gemm_format, backend, linalg, &size));
    CHECK_OK(qg_captured_energy(
        &energy, gradient, r->grad_format, r->rows, r->cols, right, right == NULL ? 0 : r->rank, left,
        left == NULL ? 0 : r->rank, r->gemm_format, device(NULL, size), size, backend, linalg));
    return energy;
}

static void test_energy(qg_format gemm_format) {
    const refresh r = {30, 26, 7, QG_BFLOAT16, gemm_format, QG_RIGHT, 0, 1.0};
    void *gradient = gradient_of(&r);
    const float *right = random_array(QG_FLOAT32, r.rank * r.cols, 1.0),
                *left = random_array(QG_FLOAT32, r.rank * r.rows, 1.0);
    for (int sides = 1; sides <= 3; sides++) {
        const float *p = sides & 1 ? right : NULL, *q = sides & 2 ? left : NULL;
        const double got = energy_of(&r, gradient, p, q, 1), want = energy_of(&r, gradient, p, q, 0);
        CHECK(fabs(got - want) < 1e-5 && want > 0.0, "sides %d: energy %g, want %g", sides, got, want);
    }
    emulated_release();
}

/* ---------------------------------------------------------------- what fails */

static void test_failures(void) {
    qg_step_params params = some_params();
    sized_task t = galore_task(0, &params);
    t.task.gradient_absmax = NULL;
    emulator_fail("cudaLaunchKernel", 1, cudaErrorLaunchFailure);
    CHECK(step_galore(&t.task, 1, &params, gpu, gpu_linalg) == QG_CUDA, "a launch that fails");
    CHECK(strstr(qg_last_error(), ": unspecified launch failure (719)") != NULL, "%s", qg_last_error());
    blas.fail("cublasGemmEx_64", 13);
    CHECK(step_galore(&t.task, 1, &params, gpu, gpu_linalg) == QG_CUDA, "a product that fails");
    CHECK(strstr(qg_last_error(), "cuBLAS: cublasGemmEx failed: ") != NULL, "%s", qg_last_error());
    CHECK_OK(step_galore(&t.task, 1, &params, gpu, gpu_linalg));
    const refresh r = {20, 20, 3, QG_FLOAT32, QG_FLOAT32, QG_RIGHT, 1, 1.0};
    float *basis = random_array(QG_FLOAT32, 60, 1.0), *before = device(basis, 60 * sizeof(float));
    void *gradient = gradient_of(&r);
    qg_subspace_report report;
    emulator_fail("cudaStreamSynchronize", 0, cudaErrorIllegalAddress);
    CHECK(run_refresh(&r, basis, gradient, &report, gpu, gpu_linalg) == QG_CUDA, "a wait that fails");
    CHECK(strstr(qg_last_error(), "cudaStreamSynchronize: an illegal memory access") != NULL, "%s", qg_last_error());
    CHECK_BYTES(basis, before, 60 * sizeof(float), "the basis of a refresh that failed");
    emulated_release();
}

/* The size of a refresh is cuSOLVER's to say: without it the query fails, in words. */
static void test_size_without_a_library(void) {
    char *kept = strdup(getenv("Q_GALORE_CUSOLVER"));
    qg_cuda *other = open_device(0, 0);
    size_t size = 0;
    setenv("Q_GALORE_CUSOLVER", "/nowhere/libcusolver.so", 1);
    const qg_status status =
        qg_subspace_scratch_size(8, 8, 2, 1, QG_FLOAT32, qg_cuda_backend(other), qg_cuda_linalg(other), &size);
    CHECK(status == QG_UNSUPPORTED, "a size without cuSOLVER: %d", (int)status);
    CHECK(strstr(qg_last_error(), "Q_GALORE_CUSOLVER: cuSOLVER cannot be opened") != NULL, "%s", qg_last_error());
    setenv("Q_GALORE_CUSOLVER", kept, 1);
    qg_cuda_close(other);
    free(kept);
}

int main(void) {
    random_seed(5);
    blas = standin_cublas();
    standin_cusolver();
    cuda = open_device(0, 0);
    gpu = qg_cuda_backend(cuda);
    gpu_linalg = qg_cuda_linalg(cuda);
    cpu = level(QG_SIMD_SCALAR);
    cpu_linalg = ref_linalg(&context);
    begin(cuda);
    emulator_check_races(1);
    for (int c = 0; c < 48; c++)
        test_galore(c);
    test_galore_together((size_t)64 << 20);
    test_galore_together((size_t)16 << 10);
    test_norm_is_not_read();
    test_launches();
    test_adam8();
    test_refreshes();
    test_random_basis();
    test_energy(QG_FLOAT32);
    test_energy(QG_BFLOAT16);
    test_failures();
    qg_cuda_end(cuda);
    test_size_without_a_library();
    qg_cuda_close(cuda);
    return check_finish();
}
