/* Every refusal of the step functions: its status, a sentence about the argument, and no byte written in any task. */
#include "harness.h"
#include "reference.h"

enum { ROWS = 6, COLS = 10, RANK = 3, COUNT = ROWS * COLS };

/* One valid parameter of each kind; everything a step writes is in here, so that it can be compared as a whole. */
typedef struct memory {
    uint8_t codes[COUNT];
    float scales[COUNT];
    int16_t zeros[COUNT];
    uint8_t exp_avg[COUNT];
    uint8_t exp_avg_sq[COUNT];
    float absmax[2][COUNT];
    int64_t stats[2];
    double norm;
} memory;

static memory first, second;
static uint8_t basis[COUNT], basis_zeros[COUNT];
static uint16_t basis_scales[COUNT];
static float gradient[COUNT];
static _Alignas(64) uint8_t scratch[1 << 20];
static const qg_backend *cpu;
static qg_linalg linalg;
static ref_gemm_context products;

static qg_step_task good_task(memory *m) {
    return (qg_step_task){.weight = {m->codes, m->scales, m->zeros, ROWS, COLS, 16, QG_INT8},
        .moments = {m->exp_avg, m->exp_avg_sq, m->absmax[0], m->absmax[1], 16, QG_DYNAMIC8},
        .projector = {basis, basis_scales, basis_zeros, RANK, COLS, 16, QG_INT8},
        .gradient = gradient,
        .noise_step = 1,
        .bias_step = 1,
        .stats = m->stats,
        .norm = &m->norm};
}

/* The same task, projected on both sides. */
static qg_step_task *both_sides(qg_step_task *task) {
    task->side = QG_FULL;
    task->right_projector = task->projector;
    task->projector.dim = ROWS;
    return task;
}

static qg_step_params good_params(void) {
    return (qg_step_params){sizeof(qg_step_params), 1, 0.1, 0.9, 0.999, 1e-8, 0.1, 1.0, 1, QG_FLOAT32, 0.0};
}

/* Size queries and steps refuse alike; the list's other task, which is valid, is not run either. */
static void refused(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    int galore,
    qg_status want,
    const char *word,
    int line) {
    memory before[2] = {first, second};
    size_t bytes = 12345;
    for (int call = 0; call < 2; call++) {
        qg_cpu_backend((qg_simd)77, NULL); /* another sentence, so that none is left over */
        qg_status got;
        if (galore)
            got = call ? qg_galore_step(tasks, count, params, scratch, sizeof scratch, cpu, &linalg)
                       : qg_galore_scratch_size(tasks, count, params, cpu, &bytes);
        else
            got = call ? qg_adam8_step(tasks, count, params, scratch, sizeof scratch, cpu)
                       : qg_adam8_scratch_size(tasks, count, params, cpu, &bytes);
        CHECK(
            got == want, "line %d: call %d gives %s, not %s", line, call, qg_status_string(got),
            qg_status_string(want));
        CHECK(strstr(qg_last_error(), word) != NULL, "line %d: '%s' is not about '%s'", line, qg_last_error(), word);
    }
    CHECK_BYTES(&first, &before[0], sizeof first, "line %d: the valid task is run", line);
    CHECK_BYTES(&second, &before[1], sizeof second, "line %d: the refused task is run", line);
}

/* The second of two tasks is wrong in one field. */
#define WRONG_TASK(assignment, galore, status, word)                                     \
    do {                                                                                 \
        qg_step_task tasks[2] = {good_task(&first), good_task(&second)}, *t = &tasks[1]; \
        qg_step_params params = good_params(), *p = &params;                             \
        assignment;                                                                      \
        (void)t;                                                                         \
        refused(tasks, 2, p, galore, status, word, __LINE__);                            \
    } while (0)

#define WRONG_PARAMS(assignment, status, word)               \
    do {                                                     \
        qg_step_task task = good_task(&first);               \
        qg_step_params params = good_params(), *p = &params; \
        assignment;                                          \
        refused(&task, 1, p, 0, status, word, __LINE__);     \
        refused(&task, 1, p, 1, status, word, __LINE__);     \
    } while (0)

static void test_good(void) {
    qg_step_task tasks[2] = {good_task(&first), good_task(&second)};
    qg_step_params params = good_params();
    CHECK_OK(qg_adam8_step(tasks, 2, &params, scratch, sizeof scratch, cpu));
    CHECK_OK(qg_galore_step(tasks, 2, &params, scratch, sizeof scratch, cpu, &linalg));
    both_sides(&tasks[0]);
    params.norm_growth_limit = 1.1;
    CHECK_OK(qg_galore_step(tasks, 2, &params, scratch, sizeof scratch, cpu, &linalg));
    CHECK(first.norm > 0.0 && second.norm > 0.0, "norms %g and %g", first.norm, second.norm);
}

