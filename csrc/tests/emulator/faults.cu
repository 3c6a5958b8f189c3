/* faults.cu - kernels that do one thing wrong, and twins that do it right: what the emulator is tested with. */
#include "faults.h"

#define WHOLE 0xffffffffu

/* The entry of each kernel: c->blocks blocks of c->threads threads. */
#define ENTRY(name)                                                                                      \
    cudaError_t name(const fault_case *c, cudaStream_t stream) {                                         \
        void *arguments[] = {(void *)c};                                                                 \
        return cudaLaunchKernel(name##_kernel, dim3(c->blocks), dim3(c->threads), arguments, 0, stream); \
    }

/* ---------------------------------------------------------------- meeting places */

static __global__ void fault_barrier_in_branch_kernel(fault_case c) {
    if (c.wrong && threadIdx.x == 3)
        __syncthreads();
    else
        __syncthreads();
    c.out[threadIdx.x] = 1;
}

static __global__ void fault_barrier_after_end_kernel(fault_case c) {
    if (c.wrong && threadIdx.x == 3)
        return;
    __syncthreads();
    c.out[threadIdx.x] = 1;
}

static __global__ void fault_barrier_rounds_kernel(fault_case c) {
    const int rounds = c.wrong && threadIdx.x == 3 ? 2 : 3;
    for (int round = 0; round < rounds; round++)
        __syncthreads();
    c.out[threadIdx.x] = rounds;
}

static __global__ void fault_shuffle_after_end_kernel(fault_case c) {
    if (c.wrong && threadIdx.x >= 30)
        return;
    c.out[threadIdx.x] = __shfl_xor_sync(WHOLE, (int)threadIdx.x, 1);
}

static __global__ void fault_shuffle_in_branch_kernel(fault_case c) {
    if (threadIdx.x % 32 < 16)
        c.out[threadIdx.x] = __shfl_xor_sync(c.wrong ? WHOLE : 0x0000ffffu, (int)threadIdx.x, 1);
    __syncthreads();
}

static __global__ void fault_shuffle_mask_kernel(fault_case c) {
    const unsigned mask = threadIdx.x % 32 < 16 || c.wrong ? 0x0000ffffu : 0xffff0000u;
    c.out[threadIdx.x] = __shfl_xor_sync(mask, (int)threadIdx.x, 1);
}

static __global__ void fault_shuffle_source_kernel(fault_case c) {
    const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    c.out[threadIdx.x] = __shfl_down_sync(mask, (int)threadIdx.x, 1, c.wrong ? 32 : 16);
}

static __global__ void fault_shuffle_two_masks_kernel(fault_case c) {
    const unsigned mask = c.wrong && threadIdx.x % 32 == 5 ? 0x0000ffffu : WHOLE;
    c.out[threadIdx.x] = __any_sync(mask, threadIdx.x == 2);
}

ENTRY(fault_barrier_in_branch)
ENTRY(fault_barrier_after_end)
ENTRY(fault_barrier_rounds)
ENTRY(fault_shuffle_after_end)
ENTRY(fault_shuffle_in_branch)
ENTRY(fault_shuffle_mask)
ENTRY(fault_shuffle_source)
ENTRY(fault_shuffle_two_masks)

/* ---------------------------------------------------------------- out of bounds */

static __global__ void fault_global_read_kernel(fault_case c) {
    const int64_t last = c.count - 1 + c.wrong;
    for (int64_t i = threadIdx.x; i <= last; i += blockDim.x)
        atomicAdd(&c.out[0], c.in[i]);
}

static __global__ void fault_global_write_kernel(fault_case c) {
    const int64_t last = c.count - 1 + c.wrong;
    for (int64_t i = threadIdx.x; i <= last; i += blockDim.x)
        c.out[i] = 7;
}

static __global__ void fault_shared_index_kernel(fault_case c) {
    __shared__ int values[32];
    const int i = (int)threadIdx.x + (c.wrong && threadIdx.x == 31);
    values[i] = 1;
    __syncthreads();
    c.out[threadIdx.x] = values[31 - threadIdx.x];
}

/* Not inlined: where the compiler sees the array, UndefinedBehaviorSanitizer reports it too. */
__attribute__((noinline)) static __device__ void set_one(int *values, int i) {
    values[i] = 1;
}

static __global__ void fault_shared_pointer_kernel(fault_case c) {
    __shared__ int values[32];
    set_one(values, (int)threadIdx.x + (c.wrong && threadIdx.x == 31));
    __syncthreads();
    c.out[threadIdx.x] = values[31 - threadIdx.x];
}

static __global__ void fault_null_kernel(fault_case c) {
    volatile int *const target = c.wrong ? NULL : c.out;
    *target = 1;
}

static __device__ int depth(volatile int *seen, int left) {
    volatile char some[256];
    some[0] = (char)left;
    if (left == 0)
        return *seen;
    return depth(seen, left - 1) + some[0] - (char)left;
}

static __global__ void fault_stack_kernel(fault_case c) {
    c.out[0] = depth(c.out, c.wrong ? 1000000 : 10);
}

ENTRY(fault_global_read)
ENTRY(fault_global_write)
ENTRY(fault_shared_index)
ENTRY(fault_shared_pointer)
ENTRY(fault_null)
ENTRY(fault_stack)

/* ---------------------------------------------------------------- 16 bytes at once */

static __device__ void copy_four(int *target, const int *source) {
    emulator_note_load(source, 16);
    const int4 four = *(const int4 *)source;
    emulator_note_store(target, 16);
    *(int4 *)target = four;
}

static __global__ void fault_misaligned_kernel(fault_case c) {
    copy_four(c.out, c.in + c.wrong);
}

static __global__ void fault_vector_read_kernel(fault_case c) {
    for (int64_t i = 4 * threadIdx.x; i + (c.wrong ? 0 : 4) <= c.count; i += 4 * blockDim.x)
        copy_four(c.out + i, c.in + i);
}

ENTRY(fault_misaligned)
ENTRY(fault_vector_read)

/* ---------------------------------------------------------------- races */

static __global__ void fault_shared_unwritten_kernel(fault_case c) {
    __shared__ int values[32];
    if (!c.wrong || threadIdx.x != 9)
        values[threadIdx.x] = 1;
    __syncthreads();
    c.out[threadIdx.x] = values[31 - threadIdx.x] & 0xff;
}

static __global__ void fault_shared_race_kernel(fault_case c) {
    __shared__ int values[64];
    values[threadIdx.x] = c.in[threadIdx.x];
    if (!c.wrong)
        __syncthreads();
    c.out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

static __global__ void fault_global_race_kernel(fault_case c) {
    if (c.wrong)
        c.out[threadIdx.x / 2] = (int)threadIdx.x;
    else
        c.out[threadIdx.x] = (int)threadIdx.x;
}

static __global__ void fault_block_race_kernel(fault_case c) {
    const int next = c.wrong ? (int)((blockIdx.x + 1) % gridDim.x) : (int)blockIdx.x;
    if (threadIdx.x == 0)
        c.out[blockIdx.x] = c.out[next] + 1;
}

ENTRY(fault_shared_unwritten)
ENTRY(fault_shared_race)
ENTRY(fault_global_race)
ENTRY(fault_block_race)

/* ---------------------------------------------------------------- right ones */

static __global__ void right_shuffles_kernel(fault_case c) {
    const int lane = (int)threadIdx.x % 32;
    int *out = c.out + lane;
    out[0] = __shfl_sync(WHOLE, c.in[lane], 5);
    out[32] = __shfl_sync(WHOLE, c.in[lane], 3, 8);
    out[64] = __shfl_up_sync(WHOLE, c.in[lane], 2);
    out[96] = __shfl_down_sync(WHOLE, c.in[lane], 3, 16);
    out[128] = __shfl_xor_sync(WHOLE, c.in[lane], 16);
    out[160] = (int)__shfl_xor_sync(WHOLE, 0.5f * (float)c.in[lane], 1);
    out[192] = (int)__shfl_down_sync(WHOLE, 1e12 * c.in[lane], 1) != 0;
    out[224] = (int)(__shfl_sync(WHOLE, (long long)c.in[lane] << 33, 31 - lane) >> 33);
    out[256] = (int)__ballot_sync(WHOLE, c.in[lane] % 3 == 0);
    out[288] = __any_sync(WHOLE, lane == 7) + 2 * __any_sync(WHOLE, lane == 40);
    out[320] = __all_sync(WHOLE, lane < 32) + 2 * __all_sync(WHOLE, lane != 31);
}

static __global__ void right_halves_kernel(fault_case c) {
    const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    int sum = c.in[threadIdx.x];
    /* The teams of a warp come here after different numbers of rounds. */
    for (unsigned round = 0; round <= threadIdx.x / 16; round++) {
        __syncwarp(mask);
        sum = c.in[threadIdx.x];
        for (int step = 8; step > 0; step /= 2)
            sum += __shfl_xor_sync(mask, sum, step);
    }
    c.out[threadIdx.x] = sum;
}

static __global__ void right_sum_kernel(fault_case c) {
    __shared__ int sums[32];
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
    int sum = 0;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < c.count; i += (int64_t)blockDim.x * gridDim.x)
        sum += c.in[i];
    for (int step = 16; step > 0; step /= 2)
        sum += __shfl_down_sync(WHOLE, sum, step);
    if (lane == 0)
        sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        sum = lane < warps ? sums[lane] : 0;
        for (int step = 16; step > 0; step /= 2)
            sum += __shfl_down_sync(WHOLE, sum, step);
        if (lane == 0)
            c.out[blockIdx.x] = sum;
    }
}

static __global__ void right_atomics_kernel(fault_case c) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < c.count;
        i += (int64_t)blockDim.x * gridDim.x) {
        atomicAdd(&c.out[0], c.in[i]);
        atomicMax(&c.out[1], c.in[i]);
        atomicMin(&c.out[2], c.in[i]);
        atomicOr(&c.out[3], 1 << (c.in[i] & 15));
        atomicAnd(&c.out[4], ~(1 << (c.in[i] & 15)));
        atomicCAS(&c.out[5], 0, 42);
        atomicExch(&c.out[6], 43);
    }
}

static __global__ void right_indices_kernel(fault_case c) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    c.out[i] = (int)i;
}

ENTRY(right_shuffles)
ENTRY(right_halves)
ENTRY(right_sum)
ENTRY(right_atomics)

cudaError_t right_indices(const fault_case *c, cudaStream_t stream) {
    const dim3 grid(c->blocks, 2, 2), block(c->threads, 2, 2);
    void *arguments[] = {(void *)c};
    return cudaLaunchKernel(right_indices_kernel, grid, block, arguments, 0, stream);
}
