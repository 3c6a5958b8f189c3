/* projector.cu - projectors: encode and decode.
 *
 * Layout: codes [rank, dim] uint8, or [rank, ceil(dim / 2)] with the even index in the low nibble; for each block of a
 * row, or once for all rows, a bfloat16 scale and, for INT4 and INT8, a uint8 zero.
 *     value = s (q - z)        INT4, INT8
 *     value = s entry(q)       FP4, NF4, FP8_E4M3, DYNAMIC8
 *     z, s from the extremes of a block (affine.h), s from its largest magnitude (codebook.h)
 * FLOAT32 and BFLOAT16 projectors are casts.
 *
 * Bytes per element, blocks of 256: dequantize, which every step calls, reads 0.51 (4 bits) or 1.01 (8 bits) and writes
 * its target's 4 or 2. quantize, a refresh's, reads the source twice, 8 in all, and writes 0.51 or 1.01: a pass for the
 * ranges and one for the codes, since blocks of any size share bytes but no two threads write one.
 *
 * A thread decodes 16 bytes of a row's codes, one access, at a time. Entries are looked up in shared memory: 16 of them
 * lie in 16 banks, and the 256 of an 8-bit format are worked out once a block of threads.
 */
#include "cuda/device.cuh"
#include "cuda/kernels.h"

#include "core/affine.h"
#include "core/codebook.h"
#include "core/dynamic8.h"
#include "core/layout.h"

/* ---------------------------------------------------------------- ranges */

/* block: its size, the whole row where all share one scale. */
struct encode_argument {
    qg_projector projector;
    const float *source;
    int64_t block;
    int64_t blocks_of_row;
    int64_t row_codes;
    int packed;
    int32_t *extremes; /* of all, for the one scale */
};

/* As qg_order has them; the range always holds 0. */
struct extremes {
    int32_t low, high;
};

/* Of n elements, by a team; all its threads get them. */
static __device__ struct extremes extremes_of(const float *source, int64_t n) {
    struct extremes e = {0, 0};
    for (int64_t i = team_rank() * SHARE; i < n; i += PIECE) {
        float x[SHARE];
        load_float32(x, source + i, share_of(n - i));
        UNROLL
        for (int k = 0; k < SHARE; k++) {
            const int32_t order = qg_order(x[k]);
            e.low = order < e.low ? order : e.low;
            e.high = order > e.high ? order : e.high;
        }
    }
    e.low = team_smallest(e.low);
    e.high = team_largest(e.high);
    return e;
}

static __device__ void store_range(const qg_projector *projector, int64_t index, struct extremes e) {
    const float low = qg_from_order(e.low), high = qg_from_order(e.high);
    const qg_format format = projector->format;
    if (format == QG_INT4 || format == QG_INT8) {
        const qg_affine range = qg_projector_range(low, high, format == QG_INT4 ? 15 : 255);
        projector->scales[index] = (uint16_t)(qg_bits(range.scale) >> 16);
        projector->zeros[index] = (uint8_t)range.zero;
    } else {
        const float scale = qg_absmax_scale(-low > high ? -low : high, qg_absmax_top(format));
        projector->scales[index] = (uint16_t)(qg_bits(scale) >> 16);
    }
}

static __global__ void block_ranges(struct encode_argument a) {
    const int64_t dim = a.projector.dim, units = a.projector.rank * a.blocks_of_row;
    for (int64_t unit = first_unit(); unit < units; unit += unit_stride()) {
        const int64_t row = quotient(unit, a.blocks_of_row);
        const int64_t first = (unit - row * a.blocks_of_row) * a.block;
        const struct extremes e = extremes_of(a.source + row * dim + first, smaller(a.block, dim - first));
        if (team_rank() == 0) {
            store_range(&a.projector, unit, e);
        }
    }
}

/* A unit is long, so that a team seldom touches the two numbers. */
enum { EXTREMES_UNIT = 8 * PIECE };

static __global__ void find_extremes(struct encode_argument a) {
    const int64_t count = a.projector.rank * a.projector.dim, units = pieces(count, EXTREMES_UNIT);
    for (int64_t unit = first_unit(); unit < units; unit += unit_stride()) {
        const int64_t first = unit * EXTREMES_UNIT;
        const struct extremes e = extremes_of(a.source + first, smaller(EXTREMES_UNIT, count - first));
        if (team_rank() == 0) {
            atomicMin(&a.extremes[0], e.low);
            atomicMax(&a.extremes[1], e.high);
        }
    }
}