static void test_params(void) {
    WRONG_PARAMS(p = NULL, QG_INVALID_ARGUMENT, "params");
    WRONG_PARAMS(p->struct_size = 0, QG_INVALID_ARGUMENT, "struct_size");
    WRONG_PARAMS(p->struct_size += 8, QG_INVALID_ARGUMENT, "struct_size");
    WRONG_PARAMS(p->beta1 = 1.0, QG_INVALID_ARGUMENT, "beta");
    WRONG_PARAMS(p->beta1 = -0.1, QG_INVALID_ARGUMENT, "beta");
    WRONG_PARAMS(p->beta2 = 1.0, QG_INVALID_ARGUMENT, "beta");
    WRONG_PARAMS(p->beta2 = NAN, QG_INVALID_ARGUMENT, "beta");
    WRONG_PARAMS(p->lr = NAN, QG_INVALID_ARGUMENT, "lr");
    WRONG_PARAMS(p->lr = INFINITY, QG_INVALID_ARGUMENT, "lr");
    WRONG_PARAMS(p->scale = INFINITY, QG_INVALID_ARGUMENT, "scale");
    WRONG_PARAMS(p->weight_decay = NAN, QG_INVALID_ARGUMENT, "weight_decay");
    WRONG_PARAMS(p->eps = -1e-8, QG_INVALID_ARGUMENT, "eps");
    WRONG_PARAMS(p->eps = NAN, QG_INVALID_ARGUMENT, "eps");
    WRONG_PARAMS(p->eps = INFINITY, QG_INVALID_ARGUMENT, "eps");
    WRONG_PARAMS(p->norm_growth_limit = -1.0, QG_INVALID_ARGUMENT, "norm_growth_limit");
    WRONG_PARAMS(p->norm_growth_limit = NAN, QG_INVALID_ARGUMENT, "norm_growth_limit");
    WRONG_PARAMS(p->norm_growth_limit = INFINITY, QG_INVALID_ARGUMENT, "norm_growth_limit");
    WRONG_PARAMS(p->lr = 1e300, QG_INVALID_ARGUMENT, "lr"); /* infinite in float32 */
    WRONG_PARAMS(p->weight_decay = 1e300, QG_INVALID_ARGUMENT, "weight_decay");
}

static void test_lists(void) {
    qg_step_task task = good_task(&first);
    qg_step_params params = good_params();
    for (int galore = 0; galore < 2; galore++) {
        refused(&task, -1, &params, galore, QG_INVALID_ARGUMENT, "count", __LINE__);
        refused(NULL, 1, &params, galore, QG_INVALID_ARGUMENT, "tasks", __LINE__);
    }
}

