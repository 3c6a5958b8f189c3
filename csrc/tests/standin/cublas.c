/* cublas.c - stands in for libcublas.so.13: the functions of csrc/cuda/libraries.h in reference C, summed in double in
 * order, which is how csrc/tests/gemm.c sums, with the checks that cuBLAS documents. It is stricter in two things: there
 * is no default stream, and no workspace but the caller's, which it spoils. */
#define STANDIN_FUNCTIONS(X) QG_CUBLAS_FUNCTIONS(X)
#include "standin.h"

#include "core/scalar.h"

enum { NOT_INITIALIZED = 1, ALLOC_FAILED = 3, INVALID_VALUE = 7, INTERNAL_ERROR = 14, NOT_SUPPORTED = 15 };

struct cublasContext {
    const void *self; /* of a handle that is alive */
    cudaStream_t stream;
    char *workspace;
    size_t size;
    unsigned mode;
};

static int is_handle(qg_blas handle) {
    return handle != NULL && handle->self == handle;
}

unsigned cublasCreate_v2(qg_blas *handle) {
    ENTER(cublasCreate_v2);
    *handle = calloc(1, sizeof **handle);
    REQUIRE(*handle != NULL, ALLOC_FAILED);
    (*handle)->self = *handle;
    handles++;
    return 0;
}

unsigned cublasDestroy_v2(qg_blas handle) {
    ENTER(cublasDestroy_v2);
    REQUIRE(is_handle(handle), NOT_INITIALIZED);
    handle->self = NULL;
    free(handle);
    handles--;
    return 0;
}

unsigned cublasSetStream_v2(qg_blas handle, cudaStream_t stream) {
    ENTER(cublasSetStream_v2);
    REQUIRE(is_handle(handle), NOT_INITIALIZED);
    handle->stream = stream;
    handle->workspace = NULL; /* as documented */
    handle->size = 0;
    return 0;
}

unsigned cublasSetWorkspace_v2(qg_blas handle, void *workspace, size_t size) {
    ENTER(cublasSetWorkspace_v2);
    REQUIRE(is_handle(handle), NOT_INITIALIZED);
    REQUIRE((uintptr_t)workspace % 256 == 0, INVALID_VALUE);
    handle->workspace = workspace;
    handle->size = size;
    return 0;
}

unsigned cublasSetMathMode(qg_blas handle, unsigned mode) {
    ENTER(cublasSetMathMode);
    REQUIRE(is_handle(handle), NOT_INITIALIZED);
    REQUIRE(mode == 0 || mode == QG_BLAS_EXACT_REDUCTION, INVALID_VALUE);
    handle->mode = mode;
    return 0;
}

const char *cublasGetStatusString(unsigned status) {
    enter(NUMBER_cublasGetStatusString);
    switch (status) {
    case NOT_INITIALIZED:
        return "the library was not initialized";
    case ALLOC_FAILED:
        return "the resource allocation failed";
    case INVALID_VALUE:
        return "an unsupported value or parameter was passed to the function";
    default:
        return "an internal operation failed";
    }
}

/* ---------------------------------------------------------------- products */

static float load(const void *array, unsigned type, int64_t index) {
    if (type == QG_TYPE_R_32F) {
        return ((const float *)array)[index];
    }
    const uint16_t bits = ((const uint16_t *)array)[index];
    return type == QG_TYPE_R_16BF ? qg_from_bfloat16(bits) : qg_from_float16(bits);
}

static void store(void *array, unsigned type, int64_t index, float value) {
    if (type == QG_TYPE_R_32F) {
        ((float *)array)[index] = value;
    } else {
        ((uint16_t *)array)[index] = type == QG_TYPE_R_16BF ? qg_to_bfloat16(value) : qg_to_float16(value);
    }
}

/* To the 11 bits of TF32's significand. */
static float to_tf32(float x) {
    return qg_float((qg_bits(x) + 0x1000) & 0xffffe000);
}

static int64_t place(unsigned op, int64_t row, int64_t col, int64_t leading) {
    return op == QG_BLAS_OP_N ? row + col * leading : col + row * leading;
}

