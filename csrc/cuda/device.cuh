/* device.cuh - what the kernels of a GPU share: the scalar definitions, teams of threads, memory by 16 bytes, lists.
 *
 * A team is half a warp. It takes a group or block of elements in pieces of 256, each thread 16 consecutive ones: of
 * codes that is one access of 16 bytes, of float32 four. A share that is not whole, or whose address is not a multiple
 * of 16, is accessed element by element; all kernels are right for any pointer and any size, and fast for the usual ones.
 * Teams of a warp may be at different places: every shuffle names its own team alone.
 */
#ifndef QG_CUDA_DEVICE_CUH
#define QG_CUDA_DEVICE_CUH

#include "cuda/cuda.h"

/* The definitions of core/, for both sides: a launcher prepares with them what all threads of an item share. */
#define QG_INLINE static __host__ __device__ inline
#define QG_TABLE static __constant__ const

#include "core/dynamic8.h"
#include "core/scalar.h"

#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

#ifndef QG_EMULATED /* the emulator counts bytes and checks alignment */
#define emulator_note_load(from, size) ((void)0)
#define emulator_note_store(to, size) ((void)0)
#endif

enum {
    THREADS = 256, /* of a block */
    TEAM = 16,     /* threads that share one group or block of elements */
    TEAMS = THREADS / TEAM,
    SHARE = 16,           /* consecutive elements of one thread */
    PIECE = TEAM * SHARE, /* elements that a team holds in registers */
    LIST_BYTES = 4000,    /* of a kernel's argument, of which older drivers take 4096 */
};

/* ---------------------------------------------------------------- sizes */

static __host__ __device__ inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* a / b for a >= 0, b > 0. GPUs divide integers in software, and 64 bits take four times as long as 32. */
static __host__ __device__ inline int64_t quotient(int64_t a, int64_t b) {
    return ((uint64_t)(a | b) >> 32) == 0 ? (int64_t)((uint32_t)a / (uint32_t)b) : a / b;
}

static __host__ __device__ inline int64_t pieces(int64_t count, int64_t size) {
    return quotient(count, size) + (quotient(count, size) * size != count);
}

static __host__ __device__ inline int64_t format_size(qg_format format) {
    return format == QG_FLOAT32 ? 4 : format == QG_BFLOAT16 || format == QG_FLOAT16 ? 2 : 1;
}

/* ---------------------------------------------------------------- teams */

/* The unit of work that this team begins with, and how far it is to the next: units are dealt out to teams in turn. */
static __device__ inline int64_t first_unit(void) {
    return (int64_t)blockIdx.x * TEAMS + threadIdx.x / TEAM;
}

static __device__ inline int64_t unit_stride(void) {
    return (int64_t)gridDim.x * TEAMS;
}

/* The number of this thread in its team. */
static __device__ inline int team_rank(void) {
    return (int)(threadIdx.x % TEAM);
}

/* How many of `left` elements are in a thread's share, which they begin with: 0 to 16. */
static __device__ inline int share_of(int64_t left) {
    return left >= SHARE ? SHARE : left > 0 ? (int)left : 0;
}

static __device__ inline unsigned team_mask(void) {
    return 0xffffu << (threadIdx.x & TEAM);
}

static __device__ inline int32_t team_smallest(int32_t x) {
    UNROLL
    for (int distance = TEAM / 2; distance > 0; distance /= 2) {
        const int32_t other = __shfl_xor_sync(team_mask(), x, distance);
        x = other < x ? other : x;
    }
    return x;
}

static __device__ inline int32_t team_largest(int32_t x) {
    UNROLL
    for (int distance = TEAM / 2; distance > 0; distance /= 2) {
        const int32_t other = __shfl_xor_sync(team_mask(), x, distance);
        x = other > x ? other : x;
    }
    return x;
}

/* ---------------------------------------------------------------- tables */

/* *to, in shared memory, = *from, by all threads of a block: where threads of a warp look up different entries, constant
 * memory serves them one after the other. Eight entries lie in eight banks. */
static __device__ inline void copy_map(qg_dynamic_map *to, const qg_dynamic_map *from) {
    const int i = (int)threadIdx.x;
    if (i < 8) {
        to->base[i] = from->base[i];
        to->high[i] = from->high[i];
        to->low[i] = from->low[i];
        to->bound[i] = from->bound[i];
        to->last[i] = from->last[i];
        to->slope[i] = from->slope[i];
        to->intercept[i] = from->intercept[i];
    }
    if (i == 0) {
        to->zero = from->zero;
    }
    __syncthreads();
}