static void test_tasks(void) {
    for (int galore = 0; galore < 2; galore++) {
        WRONG_TASK(t->weight.rows = -1, galore, QG_INVALID_ARGUMENT, "weight 1");
        WRONG_TASK(t->weight.cols = -1, galore, QG_INVALID_ARGUMENT, "weight 1");
        WRONG_TASK(t->weight.rows = INT64_MAX, galore, QG_INVALID_ARGUMENT, "weight 1");
        WRONG_TASK(t->weight.data = NULL, galore, QG_INVALID_ARGUMENT, "weight 1");
        WRONG_TASK(t->weight.scales = NULL, galore, QG_INVALID_ARGUMENT, "scales");
        WRONG_TASK(t->weight.zeros = NULL, galore, QG_INVALID_ARGUMENT, "zeros");
        WRONG_TASK(t->weight.group_size = 0, galore, QG_INVALID_ARGUMENT, "group_size");
        WRONG_TASK(t->weight.format = QG_INT4, galore, QG_UNSUPPORTED, "format 17");
        WRONG_TASK(t->weight.format = (qg_format)99, galore, QG_UNSUPPORTED, "format 99");
        WRONG_TASK(t->moments.exp_avg = NULL, galore, QG_INVALID_ARGUMENT, "exp_avg");
        WRONG_TASK(t->moments.exp_avg_sq = NULL, galore, QG_INVALID_ARGUMENT, "exp_avg_sq");
        WRONG_TASK(t->moments.exp_avg_absmax = NULL, galore, QG_INVALID_ARGUMENT, "absmax");
        WRONG_TASK(t->moments.exp_avg_sq_absmax = NULL, galore, QG_INVALID_ARGUMENT, "absmax");
        WRONG_TASK(t->moments.block = 0, galore, QG_INVALID_ARGUMENT, "block");
        WRONG_TASK(t->moments.format = QG_BFLOAT16, galore, QG_UNSUPPORTED, "format 1");
        WRONG_TASK(t->gradient = NULL, galore, QG_INVALID_ARGUMENT, "gradient 1");
        WRONG_TASK(t->grad_format = QG_INT8, galore, QG_UNSUPPORTED, "format 16");
        WRONG_TASK(t->bias_step = 0, galore, QG_INVALID_ARGUMENT, "bias_step");
        WRONG_TASK(t->noise_step = -1, galore, QG_INVALID_ARGUMENT, "noise_step");
    }
    WRONG_TASK(t->side = (qg_side)3, 1, QG_UNSUPPORTED, "side 3");
    WRONG_TASK(t->projector.rank = 0, 1, QG_INVALID_ARGUMENT, "rank");
    /* R of rank 0 is empty, so its arrays may be NULL: the rank is what is wrong. */
    WRONG_TASK((t->projector.rank = 0, t->moments.exp_avg = NULL), 1, QG_INVALID_ARGUMENT, "rank");
    WRONG_TASK(t->projector.rank = INT64_MAX / 4, 1, QG_INVALID_ARGUMENT, "R");
    WRONG_TASK(t->projector.dim = ROWS, 1, QG_INVALID_ARGUMENT, "length 10");
    WRONG_TASK(t->side = QG_LEFT, 1, QG_INVALID_ARGUMENT, "length 6");
    WRONG_TASK(t->projector.codes = NULL, 1, QG_INVALID_ARGUMENT, "projector 1");
    WRONG_TASK(t->projector.scales = NULL, 1, QG_INVALID_ARGUMENT, "scales");
    WRONG_TASK(t->projector.zeros = NULL, 1, QG_INVALID_ARGUMENT, "zeros");
    WRONG_TASK(t->projector.block = -1, 1, QG_INVALID_ARGUMENT, "block");
    WRONG_TASK(t->projector.format = QG_FLOAT16, 1, QG_UNSUPPORTED, "format 2");
    WRONG_TASK(
        both_sides(t)->projector.dim = COLS, 1, QG_INVALID_ARGUMENT, "projector 1: expected rank >= 1 vectors of");
    WRONG_TASK(both_sides(t)->right_projector.dim = ROWS, 1, QG_INVALID_ARGUMENT, "right_projector 1");
    WRONG_TASK(both_sides(t)->right_projector.rank = RANK - 1, 1, QG_INVALID_ARGUMENT, "3 vectors like the left one");
    WRONG_TASK(both_sides(t)->right_projector.codes = NULL, 1, QG_INVALID_ARGUMENT, "right_projector 1");
    WRONG_TASK(both_sides(t)->right_projector.scales = NULL, 1, QG_INVALID_ARGUMENT, "right_projector 1");
    WRONG_TASK(both_sides(t)->right_projector.format = QG_FLOAT16, 1, QG_UNSUPPORTED, "right_projector 1");
    WRONG_TASK((p->norm_growth_limit = 1.1, t->norm = NULL), 1, QG_INVALID_ARGUMENT, "norm");
    WRONG_TASK((p->norm_growth_limit = 1.1, second.norm = -1.0), 1, QG_INVALID_ARGUMENT, "got -1");
    WRONG_TASK((p->norm_growth_limit = 1.1, second.norm = NAN), 1, QG_INVALID_ARGUMENT, "norm");
    second.norm = 1.0;
    WRONG_TASK(p->gemm_format = QG_FLOAT16, 1, QG_UNSUPPORTED, "gemm_format 2");
}

