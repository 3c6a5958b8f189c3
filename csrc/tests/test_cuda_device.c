/* Opening an emulated GPU and what it says when that fails; streams, the thread's current device, failures, captures. */
#include "standin.h"

static int device_now(void) {
    int now = -1;
    CHECK(cudaGetDevice(&now) == cudaSuccess, "cudaGetDevice");
    return now;
}

/* ---------------------------------------------------------------- open */

/* An open that fails says `text`, gives no GPU and leaves the thread's device. */
static void refused(const qg_cuda_params *params, qg_status want, const char *text) {
    char message[512] = "";
    qg_cuda *cuda = (qg_cuda *)(void *)message;
    const qg_status status = qg_cuda_open(&cuda, params, message, sizeof message);
    CHECK(status == want && strstr(message, text) != NULL, "%d, \"%s\", want %d, \"%s\"", status, message, want, text);
    CHECK(cuda == NULL || params == NULL || params->struct_size != sizeof *params, "a GPU all the same: %s", text);
    CHECK(device_now() == 0, "%s: device %d", text, device_now());
}

static void test_open_arguments(void) {
    qg_cuda_params params = {sizeof params, 0, 0};
    refused(NULL, QG_INVALID_ARGUMENT, "expected a place for the GPU and a qg_cuda_params with struct_size 12");
    params.struct_size = 4;
    refused(&params, QG_INVALID_ARGUMENT, "struct_size 12");
    params = (qg_cuda_params){sizeof params, 2, 0};
    refused(&params, QG_INVALID_ARGUMENT, "device 2: expected 0 to 1, the GPUs that this process sees");
    params.device = -1;
    refused(&params, QG_INVALID_ARGUMENT, "device -1: expected 0 to 1");
    CHECK(qg_cuda_open(NULL, &params, NULL, 0) == QG_INVALID_ARGUMENT, "no place, no message");
    char tiny[8] = "xxxxxxx";
    qg_cuda *cuda = NULL;
    CHECK(qg_cuda_open(&cuda, &params, tiny, sizeof tiny) == QG_INVALID_ARGUMENT, "a short message");
    CHECK(strcmp(tiny, "device ") == 0, "cut to its size: \"%s\"", tiny);
}

