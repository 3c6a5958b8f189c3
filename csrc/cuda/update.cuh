/* update.cuh - the weight update of one thread's 16 elements, for the kernels that have u in registers.
 *
 *     float32, float16:  w = w keep - rate u, rounded to nearest
 *     bfloat16:          the same in float32, then rounded to nearest or stochastically
 *     INT8:              q' = q + d rounded, d = -(decay (q - z)) - (rate / s) u; a team decides for a whole group what
 *                        becomes of its scale and zero (core/affine.h)
 * Noise belongs to the element's index in the weight, so bits do not depend on how the work is dealt out.
 */
#ifndef QG_CUDA_UPDATE_CUH
#define QG_CUDA_UPDATE_CUH

#include "cuda/device.cuh"

#include "core/affine.h"

/* A weight and its coefficients, by value in a kernel's argument. */
struct weight_task {
    void *data;
    float *scales;
    int16_t *zeros;
    int64_t *stats;
    const float *rate;
    qg_update_coefficients c;
    qg_noise_stream stream;
    qg_noise_key key; /* of the first element */
    int32_t group;
    qg_format format;
};

static inline struct weight_task weight_task_of(
    const qg_weight *weight,
    const qg_update_coefficients *coefficients,
    const qg_noise_stream *stream,
    int64_t first,
    const float *rate,
    int64_t *stats) {
    struct weight_task task;
    memset(&task, 0, sizeof task);
    task.data = weight->data;
    task.scales = weight->scales;
    task.zeros = weight->zeros;
    task.stats = stats;
    task.rate = rate;
    task.c = *coefficients;
    task.stream = *stream;
    task.key = qg_make_noise_key(stream, (uint32_t)((uint64_t)first >> 32));
    task.group = weight->format == QG_INT8 ? weight->group_size : 1;
    task.format = weight->format;
    return task;
}

static __device__ inline float rate_of(const struct weight_task *task) {
    return task->rate != NULL ? *task->rate : task->c.rate;
}

/* The noise key of an element; it changes every 2^32. */
static __device__ inline qg_noise_key key_of(const struct weight_task *task, int64_t element) {
    const uint32_t high = (uint32_t)((uint64_t)element >> 32);
    return task->key.element_high == high ? task->key : qg_make_noise_key(&task->stream, high);
}

/* The noise of one of 16 elements from `first`: past a multiple of 2^32 the key is that of the `last` one. */
static __device__ inline int32_t noise_of(const qg_noise_key *key, const qg_noise_key *last, int64_t first, int i) {
    const uint32_t low = (uint32_t)first + (uint32_t)i;
    const int behind = low < (uint32_t)first;
    qg_noise_key own = *key;
    own.k[0] = behind ? last->k[0] : key->k[0];
    own.k[1] = behind ? last->k[1] : key->k[1];
    own.k[2] = behind ? last->k[2] : key->k[2];
    return qg_noise_element(&own, low);
}

/* Shares that are whole and have one key take no notice of bounds: they are nearly all, and their elements are worked on
 * side by side. */
static __device__ inline int is_plain(int64_t first, int n) {
    return n == SHARE && (uint32_t)first <= UINT32_MAX - (SHARE - 1);
}

/* ---------------------------------------------------------------- float weights */

static __device__ inline void bfloat16_round(
    uint32_t halves[8],
    const float x[SHARE],
    const struct weight_task *task,
    int64_t first,
    int n) {
    if (is_plain(first, n)) {
        const qg_noise_key key = key_of(task, first);
        UNROLL
        for (int i = 0; i < SHARE; i++) {
            set_half(halves, i, qg_to_bfloat16_stochastic(x[i], qg_noise_element(&key, (uint32_t)first + (uint32_t)i)));
        }
        return;
    }
    const qg_noise_key key = key_of(task, first), last = key_of(task, first + SHARE - 1);
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        if (i < n) {
            set_half(halves, i, qg_to_bfloat16_stochastic(x[i], noise_of(&key, &last, first, i)));
        }
    }
}

