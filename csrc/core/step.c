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
 *
 * A device that is slow to start takes several matrices at a time (a batch): each kernel is then started once for all of
 * them, tile by tile. The CPU takes one, which stays in its caches.
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
    BATCH = 32,            /* the most matrices at a time */
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
    int limited;        /* by norm_growth_limit */
    int whole;          /* all of N comes before the first weight, not a tile of columns at a time */
    size_t basis;       /* offset: decoded basis, all of it (right) or a piece (left), in the GEMM's format */
    size_t direction;   /* offset: R, then N, a tile's columns or all, in the GEMM's format */
    size_t exact;       /* offset: N in float32, where its norm is limited and GEMMs are bfloat16 */
    size_t inner;       /* offset: P_L G, then N P_R, [rank, n] in the GEMM's format (both sides) */
    size_t tile;        /* offset: the tile of U; before it, the cast tile of G */
    size_t limits;      /* offset: what the limit works with */
    size_t bytes;
} plan;

/* The limit on the growth of ||N||, on the device. */
typedef struct limits {
    double squares;
    float rate;
} limits;

static plan make_plan(const qg_step_task *task, const qg_step_params *params, const qg_backend *backend) {
    const qg_weight *weight = &task->weight;
    const int right = task->side == QG_RIGHT, full = task->side == QG_FULL;
    const int limited = params->norm_growth_limit > 0.0;
    plan p = {
        .rank = task->projector.rank,
        .dim = right ? weight->cols : weight->rows,
        .other = right  ? weight->rows
                 : full ? task->projector.rank
                        : weight->cols,
        .limited = limited,
        .whole = !right || limited,
    };
    const size_t element = qg_float_bytes(params->gemm_format);
    const int64_t group = weight_group(weight);
    const int64_t group_rows = group / gcd(group, weight->cols); /* so many rows end at a group's end */
    const int64_t block_rows = right ? moment_block(&task->moments) : 1;
    const int64_t least = qg_larger(TILE_ROWS, (int64_t)(backend->tile_bytes / element) / weight->cols);
    p.tile_rows = qg_smaller(common_multiple(block_rows, group_rows, least), weight->rows);

    int64_t basis_elements = p.rank * p.dim;
    if (!right) {
        const int64_t slice = p.rank * p.tile_rows;
        const int64_t piece = qg_smaller(p.rank, BASIS_ROWS) * p.dim;
        const int64_t right_piece = full ? qg_smaller(p.rank, RIGHT_ROWS) * weight->cols : 0;
        basis_elements = qg_larger(slice, qg_larger(piece, right_piece));
    }
    p.slice_rows = qg_smaller(basis_elements / weight->cols, p.rank);
    p.slice_cols = qg_smaller(basis_elements / p.rank, weight->cols);
    const int64_t direction_elements = p.rank * (p.whole ? p.other : p.tile_rows);
    const int64_t exact_elements = limited && params->gemm_format != QG_FLOAT32 ? direction_elements : 0;
    /* A cast column of G has to fit the tile's place too. */
    const int64_t tile_elements = qg_larger(p.tile_rows * weight->cols, p.dim);
    p.basis = 0;
    p.direction = p.basis + qg_aligned_size((size_t)basis_elements * element);
    p.exact = p.direction + qg_aligned_size((size_t)direction_elements * element);
    p.inner = p.exact + qg_aligned_size((size_t)exact_elements * sizeof(float));
    p.tile = p.inner + (full ? qg_aligned_size((size_t)(p.rank * weight->cols) * element) : 0);
    p.limits = p.tile + qg_aligned_size((size_t)tile_elements * element);
    p.bytes = p.limits + (limited ? qg_aligned_size(sizeof(limits)) : 0);
    return p;
}

static int is_empty(const qg_step_task *task) {
    return task->weight.rows == 0 || task->weight.cols == 0;
}