static __global__ void whole_range(struct encode_argument a) {
    const struct extremes e = {a.extremes[0], a.extremes[1]};
    store_range(&a.projector, 0, e);
}

/* ---------------------------------------------------------------- codes */

static __device__ uint8_t encode_value(qg_format format, const qg_dynamic_map *map, float x, qg_affine range) {
    switch (format) {
    case QG_FP4:
        return qg_codebook_encode(&qg_fp4, x / range.scale);
    case QG_NF4:
        return qg_codebook_encode(&qg_nf4, x / range.scale);
    case QG_FP8_E4M3:
        return qg_e4m3_encode(x / range.scale);
    case QG_DYNAMIC8:
        return qg_dynamic_signed_code(map, x / range.scale);
    default:
        return qg_projector_encode(x, range, format == QG_INT4 ? 15 : 255);
    }
}

static __device__ uint8_t
encode_element(const struct encode_argument *a, const qg_dynamic_map *map, int64_t row, int64_t col) {
    const qg_projector *projector = &a->projector;
    const int64_t block = projector->block == 0 ? 0 : row * a->blocks_of_row + quotient(col, a->block);
    qg_affine range;
    range.scale = qg_from_bfloat16(projector->scales[block]);
    range.zero = projector->zeros == NULL ? 0 : projector->zeros[block];
    return encode_value(projector->format, map, a->source[row * projector->dim + col], range);
}

/* A thread a byte: neighbours in a byte may be of two blocks. */
static __global__ void encode_bytes(struct encode_argument a) {
    __shared__ qg_dynamic_map map;
    copy_map(&map, &qg_dynamic_signed);
    const int64_t count = a.projector.rank * a.row_codes, stride = (int64_t)gridDim.x * THREADS;
    uint8_t *codes = (uint8_t *)a.projector.codes;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride) {
        const int64_t row = quotient(i, a.row_codes), byte = i - row * a.row_codes;
        if (!a.packed) {
            codes[i] = encode_element(&a, &map, row, byte);
            continue;
        }
        const uint8_t low = encode_element(&a, &map, row, 2 * byte);
        const uint8_t high = 2 * byte + 1 < a.projector.dim ? encode_element(&a, &map, row, 2 * byte + 1) : 0;
        codes[i] = (uint8_t)(low | high << 4);
    }
}

static void launch_ranges(qg_cuda *cuda, struct encode_argument a) {
    const int64_t count = a.projector.rank * a.projector.dim;
    if (a.projector.block != 0) {
        const unsigned blocks = qg_cuda_grid(cuda, a.projector.rank * a.blocks_of_row, TEAMS);
        QG_LAUNCH(cuda, block_ranges, blocks, THREADS, a);
        return;
    }
    if (cuda->status == QG_SUCCESS) {
        qg_cuda_good(cuda, cudaMemsetAsync(a.extremes, 0, 2 * sizeof *a.extremes, cuda->stream), "cudaMemsetAsync");
    }
    QG_LAUNCH(cuda, find_extremes, qg_cuda_grid(cuda, pieces(count, EXTREMES_UNIT), TEAMS), THREADS, a);
    QG_LAUNCH(cuda, whole_range, 1, 1, a);
}

void qg_cuda_projector_quantize(const qg_projector *projector, const float *source, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    const int64_t rank = projector->rank, dim = projector->dim;
    if (rank * dim == 0) {
        return;
    }
    if (qg_projector_is_float(projector->format)) {
        const qg_cast_item item = {projector->codes, source, QG_FLOAT32, rank, dim, dim};
        qg_cuda_cast(&item, 1, projector->format, cuda);
        return;
    }
    struct encode_argument a;
    a.projector = *projector;
    a.projector.zeros = qg_projector_is_affine(projector->format) ? projector->zeros : NULL;
    a.source = source;
    a.block = projector->block == 0 ? dim : projector->block;
    a.blocks_of_row = pieces(dim, a.block);
    a.row_codes = qg_projector_row_codes(projector->format, dim);
    a.packed = qg_projector_is_packed(projector->format);
    a.extremes = (int32_t *)cuda->numbers;
    launch_ranges(cuda, a);
    QG_LAUNCH(cuda, encode_bytes, qg_cuda_grid(cuda, rank * a.row_codes, THREADS), THREADS, a);
}

