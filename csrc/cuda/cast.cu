/* cast.cu - noise, the largest magnitude, and conversions of plain arrays.
 *
 *     noise        out[i] = 24 bits of the stream's element start + i
 *     absmax       out = max |x|, infinity where an element is not finite
 *     cast         target = source, rounded to nearest even
 *     scaled_cast  target = scale source, likewise
 *
 * Bytes per element: noise 4 written; absmax 2 or 4 read; casts the sizes of the two formats. A source may have a row
 * stride, targets are contiguous. A cast to the same format keeps every bit, those of a NaN too.
 *
 * The bits of |x| order as |x| does, infinities and NaNs above all others: the largest of an array is found by integer
 * atomics, in any order.
 */
#include "cuda/device.cuh"
#include "cuda/kernels.h"

/* ---------------------------------------------------------------- noise */

struct noise_argument {
    int32_t *out;
    qg_noise_key key;
    uint32_t low; /* of the first element's index */
    int64_t count;
};

static __global__ void noise_elements(struct noise_argument a) {
    const int64_t stride = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < a.count; i += stride) {
        a.out[i] = qg_noise_element(&a.key, a.low + (uint32_t)i);
    }
}

/* One launch for the elements that share a key: those with one high word of the index. */
void qg_cuda_noise(int32_t *out, const qg_noise_stream *stream, int64_t start, int64_t count, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    for (int64_t done = 0; done < count;) {
        const int64_t element = start + done;
        struct noise_argument a;
        a.out = out + done;
        a.key = qg_make_noise_key(stream, (uint32_t)((uint64_t)element >> 32));
        a.low = (uint32_t)element;
        a.count = smaller(count - done, ((int64_t)1 << 32) - a.low);
        QG_LAUNCH(cuda, noise_elements, qg_cuda_grid(cuda, a.count, THREADS), THREADS, a);
        done += a.count;
    }
}

/* ---------------------------------------------------------------- absmax */

/* A unit is long, so that a team seldom touches the one number of its array. */
enum { ABSMAX_ITEMS = 96, ABSMAX_UNIT = 8 * PIECE };

struct absmax_list {
    int *out; /* the bits of floats */
    int64_t units;
    int64_t end[ABSMAX_ITEMS];
    qg_array arrays[ABSMAX_ITEMS];
};

static __global__ void absmax_units(struct absmax_list list) {
    int item = 0;
    for (int64_t unit = first_unit(); unit < list.units; unit += unit_stride()) {
        item = later_item(list.end, item, unit);
        const qg_array *array = &list.arrays[item];
        const int64_t first = unit_of_item(list.end, item, unit) * ABSMAX_UNIT;
        const int largest =
            team_magnitude(array->data, array->format, first, smaller(first + ABSMAX_UNIT, array->count));
        if (team_rank() == 0) {
            atomicMax(list.out + item, largest < 0x7f800000 ? largest : 0x7f800000);
        }
    }
}

/* The first of the arrays, as many as one launch takes. */
static void launch_absmax(qg_cuda *cuda, float *out, const qg_array *arrays, int64_t count) {
    struct absmax_list list;
    list.out = (int *)out;
    list.units = 0;
    for (int64_t i = 0; i < count; i++) {
        list.arrays[i] = arrays[i];
        list.units += pieces(arrays[i].count, ABSMAX_UNIT);
        list.end[i] = list.units;
    }
    if (list.units > 0) {
        QG_LAUNCH(cuda, absmax_units, qg_cuda_grid(cuda, list.units, TEAMS), THREADS, list);
    }
}

void qg_cuda_absmax(float *out, const qg_array *arrays, int64_t count, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    if (count == 0 || cuda->status != QG_SUCCESS) {
        return;
    }
    qg_cuda_good(cuda, cudaMemsetAsync(out, 0, (size_t)count * sizeof *out, cuda->stream), "cudaMemsetAsync");
    for (int64_t i = 0; i < count; i += ABSMAX_ITEMS) {
        launch_absmax(cuda, out + i, arrays + i, smaller(count - i, ABSMAX_ITEMS));
    }
}