/* How many of the tasks make a batch, and its scratch. */
static int64_t next_batch(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    const qg_backend *backend,
    size_t *bytes) {
    int64_t taken = 0;
    *bytes = QG_ALIGNMENT;
    for (; taken < count && taken < BATCH; taken++) {
        const size_t need = is_empty(&tasks[taken]) ? 0 : make_plan(&tasks[taken], params, backend).bytes;
        if (taken > 0 && *bytes + need > backend->batch_bytes) {
            break;
        }
        *bytes += need;
    }
    return taken;
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
    qg_status status = qg_check_tasks(tasks, count, params, 0, backend);
    if (status != QG_SUCCESS) {
        return status;
    }
    const int64_t chunks = backend->chunks(backend->queue);
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!is_empty(&tasks[i])) {
            const int64_t chunk = adam8_chunk(&tasks[i]), elements = tasks[i].weight.rows * tasks[i].weight.cols;
            most = qg_larger(most, chunk * qg_smaller(chunks, elements / chunk + (elements % chunk != 0)));
        }
    }
    *bytes = most == 0 ? 0 : (size_t)most * sizeof(float) + QG_ALIGNMENT;
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
    qg_adam_update_item items[BATCH];
    int64_t filled = 0;
    for (int64_t i = 0; i < count; i++) {
        const qg_step_task *task = &tasks[i];
        if (!is_empty(task)) {
            items[filled++] = (qg_adam_update_item){
                .weight = &task->weight,
                .moments = &task->moments,
                .gradient = task->gradient,
                .grad_format = task->grad_format,
                .adam = adam_coefficients(params, task->bias_step),
                .update = update_coefficients(params),
                .stream = noise_stream(params, task),
                .stats = task->stats,
                .chunk = adam8_chunk(task),
                .gradient_absmax = task->gradient_absmax,
            };
        }
        if (filled == BATCH || (filled > 0 && i + 1 == count)) {
            backend->adam_update(items, filled, qg_aligned(scratch), backend->queue);
            filled = 0;
        }
    }
    return qg_finish(backend, status);
}

/* ---------------------------------------------------------------- galore */

/* What the step of one matrix works with. */
typedef struct job {
    const qg_step_task *task;
    plan plan;
    void *basis;
    void *direction;
    float *exact;
    void *inner;
    void *tile;
    limits *limits;
} job;

typedef struct batch {
    const qg_step_params *params;
    const qg_backend *backend;
    const qg_linalg *linalg;
    qg_format format; /* of GEMMs */
    int64_t count;
    job jobs[BATCH];
} batch;

static int is_right(const job *j) {
    return j->task->side == QG_RIGHT;
}

static int is_full(const job *j) {
    return j->task->side == QG_FULL;
}

/* A matrix in the GEMM's format, its rows contiguous. */
typedef struct operand {
    void *data;
    int64_t row_stride;
} operand;

static qg_status gemm(
    const batch *b,
    int64_t m,
    int64_t n,
    int64_t k,
    const void *a,
    int64_t a_row_stride,
    int64_t a_col_stride,
    const void *second,
    int64_t second_row_stride,
    int64_t second_col_stride,
    void *c,
    int64_t c_row_stride) {
    const qg_status status = b->linalg->gemm(
        b->linalg->context, b->format, 0, m, n, k, a, a_row_stride, a_col_stride, second, second_row_stride,
        second_col_stride, c, c_row_stride);
    return qg_from_linalg("gemm", status);
}

static void cast(const batch *b, const qg_cast_item *items, int64_t count) {
    if (count > 0) {
        b->backend->cast(items, count, b->format, b->backend->queue);
    }
}

static void decode(const batch *b, const qg_decode_item *items, int64_t count) {
    if (count > 0) {
        b->backend->projector_dequantize(items, count, b->format, b->backend->queue);
    }
}

static void decode_one(const batch *b, qg_decode_item item) {
    decode(b, &item, 1);
}

/* Columns first .. first + cols of R or N, in the GEMM's format. */
static operand columns(const batch *b, const job *j, int64_t first, int64_t cols) {
    if (j->plan.whole) {
        return (operand){(void *)qg_float_at(j->direction, b->format, first), j->plan.other};
    }
    return (operand){j->direction, cols};
}

