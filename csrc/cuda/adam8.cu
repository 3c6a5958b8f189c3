/* adam8.cu - Adam with 8-bit or float32 moments, alone (projected matrices) and with the weight update.
 *
 *     m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g g;  N = (m bias1) / (sqrt(v) bias2 + eps)
 * DYNAMIC8: a team takes a block of moments, decodes it, steps it in float32 and encodes it with its new absmax; N comes
 * from the moments before they are encoded. A block of at most 256 elements stays in registers, a longer one is gone
 * through twice. float32 moments have no blocks: a team takes 256 elements.
 * adam_update goes on to the weight with N in registers where 256 elements or fewer hold one block and one group; other
 * shapes go through scratch, by slabs: adam, then update.
 * Bytes per element: the gradient read, 4 and 16 / 256 for 8-bit moments in blocks of 256 (two codes read and written)
 * or 16 for float32 ones, and N written (adam, 4 or 2) or the weight read and written (adam_update; INT8 2 and 6 / 256).
 * Numerics: the bits of the CPU.
 */
#include "cuda/kernels.h"
#include "cuda/update.cuh"

/* Slabs of adam_update hold so many chunks: of 4096 elements some 1 MB, which stays in the second-level cache. */
enum { CHUNKS = 64 };

/* Both moments and the coefficients, by value in a kernel's argument. */
struct moments_task {
    void *m;
    void *v;
    float *m_absmax;
    float *v_absmax;
    qg_adam_coefficients c;
    int32_t block;
    qg_format format;
};

/* The dynamic maps, in shared memory. */
struct maps {
    qg_dynamic_map m;
    qg_dynamic_map v;
};

static struct moments_task moments_task_of(const qg_moments *moments, const qg_adam_coefficients *coefficients) {
    struct moments_task task;
    memset(&task, 0, sizeof task);
    task.m = moments->exp_avg;
    task.v = moments->exp_avg_sq;
    task.m_absmax = moments->exp_avg_absmax;
    task.v_absmax = moments->exp_avg_sq_absmax;
    task.c = *coefficients;
    task.block = moments->format == QG_DYNAMIC8 ? moments->block : 1;
    task.format = moments->format;
    return task;
}

/* ---------------------------------------------------------------- a share of 16 elements */

/* float32 moments of elements first .. first + n, and N. */
static __device__ inline void adam_share(
    float normalised[SHARE],
    const struct moments_task *task,
    const float g[SHARE],
    int64_t first,
    int n) {
    UNROLL
    for (int i = 0; i < SHARE; i += 4) {
        float m[4], v[4];
        load_four(m, (const float *)task->m + first + i, n - i);
        load_four(v, (const float *)task->v + first + i, n - i);
        UNROLL
        for (int k = 0; k < 4; k++) {
            m[k] = qg_adam_exp_avg(m[k], g[i + k], &task->c);
            v[k] = qg_adam_exp_avg_sq(v[k], g[i + k], &task->c);
            normalised[i + k] = qg_adam_normalised(m[k], v[k], &task->c);
        }
        store_four((float *)task->m + first + i, m, n - i);
        store_four((float *)task->v + first + i, v, n - i);
    }
}

/* 8-bit moments, first half: m and v from their codes and the gradient. largest collects the bits of the largest
 * magnitudes. */
static __device__ inline void adam8_moments(
    float m[SHARE],
    float v[SHARE],
    int32_t largest[2],
    const struct maps *maps,
    const struct moments_task *task,
    const float absmax[2],
    const float g[SHARE],
    int64_t first,
    int n) {
    uint32_t m_codes[4], v_codes[4];
    load_bytes(m_codes, (const uint8_t *)task->m + first, n);
    load_bytes(v_codes, (const uint8_t *)task->v + first, n);
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        m[i] = absmax[0] * qg_dynamic_signed_value(&maps->m, byte_of(m_codes, i));
        v[i] = absmax[1] * qg_dynamic_unsigned_value(&maps->v, byte_of(v_codes, i));
        m[i] = qg_adam_exp_avg(m[i], g[i], &task->c);
        v[i] = qg_adam_exp_avg_sq(v[i], g[i], &task->c);
        largest[0] = i < n && qg_magnitude(m[i]) > largest[0] ? qg_magnitude(m[i]) : largest[0];
        largest[1] = i < n && qg_magnitude(v[i]) > largest[1] ? qg_magnitude(v[i]) : largest[1];
    }
}

