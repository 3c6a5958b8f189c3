/* step.c - one optimizer step for a list of parameters, written once for every device.
 *
 *   adam8   W <- W (1 - lr wd) - lr N                  N = Adam(G)
 *   galore  W <- W (1 - lr wd) - lr scale U            N = Adam(R), R = P G^T (right) or P G (left), or given
 *                                                      U = N^T P (right) or P^T N (left)
 *           on both sides                              R = (P_L G) P_R^T, U = P_L^T (N P_R)
 *
 * Memory is kept to about one byte a weight at r = min(m, n) / 4 by tiling over rows of W. On the right a tile of W needs
 * only its own columns of R, so R and N exist one tile at a time beside the decoded basis. On the left every tile needs
 * all of N, but only its own columns of P, so the basis is decoded piece by piece. Both sides are the left one with the
 * right basis applied to what comes in and to what goes out, piece by piece too.
 *
 * A limit on the growth of ||N|| needs all of N before the first weight is written: on the right it is kept as a whole.
 */
#include <math.h>
#include <stdint.h>

#include "core/backend.h"
#include "core/check.h"
#include "core/scratch.h"
#include "core/status.h"

enum {
    TILE_ROWS = 256,       /* rows of W updated at a time, before alignment to blocks and groups */
    BASIS_ROWS = 128,      /* basis vectors decoded at a time when projecting on the left */
    RIGHT_ROWS = 32,       /* vectors of the right basis at a time when projecting on both sides: this many or more */
    CHUNK_ELEMENTS = 4096, /* elements of an unprojected weight that one thread handles at a time, before alignment */
};

/* ---------------------------------------------------------------- coefficients */

static qg_adam_coefficients adam_coefficients(const qg_step_params *params, int64_t t) {
    return (qg_adam_coefficients){
        .beta1 = (float)params->beta1,
        .one_minus_beta1 = (float)(1.0 - params->beta1),
        .beta2 = (float)params->beta2,
        .one_minus_beta2 = (float)(1.0 - params->beta2),
        .bias1 = (float)(1.0 / (1.0 - pow(params->beta1, t))),
        .bias2 = (float)(1.0 / sqrt(1.0 - pow(params->beta2, t))),
        .eps = (float)params->eps,
    };
}

static qg_update_coefficients update_coefficients(const qg_step_params *params) {
    return (qg_update_coefficients){
        .keep = (float)(1.0 - params->lr * params->weight_decay),
        .decay = (float)(params->lr * params->weight_decay),
        .rate = (float)(params->lr * params->scale),
        .stochastic = params->stochastic_round,
    };
}

static qg_noise_stream noise_stream(const qg_step_params *params, const qg_step_task *task) {
    return (qg_noise_stream){.seed = params->seed, .step = (uint64_t)task->noise_step, .id = task->id};
}

/* ---------------------------------------------------------------- sizes */