/* Adam on these columns of R, from there or given, to N, there or in float32. */
static qg_adam_item adam_item(const batch *b, const job *j, int64_t first, int64_t cols) {
    const qg_step_task *task = j->task;
    const operand r = columns(b, j, first, cols);
    qg_adam_item item = {
        .moments = &task->moments,
        .moments_cols = j->plan.other,
        .rows = j->plan.rank,
        .first_col = first,
        .cols = cols,
        .gradient = r.data,
        .grad_format = b->format,
        .gradient_row_stride = r.row_stride,
        .normalised = r.data,
        .normalised_format = b->format,
        .normalised_row_stride = r.row_stride,
        .coefficients = adam_coefficients(b->params, task->bias_step),
        .gradient_absmax = task->gradient_absmax,
    };
    if (task->low_rank_gradient) {
        item.gradient = qg_float_at(task->gradient, task->grad_format, first);
        item.grad_format = task->grad_format;
        item.gradient_row_stride = j->plan.other;
    }
    if (j->exact != NULL) {
        item.normalised = j->exact + first;
        item.normalised_format = QG_FLOAT32;
        item.normalised_row_stride = j->plan.other;
    }
    return item;
}

/* ---------------------------------------------------------------- R from G */

/* Rows of G as the GEMM takes them: their own place, or the tile, into which `item` has to be cast first. */
static const void *gradient_rows(const batch *b, const job *j, int64_t row, int64_t rows, qg_cast_item *item) {
    const qg_step_task *task = j->task;
    const int64_t n = task->weight.cols;
    const void *gradient = qg_float_at(task->gradient, task->grad_format, row * n);
    if (task->grad_format == b->format) {
        return gradient;
    }
    *item = (qg_cast_item){j->tile, gradient, task->grad_format, rows, n, n};
    return j->tile;
}

/* R[:, rows] = P G[rows, :]^T, G's rows as above. */
static qg_status project_rows(const batch *b, const job *j, int64_t row, int64_t rows) {
    const int64_t n = j->task->weight.cols;
    qg_cast_item ignored;
    const operand r = columns(b, j, row, rows);
    const void *gradient = gradient_rows(b, j, row, rows, &ignored);
    return gemm(b, j->plan.rank, rows, n, j->basis, n, 1, gradient, 1, n, r.data, r.row_stride);
}

/* All of R, tile by tile. */
static qg_status project_right(const batch *b, const job *j) {
    const int64_t m = j->task->weight.rows;
    qg_status status = QG_SUCCESS;
    for (int64_t row = 0; status == QG_SUCCESS && row < m; row += j->plan.tile_rows) {
        const int64_t rows = qg_smaller(j->plan.tile_rows, m - row);
        qg_cast_item item;
        cast(b, &item, gradient_rows(b, j, row, rows, &item) == j->tile);
        status = project_rows(b, j, row, rows);
    }
    return status;
}

/* out [rank, n] = P G, a piece of the basis at a time; G is cast by tiles of columns where its format differs from the
 * GEMM's. */
static qg_status project_left(const batch *b, const job *j, void *out) {
    const qg_step_task *task = j->task;
    const plan *p = &j->plan;
    const int64_t m = task->weight.rows, n = task->weight.cols;
    const int must_cast = task->grad_format != b->format;
    const int64_t tile_cols = must_cast ? qg_smaller(n, qg_larger(p->tile_rows * n / m, 1)) : n;
    for (int64_t vector = 0; vector < p->rank; vector += BASIS_ROWS) {
        const int64_t vectors = qg_smaller(BASIS_ROWS, p->rank - vector);
        decode_one(b, (qg_decode_item){&task->projector, vector, vectors, 0, m, j->basis});
        for (int64_t col = 0; col < n; col += tile_cols) {
            const int64_t cols = qg_smaller(tile_cols, n - col);
            const void *gradient = qg_float_at(task->gradient, task->grad_format, col);
            int64_t stride = n;
            if (must_cast) {
                const qg_cast_item item = {j->tile, gradient, task->grad_format, m, cols, n};
                cast(b, &item, 1);
                gradient = j->tile;
                stride = cols;
            }
            void *target = (void *)qg_float_at(out, b->format, vector * n + col);
            const qg_status status = gemm(b, vectors, cols, m, j->basis, m, 1, gradient, stride, 1, target, n);
            if (status != QG_SUCCESS) {
                return status;
            }
        }
    }
    return QG_SUCCESS;
}