/* ---------------------------------------------------------------- decode */

/* A unit is what a team decodes at a time: DECODE_BYTES of a row's codes. */
enum { DECODE_ITEMS = 40, DECODE_BYTES = TEAM * 16 };

/* A window that begins with the rows of these pointers, in column first_col. */
struct decode_item {
    const uint8_t *codes;
    const uint16_t *scales;
    const uint8_t *zeros; /* NULL: no zeros */
    int64_t row_codes;
    int64_t row_scales; /* 0: one scale for all */
    int64_t block;      /* the row's size then */
    int64_t first_col;
    int64_t cols;
    int64_t row_units;
    void *target;
};

struct decode_list {
    qg_format format;
    qg_format target_format;
    int packed;
    int64_t units;
    int64_t end[DECODE_ITEMS];
    struct decode_item items[DECODE_ITEMS];
};

static __device__ float entry_of(qg_format format, int code) {
    switch (format) {
    case QG_FP4:
        return qg_fp4.entry[code & 15];
    case QG_NF4:
        return qg_nf4.entry[code & 15];
    case QG_FP8_E4M3:
        return qg_e4m3_decode((uint8_t)code);
    case QG_DYNAMIC8:
        return qg_dynamic_decode_signed((uint8_t)code);
    default:
        return 0.0f; /* affine: no table */
    }
}

static __device__ inline qg_affine range_at(const struct decode_item *item, int64_t index) {
    qg_affine range;
    range.scale = qg_from_bfloat16(item->scales[index]);
    range.zero = item->zeros == NULL ? 0 : item->zeros[index];
    return range;
}

/* The value of code i in `words`. */
static __device__ inline float value_of(
    const struct decode_item *item,
    const uint32_t *words,
    int i,
    int packed,
    const float *entry,
    qg_affine range) {
    const uint8_t code = packed ? words[i / 8] >> (4 * (i % 8)) & 15 : byte_of(words, i);
    return item->zeros != NULL ? qg_projector_decode(code, range) : range.scale * entry[code];
}

/* x = the values of the n codes in `words`, the first of them in column col of row `row`. Mostly they are of one block. */
static __device__ inline void decode_run(
    float x[SHARE],
    const struct decode_item *item,
    const uint32_t *words,
    int packed,
    const float *entry,
    int64_t row,
    int64_t col,
    int n) {
    const int64_t in_row = quotient(col, item->block);
    int64_t index = row * item->row_scales + in_row;
    int64_t next = (in_row + 1) * item->block - col; /* where the next block begins */
    qg_affine range = range_at(item, index);
    if (next >= n) {
        UNROLL
        for (int i = 0; i < SHARE; i++) {
            x[i] = value_of(item, words, i, packed, entry, range);
        }
        return;
    }
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        if (i == next && i < n) {
            range = range_at(item, ++index);
            next += item->block;
        }
        x[i] = value_of(item, words, i, packed, entry, range);
    }
}

/* 16 bytes of a row's codes: byte `byte` of the window and on. An odd first column begins in the middle of a byte: then
 * all moves by half a byte, and the share's last code is in the byte after it. */
static __device__ inline void decode_share(
    const struct decode_item *item,
    qg_format target_format,
    int packed,
    const float *entry,
    int64_t row,
    int64_t byte) {
    const int64_t first = packed ? 2 * byte : byte; /* column of the window */
    const int64_t n = item->cols - first;
    if (n <= 0) {
        return;
    }
    const int odd = packed && item->first_col % 2 != 0;
    const int64_t bytes = packed ? (n + odd + 1) / 2 : n;
    const uint8_t *codes =
        item->codes + row * item->row_codes + (packed ? item->first_col / 2 : item->first_col) + byte;
    uint32_t words[5];
    load_bytes(words, codes, share_of(bytes));
    if (odd) {
        words[4] = bytes > 16 ? codes[16] : 0;
        UNROLL
        for (int i = 0; i < 4; i++) {
            words[i] = words[i] >> 4 | words[i + 1] << 28;
        }
    }
    UNROLL
    for (int half = 0; half < (packed ? 2 : 1); half++) {
        const int64_t col = first + half * SHARE;
        if (col < item->cols) {
            const int m = share_of(item->cols - col);
            float x[SHARE];
            decode_run(x, item, words + 2 * half, packed, entry, row, item->first_col + col, m);
            store_floats(item->target, target_format, row * item->cols + col, x, m);
        }
    }
}

