/* dynamic8.cu - blocks of the dynamic map: encode and decode.
 *
 * Layout: codes [rows, cols] uint8, absmax [rows, ceil(cols / block)] float32; a block never crosses a row.
 *     value = entry(code) absmax
 * Bytes per element, blocks of 256: quantize reads 4, and again from a cache, and writes 1.02; dequantize the reverse.
 *
 * A team has a block. The map's tables and its 256 entries lie in shared memory, since each thread looks up its own.
 */
#include "cuda/device.cuh"
#include "cuda/kernels.h"

#include "core/dynamic8.h"

struct dynamic_argument {
    uint8_t *codes;
    float *absmax;
    float *values;       /* what dequantize writes, */
    const float *source; /* and quantize reads */
    int64_t rows;
    int64_t cols;
    int64_t block;
    int64_t blocks_of_row;
    int is_signed;
};

/* Where block `unit` begins, and how many elements it has. */
static __device__ int64_t block_begin(const struct dynamic_argument *a, int64_t unit, int64_t *n) {
    const int64_t row = quotient(unit, a->blocks_of_row);
    const int64_t col = (unit - row * a->blocks_of_row) * a->block;
    *n = smaller(a->block, a->cols - col);
    return row * a->cols + col;
}

static __global__ void encode_blocks(struct dynamic_argument a) {
    __shared__ qg_dynamic_map map;
    copy_map(&map, a.is_signed ? &qg_dynamic_signed : &qg_dynamic_unsigned);
    for (int64_t unit = first_unit(); unit < a.rows * a.blocks_of_row; unit += unit_stride()) {
        int64_t n;
        const int64_t first = block_begin(&a, unit, &n);
        const float largest = qg_float((uint32_t)team_magnitude(a.source, QG_FLOAT32, first, first + n));
        const qg_dynamic_scale scale = qg_make_dynamic_scale(largest);
        for (int64_t i = team_rank(); i < n; i += TEAM) {
            const float x = qg_dynamic_unit(a.source[first + i], scale);
            a.codes[first + i] = a.is_signed ? qg_dynamic_signed_code(&map, x) : qg_dynamic_unsigned_code(&map, x);
        }
        if (team_rank() == 0) {
            a.absmax[unit] = largest;
        }
    }
}

static __global__ void decode_blocks(struct dynamic_argument a) {
    __shared__ float entry[256];
    const uint8_t own = (uint8_t)threadIdx.x;
    entry[own] = a.is_signed ? qg_dynamic_decode_signed(own) : qg_dynamic_decode_unsigned(own);
    __syncthreads();
    for (int64_t unit = first_unit(); unit < a.rows * a.blocks_of_row; unit += unit_stride()) {
        int64_t n;
        const int64_t first = block_begin(&a, unit, &n);
        const float largest = a.absmax[unit];
        for (int64_t i = team_rank() * SHARE; i < n; i += PIECE) {
            uint32_t codes[4];
            float x[SHARE];
            load_bytes(codes, a.codes + first + i, share_of(n - i));
            UNROLL
            for (int k = 0; k < SHARE; k++) {
                x[k] = largest * entry[byte_of(codes, k)];
            }
            store_float32(a.values + first + i, x, share_of(n - i));
        }
    }
}

static struct dynamic_argument make_argument(int64_t rows, int64_t cols, int32_t block, int is_signed) {
    struct dynamic_argument a;
    a.rows = rows;
    a.cols = cols;
    a.block = block;
    a.blocks_of_row = pieces(cols, block);
    a.is_signed = is_signed;
    return a;
}

void qg_cuda_dynamic8_quantize(
    uint8_t *codes,
    float *absmax,
    const float *source,
    int64_t rows,
    int64_t cols,
    int32_t block,
    int is_signed,
    void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    struct dynamic_argument a = make_argument(rows, cols, block, is_signed);
    a.codes = codes;
    a.absmax = absmax;
    a.source = source;
    if (rows * cols > 0) {
        QG_LAUNCH(cuda, encode_blocks, qg_cuda_grid(cuda, rows * a.blocks_of_row, TEAMS), THREADS, a);
    }
}

void qg_cuda_dynamic8_dequantize(
    float *target,
    const uint8_t *codes,
    const float *absmax,
    int64_t rows,
    int64_t cols,
    int32_t block,
    int is_signed,
    void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    struct dynamic_argument a = make_argument(rows, cols, block, is_signed);
    a.values = target;
    a.codes = (uint8_t *)codes;
    a.absmax = (float *)absmax;
    if (rows * cols > 0) {
        QG_LAUNCH(cuda, decode_blocks, qg_cuda_grid(cuda, rows * a.blocks_of_row, TEAMS), THREADS, a);
    }
}