/* R [rank, rank] = (P_L G) P_R^T, some vectors of P_R at a time. */
static qg_status project_both(const batch *b, const job *j) {
    const plan *p = &j->plan;
    const int64_t n = j->task->weight.cols;
    const operand r = columns(b, j, 0, p->rank);
    qg_status status = project_left(b, j, j->inner);
    for (int64_t vector = 0; status == QG_SUCCESS && vector < p->rank; vector += p->slice_rows) {
        const int64_t vectors = qg_smaller(p->slice_rows, p->rank - vector);
        void *target = (void *)qg_float_at(r.data, b->format, vector);
        decode_one(b, (qg_decode_item){&j->task->right_projector, vector, vectors, 0, n, j->basis});
        status = gemm(b, p->rank, vectors, n, j->inner, n, 1, j->basis, 1, n, target, r.row_stride);
    }
    return status;
}

/* ---------------------------------------------------------------- all of N before the first weight */

/* On the right the whole basis, which then serves all tiles. */
static void decode_right(const batch *b) {
    qg_decode_item items[BATCH];
    int64_t count = 0;
    for (int64_t i = 0; i < b->count; i++) {
        const job *j = &b->jobs[i];
        if (is_right(j)) {
            items[count++] = (qg_decode_item){&j->task->projector, 0, j->plan.rank, 0, j->plan.dim, j->basis};
        }
    }
    decode(b, items, count);
}

static qg_status project_whole(const batch *b) {
    qg_status status = QG_SUCCESS;
    for (int64_t i = 0; status == QG_SUCCESS && i < b->count; i++) {
        const job *j = &b->jobs[i];
        if (j->plan.whole && !j->task->low_rank_gradient) {
            status = is_right(j)  ? project_right(b, j)
                     : is_full(j) ? project_both(b, j)
                                  : project_left(b, j, j->direction);
        }
    }
    return status;
}

static void normalise_whole(const batch *b) {
    qg_adam_item items[BATCH];
    int64_t count = 0;
    for (int64_t i = 0; i < b->count; i++) {
        if (b->jobs[i].plan.whole) {
            items[count++] = adam_item(b, &b->jobs[i], 0, b->jobs[i].plan.other);
        }
    }
    if (count > 0) {
        b->backend->adam(items, count, b->backend->queue);
    }
}

/* Where ||N|| has grown to more than norm_growth_limit times the norm before, a smaller rate shrinks it to that; then N
 * is rounded for bfloat16 GEMMs. */
static void limit_growth(const batch *b) {
    const qg_step_params *params = b->params;
    const qg_backend *backend = b->backend;
    qg_cast_item items[BATCH];
    int64_t count = 0;
    for (int64_t i = 0; i < b->count; i++) {
        const job *j = &b->jobs[i];
        const int64_t rank = j->plan.rank, other = j->plan.other;
        const float *normalised = j->exact != NULL ? j->exact : j->direction;
        if (j->plan.limited) {
            backend->sum_squares(&j->limits->squares, normalised, QG_FLOAT32, rank * other, backend->queue);
            backend->limit_growth(
                &j->limits->rate, j->task->norm, &j->limits->squares, params->norm_growth_limit,
                params->lr * params->scale, j->task->gradient_absmax, backend->queue);
        }
        if (j->exact != NULL) {
            items[count++] = (qg_cast_item){j->direction, j->exact, QG_FLOAT32, rank, other, other};
        }
    }
    cast(b, items, count);
}

