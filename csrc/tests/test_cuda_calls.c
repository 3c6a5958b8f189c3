/* Every call of the library on a GPU's tables against the same call on the CPU's: equal bits, close sums of GEMMs.
 *
 * Memory is the CUDA runtime's, so the program also runs, linked with the real library, on a GPU and under
 * compute-sanitizer (make gpu-check). */
#include "harness.h"
#include "reference.h"

#include <cuda_runtime.h>
#include <stdio.h>

#ifdef QG_EMULATED
#include "standin.h"
#endif

static cudaStream_t stream;
static const qg_backend *cpu, *gpu;
static const qg_linalg *gpu_linalg;

/* ---------------------------------------------------------------- memory */

enum { KEPT = 256 };
static void *kept[KEPT];
static int kept_count;

static void *device_memory(size_t size) {
    void *memory = NULL;
    CHECK(kept_count < KEPT && cudaMalloc(&memory, size > 0 ? size : 1) == cudaSuccess, "no %zu bytes", size);
    kept[kept_count++] = memory;
    return memory;
}

static void *up(const void *host, size_t size) {
    void *device = device_memory(size);
    CHECK(cudaMemcpyAsync(device, host, size, cudaMemcpyHostToDevice, stream) == cudaSuccess, "copy to the device");
    return device;
}

static void down(void *host, const void *device, size_t size) {
    CHECK(
        cudaMemcpyAsync(host, device, size, cudaMemcpyDeviceToHost, stream) == cudaSuccess &&
            cudaStreamSynchronize(stream) == cudaSuccess,
        "copy to the host: %s", cudaGetErrorString(cudaGetLastError()));
}

static void check_down(const void *device, const void *want, size_t size, const char *what) {
    void *got = malloc(size + 1);
    down(got, device, size);
    CHECK_BYTES(got, want, size, "%s", what);
    free(got);
}

static void release(const char *what) {
    for (int i = 0; i < kept_count; i++)
        CHECK(cudaFree(kept[i]) == cudaSuccess, "%s: memory is not given back", what);
    kept_count = 0;
    RELEASE("%s", what);
}

static size_t bytes_of(qg_format format) {
    return format == QG_FLOAT32 ? 4 : format == QG_BFLOAT16 || format == QG_FLOAT16 ? 2 : 1;
}

/* Normal numbers in a float format: through an INT8 weight of fine steps for the 16-bit ones. */
static void *numbers(int64_t count, qg_format format, double size) {
    float *values = guarded((size_t)count * 4, 0);
    for (int64_t i = 0; i < count; i++)
        values[i] = (float)(size * random_normal());
    if (format == QG_FLOAT32)
        return values;
    const int64_t groups = (count + 3) / 4;
    qg_weight weight = {guarded((size_t)count, 0), guarded((size_t)groups * 4, 0), guarded((size_t)groups * 2, 0), 1,
        count, 4, QG_INT8};
    void *out = guarded((size_t)count * 2, 0);
    CHECK_OK(qg_int8_quantize(&weight, values, QG_FLOAT32, cpu));
    CHECK_OK(qg_int8_dequantize(&weight, out, format, cpu));
    return out;
}

/* ---------------------------------------------------------------- formats */

static void test_noise(void) {
    int32_t want[1000];
    CHECK_OK(qg_noise(want, 7, 3, 11, 5, 1000, cpu));
    int32_t *got = device_memory(sizeof want);
    CHECK_OK(qg_noise(got, 7, 3, 11, 5, 1000, gpu));
    check_down(got, want, sizeof want, "noise");
    release("noise");
}

static void test_absmax(void) {
    const qg_format formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};
    qg_array host[4], device[4];
    float want[4];
    for (int i = 0; i < 4; i++) {
        const qg_format format = formats[i % 3];
        const int64_t count = i == 3 ? 0 : 3001;
        void *values = numbers(3001, format, 2.0);
        host[i] = (qg_array){values, count, format};
        device[i] = (qg_array){up(values, 3001 * bytes_of(format)), count, format};
    }
    CHECK_OK(qg_absmax(want, host, 4, cpu));
    float *got = device_memory(sizeof want);
    CHECK_OK(qg_absmax(got, device, 4, gpu));
    check_down(got, want, sizeof want, "absmax");
    release("absmax");
}

