/* q_galore.h - the public C interface: quantised low-rank projection, 8-bit Adam, INT8 weights with stochastic rounding.
 *
 * Conventions
 *   - Every function returns a qg_status; qg_last_error() holds the sentence of this thread's last failure.
 *   - Nothing here allocates, prints or keeps state; only the calls on subspaces and those that encode wait for a
 *     device. Scratch memory comes from the caller; its size is asked for first.
 *   - Arrays and scratch are in the memory of the backend's device: the host's, or that of a GPU. Lists of structs, and
 *     what is said to be so, are the host's.
 *   - Arrays are row-major and contiguous. Sizes and indices are int64_t, byte counts size_t. An empty array (a size of
 *     zero) is a success that touches nothing; its pointer may be NULL. Pointers need only the alignment of their type.
 *   - Inputs and outputs must not overlap unless a comment says they may.
 *   - Element-wise results are the same bits for every SIMD level, thread count and device. GEMM sums are only close.
 */
#ifndef Q_GALORE_H
#define Q_GALORE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QG_VERSION "2.0.0.dev0"

typedef enum qg_status {
    QG_SUCCESS = 0,
    QG_INVALID_ARGUMENT = 1,
    QG_UNSUPPORTED = 2,
    QG_OUT_OF_MEMORY = 3,
    QG_CUDA = 4,
    QG_INTERNAL = 5
} qg_status;

/* Storage formats. A number never changes its meaning. */
typedef enum qg_format {
    QG_FLOAT32 = 0,
    QG_BFLOAT16 = 1,
    QG_FLOAT16 = 2,
    QG_INT8 = 16,     /* affine, one byte a value */
    QG_INT4 = 17,     /* affine, two values a byte, the even index in the low nibble; projector only */
    QG_FP8_E4M3 = 18, /* OCP 8-bit floating point E4M3; projector only */
    QG_FP4 = 19,      /* bitsandbytes' 4-bit floating point, two values a byte; projector only */
    QG_NF4 = 20,      /* QLoRA's 4-bit normal float, two values a byte; projector only */
    QG_DYNAMIC8 = 32  /* 8-bit dynamic map; moments: exp_avg signed, exp_avg_sq unsigned; projector: signed */
} qg_format;

/* Which side of the gradient is projected (m x n weight, rank r). */
typedef enum qg_side {
    QG_RIGHT = 0, /* P is r x n, R = P G^T is r x m, U = N^T P */
    QG_LEFT = 1,  /* P is r x m, R = P G   is r x n, U = P^T N */
    QG_FULL = 2   /* P_L is r x m, P_R is r x n, R = P_L G P_R^T is r x r, U = P_L^T N P_R */
} qg_side;

typedef enum qg_simd { QG_SIMD_SCALAR = 0, QG_SIMD_AVX2 = 1, QG_SIMD_AVX512 = 2 } qg_simd;

const char *qg_version(void);
const char *qg_status_string(qg_status status);
const char *qg_last_error(void);

/* ---------------------------------------------------------------- objects */

/* A weight matrix, rows x cols (a vector is 1 x n). FLOAT32, BFLOAT16, FLOAT16, or INT8 in groups of `group_size`
 * consecutive elements: w = scales[g] * (codes[i] - zeros[g]). scales and zeros are NULL unless the format is INT8. */
typedef struct qg_weight {
    void *data;
    float *scales;  /* [ceil(rows cols / group_size)] */
    int16_t *zeros; /* [ceil(rows cols / group_size)] */
    int64_t rows;
    int64_t cols;
    int32_t group_size;
    qg_format format;
} qg_weight;

/* Adam's two moments of a rows x cols array: R in a galore step, the weight as one row of rows cols elements in an adam8
 * step. FLOAT32, or DYNAMIC8 with one absmax for each `block` elements of a row; a block never crosses a row. The absmax
 * arrays are NULL for FLOAT32. */
typedef struct qg_moments {
    void *exp_avg;
    void *exp_avg_sq;
    float *exp_avg_absmax;    /* [rows, ceil(cols / block)] */
    float *exp_avg_sq_absmax; /* [rows, ceil(cols / block)] */
    int32_t block;
    qg_format format;
} qg_moments;