/* Second half: N, and the codes of m and v. largest is that of the whole block. */
static __device__ inline void adam8_finish(
    float normalised[SHARE],
    const struct maps *maps,
    const struct moments_task *task,
    const float m[SHARE],
    const float v[SHARE],
    const int32_t largest[2],
    int64_t first,
    int n) {
    const qg_dynamic_scale m_scale = qg_make_dynamic_scale(qg_float((uint32_t)largest[0]));
    const qg_dynamic_scale v_scale = qg_make_dynamic_scale(qg_float((uint32_t)largest[1]));
    uint32_t m_codes[4] = {0}, v_codes[4] = {0};
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        const uint8_t m_code = qg_dynamic_signed_code(&maps->m, qg_dynamic_unit(m[i], m_scale));
        const uint8_t v_code = qg_dynamic_unsigned_code(&maps->v, qg_dynamic_unit(v[i], v_scale));
        set_byte(m_codes, i, qg_dynamic_keep_sign(m_code, m[i]));
        set_byte(v_codes, i, qg_dynamic_keep_positive(v_code, v[i]));
        normalised[i] = qg_adam_normalised(m[i], v[i], &task->c);
    }
    store_bytes((uint8_t *)task->m + first, m_codes, n);
    store_bytes((uint8_t *)task->v + first, v_codes, n);
}

/* The largest of the whole block, known to all of its team. */
static __device__ inline void team_maxima(int32_t largest[2]) {
    largest[0] = team_largest(largest[0]);
    largest[1] = team_largest(largest[1]);
}

static __device__ inline void set_absmax(const struct moments_task *task, int64_t block, const int32_t largest[2]) {
    if (team_rank() == 0) {
        task->m_absmax[block] = qg_float((uint32_t)largest[0]);
        task->v_absmax[block] = qg_float((uint32_t)largest[1]);
    }
}

/* ---------------------------------------------------------------- Adam alone */

struct adam_item {
    struct moments_task moments;
    const void *gradient;
    void *normalised;
    const float *gradient_absmax;
    int64_t moments_cols;
    int64_t moments_blocks; /* of a row */
    int64_t first_col;
    int64_t cols;
    int64_t row_units; /* blocks or pieces of a tile's row */
    int64_t gradient_row_stride;
    int64_t normalised_row_stride;
    qg_format grad_format;
    qg_format normalised_format;
};

enum { ADAM_ITEMS = (LIST_BYTES - sizeof(int64_t)) / (sizeof(struct adam_item) + sizeof(int64_t)) };

struct adam_list {
    int64_t units;
    int64_t end[ADAM_ITEMS];
    struct adam_item item[ADAM_ITEMS];
};

/* Columns first_col + col .. + n of a row: one block. */
static __device__ inline void adam8_block(
    const struct adam_item *item,
    const struct maps *maps,
    int64_t row,
    int64_t col,
    uint32_t n) {
    const struct moments_task *task = &item->moments;
    const int64_t block = row * item->moments_blocks + quotient(item->first_col + col, task->block);
    const float absmax[2] = {task->m_absmax[block], task->v_absmax[block]};
    int32_t largest[2] = {0, 0};
    for (int pass = n > PIECE ? 0 : 1; pass < 2; pass++) {
        for (uint32_t p = 0; p < n; p += PIECE) {
            const uint32_t i = p + (uint32_t)team_rank() * SHARE;
            const int64_t at = col + i, first = row * item->moments_cols + item->first_col + at;
            const int share = share_of((int64_t)n - i);
            float g[SHARE], m[SHARE], v[SHARE];
            load_floats(g, item->gradient, item->grad_format, row * item->gradient_row_stride + at, share);
            adam8_moments(m, v, largest, maps, task, absmax, g, first, share);
            if (pass == 1) {
                team_maxima(largest);
                adam8_finish(g, maps, task, m, v, largest, first, share);
                const int64_t to = row * item->normalised_row_stride + at;
                store_floats(item->normalised, item->normalised_format, to, g, share);
            }
        }
    }
    set_absmax(task, block, largest);
}