/* The same weight in both memories. */
static qg_weight weight_up(const qg_weight *host) {
    const int64_t count = host->rows * host->cols;
    qg_weight device = *host;
    device.data = up(host->data, (size_t)count * bytes_of(host->format));
    if (host->format == QG_INT8) {
        const int64_t groups = (count + host->group_size - 1) / host->group_size;
        device.scales = up(host->scales, (size_t)groups * 4);
        device.zeros = up(host->zeros, (size_t)groups * 2);
    }
    return device;
}

static qg_weight make_weight(int64_t rows, int64_t cols, qg_format format) {
    const int64_t count = rows * cols, groups = (count + 255) / 256;
    qg_weight weight = {NULL, NULL, NULL, rows, cols, 0, format};
    if (format != QG_INT8) {
        weight.data = numbers(count, format, 0.1);
        return weight;
    }
    weight = (qg_weight){guarded((size_t)count, 0), guarded((size_t)groups * 4, 0), guarded((size_t)groups * 2, 0),
        rows, cols, 256, QG_INT8};
    CHECK_OK(qg_int8_quantize(&weight, numbers(count, QG_FLOAT32, 0.1), QG_FLOAT32, cpu));
    return weight;
}

static void check_weight(const qg_weight *got, const qg_weight *want, const char *what) {
    const int64_t count = want->rows * want->cols;
    check_down(got->data, want->data, (size_t)count * bytes_of(want->format), what);
    if (want->format == QG_INT8) {
        const int64_t groups = (count + want->group_size - 1) / want->group_size;
        check_down(got->scales, want->scales, (size_t)groups * 4, what);
        check_down(got->zeros, want->zeros, (size_t)groups * 2, what);
    }
}

static void test_int8(void) {
    const qg_format formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};
    const int64_t rows = 7, cols = 331, count = rows * cols;
    for (int i = 0; i < 3; i++) {
        qg_weight weight = make_weight(rows, cols, QG_INT8), device = weight_up(&weight);
        const size_t size = (size_t)count * bytes_of(formats[i]);
        void *values = numbers(count, formats[i], 3.0), *decoded = guarded(size, 0), *got = device_memory(size);
        CHECK_OK(qg_int8_quantize(&weight, values, formats[i], cpu));
        CHECK_OK(qg_int8_quantize(&device, up(values, size), formats[i], gpu));
        check_weight(&device, &weight, "int8_quantize");
        CHECK_OK(qg_int8_dequantize(&weight, decoded, formats[i], cpu));
        CHECK_OK(qg_int8_dequantize(&device, got, formats[i], gpu));
        check_down(got, decoded, size, "int8_dequantize");
        release("int8");
    }
}

/* Encode vectors on both, compare, decode on both, compare. */
static void check_projector(qg_format format, int32_t block, int64_t rank, int64_t dim) {
    const int packed = format == QG_INT4 || format == QG_FP4 || format == QG_NF4;
    const int affine = format == QG_INT4 || format == QG_INT8;
    const int plain = format == QG_FLOAT32 || format == QG_BFLOAT16;
    const size_t codes = (size_t)(rank * (packed ? (dim + 1) / 2 : dim)) * bytes_of(format);
    const size_t scales = plain ? 0 : block == 0 ? 1 : (size_t)(rank * ((dim + block - 1) / block));
    qg_projector host = {guarded(codes, 0), plain ? NULL : guarded(scales * 2, 0), affine ? guarded(scales, 0) : NULL,
        rank, dim, block, format};
    qg_projector device = host;
    device.codes = device_memory(codes);
    device.scales = plain ? NULL : device_memory(scales * 2);
    device.zeros = affine ? device_memory(scales) : NULL;
    const float *basis = numbers(rank * dim, QG_FLOAT32, 0.2);
    CHECK_OK(qg_projector_quantize(&host, basis, cpu));
    CHECK_OK(qg_projector_quantize(&device, up(basis, (size_t)(rank * dim) * 4), gpu));
    check_down(device.codes, host.codes, codes, "projector codes");
    if (!plain)
        check_down(device.scales, host.scales, scales * 2, "projector scales");
    if (affine)
        check_down(device.zeros, host.zeros, scales, "projector zeros");
    const qg_format targets[] = {QG_FLOAT32, QG_BFLOAT16};
    for (int i = 0; i < 2; i++) {
        const size_t size = (size_t)(rank * dim) * bytes_of(targets[i]);
        void *want = guarded(size, 0), *got = device_memory(size);
        CHECK_OK(qg_projector_dequantize(&host, want, targets[i], cpu));
        CHECK_OK(qg_projector_dequantize(&device, got, targets[i], gpu));
        check_down(got, want, size, "projector_dequantize");
    }
    release("projector");
}