/* Elements first .. first + n of a float weight. */
static __device__ inline void float_update(const struct weight_task *task, int64_t first, int n, const float u[SHARE]) {
    qg_update_coefficients c = task->c;
    c.rate = rate_of(task);
    float x[SHARE];
    load_floats(x, task->data, task->format, first, n);
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        x[i] = qg_updated_weight(x[i], u[i], &c);
    }
    if (task->format == QG_BFLOAT16 && c.stochastic) {
        uint32_t halves[8] = {0};
        bfloat16_round(halves, x, task, first, n);
        store_halves((uint16_t *)task->data + first, halves, n);
    } else {
        store_floats(task->data, task->format, first, x, n);
    }
}

/* ---------------------------------------------------------------- INT8 weights */

/* A group under update. */
struct group_task {
    int64_t group;
    int64_t first; /* element */
    uint32_t n;
    qg_affine range;
    float step; /* rate / scale */
};

/* What a whole group decides from: the extremes of x = q + d (as qg_order) and of q', and whether some d is not 0. */
struct extremes {
    int32_t x_low, x_high;
    int32_t q_low, q_high;
    int32_t moved;
};

/* What becomes of the group: nothing, all codes and the zero move by `shift`, or a new range. */
struct verdict {
    int untouched;
    int reranged;
    int32_t shift;
};

static __device__ inline struct group_task group_task_of(const struct weight_task *task, int64_t group, uint32_t n) {
    struct group_task g;
    g.group = group;
    g.first = group * task->group;
    g.n = n;
    g.range.scale = task->scales[group];
    g.range.zero = task->zeros[group];
    g.step = rate_of(task) / g.range.scale;
    return g;
}

static __device__ inline struct extremes no_extremes(void) {
    const struct extremes none = {qg_order(INFINITY), qg_order(-INFINITY), INT32_MAX, INT32_MIN, 0};
    return none;
}

/* Sets byte i of next to q' modulo 256, and takes its part of the extremes. Modulo, because a shift that is added later
 * is taken modulo 256 too. */
static __device__ inline void int8_move_element(
    uint32_t next[4],
    struct extremes *e,
    int i,
    uint8_t code,
    float u,
    int32_t noise,
    const struct group_task *group,
    float decay,
    int stochastic) {
    const float d = qg_int8_distance(code, group->range.zero, u, decay, group->step);
    const int32_t move = stochastic ? qg_int8_move_stochastic(d, noise) : qg_int8_move_nearest(d);
    const int32_t x = qg_order((float)code + d), q = code + move;
    e->x_low = x < e->x_low ? x : e->x_low;
    e->x_high = x > e->x_high ? x : e->x_high;
    e->q_low = q < e->q_low ? q : e->q_low;
    e->q_high = q > e->q_high ? q : e->q_high;
    e->moved |= qg_magnitude(d);
    set_byte(next, i, (uint8_t)q);
}

/* next = q' modulo 256 of elements first .. first + n, and their part of the extremes. */
static __device__ inline void int8_move(
    uint32_t next[4],
    struct extremes *extremes,
    const struct weight_task *task,
    const struct group_task *group,
    const uint32_t codes[4],
    const float u[SHARE],
    int64_t first,
    int n) {
    const int stochastic = task->c.stochastic;
    const float decay = task->c.decay;
    struct extremes e = *extremes;
    next[0] = next[1] = next[2] = next[3] = 0;
    if (stochastic && is_plain(first, n)) {
        const qg_noise_key key = key_of(task, first);
        UNROLL
        for (int i = 0; i < SHARE; i++) {
            const int32_t noise = qg_noise_element(&key, (uint32_t)first + (uint32_t)i);
            int8_move_element(next, &e, i, byte_of(codes, i), u[i], noise, group, decay, 1);
        }
        *extremes = e;
        return;
    }
    const qg_noise_key key = key_of(task, first), last = key_of(task, first + SHARE - 1);
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        if (i < n) {
            const int32_t noise = noise_of(&key, &last, first, i);
            int8_move_element(next, &e, i, byte_of(codes, i), u[i], noise, group, decay, stochastic);
        }
    }
    *extremes = e;
}

/* Whether a group whose x = q + d lie in low .. high keeps its scale: the range's is at least half of it. The range is
 * (high - low) / 247 old steps or more, so from 125 steps on there is nothing to compute: few GPUs are quick in double. */
static __device__ inline int int8_keeps_scale(float low, float high, qg_affine range) {
    if (high - low >= 125) {
        return 1;
    }
    const double s = (double)range.scale;
    return !(qg_int8_range(s * ((double)low - range.zero), s * ((double)high - range.zero)).scale < range.scale * 0.5f);
}