/* The same columns, at most a piece of them, with float32 moments. */
static __device__ inline void adam_piece(const struct adam_item *item, int64_t row, int64_t col) {
    const int64_t i = col + team_rank() * SHARE;
    const int share = share_of(item->cols - i);
    float g[SHARE];
    load_floats(g, item->gradient, item->grad_format, row * item->gradient_row_stride + i, share);
    adam_share(g, &item->moments, g, row * item->moments_cols + item->first_col + i, share);
    store_floats(item->normalised, item->normalised_format, row * item->normalised_row_stride + i, g, share);
}

/* Two blocks on a multiprocessor: m, v and N of 16 elements and what encodes them do not fit in 80 registers. */
static __global__ void __launch_bounds__(THREADS, 2) adam_kernel(struct adam_list list) {
    __shared__ struct maps maps;
    copy_map(&maps.m, &qg_dynamic_signed);
    copy_map(&maps.v, &qg_dynamic_unsigned);
    int i = 0;
    for (int64_t unit = first_unit(); unit < list.units; unit += unit_stride()) {
        i = later_item(list.end, i, unit);
        const struct adam_item *item = &list.item[i];
        if (!gradient_is_good(item->gradient_absmax)) {
            continue;
        }
        const int64_t k = unit_of_item(list.end, i, unit), row = quotient(k, item->row_units);
        if (item->moments.format == QG_DYNAMIC8) {
            const int64_t col = (k - row * item->row_units) * item->moments.block;
            adam8_block(item, &maps, row, col, (uint32_t)smaller(item->moments.block, item->cols - col));
        } else {
            adam_piece(item, row, (k - row * item->row_units) * PIECE);
        }
    }
}

static struct adam_item adam_item_of(const qg_adam_item *from) {
    struct adam_item item;
    memset(&item, 0, sizeof item);
    item.moments = moments_task_of(from->moments, &from->coefficients);
    item.gradient = from->gradient;
    item.normalised = from->normalised;
    item.gradient_absmax = from->gradient_absmax;
    item.moments_cols = from->moments_cols;
    item.moments_blocks = pieces(from->moments_cols, item.moments.block);
    item.first_col = from->first_col;
    item.cols = from->cols;
    item.row_units = pieces(from->cols, from->moments->format == QG_DYNAMIC8 ? item.moments.block : PIECE);
    item.gradient_row_stride = from->gradient_row_stride;
    item.normalised_row_stride = from->normalised_row_stride;
    item.grad_format = from->grad_format;
    item.normalised_format = from->normalised_format;
    return item;
}

extern "C" void qg_cuda_adam(const qg_adam_item *items, int64_t count, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    for (int64_t i = 0; i < count; i += ADAM_ITEMS) {
        struct adam_list list;
        list.units = 0;
        for (int k = 0; k < ADAM_ITEMS && i + k < count; k++) {
            list.item[k] = adam_item_of(&items[i + k]);
            list.units += items[i + k].rows * list.item[k].row_units;
            list.end[k] = list.units;
        }
        if (list.units > 0) {
            QG_LAUNCH(cuda, adam_kernel, qg_cuda_grid(cuda, list.units, TEAMS), THREADS, list);
        }
    }
}