/* A projector: `rank` basis vectors of length `dim`, one a row. FLOAT32 and BFLOAT16 have no scales. Of the others, each
 * `block` elements of a row share a scale (a block never crosses a row, the last one may be short); with block 0 all
 * rank x dim share one. INT8, INT4: value = scales[b] * (code - zeros[b]); FP8_E4M3, FP4, NF4, DYNAMIC8: value =
 * scales[b] * entry(code). Each row of 4-bit codes starts on a byte: ceil(dim / 2) bytes. */
typedef struct qg_projector {
    void *codes;
    uint16_t *scales; /* [rank, ceil(dim / block)] or [1, 1], bfloat16 bits; NULL for FLOAT32 and BFLOAT16 */
    uint8_t *zeros;   /* as scales; NULL unless INT8 or INT4 */
    int64_t rank;
    int64_t dim;
    int32_t block;
    qg_format format;
} qg_projector;

/* ---------------------------------------------------------------- linear algebra, supplied by the caller */

/* Matrix products, and the factorisations of a subspace refresh. Memory is the device's, `context` the caller's.
 *
 * gemm     c = a b (accumulate 0), c += a b (1) or c -= a b (-1) with a: m x k, b: k x n, c: m x n, element (i, j) of x
 *          at x[i * x_row_stride + j * x_col_stride]; c has unit column stride. All three are FLOAT32 or all three
 *          BFLOAT16 (accumulated in float32). accumulate is 0 for BFLOAT16.
 * potrf    a [n, n] = L L^T: reads the lower triangle, leaves L there and anything above. *failed = 0, or another
 *          number where a is not positive definite (a is spoiled then).
 * trtri    inverse [n, n] = L^-1, zeros above its diagonal; reads the lower triangle of `lower`.
 * qr       q [rows, cols], rows <= cols = an orthonormal basis of the rows of `a` (spoiled), any completion where they
 *          are dependent; row i of a has a coefficient >= 0 on row i of q (a = R^T q, R's diagonal >= 0).
 * work_size  bytes of `work` that these three need for matrices of up to rows x cols (rows <= cols).
 *
 * All are float32 and row-major. gemm alone is enough for steps; the other members may be NULL there. On the CPU they
 * are qg_cpu_potrf, qg_cpu_trtri, qg_cpu_qr and qg_cpu_work_size, which take their products from the table's gemm. */
typedef struct qg_linalg qg_linalg;
struct qg_linalg {
    uint32_t struct_size;
    void *context;
    qg_status (*gemm)(
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
        int64_t c_row_stride);
    qg_status (*potrf)(const qg_linalg *linalg, int64_t n, float *a, int32_t *failed, void *work);
    qg_status (*trtri)(const qg_linalg *linalg, int64_t n, const float *lower, float *inverse, void *work);
    qg_status (*qr)(const qg_linalg *linalg, int64_t rows, int64_t cols, float *a, float *q, void *work);
    size_t (*work_size)(const qg_linalg *linalg, int64_t rows, int64_t cols);
};

qg_status qg_cpu_potrf(const qg_linalg *linalg, int64_t n, float *a, int32_t *failed, void *work);
qg_status qg_cpu_trtri(const qg_linalg *linalg, int64_t n, const float *lower, float *inverse, void *work);
qg_status qg_cpu_qr(const qg_linalg *linalg, int64_t rows, int64_t cols, float *a, float *q, void *work);
size_t qg_cpu_work_size(const qg_linalg *linalg, int64_t rows, int64_t cols);

/* The kernels of one device: of the CPU at one SIMD level, or of a GPU (csrc/core/backend.h). Opaque to callers. */
typedef struct qg_backend qg_backend;

/* The best SIMD level that this CPU and this build have. */
qg_simd qg_cpu_best_simd(void);

/* The CPU kernels at `level`; UNSUPPORTED if this CPU or build does not have it. */
qg_status qg_cpu_backend(qg_simd level, const qg_backend **backend);

/* ---------------------------------------------------------------- noise */

/* out[i] = the 24-bit uniform integer of element start + i: a function of (seed, id, step, element) alone. */
qg_status qg_noise(
    int32_t *out, /* [count] */
    uint64_t seed,
    uint32_t id,
    uint64_t step,
    int64_t start,
    int64_t count,
    const qg_backend *backend);

