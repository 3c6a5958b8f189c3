/* int8.cu - INT8 weights: encode and decode.
 *
 * Layout: codes [n] uint8; for each group of group_size consecutive elements a float32 scale and an int16 zero.
 *     w = s (q - z)
 * One team takes a group; one of at most 256 elements stays in registers, a longer one is read twice.
 * Bytes per element, groups of 256: quantize reads the source (4 or 2) and writes 1 and 6 / 256; dequantize the reverse.
 * Numerics: the bits of the CPU; the range of a group is computed in double.
 */
#include "cuda/device.cuh"
#include "cuda/kernels.h"

#include "core/affine.h"

/* A weight, and the floats that it is made of or becomes. */
struct int8_task {
    uint8_t *codes;
    float *scales;
    int16_t *zeros;
    void *floats;
    qg_format format; /* of the floats */
    int32_t group;
    int64_t count;
};

static struct int8_task int8_task_of(const qg_weight *weight, void *floats, qg_format format) {
    struct int8_task task;
    task.codes = (uint8_t *)weight->data;
    task.scales = weight->scales;
    task.zeros = weight->zeros;
    task.floats = floats;
    task.format = format;
    task.group = weight->group_size;
    task.count = weight->rows * weight->cols;
    return task;
}

/* The codes of elements first .. first + n. */
static __device__ inline void int8_encode(
    const struct int8_task *task,
    const float w[SHARE],
    qg_affine range,
    int64_t first,
    int n) {
    uint32_t codes[4] = {0};
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        set_byte(codes, i, qg_int8_encode(w[i], range));
    }
    store_bytes(task->codes + first, codes, n);
}

static __device__ inline void int8_quantize_group(const struct int8_task *task, int64_t group) {
    const int64_t begin = group * task->group, n = smaller(task->group, task->count - begin);
    int32_t low = INT32_MAX, high = INT32_MIN;
    qg_affine range = {1, 0};
    for (int pass = n > PIECE ? 0 : 1; pass < 2; pass++) {
        for (int64_t p = 0; p < n; p += PIECE) {
            const int64_t i = p + team_rank() * SHARE;
            const int share = share_of(n - i);
            float w[SHARE];
            load_floats(w, task->floats, task->format, begin + i, share);
            UNROLL
            for (int k = 0; k < SHARE; k++) {
                const int32_t order = qg_order(w[k]);
                low = k < share && order < low ? order : low;
                high = k < share && order > high ? order : high;
            }
            if (pass == 1) {
                range = qg_int8_range_or_constant(qg_from_order(team_smallest(low)), qg_from_order(team_largest(high)));
                int8_encode(task, w, range, begin + i, share);
            }
        }
    }
    if (team_rank() == 0) {
        task->scales[group] = range.scale;
        task->zeros[group] = (int16_t)range.zero;
    }
}

static __global__ void __launch_bounds__(THREADS) int8_quantize_kernel(struct int8_task task) {
    const int64_t groups = pieces(task.count, task.group);
    for (int64_t group = first_unit(); group < groups; group += unit_stride()) {
        int8_quantize_group(&task, group);
    }
}

static __global__ void __launch_bounds__(THREADS) int8_dequantize_kernel(struct int8_task task) {
    const int64_t groups = pieces(task.count, task.group);
    for (int64_t group = first_unit(); group < groups; group += unit_stride()) {
        const int64_t begin = group * task.group, n = smaller(task.group, task.count - begin);
        const qg_affine range = {task.scales[group], task.zeros[group]};
        for (int64_t i = team_rank() * SHARE; i < n; i += PIECE) {
            const int share = share_of(n - i);
            uint32_t codes[4];
            float w[SHARE];
            load_bytes(codes, task.codes + begin + i, share);
            UNROLL
            for (int k = 0; k < SHARE; k++) {
                w[k] = qg_int8_decode(byte_of(codes, k), range);
            }
            store_floats(task.floats, task.format, begin + i, w, share);
        }
    }
}

extern "C" void qg_cuda_int8_quantize(const qg_weight *weight, const void *source, qg_format format, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    struct int8_task task = int8_task_of(weight, (void *)source, format);
    const int64_t groups = pieces(task.count, task.group);
    if (groups > 0) {
        QG_LAUNCH(cuda, int8_quantize_kernel, qg_cuda_grid(cuda, groups, TEAMS), THREADS, task);
    }
}

extern "C" void qg_cuda_int8_dequantize(const qg_weight *weight, void *target, qg_format format, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    struct int8_task task = int8_task_of(weight, target, format);
    const int64_t groups = pieces(task.count, task.group);
    if (groups > 0) {
        QG_LAUNCH(cuda, int8_dequantize_kernel, qg_cuda_grid(cuda, groups, TEAMS), THREADS, task);
    }
}