/* ---------------------------------------------------------------- Adam and update in one pass */

struct adam_update_item {
    struct weight_task weight;
    struct moments_task moments;
    const void *gradient;
    const float *gradient_absmax;
    int64_t count;
    qg_format grad_format;
    int32_t unit; /* elements of a team: at most one block, one group, a piece */
};

enum { ADAM_UPDATE_ITEMS = (LIST_BYTES - sizeof(int64_t)) / (sizeof(struct adam_update_item) + sizeof(int64_t)) };

struct adam_update_list {
    int64_t units;
    int64_t end[ADAM_UPDATE_ITEMS];
    struct adam_update_item item[ADAM_UPDATE_ITEMS];
};

/* One group with u in registers. kept: shared memory for a piece, where a group that gets a new range finds u. */
static __device__ inline void int8_update_share(
    const struct weight_task *task,
    const float u[SHARE],
    float *kept,
    int64_t index,
    int64_t n) {
    const struct group_task group = group_task_of(task, index, (uint32_t)n);
    const int64_t first = group.first + team_rank() * SHARE;
    const int share = share_of(n - team_rank() * SHARE);
    struct extremes extremes = no_extremes();
    uint32_t codes[4], next[4];
    load_bytes(codes, (const uint8_t *)task->data + first, share);
    int8_move(next, &extremes, task, &group, codes, u, first, share);
    const struct verdict verdict = int8_decide(&extremes, group.range);
    if (verdict.untouched) {
        return;
    }
    if (verdict.reranged) {
        UNROLL
        for (int i = 0; i < SHARE; i++) {
            kept[team_rank() * SHARE + i] = u[i];
        }
        __syncwarp(team_mask());
        int8_rerange(task, &group, kept, QG_FLOAT32, 0);
        __syncwarp(team_mask()); /* `kept` is the next group's from here on */
        return;
    }
    int8_store(task, next, verdict.shift, first, share);
    int8_shift(task, &group, verdict.shift);
}

/* Elements begin .. begin + n of the flat weight, n <= PIECE. */
static __device__ inline void adam_update_piece(
    const struct adam_update_item *item,
    const struct maps *maps,
    float *kept,
    int64_t unit,
    int64_t begin,
    int64_t n) {
    const struct moments_task *task = &item->moments;
    const int64_t first = begin + team_rank() * SHARE;
    const int share = share_of(n - team_rank() * SHARE);
    float g[SHARE];
    load_floats(g, item->gradient, item->grad_format, first, share);
    if (task->format == QG_DYNAMIC8) {
        const float absmax[2] = {task->m_absmax[unit], task->v_absmax[unit]};
        int32_t largest[2] = {0, 0};
        float m[SHARE], v[SHARE];
        adam8_moments(m, v, largest, maps, task, absmax, g, first, share);
        team_maxima(largest);
        adam8_finish(g, maps, task, m, v, largest, first, share);
        set_absmax(task, unit, largest);
    } else {
        adam_share(g, task, g, first, share);
    }
    if (item->weight.format == QG_INT8) {
        int8_update_share(&item->weight, g, kept, unit, n);
    } else {
        float_update(&item->weight, first, share, g);
    }
}

static __global__ void __launch_bounds__(THREADS, 2) adam_update_kernel(struct adam_update_list list) {
    __shared__ struct maps maps;
    __shared__ float kept[TEAMS][PIECE];
    copy_map(&maps.m, &qg_dynamic_signed);
    copy_map(&maps.v, &qg_dynamic_unsigned);
    int i = 0;
    for (int64_t unit = first_unit(); unit < list.units; unit += unit_stride()) {
        i = later_item(list.end, i, unit);
        const struct adam_update_item *item = &list.item[i];
        if (!gradient_is_good(item->gradient_absmax)) {
            continue;
        }
        const int64_t k = unit_of_item(list.end, i, unit), begin = k * item->unit;
        adam_update_piece(item, &maps, kept[threadIdx.x / TEAM], k, begin, smaller(item->unit, item->count - begin));
    }
}

