/* The bytes that one projected step of an INT8 weight moves on a GPU, against the floor of docs/kernels/README.md.
 *
 * The emulator counts what the kernels load and store (shares of elements; scales and absmax, some 2 %, are added here),
 * and each product counts its operands and its result once. */
#include "standin.h"

enum { RANK = 64, BLOCK = 256 };

typedef struct counting {
    qg_linalg table; /* first: its context is this struct */
    const qg_linalg *inner;
    double bytes;
} counting;

static qg_status counted_gemm(
    void *context,
    qg_format format,
    int32_t accumulate,
    int64_t m,
    int64_t n,
    int64_t k,
    const void *a,
    int64_t a_row_stride,
    int64_t a_col_stride,
    const void *b,
    int64_t b_row_stride,
    int64_t b_col_stride,
    void *c,
    int64_t c_row_stride) {
    counting *self = context;
    self->bytes += (double)(m * k + k * n + m * n) * (format == QG_FLOAT32 ? 4 : 2);
    return self->inner->gemm(
        self->inner->context, format, accumulate, m, n, k, a, a_row_stride, a_col_stride, b, b_row_stride, b_col_stride,
        c, c_row_stride);
}

static void *filled(size_t size, int byte) {
    return memset(device(NULL, size), byte, size);
}

static float *normals(int64_t count, double size) {
    float *values = device(NULL, (size_t)count * 4);
    for (int64_t i = 0; i < count; i++)
        values[i] = (float)(size * random_normal());
    return values;
}

static int64_t blocks_of(int64_t count) {
    return (count + BLOCK - 1) / BLOCK;
}

/* The least that a step can move with what is stored, products through memory, each array once. */
static double floor_of(int64_t rows, int64_t cols, int64_t dim, int64_t other, int low_rank) {
    const double weight = (double)(rows * cols), vectors = (double)(RANK * dim), r = (double)(RANK * other);
    const double decode = vectors * (0.5 + 3.0 / BLOCK + 2);                  /* codes, scales and zeros; bfloat16 */
    const double project = low_rank ? 0 : 2 * (vectors + weight + r);         /* P and G read, R written */
    const double adam = r * ((low_rank ? 4 : 2) + 2 + 4 * (1 + 4.0 / BLOCK)); /* R, N, two moments twice */
    const double expand = 2 * (vectors + r + weight);                         /* P and N read, U written */
    const double update = weight * (2 + 1 + 1 + 6.0 / BLOCK);                 /* U, codes twice, scales and zeros */
    return decode + project + adam + expand + update;
}

static void test_step(qg_cuda *cuda, qg_side side, int64_t rows, int64_t cols, int low_rank) {
    const qg_backend *gpu = qg_cuda_backend(cuda);
    const int64_t dim = side == QG_RIGHT ? cols : rows, other = side == QG_RIGHT ? rows : cols;
    const int64_t count = rows * cols, groups = blocks_of(count);
    counting counted = {.table = *qg_cuda_linalg(cuda), .inner = qg_cuda_linalg(cuda)};
    counted.table.context = &counted;
    counted.table.gemm = counted_gemm;
    qg_weight weight = {device(NULL, (size_t)count), device(NULL, (size_t)groups * 4), device(NULL, (size_t)groups * 2),
        rows, cols, BLOCK, QG_INT8};
    CHECK_OK(qg_int8_quantize(&weight, normals(count, 0.02), QG_FLOAT32, gpu));
    qg_projector projector = {device(NULL, (size_t)(RANK * dim / 2)), device(NULL, (size_t)(RANK * blocks_of(dim)) * 2),
        device(NULL, (size_t)(RANK * blocks_of(dim))), RANK, dim, BLOCK, QG_INT4};
    CHECK_OK(qg_projector_quantize(&projector, normals(RANK * dim, 0.05), gpu));
    const size_t r = (size_t)(RANK * other), absmax = (size_t)(RANK * blocks_of(other)) * 4;
    qg_step_task task = {.weight = weight,
        .moments = {filled(r, 127), filled(r, 0), filled(absmax, 0), filled(absmax, 0), BLOCK, QG_DYNAMIC8},
        .projector = projector,
        .gradient = low_rank ? normals(RANK * other, 1.0) : NULL,
        .grad_format = QG_FLOAT32,
        .side = side,
        .low_rank_gradient = low_rank,
        .noise_step = 1,
        .bias_step = 1};
    if (!low_rank) {
        uint16_t *gradient = device(NULL, (size_t)count * 2);
        for (int64_t i = 0; i < count; i++)
            gradient[i] = (uint16_t)(0x3c00 + random_below(0x400) + (random_below(2) << 15));
        task.gradient = gradient;
        task.grad_format = QG_BFLOAT16;
    }
    const qg_step_params params = {.struct_size = sizeof params,
        .stochastic_round = 1,
        .lr = 1e-4,
        .beta1 = 0.9,
        .beta2 = 0.99,
        .eps = 1e-8,
        .scale = 0.25,
        .gemm_format = QG_BFLOAT16};
    size_t bytes = 0;
    CHECK_OK(qg_galore_scratch_size(&task, 1, &params, gpu, &bytes));
    void *scratch = device(NULL, bytes);
    emulator_reset_counts();
    CHECK_OK(qg_galore_step(&task, 1, &params, scratch, bytes, gpu, &counted.table));
    CHECK(emulator_waits() == 0, "the host waited %lld times", (long long)emulator_waits());
    const double tables = (double)groups * 6 + (double)(RANK * blocks_of(dim)) * 3 + 4.0 * (double)absmax;
    const double moved = (double)emulator_bytes(NULL) + counted.bytes + tables;
    const double share = moved / floor_of(rows, cols, dim, other, low_rank);
    CHECK(
        share > 0.97 && share < 1.10, "%s, %lld x %lld, %s gradient: %.3f of the floor",
        side == QG_RIGHT ? "right" : "left", (long long)rows, (long long)cols, low_rank ? "low-rank" : "full", share);
    /* P is decoded once, on the left again for R, and R and both moments are gone through once. */
    const int64_t passes = side == QG_LEFT && !low_rank ? 2 : 1, decoded = emulator_bytes("decode_units");
    CHECK(decoded == passes * RANK * dim * 5 / 2, "%lld bytes of bases decoded", (long long)decoded);
    const int64_t adam = RANK * other * ((low_rank ? 4 : 2) + 2 + 4), stepped = emulator_bytes("adam_kernel");
    CHECK(stepped == adam, "Adam moves %lld bytes, not %lld", (long long)stepped, (long long)adam);
    emulated_release();
}

int main(void) {
    standin_cublas();
    standin_cusolver();
    qg_cuda *cuda = open_device(0, 0);
    begin(cuda);
    random_seed(71);
    for (int low_rank = 0; low_rank < 2; low_rank++) {
        test_step(cuda, QG_RIGHT, 688, 256, low_rank);
        test_step(cuda, QG_LEFT, 256, 688, low_rank);
    }
    qg_cuda_end(cuda);
    qg_cuda_close(cuda);
    return check_finish();
}
