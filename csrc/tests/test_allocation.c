/* No qg_ function allocates: every call of the C library's allocators from the library and from here is counted (the
 * linker sends them to the functions below). */
#include "harness.h"
#include "reference.h"

#include <stdio.h>
#include <sys/mman.h>

static int64_t calls;

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *memory, size_t size);
void __real_free(void *memory);
int __real_posix_memalign(void **memory, size_t alignment, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
void *__real_mmap(void *address, size_t length, int protection, int flags, int file, off_t offset);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *memory, size_t size);
void __wrap_free(void *memory);
int __wrap_posix_memalign(void **memory, size_t alignment, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size);
void *__wrap_mmap(void *address, size_t length, int protection, int flags, int file, off_t offset);

void *__wrap_malloc(size_t size) {
    calls++;
    return __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size) {
    calls++;
    return __real_calloc(count, size);
}

void *__wrap_realloc(void *memory, size_t size) {
    calls++;
    return __real_realloc(memory, size);
}

void __wrap_free(void *memory) {
    calls++;
    __real_free(memory);
}

int __wrap_posix_memalign(void **memory, size_t alignment, size_t size) {
    calls++;
    return __real_posix_memalign(memory, alignment, size);
}

void *__wrap_aligned_alloc(size_t alignment, size_t size) {
    calls++;
    return __real_aligned_alloc(alignment, size);
}

void *__wrap_mmap(void *address, size_t length, int protection, int flags, int file, off_t offset) {
    calls++;
    return __real_mmap(address, length, protection, flags, file, offset);
}

enum { ROWS = 300, COLS = 257, RANK = 16, COUNT = ROWS * COLS, GROUPS = (COUNT + 255) / 256, R_COUNT = RANK * COUNT };

static uint8_t codes[COUNT], exp_avg[COUNT], exp_avg_sq[COUNT], basis[RANK * (ROWS + COLS)], basis_zeros[RANK * 8];
static float scales[GROUPS], absmax[2][COUNT], gradient[COUNT], decoded[COUNT], scratch[4 * COUNT],
    subspace_scratch[4 * COUNT];
static int16_t zeros[GROUPS];
static uint16_t basis_scales[RANK * 8];
static int32_t noise[COUNT];

static void every_call(const qg_backend *backend, int threads) {
    static const qg_format formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};
    ref_gemm_context context = {0, 0};
    qg_linalg linalg = ref_linalg(&context);
    float largest;
    size_t size = 0;
    qg_step_params params = {sizeof params, 1, 1e-3, 0.9, 0.999, 1e-8, 0.1, 0.25, 1, QG_BFLOAT16, 0.0};
    qg_weight weight = {codes, scales, zeros, ROWS, COLS, 256, QG_INT8};
    qg_step_task task = {.weight = weight,
        .moments = {exp_avg, exp_avg_sq, absmax[0], absmax[1], 256, QG_DYNAMIC8},
        .projector = {basis, basis_scales, basis_zeros, RANK, COLS, 256, QG_INT4},
        .gradient = gradient,
        .bias_step = 1};
    omp_set_num_threads(threads);
    CHECK_OK(qg_int8_quantize(&weight, gradient, QG_FLOAT32, backend));
    CHECK_OK(qg_projector_quantize(&task.projector, gradient, backend));
    CHECK_OK(qg_noise(noise, 1, 2, 3, 0, COUNT, backend));
    CHECK_OK(qg_dynamic8_quantize(exp_avg, absmax[0], gradient, ROWS, COLS, 256, 1, backend));
    CHECK_OK(qg_dynamic8_dequantize(decoded, exp_avg, absmax[0], ROWS, COLS, 256, 1, backend));
    for (int f = 0; f < 3; f++) {
        CHECK_OK(qg_int8_dequantize(&weight, decoded, formats[f], backend));
        CHECK_OK(qg_absmax(&largest, &(qg_array){decoded, COUNT, formats[f]}, 1, backend));
    }
    CHECK_OK(qg_projector_dequantize(&task.projector, decoded, QG_BFLOAT16, backend));
    CHECK_OK(qg_galore_scratch_size(&task, 1, &params, backend, &size));
    CHECK_OK(qg_galore_step(&task, 1, &params, scratch, sizeof scratch, backend, &linalg));
    task.side = QG_LEFT;
    task.projector.dim = ROWS;
    CHECK_OK(qg_galore_step(&task, 1, &params, scratch, sizeof scratch, backend, &linalg));
    double norm = 1.0;
    task.side = QG_FULL;
    task.right_projector = (qg_projector){basis, basis_scales, basis_zeros, RANK, COLS, 256, QG_INT4};
    task.norm = &norm;
    params.norm_growth_limit = 1.01;
    CHECK_OK(qg_galore_step(&task, 1, &params, scratch, sizeof scratch, backend, &linalg));
    CHECK_OK(qg_adam8_scratch_size(&task, 1, &params, backend, &size));
    CHECK_OK(qg_adam8_step(&task, 1, &params, scratch, sizeof scratch, backend));
    qg_subspace_params steps = {sizeof steps, 0, QG_BFLOAT16};
    qg_subspace_report report = {.struct_size = sizeof report};
    double energy;
    CHECK_OK(qg_subspace_scratch_size(ROWS, COLS, RANK, 2, QG_BFLOAT16, backend, &linalg, &size));
    CHECK(size <= sizeof subspace_scratch, "%zu bytes of scratch", size);
    CHECK_OK(qg_subspace_random(decoded, RANK, COLS, 1, 2, 3, subspace_scratch, size, backend, &linalg));
    CHECK_OK(qg_subspace_refresh(
        decoded, RANK, gradient, QG_FLOAT32, ROWS, COLS, QG_RIGHT, &steps, &report, subspace_scratch, size, backend,
        &linalg));
    CHECK_OK(qg_captured_energy(
        &energy, gradient, QG_FLOAT32, ROWS, COLS, decoded, RANK, gradient, RANK, QG_BFLOAT16, subspace_scratch, size,
        backend, &linalg));
    memset(decoded + RANK * COLS / 2, 0, RANK * COLS * 2); /* dead vectors: Householder QR */
    CHECK_OK(qg_captured_energy(
        &energy, gradient, QG_FLOAT32, ROWS, COLS, decoded, RANK, NULL, 0, QG_FLOAT32, subspace_scratch, size, backend,
        &linalg));
    CHECK(qg_adam8_step(&task, -1, &params, scratch, sizeof scratch, backend) == QG_INVALID_ARGUMENT, "count -1");
}

int main(void) {
    random_seed(11);
    for (int i = 0; i < COUNT; i++)
        gradient[i] = (float)random_normal();
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int threads = 1; level(simd) != NULL && threads <= 2; threads++) {
            every_call(level(simd), threads); /* OpenMP's threads are made here */
            calls = 0;
            every_call(level(simd), threads);
            CHECK(calls == 0, "level %d, %d threads: %lld allocations", simd, threads, (long long)calls);
        }
    }
    void *volatile memory = malloc(1);
    free(memory);
    CHECK(calls == 2, "the counter counts %lld of 2 calls", (long long)calls);
    return check_finish();
}
