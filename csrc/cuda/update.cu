/* update.cu - the weight update of every format, from a u in memory.
 *
 * The formulas are those of update.cuh. One team takes a group of an INT8 weight, or 256 elements of a float weight.
 * A group of at most 256 elements stays in registers between its decision and its codes; a longer one is gone through
 * twice.
 * Bytes per element, u float32: 4 read, and INT8 1 read, 1 written and 6 / 256 of scale and zero; bfloat16 and float16
 * 2 and 2; float32 4 and 4. A bfloat16 u takes 2 less.
 * Numerics: the bits of the CPU. Ranges are decided in double, everything else is float32.
 */
#include "cuda/kernels.h"
#include "cuda/update.cuh"

struct update_item {
    struct weight_task weight;
    const void *u; /* element first of the weight has u[0] */
    const float *gradient_absmax;
    int64_t first;
    int64_t count;
    qg_format u_format;
};

enum { UPDATE_ITEMS = (LIST_BYTES - sizeof(int64_t)) / (sizeof(struct update_item) + sizeof(int64_t)) };

struct update_list {
    int64_t units;
    int64_t end[UPDATE_ITEMS];
    struct update_item item[UPDATE_ITEMS];
};

static __device__ inline void int8_update_group(const struct update_item *item, int64_t number, uint32_t n) {
    const struct weight_task *task = &item->weight;
    const struct group_task group = group_task_of(task, number, n);
    struct extremes extremes = no_extremes();
    for (int pass = n > PIECE ? 0 : 1; pass < 2; pass++) {
        for (uint32_t p = 0; p < n; p += PIECE) {
            const int64_t i = (int64_t)p + team_rank() * SHARE, first = group.first + i;
            const int share = share_of(n - i);
            uint32_t codes[4], next[4];
            float u[SHARE];
            load_bytes(codes, (const uint8_t *)task->data + first, share);
            load_floats(u, item->u, item->u_format, first - item->first, share);
            int8_move(next, &extremes, task, &group, codes, u, first, share);
            if (pass == 0) {
                continue;
            }
            const struct verdict verdict = int8_decide(&extremes, group.range);
            if (verdict.untouched) {
                return;
            }
            if (verdict.reranged) {
                int8_rerange(task, &group, item->u, item->u_format, group.first - item->first);
                return;
            }
            int8_store(task, next, verdict.shift, first, share);
            if (p == 0) {
                int8_shift(task, &group, verdict.shift);
            }
        }
    }
}

/* Three blocks on a multiprocessor, 80 registers: with 64 the newest GPUs would spill some. */
static __global__ void __launch_bounds__(THREADS, 3) update_kernel(struct update_list list) {
    int i = 0;
    for (int64_t unit = first_unit(); unit < list.units; unit += unit_stride()) {
        i = later_item(list.end, i, unit);
        const struct update_item *item = &list.item[i];
        if (!gradient_is_good(item->gradient_absmax)) {
            continue;
        }
        const int64_t k = unit_of_item(list.end, i, unit);
        if (item->weight.format == QG_INT8) {
            const int32_t size = item->weight.group;
            const uint32_t n = (uint32_t)smaller(size, item->count - k * size);
            int8_update_group(item, quotient(item->first, size) + k, n);
        } else {
            const int64_t from = k * PIECE + team_rank() * SHARE;
            const int share = share_of(item->count - from);
            float u[SHARE];
            load_floats(u, item->u, item->u_format, from, share);
            float_update(&item->weight, item->first + from, share, u);
        }
    }
}

/* The units of work of an item: groups or pieces. */
static int64_t update_units(const qg_update_item *item) {
    return pieces(item->count, item->weight->format == QG_INT8 ? item->weight->group_size : PIECE);
}

extern "C" void qg_cuda_update(const qg_update_item *items, int64_t count, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    for (int64_t i = 0; i < count; i += UPDATE_ITEMS) {
        struct update_list list;
        list.units = 0;
        for (int k = 0; k < UPDATE_ITEMS && i + k < count; k++) {
            const qg_update_item *from = &items[i + k];
            struct update_item *item = &list.item[k];
            item->weight =
                weight_task_of(from->weight, &from->coefficients, &from->stream, from->first, from->rate, from->stats);
            item->u = from->u;
            item->gradient_absmax = from->gradient_absmax;
            item->first = from->first;
            item->count = from->count;
            item->u_format = from->u_format;
            list.units += update_units(from);
            list.end[k] = list.units;
        }
        if (list.units > 0) {
            QG_LAUNCH(cuda, update_kernel, qg_cuda_grid(cuda, list.units, TEAMS), THREADS, list);
        }
    }
}
