/* subspace.cu - the passes and reductions of a subspace refresh.
 *
 *     sum_squares   *out = sum x^2 in double
 *     limit_growth  *rate, *norm from *squares
 *     normalise     target = source sqrt(rows / *squares)
 *     shift_gram    *distance = max |A - I|; where that is at least 0.5, A's diagonal += 1e-6 ||A||_F
 *     bell          out[i] = (n[4 i] + n[4 i + 1] + n[4 i + 2] + n[4 i + 3] - 2 (2^24 - 1)) 2^-24, n the noise
 *
 * Bytes per element: sum_squares reads 4 or 2; normalise reads 4 or 2 and writes 4; shift_gram reads 2 (the lower
 * triangle); bell writes 4.
 *
 * sum_squares adds in the order of the CPU's, 16 lanes of 64 ranges one after another, so it has the CPU's bits. Those
 * 1024 chains of dependent additions are all its parallelism: one block a range, whose 256 threads bring a tile of
 * the range to shared memory while 16 of them add up the tile before. shift_gram's sum has its own order, which depends
 * on n alone; its distance is exact.
 */
#include "cuda/device.cuh"
#include "cuda/kernels.h"

/* ---------------------------------------------------------------- sum of squares */

/* The first three as on the CPU. */
enum { RANGES = 64, SUM_LANES = 16, RANGE_UNIT = 1024, EACH = 16, TILE = THREADS * EACH };

static_assert(RANGES * sizeof(double) <= QG_CUDA_LEAST_WORKSPACE, "the sums of the ranges");

struct squares_argument {
    const void *source;
    qg_format format;
    int64_t count;
    int64_t range;
    double *sums; /* [RANGES] */
};

/* Elements first + threadIdx.x, + THREADS, ..: whole cache lines for a warp whatever the array's alignment. Zeros, whose
 * squares change no sum, behind the end. */
static __device__ void load_tile(float *x, const void *source, qg_format format, int64_t first, int64_t end) {
    UNROLL
    for (int k = 0; k < EACH; k++) {
        const int64_t i = first + k * THREADS + threadIdx.x;
        x[k] = i < end ? load_float(source, format, i) : 0.0f;
    }
}

static __global__ void sum_ranges(struct squares_argument a) {
    __shared__ float tile[TILE];
    __shared__ double lanes[SUM_LANES];
    const int64_t from = (int64_t)blockIdx.x * a.range;
    const int64_t end = smaller(from + a.range, a.count);
    double sum = 0.0;
    float next[EACH];
    load_tile(next, a.source, a.format, from, end);
    for (int64_t i = from; i < end; i += TILE) {
        UNROLL
        for (int k = 0; k < EACH; k++) {
            tile[k * THREADS + threadIdx.x] = next[k];
        }
        __syncthreads();
        load_tile(next, a.source, a.format, i + TILE, end);
        if (threadIdx.x < SUM_LANES) {
            for (int k = 0; k < TILE; k += SUM_LANES) {
                const double x = tile[k + threadIdx.x];
                sum += x * x;
            }
        }
        __syncthreads();
    }
    if (threadIdx.x < SUM_LANES) {
        lanes[threadIdx.x] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double all = 0.0;
        for (int k = 0; k < SUM_LANES; k++) {
            all += lanes[k];
        }
        a.sums[blockIdx.x] = all;
    }
}

struct add_argument {
    double *out;
    const double *sums;
};

static __global__ void add_ranges(struct add_argument a) {
    double sum = 0.0;
    for (int i = 0; i < RANGES; i++) {
        sum += a.sums[i];
    }
    *a.out = sum;
}

void qg_cuda_sum_squares(double *out, const void *source, qg_format format, int64_t count, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    struct squares_argument a;
    a.source = source;
    a.format = format;
    a.count = count;
    a.range = pieces(pieces(count, RANGE_UNIT), RANGES) * RANGE_UNIT;
    a.sums = (double *)cuda->numbers;
    struct add_argument b = {out, a.sums};
    QG_LAUNCH(cuda, sum_ranges, RANGES, THREADS, a);
    QG_LAUNCH(cuda, add_ranges, 1, 1, b);
}

/* ---------------------------------------------------------------- norms */

struct growth_argument {
    float *rate_out;
    double *norm;
    const double *squares;
    double growth;
    double rate;
    const float *gradient_absmax;
};

static __global__ void growth(struct growth_argument a) {
    if (gradient_is_good(a.gradient_absmax)) {
        qg_limit_growth(a.rate_out, a.norm, *a.squares, a.growth, a.rate);
    }
}