static int64_t gcd(int64_t a, int64_t b) {
    while (b != 0) {
        int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* The smallest multiple of both steps that is at least `least`. */
static int64_t common_multiple(int64_t a, int64_t b, int64_t least) {
    int64_t lcm = a / gcd(a, b) * b;
    return (least + lcm - 1) / lcm * lcm;
}

static int64_t moment_block(const qg_moments *moments) {
    return moments->format == QG_DYNAMIC8 ? moments->block : 1;
}

static int64_t weight_group(const qg_weight *weight) {
    return weight->format == QG_INT8 ? weight->group_size : 1;
}

/* Whole blocks and groups, or the whole weight where that is less. */
static int64_t adam8_chunk(const qg_step_task *task) {
    int64_t chunk = common_multiple(moment_block(&task->moments), weight_group(&task->weight), CHUNK_ELEMENTS);
    return qg_smaller(chunk, task->weight.rows * task->weight.cols);
}

/* Sizes and scratch offsets of one projected step. */
typedef struct plan {
    int64_t rank;
    int64_t dim;        /* length of a basis vector */
    int64_t other;      /* k: columns of R */
    int64_t tile_rows;  /* rows of W at a time */
    int64_t slice_rows; /* vectors of the right basis that fit in the basis' place (both sides) */
    int64_t slice_cols; /* columns of all of them that do */
    int whole;          /* N is kept as a whole, not a tile of columns at a time */
    size_t basis;       /* offset: decoded basis, all of it (right) or a piece (left), in the GEMM's format */
    size_t normalised;  /* offset: N float32, a tile's columns or all */
    size_t rounded;     /* offset: R, then N, a tile's columns (right) or all, in bfloat16; only with bfloat16 GEMMs */
    size_t inner;       /* offset: P_L G, then N P_R, [rank, n] in the GEMM's format (both sides) */
    size_t tile;        /* offset: the tile of U; before it, the cast tile of G */
    size_t bytes;
} plan;

static plan make_plan(const qg_step_task *task, const qg_step_params *params) {
    const qg_weight *weight = &task->weight;
    int right = task->side == QG_RIGHT, full = task->side == QG_FULL;
    plan p = {
        .rank = task->projector.rank,
        .dim = right ? weight->cols : weight->rows,
        .other = right  ? weight->rows
                 : full ? task->projector.rank
                        : weight->cols,
        .whole = !right || params->norm_growth_limit > 0.0,
    };
    int64_t group = weight_group(weight);
    int64_t group_rows = group / gcd(group, weight->cols); /* so many rows end at a group's end */
    int64_t block_rows = right ? moment_block(&task->moments) : 1;
    p.tile_rows = qg_smaller(common_multiple(block_rows, group_rows, TILE_ROWS), weight->rows);

    size_t element = qg_float_bytes(params->gemm_format);
    int64_t basis_elements = p.rank * p.dim;
    if (!right) {
        int64_t slice = p.rank * p.tile_rows;
        int64_t piece = qg_smaller(p.rank, BASIS_ROWS) * p.dim;
        int64_t right_piece = full ? qg_smaller(p.rank, RIGHT_ROWS) * weight->cols : 0;
        basis_elements = qg_larger(slice, qg_larger(piece, right_piece));
    }
    p.slice_rows = qg_smaller(basis_elements / weight->cols, p.rank);
    p.slice_cols = qg_smaller(basis_elements / p.rank, weight->cols);
    int64_t normalised_elements = p.rank * (p.whole ? p.other : p.tile_rows);
    int64_t rounded_elements = p.rank * (right ? p.tile_rows : p.other);
    p.basis = 0;
    p.normalised = p.basis + qg_aligned_size((size_t)basis_elements * element);
    p.rounded = p.normalised + qg_aligned_size((size_t)normalised_elements * 4);
    p.inner = p.rounded + (params->gemm_format == QG_FLOAT32 ? 0 : qg_aligned_size((size_t)rounded_elements * element));
    p.tile = p.inner + (full ? qg_aligned_size((size_t)(p.rank * weight->cols) * element) : 0);
    int64_t tile_elements = p.tile_rows * weight->cols;
    if (tile_elements < p.dim) {
        tile_elements = p.dim; /* one cast column of G */
    }
    p.bytes = p.tile + qg_aligned_size((size_t)tile_elements * element) + QG_ALIGNMENT;
    return p;
}

static int is_empty(const qg_step_task *task) {
    return task->weight.rows == 0 || task->weight.cols == 0;
}

/* ---------------------------------------------------------------- adam8 */

qg_status qg_adam8_scratch_size(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    const qg_backend *backend,
    size_t *bytes) {
    if (backend == NULL || bytes == NULL) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "expected a table of kernels and a place for the size, one of them is NULL");
    }
    qg_status status = qg_check_tasks(tasks, count, params, 0);
    if (status != QG_SUCCESS) {
        return status;
    }
    int64_t chunk = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!is_empty(&tasks[i]) && adam8_chunk(&tasks[i]) > chunk) {
            chunk = adam8_chunk(&tasks[i]);
        }
    }
    *bytes = chunk == 0 ? 0 : (size_t)chunk * (size_t)backend->threads() * 4 + QG_ALIGNMENT;
    return QG_SUCCESS;
}

qg_status qg_adam8_step(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    void *scratch,
    size_t scratch_size,
    const qg_backend *backend) {
    size_t need = 0;
    qg_status status = qg_adam8_scratch_size(tasks, count, params, backend, &need);
    if (status != QG_SUCCESS || (status = qg_check_scratch(scratch, scratch_size, need)) != QG_SUCCESS) {
        return status;
    }
    qg_update_coefficients update = update_coefficients(params);
    for (int64_t i = 0; i < count; i++) {
        const qg_step_task *task = &tasks[i];
        if (is_empty(task)) {
            continue;
        }
        qg_adam_coefficients adam = adam_coefficients(params, task->bias_step);
        qg_noise_stream stream = noise_stream(params, task);
        backend->adam_update(
            &task->weight, &task->moments, task->gradient, task->grad_format, &adam, &update, &stream, task->stats,
            adam8_chunk(task), qg_aligned(scratch));
    }
    return QG_SUCCESS;
}

