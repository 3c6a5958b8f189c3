/* faults.h - the kernels of faults.cu, each launched in `stream`. */
#ifndef QG_TESTS_EMULATOR_FAULTS_H
#define QG_TESTS_EMULATOR_FAULTS_H

#include "cuda_runtime.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a kernel of faults.cu gets: memory, how many elements of it, how many threads a block has, and, for kernels that
 * can do the same in a wrong way, whether they do. */
typedef struct fault_case {
    int *out;
    const int *in;
    int64_t count;
    int threads;
    int blocks;
    int wrong;
} fault_case;

typedef cudaError_t fault_launch(const fault_case *c, cudaStream_t stream);

fault_launch fault_barrier_in_branch; /* threads of one block wait at two barriers */
fault_launch fault_barrier_after_end; /* some threads have ended */
fault_launch fault_barrier_rounds;    /* one thread waits at the same barrier once less than the others */
fault_launch fault_shuffle_after_end; /* the mask names lanes that have ended */
fault_launch fault_shuffle_in_branch; /* half a warp shuffles with the mask of the whole */
fault_launch fault_shuffle_mask;      /* the caller is not in its mask */
fault_launch fault_shuffle_source;    /* reads a lane outside of its mask */
fault_launch fault_shuffle_two_masks; /* lanes meet with different masks */
fault_launch fault_global_read;       /* in[count] */
fault_launch fault_global_write;      /* out[count] */
fault_launch fault_shared_index;      /* an array of shared memory at its size */
fault_launch fault_shared_pointer;    /* the same through a pointer: seen by AddressSanitizer alone */
fault_launch fault_shared_unwritten;  /* out depends on shared memory that nobody wrote */
fault_launch fault_shared_race;       /* no barrier between writing and reading shared memory */
fault_launch fault_global_race;       /* several threads write one element */
fault_launch fault_block_race;        /* a block reads what another one writes */
fault_launch fault_misaligned;        /* 16 bytes at once, one element off */
fault_launch fault_vector_read;       /* 16 bytes at once, past the end */
fault_launch fault_null;              /* a write through NULL */
fault_launch fault_stack;             /* a recursion without end */

/* Right kernels, whose results a test compares with values by hand. */
fault_launch right_shuffles; /* out[32 k + lane] for 11 shuffles and votes k */
fault_launch right_halves;   /* teams of 16 lanes with masks of their own: out[i] = sum of in over the team of i */
fault_launch right_sum;      /* out[block] = sum of in over the block, through shared memory */
fault_launch right_atomics;  /* out[0 .. 6] add, max, min, or, and, exchange, compare and swap over in[0 .. count) */
fault_launch right_indices;  /* out[i] = i for a block of (threads, 2, 2) and a grid of (blocks, 2, 2) */

#ifdef __cplusplus
}
#endif
#endif