/* inner [rank, n] = N P_R, some columns of P_R at a time. */
static qg_status expand_right(const batch *b, const job *j) {
    const plan *p = &j->plan;
    const int64_t n = j->task->weight.cols;
    const operand d = columns(b, j, 0, p->other);
    qg_status status = QG_SUCCESS;
    for (int64_t col = 0; status == QG_SUCCESS && col < n; col += p->slice_cols) {
        const int64_t cols = qg_smaller(p->slice_cols, n - col);
        void *target = (void *)qg_float_at(j->inner, b->format, col);
        decode_one(b, (qg_decode_item){&j->task->right_projector, 0, p->rank, col, cols, j->basis});
        status = gemm(b, p->rank, cols, p->rank, d.data, d.row_stride, 1, j->basis, cols, 1, target, n);
    }
    return status;
}

static qg_status prepare(const batch *b) {
    decode_right(b);
    qg_status status = project_whole(b);
    if (status != QG_SUCCESS) {
        return status;
    }
    normalise_whole(b);
    limit_growth(b);
    for (int64_t i = 0; status == QG_SUCCESS && i < b->count; i++) {
        status = is_full(&b->jobs[i]) ? expand_right(b, &b->jobs[i]) : QG_SUCCESS;
    }
    return status;
}

/* ---------------------------------------------------------------- tile by tile */

/* The rows of a job's tile number `round`; 0 where it has no such tile. */
static int64_t rows_of(const job *j, int64_t round, int64_t *first) {
    *first = round * j->plan.tile_rows;
    return qg_larger(0, qg_smaller(j->plan.tile_rows, j->task->weight.rows - *first));
}

/* N of the tile's columns, where it is not there yet. */
static qg_status normalise_tiles(const batch *b, int64_t round) {
    qg_cast_item casts[BATCH];
    qg_adam_item items[BATCH];
    int64_t first, cast_count = 0, count = 0;
    for (int64_t i = 0; i < b->count; i++) {
        const job *j = &b->jobs[i];
        const int64_t rows = rows_of(j, round, &first);
        if (rows > 0 && !j->plan.whole) {
            items[count++] = adam_item(b, j, first, rows);
            if (!j->task->low_rank_gradient) {
                cast_count += gradient_rows(b, j, first, rows, &casts[cast_count]) == j->tile;
            }
        }
    }
    cast(b, casts, cast_count);
    for (int64_t i = 0; i < b->count; i++) {
        const job *j = &b->jobs[i];
        const int64_t rows = rows_of(j, round, &first);
        if (rows > 0 && !j->plan.whole && !j->task->low_rank_gradient) {
            qg_status status = project_rows(b, j, first, rows);
            if (status != QG_SUCCESS) {
                return status;
            }
        }
    }
    if (count > 0) {
        b->backend->adam(items, count, b->backend->queue);
    }
    return QG_SUCCESS;
}

/* On the left: the basis' columns of the tile. */
static void decode_left(const batch *b, int64_t round) {
    qg_decode_item items[BATCH];
    int64_t first, count = 0;
    for (int64_t i = 0; i < b->count; i++) {
        const job *j = &b->jobs[i];
        const int64_t rows = rows_of(j, round, &first);
        if (rows > 0 && !is_right(j)) {
            items[count++] = (qg_decode_item){&j->task->projector, 0, j->plan.rank, first, rows, j->basis};
        }
    }
    decode(b, items, count);
}

/* tile = U[rows, :] = N[:, rows]^T P (right), P[:, rows]^T N (left) or P_L[:, rows]^T (N P_R) */
static qg_status expand_rows(const batch *b, const job *j, int64_t first, int64_t rows) {
    const int64_t n = j->task->weight.cols, rank = j->plan.rank;
    if (is_right(j)) {
        const operand d = columns(b, j, first, rows);
        return gemm(b, rows, n, rank, d.data, 1, d.row_stride, j->basis, n, 1, j->tile, n);
    }
    const void *right = is_full(j) ? j->inner : j->direction;
    return gemm(b, rows, n, rank, j->basis, 1, rows, right, n, 1, j->tile, n);
}