static __global__ void decode_units(struct decode_list list) {
    __shared__ float entry[256];
    entry[threadIdx.x] = entry_of(list.format, (int)threadIdx.x);
    __syncthreads();
    int i = 0;
    for (int64_t unit = first_unit(); unit < list.units; unit += unit_stride()) {
        i = later_item(list.end, i, unit);
        const struct decode_item *item = &list.items[i];
        const int64_t u = unit_of_item(list.end, i, unit), row = quotient(u, item->row_units);
        const int64_t byte = (u - row * item->row_units) * DECODE_BYTES + team_rank() * 16;
        if (list.packed) {
            decode_share(item, list.target_format, 1, entry, row, byte);
        } else {
            decode_share(item, list.target_format, 0, entry, row, byte);
        }
    }
}

static struct decode_item make_decode_item(const qg_decode_item *window) {
    const qg_projector *projector = window->projector;
    const int packed = qg_projector_is_packed(projector->format);
    const int64_t dim = projector->dim;
    struct decode_item item;
    item.row_codes = qg_projector_row_codes(projector->format, dim);
    item.block = projector->block == 0 ? dim : projector->block;
    item.row_scales = projector->block == 0 ? 0 : pieces(dim, item.block);
    item.codes = (const uint8_t *)projector->codes + window->first_row * item.row_codes;
    item.scales = projector->scales + window->first_row * item.row_scales;
    item.zeros = NULL;
    if (qg_projector_is_affine(projector->format)) {
        item.zeros = projector->zeros + window->first_row * item.row_scales;
    }
    item.first_col = window->first_col;
    item.cols = window->cols;
    item.row_units = pieces(packed ? item.cols / 2 + item.cols % 2 : item.cols, DECODE_BYTES);
    item.target = window->target;
    return item;
}

/* Windows of one format, as many as one launch takes. */
static void launch_decode(qg_cuda *cuda, const qg_decode_item *windows, int64_t count, qg_format target_format) {
    struct decode_list list;
    list.format = windows->projector->format;
    list.target_format = target_format;
    list.packed = qg_projector_is_packed(list.format);
    list.units = 0;
    for (int64_t i = 0; i < count; i++) {
        list.items[i] = make_decode_item(&windows[i]);
        list.units += windows[i].rows * list.items[i].row_units;
        list.end[i] = list.units;
    }
    if (list.units > 0) {
        QG_LAUNCH(cuda, decode_units, qg_cuda_grid(cuda, list.units, TEAMS), THREADS, list);
    }
}

static void launch_cast(qg_cuda *cuda, const qg_decode_item *windows, int64_t count, qg_format target_format) {
    qg_cast_item items[DECODE_ITEMS];
    for (int64_t i = 0; i < count; i++) {
        const qg_projector *projector = windows[i].projector;
        const int64_t first = windows[i].first_row * projector->dim + windows[i].first_col;
        items[i].target = windows[i].target;
        items[i].source = (const char *)projector->codes + first * format_size(projector->format);
        items[i].source_format = projector->format;
        items[i].rows = windows[i].rows;
        items[i].cols = windows[i].cols;
        items[i].source_row_stride = projector->dim;
    }
    qg_cuda_cast(items, count, target_format, cuda);
}

/* How many of the windows that come first have one format, and fit into one launch. */
static int64_t run_of_format(const qg_decode_item *windows, int64_t count) {
    int64_t run = 1;
    while (run < smaller(count, DECODE_ITEMS) && windows[run].projector->format == windows[0].projector->format) {
        run++;
    }
    return run;
}

void qg_cuda_projector_dequantize(const qg_decode_item *items, int64_t count, qg_format target_format, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    for (int64_t i = 0, run; i < count; i += run) {
        run = run_of_format(items + i, count - i);
        if (qg_projector_is_float(items[i].projector->format)) {
            launch_cast(cuda, items + i, run, target_format);
        } else {
            launch_decode(cuda, items + i, run, target_format);
        }
    }
}