/* One byte less than asked for, or none; a table that is missing or of another version. */
static void test_scratch_and_tables(void) {
    qg_step_task task = good_task(&first);
    qg_step_params params = good_params();
    memory before = first;
    size_t size = 0;
    CHECK_OK(qg_adam8_scratch_size(&task, 1, &params, cpu, &size));
    CHECK(qg_adam8_step(&task, 1, &params, scratch, size - 1, cpu) == QG_INVALID_ARGUMENT, "adam8: too little scratch");
    CHECK(strstr(qg_last_error(), "scratch") != NULL, "'%s'", qg_last_error());
    CHECK(qg_adam8_step(&task, 1, &params, NULL, size, cpu) == QG_INVALID_ARGUMENT, "adam8: no scratch");
    CHECK_OK(qg_galore_scratch_size(&task, 1, &params, cpu, &size));
    CHECK(
        qg_galore_step(&task, 1, &params, scratch, size - 1, cpu, &linalg) == QG_INVALID_ARGUMENT,
        "too little scratch");
    CHECK(strstr(qg_last_error(), "scratch") != NULL, "'%s'", qg_last_error());
    CHECK(qg_galore_step(&task, 1, &params, NULL, size, cpu, &linalg) == QG_INVALID_ARGUMENT, "no scratch");
    qg_linalg other = linalg;
    CHECK(qg_galore_step(&task, 1, &params, scratch, size, cpu, NULL) == QG_INVALID_ARGUMENT, "linalg NULL");
    CHECK(strstr(qg_last_error(), "linalg") != NULL, "'%s'", qg_last_error());
    other.struct_size++;
    CHECK(qg_galore_step(&task, 1, &params, scratch, size, cpu, &other) == QG_INVALID_ARGUMENT, "another linalg");
    other = linalg;
    other.gemm = NULL;
    CHECK(
        qg_galore_step(&task, 1, &params, scratch, size, cpu, &other) == QG_INVALID_ARGUMENT, "a linalg without gemm");
    static const char *const what[] = {"kernels", "kernels", "kernels", "place", "place"};
    for (int call = 0; call < 5; call++) {
        qg_status got = call == 0   ? qg_adam8_scratch_size(&task, 1, &params, NULL, &size)
                        : call == 1 ? qg_adam8_step(&task, 1, &params, scratch, sizeof scratch, NULL)
                        : call == 2 ? qg_galore_step(&task, 1, &params, scratch, sizeof scratch, NULL, &linalg)
                        : call == 3 ? qg_adam8_scratch_size(&task, 1, &params, cpu, NULL)
                                    : qg_galore_scratch_size(&task, 1, &params, cpu, NULL);
        CHECK(
            got == QG_INVALID_ARGUMENT && strstr(qg_last_error(), what[call]), "call %d: '%s'", call, qg_last_error());
    }
    CHECK_BYTES(&first, &before, sizeof before, "a refused step writes");
}

/* A GEMM that fails stops the step, and its status comes back. */
static void test_failing_gemm(void) {
    qg_step_params params = good_params();
    static const struct {
        qg_side side;
        double limit;
        int64_t fail_at;
    } cases[] = {{QG_RIGHT, 0, 1}, {QG_RIGHT, 0, 2}, {QG_LEFT, 0, 1}, {QG_LEFT, 0, 2}, {QG_RIGHT, 2, 1},
        {QG_RIGHT, 2, 2}, {QG_FULL, 0, 1}, {QG_FULL, 0, 2}, {QG_FULL, 0, 3}, {QG_FULL, 0, 4}};
    for (int c = 0; c < 10; c++) {
        qg_step_task task = good_task(&first);
        if (cases[c].side == QG_FULL)
            both_sides(&task);
        task.side = cases[c].side;
        task.projector.dim = task.side == QG_RIGHT ? COLS : ROWS;
        params.norm_growth_limit = cases[c].limit;
        memory before = first;
        products = (ref_gemm_context){0, cases[c].fail_at};
        qg_galore_step(&task, -1, &params, scratch, sizeof scratch, cpu, &linalg); /* an older sentence */
        CHECK(
            qg_galore_step(&task, 1, &params, scratch, sizeof scratch, cpu, &linalg) == QG_INTERNAL, "case %d goes on",
            c);
        CHECK(strstr(qg_last_error(), "linalg: gemm failed") != NULL, "case %d says '%s'", c, qg_last_error());
        CHECK(products.calls == cases[c].fail_at, "case %d: %lld products", c, (long long)products.calls);
        CHECK_BYTES(first.codes, before.codes, sizeof before.codes, "case %d: the weight is updated", c);
    }
    products = (ref_gemm_context){0, 0};
}

int main(void) {
    random_seed(12);
    cpu = level(QG_SIMD_SCALAR);
    linalg = ref_linalg(&products);
    for (int i = 0; i < COUNT; i++) {
        gradient[i] = (float)random_normal();
        basis_scales[i] = 0x3C00;
        first.scales[i] = second.scales[i] = 0.01f;
        basis[i] = (uint8_t)random_bits();
    }
    test_good();
    test_params();
    test_lists();
    test_tasks();
    test_scratch_and_tables();
    test_failing_gemm();
    return check_finish();
}