/* ---------------------------------------------------------------- formats */

/* Encode `source` (source_format: FLOAT32, BFLOAT16 or FLOAT16; same shape) as the INT8 weight, rounding to nearest.
 * A value that is not finite: INVALID_ARGUMENT, and nothing is written. */
qg_status qg_int8_quantize(
    const qg_weight *weight,
    const void *source,
    qg_format source_format,
    const qg_backend *backend);

/* Decode an INT8 weight to `target` (FLOAT32, BFLOAT16 or FLOAT16, rounded to nearest even). */
qg_status qg_int8_dequantize(const qg_weight *weight, void *target, qg_format target_format, const qg_backend *backend);

/* Encode float32 basis vectors [rank, dim]. A value that is not finite: INVALID_ARGUMENT, and nothing is written. */
qg_status qg_projector_quantize(const qg_projector *projector, const float *source, const qg_backend *backend);

/* Decode basis vectors [rank, dim] to FLOAT32 or BFLOAT16. */
qg_status qg_projector_dequantize(
    const qg_projector *projector,
    void *target,
    qg_format target_format,
    const qg_backend *backend);

/* Encode float32 [rows, cols] to the dynamic map (nearest entry, ties to the lower code), one absmax a block of a row. */
qg_status qg_dynamic8_quantize(
    uint8_t *codes, /* [rows, cols] */
    float *absmax,  /* [rows, ceil(cols / block)] */
    const float *source,
    int64_t rows,
    int64_t cols,
    int32_t block,
    int is_signed,
    const qg_backend *backend);

qg_status qg_dynamic8_dequantize(
    float *target, /* [rows, cols] */
    const uint8_t *codes,
    const float *absmax,
    int64_t rows,
    int64_t cols,
    int32_t block,
    int is_signed,
    const qg_backend *backend);

/* Some numbers: FLOAT32, BFLOAT16 or FLOAT16. */
typedef struct qg_array {
    const void *data;
    int64_t count;
    qg_format format;
} qg_array;

/* out[i] = max |x| of arrays[i], +infinity if any element is not finite, 0 for none. */
qg_status qg_absmax(
    float *out,             /* [count] */
    const qg_array *arrays, /* [count] */
    int64_t count,
    const qg_backend *backend);

/* ---------------------------------------------------------------- steps */

typedef struct qg_step_params {
    uint32_t struct_size;
    int32_t stochastic_round; /* 0 or 1; INT8 and BFLOAT16 weights */
    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    double scale; /* alpha of the back-projected update; adam8 uses it too (1 for ordinary parameters) */
    uint64_t seed;
    qg_format gemm_format; /* FLOAT32 or BFLOAT16; galore only */
    /* 0: off. Else the Frobenius norm of each task's N is held to at most this many times that of its step before
     * (Fira, arXiv 2410.01623), by a smaller rate in that step; galore only. */
    double norm_growth_limit;
} qg_step_params;

/* A gradient with a larger magnitude, or one that is not finite, enters no moments: its square would overflow. */
#define QG_LARGEST_GRADIENT 1e18f

/* One parameter of a step. `gradient` has the weight's shape (grad_format FLOAT32, BFLOAT16 or FLOAT16) or, for a
 * galore step with low_rank_gradient, R's shape (r x k; r x r on both sides). The moments have the weight's shape for
 * adam8 (and their blocks run along the flat weight), R's shape for galore. The step counts start at 1 and already
 * count this step. */
typedef struct qg_step_task {
    qg_weight weight;
    qg_moments moments;
    qg_projector projector;       /* galore only; P_L on both sides */
    qg_projector right_projector; /* P_R, of the same rank; FULL only */
    const void *gradient;
    qg_format grad_format;
    qg_side side; /* galore only */
    int32_t low_rank_gradient;
    uint32_t id;        /* noise: the parameter's number */
    int64_t noise_step; /* noise: the step of that parameter */
    int64_t bias_step;  /* bias correction: updates since the moments were last reset */
    int64_t *stats;     /* [2] or NULL: groups shifted, groups re-ranged are added here (INT8 weights) */
    double *norm; /* with norm_growth_limit: ||N|| of the step before, 0 for none (no limit then); becomes this one's */
    const float
        *gradient_absmax; /* [1] or NULL: max |g| (qg_absmax); above QG_LARGEST_GRADIENT the task is left as it is */
} qg_step_task;