static void test_projector(void) {
    const qg_format formats[] = {QG_FLOAT32, QG_BFLOAT16, QG_INT8, QG_INT4, QG_FP8_E4M3, QG_FP4, QG_NF4, QG_DYNAMIC8};
    const int32_t blocks[] = {256, 64, 0};
    for (int i = 0; i < 8; i++) {
        for (int j = 0; j < 3; j++) {
            check_projector(formats[i], blocks[j], 5, 307);
            check_projector(formats[i], blocks[j], 3, 512);
        }
    }
}

static void test_dynamic8(void) {
    enum { ROWS = 5, COLS = 700, BLOCKS = 3 };
    const float *values = numbers(ROWS * COLS, QG_FLOAT32, 1.0);
    for (int is_signed = 0; is_signed < 2; is_signed++) {
        float *source = guarded_copy(values, ROWS * COLS * 4, 0);
        for (int64_t i = 0; !is_signed && i < ROWS * COLS; i++)
            source[i] *= source[i];
        uint8_t *codes = guarded(ROWS * COLS, 0), *got_codes = device_memory(ROWS * COLS);
        float *absmax = guarded(ROWS * BLOCKS * 4, 0), *got_absmax = device_memory(ROWS * BLOCKS * 4);
        float *decoded = guarded(ROWS * COLS * 4, 0), *got = device_memory(ROWS * COLS * 4);
        CHECK_OK(qg_dynamic8_quantize(codes, absmax, source, ROWS, COLS, 256, is_signed, cpu));
        CHECK_OK(
            qg_dynamic8_quantize(got_codes, got_absmax, up(source, ROWS * COLS * 4), ROWS, COLS, 256, is_signed, gpu));
        check_down(got_codes, codes, ROWS * COLS, "dynamic8 codes");
        check_down(got_absmax, absmax, ROWS * BLOCKS * 4, "dynamic8 absmax");
        CHECK_OK(qg_dynamic8_dequantize(decoded, codes, absmax, ROWS, COLS, 256, is_signed, cpu));
        CHECK_OK(qg_dynamic8_dequantize(got, got_codes, got_absmax, ROWS, COLS, 256, is_signed, gpu));
        check_down(got, decoded, ROWS * COLS * 4, "dynamic8_dequantize");
    }
    release("dynamic8");
}

/* ---------------------------------------------------------------- steps */

static size_t moments_blocks(int64_t rows, int64_t cols) {
    return (size_t)(rows * ((cols + 255) / 256));
}

static qg_moments make_moments(int64_t rows, int64_t cols, qg_format format) {
    const int64_t count = rows * cols;
    float *m = numbers(count, QG_FLOAT32, 0.5), *v = numbers(count, QG_FLOAT32, 0.5);
    for (int64_t i = 0; i < count; i++)
        v[i] *= v[i];
    if (format == QG_FLOAT32)
        return (qg_moments){m, v, NULL, NULL, 0, format};
    const size_t blocks = moments_blocks(rows, cols);
    qg_moments moments = {guarded((size_t)count, 0), guarded((size_t)count, 0), guarded(blocks * 4, 0),
        guarded(blocks * 4, 0), 256, format};
    CHECK_OK(qg_dynamic8_quantize(moments.exp_avg, moments.exp_avg_absmax, m, rows, cols, 256, 1, cpu));
    CHECK_OK(qg_dynamic8_quantize(moments.exp_avg_sq, moments.exp_avg_sq_absmax, v, rows, cols, 256, 0, cpu));
    return moments;
}