/* ---------------------------------------------------------------- lists
 *
 * One launch works on as many items as fit, with their ends, in LIST_BYTES of argument. Item i has the units up to
 * end[i], the last one up to `units`; the item of a unit is found by going along the ends. */

/* A team's units ascend: its next one is of the same item or of a later one. */
static __device__ inline int later_item(const int64_t *end, int item, int64_t unit) {
    while (unit >= end[item]) {
        item++;
    }
    return item;
}

/* The unit's number within its item. */
static __device__ inline int64_t unit_of_item(const int64_t *end, int item, int64_t unit) {
    return item == 0 ? unit : unit - end[item - 1];
}

/* Whether a task whose largest gradient is at `absmax` may be worked on (NaN: no). */
static __device__ inline int gradient_is_good(const float *absmax) {
    return absmax == NULL || *absmax <= QG_LARGEST_GRADIENT;
}

/* ---------------------------------------------------------------- memory
 *
 * Each of these accesses the first n of a thread's 16 elements, 0 <= n <= 16. What a load leaves out is 0. */

static __device__ inline int is_whole(const void *address, int n) {
    return n == SHARE && ((uintptr_t)address & 15) == 0;
}

/* 16 aligned bytes: one access. */
#ifndef QG_EMULATED
static __device__ inline void load_words(uint32_t out[4], const void *from) {
    const uint4 w = *(const uint4 *)from;
    out[0] = w.x;
    out[1] = w.y;
    out[2] = w.z;
    out[3] = w.w;
}

static __device__ inline void store_words(void *to, const uint32_t in[4]) {
    *(uint4 *)to = make_uint4(in[0], in[1], in[2], in[3]);
}

/* The same for floats, as one instruction: nvcc 13.0 takes a uint4 of them apart, for the branch beside it stores them
 * one by one. (Codes are left whole, and int8_quantize would spill on sm_120.) */
static __device__ inline void store_float_words(void *to, const uint32_t in[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(in[0]), "r"(in[1]),
        "r"(in[2]), "r"(in[3])
        : "memory");
}
#else
/* g++ takes an array of another type for other memory. */
static inline void load_words(uint32_t out[4], const void *from) {
    emulator_note_load(from, 16);
    memcpy(out, from, 16);
}

static inline void store_words(void *to, const uint32_t in[4]) {
    emulator_note_store(to, 16);
    memcpy(to, in, 16);
}

static inline void store_float_words(void *to, const uint32_t in[4]) {
    store_words(to, in);
}
#endif

/* Byte i and half i of 16, in words; i is a constant after unrolling. What is set has to be 0 before. */
static __device__ inline uint8_t byte_of(const uint32_t bytes[4], int i) {
    return (uint8_t)(bytes[i / 4] >> (8 * (i % 4)));
}

static __device__ inline void set_byte(uint32_t bytes[4], int i, uint8_t byte) {
    bytes[i / 4] |= (uint32_t)byte << (8 * (i % 4));
}

static __device__ inline uint16_t half_of(const uint32_t halves[8], int i) {
    return (uint16_t)(halves[i / 2] >> (16 * (i % 2)));
}

static __device__ inline void set_half(uint32_t halves[8], int i, uint16_t half) {
    halves[i / 2] |= (uint32_t)half << (16 * (i % 2));
}

static __device__ inline void load_bytes(uint32_t bytes[4], const uint8_t *from, int n) {
    if (is_whole(from, n)) {
        load_words(bytes, from);
        return;
    }
    bytes[0] = bytes[1] = bytes[2] = bytes[3] = 0;
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        if (i < n) {
            emulator_note_load(from + i, 1);
            set_byte(bytes, i, from[i]);
        }
    }
}

static __device__ inline void store_bytes(uint8_t *to, const uint32_t bytes[4], int n) {
    if (is_whole(to, n)) {
        store_words(to, bytes);
        return;
    }
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        if (i < n) {
            emulator_note_store(to + i, 1);
            to[i] = byte_of(bytes, i);
        }
    }
}

static __device__ inline void load_halves(uint32_t halves[8], const uint16_t *from, int n) {
    if (is_whole(from, n)) {
        load_words(halves, from);
        load_words(halves + 4, from + 8);
        return;
    }
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        if (i % 2 == 0) {
            halves[i / 2] = 0;
        }
        if (i < n) {
            emulator_note_load(from + i, 2);
            set_half(halves, i, from[i]);
        }
    }
}

static __device__ inline void store_halves(uint16_t *to, const uint32_t halves[8], int n) {
    if (is_whole(to, n)) {
        store_float_words(to, halves);
        store_float_words(to + 8, halves + 4);
        return;
    }
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        if (i < n) {
            emulator_note_store(to + i, 2);
            to[i] = half_of(halves, i);
        }
    }
}