/* ---------------------------------------------------------------- galore */

/* What one projected step works with. */
typedef struct job {
    const qg_step_task *task;
    const qg_step_params *params;
    const qg_backend *backend;
    const qg_linalg *linalg;
    plan plan;
    qg_format gemm_format;
    qg_adam_coefficients adam;
    qg_update_coefficients update;
    qg_noise_stream stream;
    void *basis;
    float *normalised;
    void *rounded; /* NULL with float32 GEMMs */
    void *inner;
    void *tile;
} job;

/* A matrix in the GEMM's format, its rows contiguous. */
typedef struct operand {
    void *data;
    int64_t row_stride;
} operand;

static qg_status gemm(
    const job *j,
    int64_t m,
    int64_t n,
    int64_t k,
    const void *a,
    int64_t a_row_stride,
    int64_t a_col_stride,
    const void *b,
    int64_t b_row_stride,
    int64_t b_col_stride,
    void *c,
    int64_t c_row_stride) {
    const qg_status status = j->linalg->gemm(
        j->linalg->context, j->gemm_format, 0, m, n, k, a, a_row_stride, a_col_stride, b, b_row_stride, b_col_stride, c,
        c_row_stride);
    return qg_from_linalg("gemm", status);
}

/* Columns first .. first + cols of N in float32. */
static float *normalised_at(const job *j, int64_t first) {
    return j->normalised + (j->plan.whole ? first : 0);
}

static int64_t normalised_stride(const job *j, int64_t cols) {
    return j->plan.whole ? j->plan.other : cols;
}

/* Where these columns of R come out of a GEMM, and those of N go into one: N's own place, or the bfloat16 buffer. */
static operand low_rank_columns(const job *j, int64_t first, int64_t cols) {
    if (j->rounded != NULL) {
        return (operand){j->rounded, cols};
    }
    return (operand){normalised_at(j, first), normalised_stride(j, cols)};
}

/* Adam on these columns of R, from low_rank_columns or given. */
static void normalise(const job *j, int64_t first, int64_t cols) {
    const qg_step_task *task = j->task;
    const operand r = low_rank_columns(j, first, cols);
    const void *gradient = r.data;
    qg_format format = j->gemm_format;
    int64_t stride = r.row_stride;
    if (task->low_rank_gradient) {
        gradient = qg_float_at(task->gradient, task->grad_format, first);
        format = task->grad_format;
        stride = j->plan.other;
    }
    j->backend->adam(
        &task->moments, j->plan.other, j->plan.rank, first, cols, gradient, format, stride, normalised_at(j, first),
        normalised_stride(j, cols), &j->adam);
}

/* These columns of N, rounded for bfloat16 GEMMs. */
static operand direction(const job *j, int64_t first, int64_t cols) {
    const operand n = low_rank_columns(j, first, cols);
    if (j->rounded != NULL) {
        j->backend->cast(
            n.data, QG_BFLOAT16, normalised_at(j, first), QG_FLOAT32, j->plan.rank, cols, normalised_stride(j, cols));
    }
    return n;
}

/* Where ||N|| has grown to more than norm_growth_limit times the norm before, the rate shrinks it to that. */
static void limit_growth(job *j) {
    const qg_step_params *params = j->params;
    double *norm = j->task->norm, most = params->norm_growth_limit * *norm, now;
    j->backend->sum_squares(&now, j->normalised, QG_FLOAT32, j->plan.rank * j->plan.other);
    now = sqrt(now);
    if (*norm > 0.0 && now > most) {
        j->update.rate = (float)(params->lr * params->scale * (most / now));
        now = most;
    }
    *norm = now;
}

static void update_rows(const job *j, int64_t first_row, int64_t rows) {
    const qg_weight *weight = &j->task->weight;
    j->backend->update(
        weight, first_row * weight->cols, rows * weight->cols, j->tile, j->gemm_format, &j->update, &j->stream,
        j->task->stats);
}

/* N[:, rows] from R[:, rows] = P G[rows, :]^T */
static qg_status normalise_rows(const job *j, int64_t row, int64_t rows) {
    const qg_step_task *task = j->task;
    int64_t n = task->weight.cols;
    qg_status status = QG_SUCCESS;
    if (!task->low_rank_gradient) {
        const operand r = low_rank_columns(j, row, rows);
        const void *gradient = qg_float_at(task->gradient, task->grad_format, row * n);
        if (task->grad_format != j->gemm_format) {
            j->backend->cast(j->tile, j->gemm_format, gradient, task->grad_format, rows, n, n);
            gradient = j->tile;
        }
        status = gemm(j, j->plan.rank, rows, n, j->basis, n, 1, gradient, 1, n, r.data, r.row_stride);
    }
    if (status == QG_SUCCESS) {
        normalise(j, row, rows);
    }
    return status;
}