static qg_moments moments_up(const qg_moments *host, int64_t rows, int64_t cols) {
    const size_t size = (size_t)(rows * cols) * bytes_of(host->format);
    qg_moments device = *host;
    device.exp_avg = up(host->exp_avg, size);
    device.exp_avg_sq = up(host->exp_avg_sq, size);
    if (host->format == QG_DYNAMIC8) {
        device.exp_avg_absmax = up(host->exp_avg_absmax, moments_blocks(rows, cols) * 4);
        device.exp_avg_sq_absmax = up(host->exp_avg_sq_absmax, moments_blocks(rows, cols) * 4);
    }
    return device;
}

static void check_moments(const qg_moments *got, const qg_moments *want, int64_t rows, int64_t cols) {
    const size_t size = (size_t)(rows * cols) * bytes_of(want->format);
    check_down(got->exp_avg, want->exp_avg, size, "exp_avg");
    check_down(got->exp_avg_sq, want->exp_avg_sq, size, "exp_avg_sq");
    if (want->format == QG_DYNAMIC8) {
        check_down(got->exp_avg_absmax, want->exp_avg_absmax, moments_blocks(rows, cols) * 4, "exp_avg_absmax");
        check_down(
            got->exp_avg_sq_absmax, want->exp_avg_sq_absmax, moments_blocks(rows, cols) * 4, "exp_avg_sq_absmax");
    }
}

static const qg_step_params params = {.struct_size = sizeof(qg_step_params),
    .stochastic_round = 1,
    .lr = 0.01,
    .beta1 = 0.9,
    .beta2 = 0.99,
    .eps = 1e-8,
    .weight_decay = 0.1,
    .scale = 0.5,
    .seed = 5,
    .gemm_format = QG_FLOAT32};

/* A list of parameters of all formats, the last one with a gradient too large to be taken. */
static void test_adam8(void) {
    enum { TASKS = 9 };
    const qg_format weights[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16, QG_INT8};
    const qg_format grads[] = {QG_FLOAT32, QG_BFLOAT16, QG_FLOAT16};
    qg_step_task host[TASKS], device[TASKS];
    for (int i = 0; i < TASKS; i++) {
        const int64_t rows = 3 + i, cols = 401, count = rows * cols;
        const qg_format grad = grads[i % 3];
        float largest = i == TASKS - 1 ? INFINITY : 1.0f;
        host[i] = (qg_step_task){.weight = make_weight(rows, cols, weights[i % 4]),
            .moments = make_moments(1, count, i % 2 ? QG_FLOAT32 : QG_DYNAMIC8),
            .gradient = numbers(count, grad, 0.5),
            .grad_format = grad,
            .id = (uint32_t)i,
            .noise_step = 4,
            .bias_step = 3,
            .stats = guarded(16, 0),
            .gradient_absmax = guarded_copy(&largest, 4, 0)};
        memset(host[i].stats, 0, 16);
        device[i] = host[i];
        device[i].weight = weight_up(&host[i].weight);
        device[i].moments = moments_up(&host[i].moments, 1, count);
        device[i].gradient = up(host[i].gradient, (size_t)count * bytes_of(grad));
        device[i].stats = up(host[i].stats, 16);
        device[i].gradient_absmax = up(&largest, 4);
    }
    size_t bytes = 0;
    CHECK_OK(qg_adam8_scratch_size(host, TASKS, &params, cpu, &bytes));
    CHECK_OK(qg_adam8_step(host, TASKS, &params, guarded(bytes, 0), bytes, cpu));
    CHECK_OK(qg_adam8_scratch_size(device, TASKS, &params, gpu, &bytes));
    CHECK_OK(qg_adam8_step(device, TASKS, &params, device_memory(bytes), bytes, gpu));
    for (int i = 0; i < TASKS; i++) {
        check_weight(&device[i].weight, &host[i].weight, "adam8: weight");
        check_moments(&device[i].moments, &host[i].moments, 1, host[i].weight.rows * host[i].weight.cols);
        check_down(device[i].stats, host[i].stats, 16, "adam8: stats");
    }
    release("adam8");
}