/* Scratch for a list of tasks: the largest task's need on the CPU; on a GPU small ones run side by side, in some MB. */
qg_status qg_adam8_scratch_size(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    const qg_backend *backend,
    size_t *bytes);
qg_status qg_galore_scratch_size(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    const qg_backend *backend,
    size_t *bytes);

/* AdamW on each task's weight: moments updated from the gradient, then W <- W (1 - lr wd) - lr scale N.
 * Every task is checked before the first one is run. Without gradient_absmax the gradients must be finite with |g| <=
 * QG_LARGEST_GRADIENT. */
qg_status qg_adam8_step(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    void *scratch,
    size_t scratch_size,
    const qg_backend *backend);

/* Projected AdamW: R from the gradient (or given), Adam on R, W <- W (1 - lr wd) - lr scale U. As above. */
qg_status qg_galore_step(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    void *scratch,
    size_t scratch_size,
    const qg_backend *backend,
    const qg_linalg *linalg);

/* ---------------------------------------------------------------- subspaces */

typedef struct qg_subspace_params {
    uint32_t struct_size;
    int32_t steps;         /* power steps; 0: one, a second one where the old basis captured less than 0.9 of the new
                            * one's energy, a third one where that was less than 0.97 of the second one's */
    qg_format gemm_format; /* FLOAT32 or BFLOAT16, of the products with the gradient; all others are FLOAT32 */
} qg_subspace_params;

/* What a refresh did. The energies are shares of ||G||^2: E = ||G Q^T||^2 / ||G||^2 (right), Q the orthonormalised old
 * basis and the new one; both 0 where the gradient is zero, not finite, or orthogonal to the old basis. */
typedef struct qg_subspace_report {
    uint32_t struct_size;
    int32_t kept;        /* 1: the basis has not been touched */
    int32_t power_steps; /* taken */
    int32_t fallbacks;   /* how often Householder QR took over from Cholesky */
    double energy_old;
    double energy_new;
} qg_subspace_report;

/* Scratch for any of the calls below on a rows x cols gradient: bases on one side or (`sides` 2, qg_captured_energy
 * alone) on both, with up to `rank` vectors each. */
qg_status qg_subspace_scratch_size(
    int64_t rows,
    int64_t cols,
    int64_t rank,
    int32_t sides,
    qg_format gemm_format,
    const qg_backend *backend,
    const qg_linalg *linalg,
    size_t *bytes);

/* Block power steps from an old basis: Z = orth(G P^T), Y = orth(G^T Z), P = Y^T (right; left: G^T stands for G).
 * Vector i keeps its orientation. A gradient that is zero, not finite, or orthogonal to the whole basis leaves the
 * basis as it is, bit for bit, which is a success (report->kept); so does a basis that is zero or not finite. A new
 * basis is orthonormal to 1e-4.
 *
 * The host waits for numbers of the device once in the usual case: after the last step, or after the first one where
 * steps = 0, and once for each further one. What is usual is assumed and checked then (a gradient of ordinary size, three
 * passes of Cholesky QR, one for Z); where it does not hold, or steps > 4, everything is done again and looked at pass
 * by pass. A backend that is not asynchronous looks at once, so that it takes no pass too many. */
qg_status qg_subspace_refresh(
    float *basis, /* [rank, dim]: in: the old one, finite, not necessarily orthonormal; out: the new one */
    int64_t rank,
    const void *gradient, /* [rows, cols] */
    qg_format grad_format,
    int64_t rows,
    int64_t cols,
    qg_side side, /* dim = cols (right) or rows (left) */
    const qg_subspace_params *params,
    qg_subspace_report *report,
    void *scratch,
    size_t scratch_size,
    const qg_backend *backend,
    const qg_linalg *linalg);

/* A random orthonormal basis: entries close to normal (sums of four uniform integers of qg_noise's generator, under
 * steps from 2^63 on, which no update reaches), orthonormalised. The entries are the same bits everywhere, the
 * result is not: its sums are the GEMM's. The scratch is that of a 1 x dim gradient, one side, FLOAT32. */