/* W[rows, :] by U[rows, :] = N[:, rows]^T P */
static qg_status apply_rows(const job *j, int64_t row, int64_t rows) {
    int64_t n = j->task->weight.cols;
    const operand d = direction(j, row, rows);
    qg_status status = gemm(j, rows, n, j->plan.rank, d.data, 1, d.row_stride, j->basis, n, 1, j->tile, n);
    if (status == QG_SUCCESS) {
        update_rows(j, row, rows);
    }
    return status;
}

/* Tile by tile; with a limit all of N first. */
static qg_status step_right(job *j) {
    const qg_weight *weight = &j->task->weight;
    int limited = j->params->norm_growth_limit > 0.0;
    qg_status status = QG_SUCCESS;
    j->backend->projector_dequantize(&j->task->projector, 0, j->plan.rank, 0, weight->cols, j->basis, j->gemm_format);
    for (int64_t row = 0; status == QG_SUCCESS && row < weight->rows; row += j->plan.tile_rows) {
        int64_t rows = qg_smaller(j->plan.tile_rows, weight->rows - row);
        status = normalise_rows(j, row, rows);
        if (status == QG_SUCCESS && !limited) {
            status = apply_rows(j, row, rows);
        }
    }
    if (status != QG_SUCCESS || !limited) {
        return status;
    }
    limit_growth(j);
    for (int64_t row = 0; status == QG_SUCCESS && row < weight->rows; row += j->plan.tile_rows) {
        status = apply_rows(j, row, qg_smaller(j->plan.tile_rows, weight->rows - row));
    }
    return status;
}

/* out [rank, n] = P G, a piece of the basis at a time; G is cast by tiles of columns where its format differs from the
 * GEMM's. */
static qg_status project_left(const job *j, void *out) {
    const qg_step_task *task = j->task;
    const plan *p = &j->plan;
    int64_t m = task->weight.rows, n = task->weight.cols;
    int must_cast = task->grad_format != j->gemm_format;
    int64_t tile_cols = must_cast ? qg_smaller(n, p->tile_rows * n / m > 0 ? p->tile_rows * n / m : 1) : n;
    for (int64_t vector = 0; vector < p->rank; vector += BASIS_ROWS) {
        int64_t vectors = qg_smaller(BASIS_ROWS, p->rank - vector);
        j->backend->projector_dequantize(&task->projector, vector, vectors, 0, m, j->basis, j->gemm_format);
        for (int64_t col = 0; col < n; col += tile_cols) {
            int64_t cols = qg_smaller(tile_cols, n - col);
            const void *gradient = qg_float_at(task->gradient, task->grad_format, col);
            int64_t stride = n;
            if (must_cast) {
                j->backend->cast(j->tile, j->gemm_format, gradient, task->grad_format, m, cols, n);
                gradient = j->tile;
                stride = cols;
            }
            void *target = (void *)qg_float_at(out, j->gemm_format, vector * n + col);
            qg_status status = gemm(j, vectors, cols, m, j->basis, m, 1, gradient, stride, 1, target, n);
            if (status != QG_SUCCESS) {
                return status;
            }
        }
    }
    return QG_SUCCESS;
}

/* R [rank, rank] = (P_L G) P_R^T, some vectors of P_R at a time. */
static qg_status project_both(const job *j) {
    const plan *p = &j->plan;
    int64_t n = j->task->weight.cols;
    const operand r = low_rank_columns(j, 0, p->rank);
    qg_status status = project_left(j, j->inner);
    for (int64_t vector = 0; status == QG_SUCCESS && vector < p->rank; vector += p->slice_rows) {
        int64_t vectors = qg_smaller(p->slice_rows, p->rank - vector);
        void *target = (void *)qg_float_at(r.data, j->gemm_format, vector);
        j->backend->projector_dequantize(&j->task->right_projector, vector, vectors, 0, n, j->basis, j->gemm_format);
        status = gemm(j, p->rank, vectors, n, j->inner, n, 1, j->basis, 1, n, target, r.row_stride);
    }
    return status;
}