void qg_cuda_limit_growth(
    float *rate_out,
    double *norm,
    const double *squares,
    double limit,
    double rate,
    const float *gradient_absmax,
    void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    struct growth_argument a = {rate_out, norm, squares, limit, rate, gradient_absmax};
    QG_LAUNCH(cuda, growth, 1, 1, a);
}

struct normalise_argument {
    float *target;
    const void *source;
    qg_format format;
    int64_t count;
    int64_t rows;
    const double *squares;
};

static __global__ void normalise_rows(struct normalise_argument a) {
    __shared__ float factor; /* once a block: few double operations fit into a cycle of most GPUs */
    if (threadIdx.x == 0) {
        factor = (float)sqrt((double)a.rows / *a.squares);
    }
    __syncthreads();
    const int64_t stride = unit_stride() * PIECE;
    for (int64_t i = first_unit() * PIECE + team_rank() * SHARE; i < a.count; i += stride) {
        float x[SHARE];
        load_floats(x, a.source, a.format, i, share_of(a.count - i));
        UNROLL
        for (int k = 0; k < SHARE; k++) {
            x[k] = factor * x[k];
        }
        store_float32(a.target + i, x, share_of(a.count - i));
    }
}

void qg_cuda_normalise(
    float *target,
    const void *source,
    qg_format format,
    int64_t count,
    int64_t rows,
    const double *squares,
    void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    if (count > 0) {
        struct normalise_argument a = {target, source, format, count, rows, squares};
        QG_LAUNCH(cuda, normalise_rows, qg_cuda_grid(cuda, count, THREADS * SHARE), THREADS, a);
    }
}

/* ---------------------------------------------------------------- the Gram matrix */

enum { GRAM_THREADS = 1024, WARP = 32 };

struct gram_argument {
    double *distance;
    float *gram;
    int64_t n;
};

/* One block: a Gram matrix has the size of the rank squared, and its sum one order. */
static __global__ void shift_diagonal(struct gram_argument a) {
    __shared__ double sums[GRAM_THREADS];
    __shared__ int largest; /* the bits of |x|: NaN is the largest of all */
    const int thread = (int)threadIdx.x, lane = thread % WARP;
    if (thread == 0) {
        largest = 0;
    }
    __syncthreads();
    double sum = 0.0;
    int furthest = 0;
    for (int64_t i = thread / WARP; i < a.n; i += GRAM_THREADS / WARP) {
        for (int64_t j = lane; j <= i; j += WARP) {
            const float x = a.gram[i * a.n + j];
            const int distance = qg_magnitude(i == j ? x - 1.0f : x);
            furthest = distance > furthest ? distance : furthest;
            sum += (i == j ? 1.0 : 2.0) * ((double)x * (double)x);
        }
    }
    atomicMax(&largest, furthest);
    sums[thread] = sum;
    for (int half = GRAM_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) {
            sums[thread] += sums[thread + half];
        }
    }
    __syncthreads();
    const double distance = largest < 0x7f800000 ? (double)qg_float((uint32_t)largest) : (double)INFINITY;
    if (thread == 0) {
        *a.distance = distance;
    }
    if (distance >= 0.5) {
        const float shift = (float)(1e-6 * sqrt(sums[0]));
        for (int64_t i = thread; i < a.n; i += GRAM_THREADS) {
            a.gram[i * a.n + i] += shift;
        }
    }
}

void qg_cuda_shift_gram(double *distance, float *gram, int64_t n, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    struct gram_argument a = {distance, gram, n};
    QG_LAUNCH(cuda, shift_diagonal, 1, GRAM_THREADS, a);
}

/* ---------------------------------------------------------------- nearly normal numbers */

struct bell_argument {
    float *out;
    qg_noise_key key;
    int64_t count;
};

static __global__ void bell_elements(struct bell_argument a) {
    const int64_t stride = (int64_t)gridDim.x * THREADS;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < a.count; i += stride) {
        int32_t sum = -2 * 0xffffff;
        UNROLL
        for (uint32_t k = 0; k < 4; k++) {
            sum += qg_noise_element(&a.key, 4 * (uint32_t)i + k);
        }
        a.out[i] = (float)sum * 0x1p-24f;
    }
}

/* One launch for the elements whose noise has one key, that is one high word of the index. */
void qg_cuda_bell(float *out, const qg_noise_stream *stream, int64_t count, void *queue) {
    qg_cuda *cuda = (qg_cuda *)queue;
    const int64_t most = (int64_t)1 << 30;
    for (int64_t i = 0; i * most < count; i++) {
        struct bell_argument a;
        a.out = out + i * most;
        a.key = qg_make_noise_key(stream, (uint32_t)i);
        a.count = smaller(count - i * most, most);
        QG_LAUNCH(cuda, bell_elements, qg_cuda_grid(cuda, a.count, THREADS), THREADS, a);
    }
}