static unsigned check_place(qg_blas handle) {
    REQUIRE(is_handle(handle), NOT_INITIALIZED);
    REQUIRE(handle->stream != NULL && handle->workspace != NULL && handle->size > 0, INTERNAL_ERROR);
    memset(handle->workspace, 0x5a, handle->size);
    return 0;
}

static unsigned check_operand(unsigned op, int64_t rows, int64_t cols, int64_t leading) {
    const int64_t lines = op == QG_BLAS_OP_N ? rows : cols;
    REQUIRE(op == QG_BLAS_OP_N || op == QG_BLAS_OP_T, INVALID_VALUE);
    REQUIRE(rows >= 0 && cols >= 0 && leading >= lines && leading >= 1, INVALID_VALUE);
    return 0;
}

unsigned cublasGemmEx_64(
    qg_blas handle,
    unsigned op_a,
    unsigned op_b,
    int64_t m,
    int64_t n,
    int64_t k,
    const void *alpha,
    const void *a,
    unsigned a_type,
    int64_t lda,
    const void *b,
    unsigned b_type,
    int64_t ldb,
    const void *beta,
    void *c,
    unsigned c_type,
    int64_t ldc,
    unsigned compute_type,
    int algo) {
    ENTER(cublasGemmEx_64);
    unsigned status = check_place(handle);
    status = status != 0 ? status : check_operand(op_a, m, k, lda);
    status = status != 0 ? status : check_operand(op_b, k, n, ldb);
    status = status != 0 ? status : check_operand(QG_BLAS_OP_N, m, n, ldc);
    REQUIRE(status == 0, status);
    const int fast = compute_type == QG_BLAS_COMPUTE_32F_FAST_TF32;
    REQUIRE(alpha != NULL && beta != NULL && algo == QG_BLAS_GEMM_DEFAULT, INVALID_VALUE);
    REQUIRE(a_type == b_type && a_type == c_type && handle->mode == QG_BLAS_EXACT_REDUCTION, NOT_SUPPORTED);
    REQUIRE(a_type == QG_TYPE_R_32F || a_type == QG_TYPE_R_16F || a_type == QG_TYPE_R_16BF, NOT_SUPPORTED);
    REQUIRE(compute_type == QG_BLAS_COMPUTE_32F || (fast && a_type == QG_TYPE_R_32F), NOT_SUPPORTED);
    const double times = *(const float *)alpha, before = *(const float *)beta;
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = 0; i < m; i++) {
            double sum = 0.0;
            for (int64_t l = 0; l < k; l++) {
                const float x = load(a, a_type, place(op_a, i, l, lda)), y = load(b, b_type, place(op_b, l, j, ldb));
                sum += fast ? (double)to_tf32(x) * to_tf32(y) : (double)x * y;
            }
            sum *= times;
            if (before != 0.0) {
                sum += before * load(c, c_type, i + j * ldc);
            }
            store(c, c_type, i + j * ldc, (float)sum);
        }
    }
    return 0;
}

unsigned cublasSgeam_64(
    qg_blas handle,
    unsigned op_a,
    unsigned op_b,
    int64_t m,
    int64_t n,
    const float *alpha,
    const float *a,
    int64_t lda,
    const float *beta,
    const float *b,
    int64_t ldb,
    float *c,
    int64_t ldc) {
    ENTER(cublasSgeam_64);
    unsigned status = check_place(handle);
    status = status != 0 ? status : check_operand(op_a, m, n, lda);
    status = status != 0 ? status : check_operand(op_b, m, n, ldb);
    status = status != 0 ? status : check_operand(QG_BLAS_OP_N, m, n, ldc);
    REQUIRE(status == 0, status);
    REQUIRE(alpha != NULL && beta != NULL && (c != b || op_b == QG_BLAS_OP_N) && c != a, INVALID_VALUE);
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = 0; i < m; i++) {
            const float old = *beta == 0.0f ? 0.0f : *beta * b[place(op_b, i, j, ldb)];
            c[i + j * ldc] = *alpha * a[place(op_a, i, j, lda)] + old;
        }
    }
    return 0;
}