qg_status qg_subspace_random(
    float *basis, /* [rank, dim] */
    int64_t rank,
    int64_t dim,
    uint64_t seed,
    uint32_t id,
    uint32_t draw,
    void *scratch,
    size_t scratch_size,
    const qg_backend *backend,
    const qg_linalg *linalg);

/* *energy = ||G Q_right^T||^2 / ||G||^2, ||Q_left G||^2 / ||G||^2 or, with both, ||Q_left G Q_right^T||^2 / ||G||^2, Q
 * an orthonormal basis of the rows of a basis; 0 for a zero gradient. A basis of no vectors is absent. */
qg_status qg_captured_energy(
    double *energy,
    const void *gradient, /* [rows, cols], finite */
    qg_format grad_format,
    int64_t rows,
    int64_t cols,
    const float *right, /* [right_rank, cols] */
    int64_t right_rank,
    const float *left, /* [left_rank, rows] */
    int64_t left_rank,
    qg_format gemm_format,
    void *scratch,
    size_t scratch_size,
    const qg_backend *backend,
    const qg_linalg *linalg);

/* ---------------------------------------------------------------- CUDA (libq_galore_cuda13.so) */

/* One GPU with its kernels and libraries. Not for two threads at a time. The functions of this part are those that the
 * library exports; it holds nothing else of this interface, and qg_last_error() does not know of its failures. */
typedef struct qg_cuda qg_cuda;

typedef struct qg_cuda_params {
    uint32_t struct_size;
    int32_t device;
    int32_t allow_tf32; /* 1: FLOAT32 products may round their factors to TF32 */
} qg_cuda_params;

/* The version of the library: QG_VERSION of the header that it was built with. */
const char *qg_cuda_version(void);

/* Open a GPU. `message` [message_size] holds one sentence if that fails. cuBLAS and cuSOLVER are opened when they are
 * needed first, by name, where the process has them already those. */
qg_status qg_cuda_open(qg_cuda **cuda, const qg_cuda_params *params, char *message, size_t message_size);
void qg_cuda_close(qg_cuda *cuda);

/* Bytes of a workspace that every begin needs. */
#define QG_CUDA_LEAST_WORKSPACE 512

/* What follows in this thread runs on `stream` (a cudaStream_t of this GPU, not the default stream of value 0 while
 * it is captured). `workspace`, in device memory, is for what kernels leave to each other (QG_CUDA_LEAST_WORKSPACE bytes,
 * which it must have) and the rest for cuBLAS (products need one: 8 MB do, 32 MB are better on Hopper and newer); it is in
 * use until the work is done, and a graph that was captured uses it whenever it runs. end puts the thread's current device
 * back: they come in pairs, and a GPU is closed outside of them. */
qg_status qg_cuda_begin(qg_cuda *cuda, void *stream, void *workspace, size_t workspace_size);
void qg_cuda_end(qg_cuda *cuda);

/* The tables to hand to the calls above; they are the GPU's until it is closed. */
const qg_backend *qg_cuda_backend(qg_cuda *cuda);
const qg_linalg *qg_cuda_linalg(qg_cuda *cuda);

/* The thin singular value decomposition a = left^T diag(values) right, exact to rounding, with k = min(rows, cols) and
 * the singular vectors one a row: the first r rows of `right` (`left`) are a basis for a projection on the right (left).
 * A value that is not finite: INVALID_ARGUMENT. `a` is spoiled; nothing may overlap. The host waits for the device.
 * Between begin and end, as are the products of the table. */
qg_status qg_cuda_svd_scratch_size(qg_cuda *cuda, int64_t rows, int64_t cols, size_t *bytes);
qg_status qg_cuda_svd(
    qg_cuda *cuda,
    float *left,   /* [k, rows] */
    float *values, /* [k], falling */
    float *right,  /* [k, cols] */
    float *a,      /* [rows, cols] */
    int64_t rows,
    int64_t cols,
    void *scratch,
    size_t scratch_size);

/* The sentence of the last failure of a call of this part. */
const char *qg_cuda_error(const qg_cuda *cuda);

#ifdef __cplusplus
}
#endif
#endif