/* All threads of the team decide the same. */
static __device__ inline struct verdict int8_decide(const struct extremes *extremes, qg_affine range) {
    const int32_t x_low = team_smallest(extremes->x_low), x_high = team_largest(extremes->x_high);
    const int32_t q_low = team_smallest(extremes->q_low), q_high = team_largest(extremes->q_high);
    const int keep = int8_keeps_scale(qg_from_order(x_low), qg_from_order(x_high), range);
    const int fits = q_low >= 0 && q_high <= 255;
    struct verdict verdict;
    verdict.untouched = team_largest(extremes->moved) == 0;
    verdict.shift = fits ? 0 : (int32_t)qg_round_double(127.5 - ((double)q_high + q_low) / 2);
    const int32_t zero = range.zero + verdict.shift;
    verdict.reranged = !verdict.untouched && (!keep || q_high - q_low > 255 || zero > 32767 || zero < -32767);
    return verdict;
}

/* The codes of elements first .. first + n, moved by the group's shift. */
static __device__ inline void int8_store(
    const struct weight_task *task,
    const uint32_t next[4],
    int32_t shift,
    int64_t first,
    int n) {
    uint32_t codes[4] = {0};
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        set_byte(codes, i, (uint8_t)(byte_of(next, i) + shift));
    }
    store_bytes((uint8_t *)task->data + first, codes, n);
}

/* The group's new zero, and its entry in the statistics: 0 shifted, 1 re-ranged. By one thread of the team. */
static __device__ inline void int8_count(const struct weight_task *task, int entry) {
    if (task->stats != NULL) {
        atomicAdd((unsigned long long *)&task->stats[entry], 1ull);
    }
}

static __device__ inline void int8_shift(
    const struct weight_task *task,
    const struct group_task *group,
    int32_t shift) {
    if (shift != 0 && team_rank() == 0) {
        task->zeros[group->group] = (int16_t)(group->range.zero + shift);
        int8_count(task, 0);
    }
}

/* ---------------------------------------------------------------- a new range */

static __device__ inline double team_smallest_double(double x) {
    UNROLL
    for (int distance = TEAM / 2; distance > 0; distance /= 2) {
        const double other = __shfl_xor_sync(team_mask(), x, distance);
        x = other < x ? other : x;
    }
    return x;
}

static __device__ inline double int8_target(
    const struct weight_task *task,
    const struct group_task *group,
    uint8_t code,
    float u) {
    return (double)code + (double)qg_int8_distance(code, group->range.zero, u, task->c.decay, group->step);
}

/* A group that does not fit its range any more gets a new one, and is rounded once, from x = q + d in double. u[i]
 * belongs to element group->first + i. Rare: element by element. */
static __device__ inline void int8_rerange(
    const struct weight_task *task,
    const struct group_task *group,
    const void *u,
    qg_format u_format,
    int64_t u_first) {
    uint8_t *codes = (uint8_t *)task->data + group->first;
    double low = 0x1p1000, high = -0x1p1000;
    for (uint32_t i = (uint32_t)team_rank(); i < group->n; i += TEAM) {
        const double x = int8_target(task, group, codes[i], load_float(u, u_format, u_first + i));
        low = x < low ? x : low;
        high = x > high ? x : high;
    }
    low = team_smallest_double(low);
    high = -team_smallest_double(-high);
    const double s = (double)group->range.scale;
    const int32_t zero = group->range.zero;
    const qg_affine range = qg_int8_range_or_constant(s * (low - zero), s * (high - zero));
    const double ratio = s / (double)range.scale;
    for (uint32_t i = (uint32_t)team_rank(); i < group->n; i += TEAM) {
        const double x = int8_target(task, group, codes[i], load_float(u, u_format, u_first + i));
        const qg_noise_key key = key_of(task, group->first + i);
        const int32_t noise = qg_noise_element(&key, (uint32_t)(group->first + i));
        codes[i] = qg_int8_recode(x - zero, ratio, range.zero, noise, task->c.stochastic);
    }
    if (team_rank() == 0) {
        task->scales[group->group] = range.scale;
        task->zeros[group->group] = (int16_t)range.zero;
        int8_count(task, 1);
    }
}

#endif