static void test_open_failures(void) {
    const qg_cuda_params params = {sizeof params, 1, 0};
    static const struct {
        const char *call;
        cudaError_t error;
        qg_status status;
        const char *text;
    } cases[] = {
        {"cudaGetDeviceCount", cudaErrorInsufficientDriver, QG_CUDA,
            "the NVIDIA driver is missing or older than CUDA 13 needs (version >= 580): install a newer one; "
            "cudaGetDeviceCount: CUDA driver version is insufficient for CUDA runtime version (35)"},
        {"cudaGetDeviceCount", cudaErrorNoDevice, QG_CUDA,
            "no GPU is seen by this process: look at nvidia-smi and CUDA_VISIBLE_DEVICES; "
            "cudaGetDeviceCount: no CUDA-capable device is detected (100)"},
        {"cudaGetDevice", cudaErrorInitializationError, QG_CUDA, "cudaGetDevice: initialization error (3)"},
        {"cudaSetDevice", cudaErrorInitializationError, QG_CUDA, "cudaSetDevice: initialization error (3)"},
        {"cudaDeviceGetAttribute", cudaErrorInvalidDevice, QG_CUDA, "cudaDeviceGetAttribute: invalid device ordinal"},
        {"cudaMalloc", cudaErrorMemoryAllocation, QG_OUT_OF_MEMORY,
            "cudaMalloc: out of memory (2): GPU 1 has too little free memory"},
        {"cudaStreamCreateWithFlags", cudaErrorUnknown, QG_CUDA, "cudaStreamCreateWithFlags: unknown error (999)"},
        {"cudaMemsetAsync", cudaErrorInvalidValue, QG_CUDA, "cudaMemsetAsync: invalid argument (1)"},
        {"cudaLaunchKernel", cudaErrorNoKernelImageForDevice, QG_UNSUPPORTED,
            "and GPU 1 is sm_90: rebuild with Q_GALORE_CUDA_ARCHS=90"},
        {"cudaLaunchKernel", cudaErrorLaunchFailure, QG_CUDA, "signs_of: unspecified launch failure (719)"},
        {"cudaStreamSynchronize", cudaErrorIllegalAddress, QG_CUDA,
            "the first kernel: an illegal memory access was encountered (700)"},
        {"cudaStreamDestroy", cudaErrorUnknown, QG_CUDA, "cudaStreamDestroy: unknown error (999)"},
        {"cudaFree", cudaErrorUnknown, QG_CUDA, "cudaFree: unknown error (999)"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        emulator_fail(cases[i].call, 0, cases[i].error);
        refused(&params, cases[i].status, cases[i].text);
        CHECK(cudaPeekAtLastError() == cudaSuccess, "%s: an error is left for the next caller", cases[i].call);
    }
}

static void test_open(void) {
    qg_cuda *cuda = open_device(1, 0);
    CHECK(device_now() == 0, "open has left device %d", device_now());
    const qg_backend *backend = qg_cuda_backend(cuda);
    CHECK(strcmp(backend->name, "cuda") == 0 && backend->asynchronous == 1, "name and kind");
    CHECK(backend->batch_bytes == 64 << 20 && backend->tile_bytes == 4 << 20, "sizes");
    /* From chunks on all members are functions. */
    void *const *member = (void *const *)(const void *)&backend->chunks, *const *end = (void *const *)(backend + 1);
    for (int i = 0; member < end; member++, i++)
        CHECK(*member != NULL, "function %d of the table is missing", i);
    const qg_linalg *linalg = qg_cuda_linalg(cuda);
    CHECK(linalg->struct_size == sizeof *linalg && linalg->context == cuda, "linalg");
    CHECK(strcmp(qg_cuda_error(cuda), "") == 0, "an error from the start: %s", qg_cuda_error(cuda));
    qg_cuda_close(cuda);
    CHECK(device_now() == 0, "close has left device %d", device_now());
    qg_cuda_close(NULL);
}

/* ---------------------------------------------------------------- begin and end */

static void test_begin(void) {
    qg_cuda *cuda = open_device(1, 0);
    cudaStream_t stream = emulator_stream();
    char *workspace = device(NULL, WORKSPACE);
    struct {
        void *workspace;
        size_t size;
    } wrong[] = {{workspace + 8, 2048}, {workspace, QG_CUDA_LEAST_WORKSPACE - 1}, {NULL, WORKSPACE}};
    for (int i = 0; i < 3; i++) {
        CHECK(qg_cuda_begin(cuda, stream, wrong[i].workspace, wrong[i].size) == QG_INVALID_ARGUMENT, "workspace %d", i);
        CHECK(
            strstr(qg_cuda_error(cuda), "workspace: expected 512 bytes of device") != NULL, "%s", qg_cuda_error(cuda));
    }
    CHECK(device_now() == 0, "a begin that failed has left device %d", device_now());
    emulator_fail("cudaSetDevice", 0, cudaErrorInvalidDevice);
    CHECK(qg_cuda_begin(cuda, stream, workspace, WORKSPACE) == QG_CUDA, "a device that cannot be set");
    CHECK(strstr(qg_cuda_error(cuda), "cudaSetDevice: invalid device") != NULL, "%s", qg_cuda_error(cuda));
    CHECK(qg_cuda_begin(cuda, stream, workspace, WORKSPACE) == QG_SUCCESS, "begin: %s", qg_cuda_error(cuda));
    CHECK(device_now() == 1, "at work on device %d", device_now());
    qg_cuda_end(cuda);
    CHECK(device_now() == 0, "end has left device %d", device_now());
    qg_cuda_close(cuda);
    emulated_release();
}

/* Work of another begin may be queued in another stream: what one kernel leaves to the next lies in this one's. */
static void test_numbers_lie_in_the_workspace(void) {
    qg_cuda *cuda = open_device(0, 0);
    const qg_backend *backend = qg_cuda_backend(cuda);
    const float values[3] = {1.0f, -3.5f, 2.0f};
    float *source = device(values, sizeof values), *workspaces[2];
    for (int i = 0; i < 2; i++) {
        workspaces[i] = device(NULL, QG_CUDA_LEAST_WORKSPACE);
        CHECK(
            qg_cuda_begin(cuda, emulator_stream(), workspaces[i], QG_CUDA_LEAST_WORKSPACE) == QG_SUCCESS, "begin %d",
            i);
        CHECK(backend->finite(source, QG_FLOAT32, 3 - 2 * i, backend->queue), "finite %d", i);
        CHECK(cuda->workspace == NULL, "a workspace of nothing for cuBLAS");
        qg_cuda_end(cuda);
    }
    CHECK(workspaces[0][0] == 3.5f && workspaces[1][0] == 1.0f, "%g, %g", workspaces[0][0], workspaces[1][0]);
    qg_cuda_close(cuda);
    emulated_release();
}

/* ---------------------------------------------------------------- failures */

static void test_first_failure_is_kept(void) {
    qg_cuda *cuda = open_device(0, 0);
    const qg_backend *backend = qg_cuda_backend(cuda);
    float *values = device(NULL, 64);
    begin(cuda);
    emulator_reset_counts();
    emulator_fail("cudaLaunchKernel", 0, cudaErrorLaunchOutOfResources);
    qg_cuda_signs(values, values, 1, 16, cuda);
    qg_cuda_scale_rows(values, values, values, 4, 4, cuda);
    CHECK(emulator_count(NULL).launches == 0, "%lld launches", (long long)emulator_count(NULL).launches);
    double number = 0.0;
    backend->fetch(&number, values, sizeof number, backend->queue);
    CHECK(isnan(number), "fetched after a failure: %g", number);
    EXPECT_FAILURE(cuda, QG_CUDA, "signs_of: too many resources requested for launch (701)");
    CHECK(strstr(qg_cuda_error(cuda), "signs_of: too many") != NULL, "%s", qg_cuda_error(cuda));
    EXPECT_FAILURE(cuda, QG_SUCCESS, "");
    qg_cuda_scale_rows(values, values, values, 4, 4, cuda);
    CHECK(emulator_count("scale_rows").launches == 1, "nothing is launched after the failure was taken");
    qg_cuda_fail(cuda, QG_INTERNAL, "one %d", 1);
    qg_cuda_fail(cuda, QG_CUDA, "two");
    EXPECT_FAILURE(cuda, QG_INTERNAL, "one 1");
    qg_cuda_fail(cuda, QG_INTERNAL, "three");
    qg_cuda_end(cuda);
    begin(cuda);
    EXPECT_FAILURE(cuda, QG_SUCCESS, "");
    qg_cuda_end(cuda);
    qg_cuda_close(cuda);
    emulated_release();
}

static void test_fetch(void) {
    qg_cuda *cuda = open_device(0, 0);
    const qg_backend *backend = qg_cuda_backend(cuda);
    const double numbers[2] = {1.5, -2.5};
    double got[2] = {0.0, 0.0}, *on_device = device(numbers, sizeof numbers);
    begin(cuda);
    backend->fetch(got, on_device, sizeof got, backend->queue);
    CHECK_BYTES(got, numbers, sizeof got, "fetched");
    cudaGraph_t graph;
    CHECK(cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeGlobal) == cudaSuccess, "capture");
    backend->fetch(got, on_device, sizeof got, backend->queue);
    CHECK(isnan(got[0]) && isnan(got[1]), "fetched while captured: %g", got[0]);
    EXPECT_FAILURE(cuda, QG_UNSUPPORTED, "cannot be captured in a CUDA graph: call it outside of the capture");
    CHECK(cudaStreamEndCapture(cuda->stream, &graph) == cudaSuccess, "end of the capture");
    cudaGraphDestroy(graph);
    emulator_fail("cudaMemcpyAsync", 0, cudaErrorUnknown);
    backend->fetch(got, on_device, sizeof got, backend->queue);
    CHECK(isnan(got[0]), "fetched nothing: %g", got[0]);
    EXPECT_FAILURE(cuda, QG_CUDA, "cudaMemcpyAsync: unknown error (999)");
    emulator_fail("cudaStreamSynchronize", 0, cudaErrorIllegalAddress);
    backend->fetch(got, on_device, sizeof got, backend->queue);
    CHECK(isnan(got[0]), "fetched in vain: %g", got[0]);
    EXPECT_FAILURE(cuda, QG_CUDA, "cudaStreamSynchronize: an illegal memory access");
    qg_cuda_end(cuda);
    qg_cuda_close(cuda);
    emulated_release();
}

static void test_grid(void) {
    qg_cuda *cuda = open_device(0, 0);
    int processors = 0;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0);
    CHECK(qg_cuda_grid(cuda, 0, 256) == 1 && qg_cuda_grid(cuda, 256, 256) == 1, "one block");
    CHECK(qg_cuda_grid(cuda, 257, 256) == 2, "two blocks");
    const unsigned most = qg_cuda_grid(cuda, INT64_MAX, 1);
    CHECK(most == 16 * (unsigned)processors && qg_cuda_grid(cuda, INT64_MAX, 2) == most, "at most %u blocks", most);
    qg_cuda_close(cuda);
}

int main(void) {
    test_open_arguments();
    test_open_failures();
    test_open();
    test_begin();
    test_numbers_lie_in_the_workspace();
    test_first_failure_is_kept();
    test_fetch();
    test_grid();
    return check_finish();
}