/* How many elements a team takes through Adam and the update at once, 0 where they have to go through scratch. */
static int32_t fused_unit(const qg_adam_update_item *item) {
    const int64_t count = item->weight->rows * item->weight->cols;
    const int64_t none = smaller(PIECE, count); /* float32 moments and float weights can be cut anywhere */
    const int64_t block = item->moments->format == QG_DYNAMIC8 ? smaller(item->moments->block, count) : none;
    const int64_t group = item->weight->format == QG_INT8 ? smaller(item->weight->group_size, count) : none;
    const int64_t unit = item->moments->format != QG_DYNAMIC8 ? group : block;
    const int fits = unit <= PIECE && (item->weight->format != QG_INT8 || unit == group);
    return fits ? (int32_t)unit : 0;
}

static struct adam_update_item adam_update_item_of(const qg_adam_update_item *from, int32_t unit) {
    struct adam_update_item item;
    memset(&item, 0, sizeof item);
    item.weight = weight_task_of(from->weight, &from->update, &from->stream, 0, NULL, from->stats);
    item.moments = moments_task_of(from->moments, &from->adam);
    item.gradient = from->gradient;
    item.gradient_absmax = from->gradient_absmax;
    item.count = from->weight->rows * from->weight->cols;
    item.grad_format = from->grad_format;
    item.unit = unit;
    return item;
}

/* A weight whose blocks and groups do not go together: N of a slab goes to scratch and comes from there. */
static void adam_update_slabs(const qg_adam_update_item *item, float *scratch, qg_cuda *cuda) {
    const int64_t count = item->weight->rows * item->weight->cols, slab = CHUNKS * item->chunk;
    for (int64_t first = 0; first < count; first += slab) {
        const int64_t n = smaller(slab, count - first);
        qg_adam_item adam;
        memset(&adam, 0, sizeof adam);
        adam.moments = item->moments;
        adam.moments_cols = count;
        adam.rows = 1;
        adam.first_col = first;
        adam.cols = n;
        adam.gradient = (const char *)item->gradient + first * format_size(item->grad_format);
        adam.grad_format = item->grad_format;
        adam.gradient_row_stride = n;
        adam.normalised = scratch;
        adam.normalised_format = QG_FLOAT32;
        adam.normalised_row_stride = n;
        adam.coefficients = item->adam;
        adam.gradient_absmax = item->gradient_absmax;
        qg_cuda_adam(&adam, 1, cuda);

        qg_update_item update;
        memset(&update, 0, sizeof update);
        update.weight = item->weight;
        update.first = first;
        update.count = n;
        update.u = scratch;
        update.u_format = QG_FLOAT32;
        update.coefficients = item->update;
        update.stream = item->stream;
        update.stats = item->stats;
        update.gradient_absmax = item->gradient_absmax;
        qg_cuda_update(&update, 1, cuda);
    }
}

extern "C" int64_t qg_cuda_chunks(void *queue) {
    (void)queue;
    return CHUNKS;
}

extern "C" void qg_cuda_adam_update(const qg_adam_update_item *items, int64_t count, float *scratch, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    for (int64_t i = 0; i < count;) {
        struct adam_update_list list;
        list.units = 0;
        for (int k = 0; i < count && k < ADAM_UPDATE_ITEMS; i++) {
            const int32_t unit = fused_unit(&items[i]);
            if (unit > 0) {
                list.item[k] = adam_update_item_of(&items[i], unit);
                list.units += pieces(list.item[k].count, unit);
                list.end[k++] = list.units;
            } else {
                adam_update_slabs(&items[i], scratch, cuda);
            }
        }
        if (list.units > 0) {
            QG_LAUNCH(cuda, adam_update_kernel, qg_cuda_grid(cuda, list.units, TEAMS), THREADS, list);
        }
    }
}