int qg_cuda_finite(const void *source, qg_format format, int64_t count, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    const qg_array array = {source, count, format};
    float largest = INFINITY;
    qg_cuda_absmax(cuda->numbers, &array, 1, cuda);
    cuda->backend.fetch(&largest, cuda->numbers, sizeof largest, cuda);
    return largest < INFINITY; /* a NaN after a failure */
}

/* ---------------------------------------------------------------- casts */

enum { CAST_ITEMS = 64 };

/* A unit is a piece of a row. */
struct cast_list {
    qg_format target_format;
    float scale;
    int64_t units;
    int64_t end[CAST_ITEMS];
    qg_cast_item items[CAST_ITEMS];
};

/* A scale of 1 is left out: a product would lose the payload of a NaN. */
static __device__ void cast_share(
    const qg_cast_item *item,
    qg_format target_format,
    float scale,
    int64_t to,
    int64_t from,
    int n) {
    if (scale == 1.0f && target_format == item->source_format && target_format != QG_FLOAT32) {
        uint32_t halves[SHARE / 2];
        load_halves(halves, (const uint16_t *)item->source + from, n);
        store_halves((uint16_t *)item->target + to, halves, n);
        return;
    }
    float x[SHARE];
    load_floats(x, item->source, item->source_format, from, n);
    if (scale != 1.0f) {
        UNROLL
        for (int i = 0; i < SHARE; i++) {
            x[i] = scale * x[i];
        }
    }
    store_floats(item->target, target_format, to, x, n);
}

static __global__ void cast_units(struct cast_list list) {
    int i = 0;
    for (int64_t unit = first_unit(); unit < list.units; unit += unit_stride()) {
        i = later_item(list.end, i, unit);
        const qg_cast_item *item = &list.items[i];
        const int64_t of_row = pieces(item->cols, PIECE), u = unit_of_item(list.end, i, unit);
        const int64_t row = quotient(u, of_row);
        const int64_t col = (u - row * of_row) * PIECE + team_rank() * SHARE;
        cast_share(
            item, list.target_format, list.scale, row * item->cols + col, row * item->source_row_stride + col,
            share_of(item->cols - col));
    }
}

/* The first of the items, as many as one launch takes. What is contiguous counts as one row. */
static void launch_cast(qg_cuda *cuda, const qg_cast_item *items, int64_t count, qg_format target_format, float scale) {
    struct cast_list list;
    list.target_format = target_format;
    list.scale = scale;
    list.units = 0;
    for (int64_t i = 0; i < count; i++) {
        qg_cast_item *item = &list.items[i];
        *item = items[i];
        if (item->source_row_stride == item->cols) {
            item->cols *= item->rows;
            item->rows = 1;
        }
        list.units += item->rows * pieces(item->cols, PIECE);
        list.end[i] = list.units;
    }
    if (list.units > 0) {
        QG_LAUNCH(cuda, cast_units, qg_cuda_grid(cuda, list.units, TEAMS), THREADS, list);
    }
}

void qg_cuda_cast(const qg_cast_item *items, int64_t count, qg_format target_format, void *queue) {
    for (int64_t i = 0; i < count; i += CAST_ITEMS) {
        launch_cast((qg_cuda *)queue, items + i, smaller(count - i, CAST_ITEMS), target_format, 1.0f);
    }
}

void qg_cuda_scaled_cast(
    void *target,
    qg_format target_format,
    const void *source,
    qg_format source_format,
    int64_t rows,
    int64_t cols,
    int64_t source_row_stride,
    float scale,
    void *queue) {
    const qg_cast_item item = {target, source, source_format, rows, cols, source_row_stride};
    launch_cast((qg_cuda *)queue, &item, 1, target_format, scale);
}
