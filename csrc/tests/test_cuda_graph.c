/* What a refresh launches besides its linear algebra, captured in a CUDA graph and run on other numbers. */
#include "cuda/cuda.h"
#include "emulated.h"

enum { RANK = 5, DIM = 300, COUNT = RANK * DIM, BLOCK = 64, BLOCKS = RANK * ((DIM + BLOCK - 1) / BLOCK) };

/* Of one device: the CPU's are host memory. */
typedef struct arrays {
    float *basis, *decoded, *copy, *gram;
    uint16_t *half;
    int32_t *noise;
    uint8_t *codes, *zeros, *one_codes, *one_zero, *map_codes;
    uint16_t *scales, *one_scale;
    float *map_absmax, *absmax, *rate;
    double *squares, *norm, *distance;
} arrays;

static void *poisoned(int on_gpu, size_t size) {
    return on_gpu ? emulated_poisoned(size, 0) : guarded(size, 0);
}

static arrays make_arrays(int on_gpu) {
    arrays a;
    a.basis = poisoned(on_gpu, COUNT * 4);
    a.decoded = poisoned(on_gpu, COUNT * 4);
    a.copy = poisoned(on_gpu, COUNT * 4);
    a.gram = poisoned(on_gpu, RANK * RANK * 4);
    a.half = poisoned(on_gpu, COUNT * 2);
    a.noise = poisoned(on_gpu, COUNT * 4);
    a.codes = poisoned(on_gpu, COUNT);
    a.zeros = poisoned(on_gpu, BLOCKS);
    a.one_codes = poisoned(on_gpu, COUNT);
    a.one_zero = poisoned(on_gpu, 1);
    a.map_codes = poisoned(on_gpu, COUNT);
    a.scales = poisoned(on_gpu, BLOCKS * 2);
    a.one_scale = poisoned(on_gpu, 2);
    a.map_absmax = poisoned(on_gpu, BLOCKS * 4);
    a.absmax = poisoned(on_gpu, 4);
    a.rate = poisoned(on_gpu, 4);
    a.squares = poisoned(on_gpu, 8);
    a.norm = poisoned(on_gpu, 8);
    a.distance = poisoned(on_gpu, 8);
    return a;
}

static void start(const arrays *a, uint64_t seed) {
    random_seed(seed);
    for (int i = 0; i < COUNT; i++)
        a->basis[i] = (float)random_normal();
    for (int i = 0; i < RANK * RANK; i++)
        a->gram[i] = (float)(i % (RANK + 1) == 0) + 0.01f * (float)random_normal();
    *a->norm = 10.0;
}

static void run(const arrays *a, const qg_backend *backend) {
    void *queue = backend->queue;
    const qg_noise_stream stream = {1, 2, 3};
    const qg_projector blocks = {a->codes, a->scales, a->zeros, RANK, DIM, BLOCK, QG_INT8};
    const qg_projector whole = {a->one_codes, a->one_scale, a->one_zero, RANK, DIM, 0, QG_INT4};
    const qg_decode_item window = {&blocks, 0, RANK, 0, DIM, a->decoded};
    const qg_cast_item item = {a->half, a->decoded, QG_FLOAT32, RANK, DIM, DIM};
    const qg_array array = {a->basis, COUNT, QG_FLOAT32};
    backend->noise(a->noise, &stream, 7, COUNT, queue);
    backend->bell(a->copy, &stream, COUNT, queue);
    backend->absmax(a->absmax, &array, 1, queue);
    backend->sum_squares(a->squares, a->basis, QG_FLOAT32, COUNT, queue);
    backend->limit_growth(a->rate, a->norm, a->squares, 1.01, 0.1, a->absmax, queue);
    backend->normalise(a->basis, a->basis, QG_FLOAT32, COUNT, RANK, a->squares, queue);
    backend->shift_gram(a->distance, a->gram, RANK, queue);
    backend->projector_quantize(&blocks, a->basis, queue);
    backend->projector_quantize(&whole, a->basis, queue);
    backend->projector_dequantize(&window, 1, QG_FLOAT32, queue);
    backend->cast(&item, 1, QG_BFLOAT16, queue);
    backend->dynamic8_quantize(a->map_codes, a->map_absmax, a->decoded, RANK, DIM, BLOCK, 1, queue);
    backend->dynamic8_dequantize(a->decoded, a->map_codes, a->map_absmax, RANK, DIM, BLOCK, 1, queue);
    backend->scaled_cast(a->copy, QG_FLOAT32, a->decoded, QG_FLOAT32, RANK, DIM, DIM, 0.5f, queue);
}

static void compare(const arrays *got, const arrays *want, int round) {
    const int packed = RANK * (DIM / 2);
    CHECK_BYTES(got->noise, want->noise, COUNT * 4, "noise, round %d", round);
    CHECK_BYTES(got->absmax, want->absmax, 4, "absmax, round %d", round);
    CHECK_BYTES(got->squares, want->squares, 8, "squares, round %d", round);
    CHECK_BYTES(got->rate, want->rate, 4, "rate, round %d", round);
    CHECK_BYTES(got->norm, want->norm, 8, "norm, round %d", round);
    CHECK_BYTES(got->distance, want->distance, 8, "distance, round %d", round);
    CHECK_BYTES(got->basis, want->basis, COUNT * 4, "basis, round %d", round);
    CHECK_BYTES(got->codes, want->codes, COUNT, "codes, round %d", round);
    CHECK_BYTES(got->one_codes, want->one_codes, (size_t)packed, "codes with one scale, round %d", round);
    CHECK_BYTES(got->map_codes, want->map_codes, COUNT, "codes of the dynamic map, round %d", round);
    CHECK_BYTES(got->half, want->half, COUNT * 2, "cast, round %d", round);
    CHECK_BYTES(got->copy, want->copy, COUNT * 4, "scaled cast, round %d", round);
}

int main(void) {
    cudaGraph_t graph = NULL;
    cudaGraphExec_t executable = NULL;
    const qg_backend *gpu = emulated_table();
    const cudaStream_t stream = ((const qg_cuda *)gpu->queue)->stream;
    const arrays want = make_arrays(0), got = make_arrays(1);
    start(&got, 100);
    const float first = got.basis[0];
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "begin of the capture");
    run(&got, gpu);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess, "end of the capture");
    CHECK(got.basis[0] == first, "captured work has run already");
    CHECK(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess, "the graph");
    for (int round = 0; round < 2; round++) {
        start(&want, 200 + (uint64_t)round);
        start(&got, 200 + (uint64_t)round);
        run(&want, level(QG_SIMD_SCALAR));
        CHECK(cudaGraphLaunch(executable, stream) == cudaSuccess, "launch %d", round);
        compare(&got, &want, round);
    }
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    emulated_release();
    RELEASE("the CPU's arrays");
    emulated_check("all calls");
    return check_finish();
}