/* ---------------------------------------------------------------- what takes products */

/* The CPU's, with products in the plainest form. */
static const qg_linalg *cpu_linalg(void) {
    static ref_gemm_context context;
    static qg_linalg table;
    table = ref_linalg(&context);
    return &table;
}

static void check_close(const float *device, const float *want, int64_t count, double most, const char *what) {
    float *got = malloc((size_t)count * 4);
    down(got, device, (size_t)count * 4);
    double worst = 0.0;
    for (int64_t i = 0; i < count; i++) {
        const double error = fabs((double)got[i] - want[i]);
        worst = error > worst || isnan(error) ? error : worst;
    }
    CHECK(worst <= most, "%s: off by %g, more than %g", what, worst, most);
    free(got);
}

static qg_projector make_projector(int64_t rank, int64_t dim) {
    qg_projector projector = {guarded((size_t)(rank * ((dim + 1) / 2)), 0), guarded((size_t)rank * 2, 0),
        guarded((size_t)rank, 0), rank, dim, 256, QG_INT4};
    CHECK_OK(qg_projector_quantize(&projector, numbers(rank * dim, QG_FLOAT32, 0.1), cpu));
    return projector;
}

static qg_projector projector_up(const qg_projector *host) {
    qg_projector device = *host;
    if (host->codes != NULL) {
        device.codes = up(host->codes, (size_t)(host->rank * ((host->dim + 1) / 2)));
        device.scales = up(host->scales, (size_t)host->rank * 2);
        device.zeros = up(host->zeros, (size_t)host->rank);
    }
    return device;
}

/* Float weights of each side, in one list: close. (INT8 codes may differ where a sum falls on the other side of a draw.) */
static void test_galore(void) {
    enum { TASKS = 4, RANK = 12 };
    const qg_side sides[] = {QG_RIGHT, QG_LEFT, QG_FULL, QG_RIGHT};
    qg_step_task host[TASKS], device[TASKS];
    for (int i = 0; i < TASKS; i++) {
        const int64_t rows = i == 3 ? 530 : 40, cols = 72;
        const int64_t other = sides[i] == QG_RIGHT ? rows : sides[i] == QG_LEFT ? cols : RANK;
        double norm = 1.0;
        host[i] = (qg_step_task){.weight = make_weight(rows, cols, QG_FLOAT32),
            .moments = make_moments(RANK, other, QG_DYNAMIC8),
            .projector = make_projector(RANK, sides[i] == QG_RIGHT ? cols : rows),
            .gradient = numbers(rows * cols, QG_BFLOAT16, 0.5),
            .grad_format = QG_BFLOAT16,
            .side = sides[i],
            .noise_step = 2,
            .bias_step = 2,
            .norm = guarded_copy(&norm, 8, 0)};
        if (sides[i] == QG_FULL)
            host[i].right_projector = make_projector(RANK, cols);
        device[i] = host[i];
        device[i].weight = weight_up(&host[i].weight);
        device[i].moments = moments_up(&host[i].moments, RANK, other);
        device[i].projector = projector_up(&host[i].projector);
        device[i].right_projector = projector_up(&host[i].right_projector);
        device[i].gradient = up(host[i].gradient, (size_t)(rows * cols) * 2);
        device[i].norm = up(&norm, 8);
    }
    qg_step_params limited = params;
    limited.norm_growth_limit = 1.5;
    size_t bytes = 0;
    CHECK_OK(qg_galore_scratch_size(host, TASKS, &limited, cpu, &bytes));
    CHECK_OK(qg_galore_step(host, TASKS, &limited, guarded(bytes, 0), bytes, cpu, cpu_linalg()));
    CHECK_OK(qg_galore_scratch_size(device, TASKS, &limited, gpu, &bytes));
    CHECK_OK(qg_galore_step(device, TASKS, &limited, device_memory(bytes), bytes, gpu, gpu_linalg));
    for (int i = 0; i < TASKS; i++) {
        const qg_weight *want = &host[i].weight;
        check_close(device[i].weight.data, want->data, want->rows * want->cols, 1e-5, "galore: weight");
    }
    release("galore");
}