static qg_update_item update_item(const batch *b, const job *j, int64_t first, int64_t rows) {
    const qg_step_task *task = j->task;
    const int64_t n = task->weight.cols;
    return (qg_update_item){
        .weight = &task->weight,
        .first = first * n,
        .count = rows * n,
        .u = j->tile,
        .u_format = b->format,
        .coefficients = update_coefficients(b->params),
        .rate = j->plan.limited ? &j->limits->rate : NULL,
        .stream = noise_stream(b->params, task),
        .stats = task->stats,
        .gradient_absmax = task->gradient_absmax,
    };
}

/* One tile of each matrix that still has one; *left says whether there was any. */
static qg_status update_tiles(const batch *b, int64_t round, int *left) {
    qg_update_item items[BATCH];
    int64_t first, count = 0;
    qg_status status = normalise_tiles(b, round);
    decode_left(b, round);
    for (int64_t i = 0; status == QG_SUCCESS && i < b->count; i++) {
        const job *j = &b->jobs[i];
        const int64_t rows = rows_of(j, round, &first);
        if (rows > 0) {
            status = expand_rows(b, j, first, rows);
            items[count++] = update_item(b, j, first, rows);
        }
    }
    *left = count > 0;
    if (status == QG_SUCCESS && count > 0) {
        b->backend->update(items, count, b->backend->queue);
    }
    return status;
}

/* ---------------------------------------------------------------- batches */

static job make_job(const batch *b, const qg_step_task *task, char *memory) {
    job j = {.task = task, .plan = make_plan(task, b->params, b->backend)};
    j.basis = memory + j.plan.basis;
    j.direction = memory + j.plan.direction;
    j.exact = j.plan.inner > j.plan.exact ? (float *)(memory + j.plan.exact) : NULL;
    j.inner = memory + j.plan.inner;
    j.tile = memory + j.plan.tile;
    j.limits = (limits *)(memory + j.plan.limits);
    return j;
}

static qg_status run_batch(batch *b, const qg_step_task *tasks, int64_t count, char *memory) {
    b->count = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!is_empty(&tasks[i])) {
            job *j = &b->jobs[b->count++];
            *j = make_job(b, &tasks[i], memory);
            memory += j->plan.bytes;
        }
    }
    qg_status status = prepare(b);
    int left = 1;
    for (int64_t round = 0; status == QG_SUCCESS && left; round++) {
        status = update_tiles(b, round, &left);
    }
    return status;
}

qg_status qg_galore_scratch_size(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    const qg_backend *backend,
    size_t *bytes) {
    if (backend == NULL || bytes == NULL) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "expected a table of kernels and a place for the size, one of them is NULL");
    }
    qg_status status = qg_check_tasks(tasks, count, params, 1, backend);
    if (status != QG_SUCCESS) {
        return status;
    }
    if (params->gemm_format != QG_FLOAT32 && params->gemm_format != QG_BFLOAT16) {
        return qg_fail(QG_UNSUPPORTED, "gemm_format %d: expected FLOAT32 or BFLOAT16", (int)params->gemm_format);
    }
    size_t most = 0, need;
    for (int64_t first = 0; first < count;) {
        first += next_batch(&tasks[first], count - first, params, backend, &need);
        most = need > most ? need : most;
    }
    *bytes = most > QG_ALIGNMENT ? most : 0;
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
    qg_status status = qg_galore_scratch_size(tasks, count, params, backend, &need);
    if (status != QG_SUCCESS || (status = qg_check_scratch(scratch, scratch_size, need)) != QG_SUCCESS) {
        return status;
    }
    if (linalg == NULL || linalg->struct_size != sizeof *linalg || linalg->gemm == NULL) {
        return qg_fail(QG_INVALID_ARGUMENT, "linalg: expected a qg_linalg with struct_size %zu", sizeof *linalg);
    }
    batch b = {.params = params, .backend = backend, .linalg = linalg, .format = params->gemm_format};
    for (int64_t first = 0; status == QG_SUCCESS && first < count;) {
        const int64_t taken = next_batch(&tasks[first], count - first, params, backend, &need);
        status = run_batch(&b, &tasks[first], taken, qg_aligned(scratch));
        first += taken;
    }
    return qg_finish(backend, status);
}