static __device__ inline void load_float32(float x[SHARE], const float *from, int n) {
    if (is_whole(from, n)) {
        UNROLL
        for (int i = 0; i < SHARE; i += 4) {
            uint32_t bits[4];
            load_words(bits, from + i);
            x[i] = qg_float(bits[0]);
            x[i + 1] = qg_float(bits[1]);
            x[i + 2] = qg_float(bits[2]);
            x[i + 3] = qg_float(bits[3]);
        }
        return;
    }
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        x[i] = 0;
        if (i < n) {
            emulator_note_load(from + i, 4);
            x[i] = from[i];
        }
    }
}

static __device__ inline void store_float32(float *to, const float x[SHARE], int n) {
    if (is_whole(to, n)) {
        UNROLL
        for (int i = 0; i < SHARE; i += 4) {
            const uint32_t bits[4] = {qg_bits(x[i]), qg_bits(x[i + 1]), qg_bits(x[i + 2]), qg_bits(x[i + 3])};
            store_float_words(to + i, bits);
        }
        return;
    }
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        if (i < n) {
            emulator_note_store(to + i, 4);
            to[i] = x[i];
        }
    }
}

/* A quarter of a share, of which n elements are left: where 16 of each array would take too many registers. */
static __device__ inline int is_whole_four(const void *address, int n) {
    return n >= 4 && ((uintptr_t)address & 15) == 0;
}

static __device__ inline void load_four(float x[4], const float *from, int n) {
    if (is_whole_four(from, n)) {
        uint32_t bits[4];
        load_words(bits, from);
        x[0] = qg_float(bits[0]);
        x[1] = qg_float(bits[1]);
        x[2] = qg_float(bits[2]);
        x[3] = qg_float(bits[3]);
        return;
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        x[i] = 0;
        if (i < n) {
            emulator_note_load(from + i, 4);
            x[i] = from[i];
        }
    }
}

static __device__ inline void store_four(float *to, const float x[4], int n) {
    if (is_whole_four(to, n)) {
        const uint32_t bits[4] = {qg_bits(x[0]), qg_bits(x[1]), qg_bits(x[2]), qg_bits(x[3])};
        store_float_words(to, bits);
        return;
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        if (i < n) {
            emulator_note_store(to + i, 4);
            to[i] = x[i];
        }
    }
}

/* source[i] as float32, from FLOAT32, BFLOAT16 or FLOAT16. */
static __device__ inline float load_float(const void *source, qg_format format, int64_t i) {
    if (format == QG_FLOAT32) {
        return ((const float *)source)[i];
    }
    const uint16_t half = ((const uint16_t *)source)[i];
    return format == QG_BFLOAT16 ? qg_from_bfloat16(half) : qg_from_float16(half);
}

/* x = source[first ..] as float32, from FLOAT32, BFLOAT16 or FLOAT16. */
static __device__ inline void load_floats(float x[SHARE], const void *source, qg_format format, int64_t first, int n) {
    if (format == QG_FLOAT32) {
        load_float32(x, (const float *)source + first, n);
        return;
    }
    uint32_t halves[8];
    load_halves(halves, (const uint16_t *)source + first, n);
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        const uint16_t half = half_of(halves, i);
        x[i] = format == QG_BFLOAT16 ? qg_from_bfloat16(half) : qg_from_float16(half);
    }
}

/* target[first ..] = x, rounded to nearest even. */
static __device__ inline void store_floats(void *target, qg_format format, int64_t first, const float x[SHARE], int n) {
    if (format == QG_FLOAT32) {
        store_float32((float *)target + first, x, n);
        return;
    }
    uint32_t halves[8] = {0};
    UNROLL
    for (int i = 0; i < SHARE; i++) {
        set_half(halves, i, format == QG_BFLOAT16 ? qg_to_bfloat16(x[i]) : qg_to_float16(x[i]));
    }
    store_halves((uint16_t *)target + first, halves, n);
}

/* The bits of the largest |x| of elements first .. end, as all threads of the team get them: they order as |x| does. */
static __device__ inline int32_t team_magnitude(const void *source, qg_format format, int64_t first, int64_t end) {
    int32_t largest = 0;
    for (int64_t i = first + team_rank() * SHARE; i < end; i += PIECE) {
        float x[SHARE];
        load_floats(x, source, format, i, share_of(end - i));
        UNROLL
        for (int k = 0; k < SHARE; k++) {
            largest = qg_magnitude(x[k]) > largest ? qg_magnitude(x[k]) : largest;
        }
    }
    return team_largest(largest);
}

#endif