/* A refresh and a random basis: vectors that agree to the rounding of float32 sums. */
static void test_subspace(void) {
    enum { ROWS = 60, COLS = 96, RANK = 12 };
    const qg_subspace_params how = {.struct_size = sizeof how, .steps = 1, .gemm_format = QG_FLOAT32};
    qg_subspace_report want_report = {.struct_size = sizeof want_report}, report = {.struct_size = sizeof report};
    float *gradient = numbers(ROWS * COLS, QG_FLOAT32, 1.0), *want = guarded(RANK * ROWS * 4, 0);
    float *device_gradient = up(gradient, ROWS * COLS * 4), *got = device_memory(RANK * ROWS * 4);
    size_t cpu_bytes = 0, gpu_bytes = 0;
    CHECK_OK(qg_subspace_scratch_size(ROWS, COLS, RANK, 1, QG_FLOAT32, cpu, cpu_linalg(), &cpu_bytes));
    CHECK_OK(qg_subspace_scratch_size(ROWS, COLS, RANK, 1, QG_FLOAT32, gpu, gpu_linalg, &gpu_bytes));
    void *scratch = guarded(cpu_bytes, 0), *device_scratch = device_memory(gpu_bytes);
    CHECK_OK(qg_subspace_random(want, RANK, ROWS, 3, 1, 0, scratch, cpu_bytes, cpu, cpu_linalg()));
    CHECK_OK(qg_subspace_random(got, RANK, ROWS, 3, 1, 0, device_scratch, gpu_bytes, gpu, gpu_linalg));
    check_close(got, want, RANK * ROWS, 1e-5, "subspace_random");
    CHECK_OK(qg_subspace_refresh(
        want, RANK, gradient, QG_FLOAT32, ROWS, COLS, QG_LEFT, &how, &want_report, scratch, cpu_bytes, cpu,
        cpu_linalg()));
    CHECK_OK(qg_subspace_refresh(
        got, RANK, device_gradient, QG_FLOAT32, ROWS, COLS, QG_LEFT, &how, &report, device_scratch, gpu_bytes, gpu,
        gpu_linalg));
    check_close(got, want, RANK * ROWS, 1e-4, "subspace_refresh");
    CHECK(!report.kept && fabs(report.energy_new - want_report.energy_new) < 1e-5, "energy %g", report.energy_new);
    release("subspace");
}

int main(void) {
#ifdef QG_EMULATED
    standin_cublas();
    standin_cusolver();
    emulator_check_races(1);
#endif
    char message[512] = "";
    qg_cuda *cuda = NULL;
    const qg_cuda_params gpu_params = {.struct_size = sizeof gpu_params};
    const qg_status opened = qg_cuda_open(&cuda, &gpu_params, message, sizeof message);
    if (!CHECK(opened == QG_SUCCESS, "%s", message))
        return check_finish();
    void *workspace = NULL;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "no stream");
    CHECK(cudaMalloc(&workspace, 8 << 20) == cudaSuccess, "no workspace");
    CHECK(qg_cuda_begin(cuda, stream, workspace, 8 << 20) == QG_SUCCESS, "%s", qg_cuda_error(cuda));
    cpu = level(QG_SIMD_SCALAR);
    gpu = qg_cuda_backend(cuda);
    gpu_linalg = qg_cuda_linalg(cuda);
    test_noise();
    test_absmax();
    test_int8();
    test_projector();
    test_dynamic8();
    test_adam8();
    test_galore();
    test_subspace();
    qg_cuda_end(cuda);
    qg_cuda_close(cuda);
    CHECK(cudaFree(workspace) == cudaSuccess && cudaStreamDestroy(stream) == cudaSuccess, "not given back");
    return check_finish();
}