/* inner [rank, n] = N P_R, some columns of P_R at a time. */
static qg_status expand_right(const job *j, operand d) {
    const plan *p = &j->plan;
    int64_t n = j->task->weight.cols;
    qg_status status = QG_SUCCESS;
    for (int64_t col = 0; status == QG_SUCCESS && col < n; col += p->slice_cols) {
        int64_t cols = qg_smaller(p->slice_cols, n - col);
        void *target = (void *)qg_float_at(j->inner, j->gemm_format, col);
        j->backend->projector_dequantize(&j->task->right_projector, 0, p->rank, col, cols, j->basis, j->gemm_format);
        status = gemm(j, p->rank, cols, p->rank, d.data, d.row_stride, 1, j->basis, cols, 1, target, n);
    }
    return status;
}

/* On the left, or on both sides. */
static qg_status step_left(job *j) {
    const qg_step_task *task = j->task;
    const plan *p = &j->plan;
    int full = task->side == QG_FULL;
    int64_t n = task->weight.cols;
    qg_status status = QG_SUCCESS;
    if (!task->low_rank_gradient) {
        status = full ? project_both(j) : project_left(j, low_rank_columns(j, 0, n).data);
    }
    if (status != QG_SUCCESS) {
        return status;
    }
    normalise(j, 0, p->other);
    if (j->params->norm_growth_limit > 0.0) {
        limit_growth(j);
    }
    operand d = direction(j, 0, p->other);
    if (full) {
        status = expand_right(j, d);
        d = (operand){j->inner, n};
    }
    for (int64_t row = 0; status == QG_SUCCESS && row < task->weight.rows; row += p->tile_rows) {
        int64_t rows = qg_smaller(p->tile_rows, task->weight.rows - row); /* U[rows, :] = P[:, rows]^T (N or N P_R) */
        j->backend->projector_dequantize(&task->projector, 0, p->rank, row, rows, j->basis, j->gemm_format);
        status = gemm(j, rows, n, p->rank, j->basis, 1, rows, d.data, d.row_stride, 1, j->tile, n);
        if (status == QG_SUCCESS) {
            update_rows(j, row, rows);
        }
    }
    return status;
}

qg_status qg_galore_scratch_size(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    size_t *bytes) {
    if (bytes == NULL) {
        return qg_fail(QG_INVALID_ARGUMENT, "expected a place for the size, got NULL");
    }
    qg_status status = qg_check_tasks(tasks, count, params, 1);
    if (status != QG_SUCCESS) {
        return status;
    }
    if (params->gemm_format != QG_FLOAT32 && params->gemm_format != QG_BFLOAT16) {
        return qg_fail(QG_UNSUPPORTED, "gemm_format %d: expected FLOAT32 or BFLOAT16", (int)params->gemm_format);
    }
    *bytes = 0;
    for (int64_t i = 0; i < count; i++) {
        size_t need = is_empty(&tasks[i]) ? 0 : make_plan(&tasks[i], params).bytes;
        *bytes = need > *bytes ? need : *bytes;
    }
    return QG_SUCCESS;
}

qg_status qg_galore_step(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    void *scratch,
    size_t scratch_size,
    const qg_backend *backend,
    const qg_linalg *linalg) {
    size_t need = 0;
    qg_status status = qg_galore_scratch_size(tasks, count, params, &need);
    if (status != QG_SUCCESS || (status = qg_check_scratch(scratch, scratch_size, need)) != QG_SUCCESS) {
        return status;
    }
    if ((status = qg_check_backend(backend)) != QG_SUCCESS) {
        return status;
    }
    if (linalg == NULL || linalg->struct_size != sizeof *linalg || linalg->gemm == NULL) {
        return qg_fail(QG_INVALID_ARGUMENT, "linalg: expected a qg_linalg with struct_size %zu", sizeof *linalg);
    }
    for (int64_t i = 0; status == QG_SUCCESS && i < count; i++) {
        const qg_step_task *task = &tasks[i];
        if (is_empty(task)) {
            continue;
        }
        char *memory = qg_aligned(scratch);
        job j = {
            .task = task,
            .params = params,
            .backend = backend,
            .linalg = linalg,
            .plan = make_plan(task, params),
            .gemm_format = params->gemm_format,
            .adam = adam_coefficients(params, task->bias_step),
            .update = update_coefficients(params),
            .stream = noise_stream(params, task),
        };
        j.basis = memory + j.plan.basis;
        j.normalised = (float *)(memory + j.plan.normalised);
        j.rounded = j.gemm_format == QG_FLOAT32 ? NULL : memory + j.plan.rounded;
        j.inner = memory + j.plan.inner;
        j.tile = memory + j.plan.tile;
        status = task->side == QG_RIGHT ? step_right(&j) : step_left(&j);
    }
    return status;
}
