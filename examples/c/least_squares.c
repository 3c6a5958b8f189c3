/* least_squares.c - trains a linear model with the C library alone: no Python, no torch.
 *
 *     y = W x + b, loss = ||X W^T + 1 b^T - Y||^2 / (2 samples)
 *
 * W is an INT8 matrix whose gradient is projected on 16 vectors in 4 bits, with 8-bit Adam there and a new basis every 20
 * steps; b is a float vector with ordinary 8-bit Adam.
 *
 *     make -C examples/c run        with gcc alone; two files of the library want -march of their own
 */
#include <stdio.h>
#include <stdlib.h>

#include "q_galore.h"

enum { SAMPLES = 256, OUT = 48, IN = 64, RANK = 16, BLOCK = 256, STEPS = 400, GAP = 20 };
enum { GROUPS = (OUT * IN + BLOCK - 1) / BLOCK };

/* Arrays of both parameters: as they are stored, and what one step needs. */
static uint8_t codes[OUT * IN], m_codes[RANK * IN], v_codes[RANK * IN], bias_m[OUT], bias_v[OUT];
static float scales[GROUPS], m_absmax[RANK], v_absmax[RANK], bias_m_absmax[1], bias_v_absmax[1];
static int16_t zeros[GROUPS];
static uint8_t basis_codes[RANK * (OUT / 2)], basis_zeros[RANK];
static uint16_t basis_scales[RANK];
static float bias[OUT], weight[OUT * IN], basis[RANK * OUT], gradient[OUT * IN], bias_gradient[OUT];
static float inputs[SAMPLES * IN], targets[SAMPLES * OUT], errors[SAMPLES * OUT];

static void must(qg_status status) {
    if (status != QG_SUCCESS) {
        fprintf(stderr, "%s: %s\n", qg_status_string(status), qg_last_error());
        exit(1);
    }
}

/* c = a b, c += a b or c -= a b in float32. A program with a BLAS calls it here. */
static qg_status gemm(
    void *context,
    qg_format format,
    int32_t accumulate,
    int64_t m,
    int64_t n,
    int64_t k,
    const void *a,
    int64_t a_row,
    int64_t a_col,
    const void *b,
    int64_t b_row,
    int64_t b_col,
    void *c,
    int64_t c_row) {
    (void)context;
    if (format != QG_FLOAT32)
        return QG_UNSUPPORTED;
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = 0.0;
            for (int64_t l = 0; l < k; l++)
                sum += (double)((const float *)a)[i * a_row + l * a_col] * ((const float *)b)[l * b_row + j * b_col];
            float *out = (float *)c + i * c_row + j;
            *out = accumulate == 0 ? (float)sum : *out + (float)(accumulate * sum);
        }
    }
    return QG_SUCCESS;
}

/* Numbers near normal, from the library's own counter-based noise. */
static void fill(float *out, int64_t count, uint32_t id, float size, const qg_backend *backend) {
    for (int64_t i = 0; i < count; i++) {
        int32_t draws[4];
        must(qg_noise(draws, 1, id, 0, 4 * i, 4, backend));
        out[i] = size * (float)(((double)draws[0] + draws[1] + draws[2] + draws[3]) * 0x1p-24 - 2.0);
    }
}

/* errors = X W^T + b - Y; returns the loss and leaves its gradients. */
static double loss_and_gradients(void) {
    double sum = 0.0;
    gemm(NULL, QG_FLOAT32, 0, SAMPLES, OUT, IN, inputs, IN, 1, weight, 1, IN, errors, OUT);
    for (int o = 0; o < OUT; o++)
        bias_gradient[o] = 0.0f;
    for (int s = 0; s < SAMPLES; s++) {
        for (int o = 0; o < OUT; o++) {
            float *error = &errors[s * OUT + o];
            *error = (*error + bias[o] - targets[s * OUT + o]) / SAMPLES;
            bias_gradient[o] += *error;
            sum += (double)*error * *error * SAMPLES / 2.0;
        }
    }
    gemm(NULL, QG_FLOAT32, 0, OUT, IN, SAMPLES, errors, 1, OUT, inputs, IN, 1, gradient, IN);
    return sum;
}

int main(void) {
    const qg_backend *backend;
    must(qg_cpu_backend(qg_cpu_best_simd(), &backend));
    qg_linalg linalg = {sizeof linalg, NULL, gemm, qg_cpu_potrf, qg_cpu_trtri, qg_cpu_qr, qg_cpu_work_size};

    /* The problem: inputs, and the targets of a weight and a bias to be found. */
    fill(inputs, SAMPLES * IN, 0, 1.0f, backend);
    fill(weight, OUT * IN, 1, 0.5f, backend);
    fill(bias, OUT, 2, 1.0f, backend);
    loss_and_gradients();
    for (int i = 0; i < SAMPLES * OUT; i++)
        targets[i] = errors[i] * SAMPLES;

    /* The parameters. Code 127 is the signed map's zero. */
    qg_weight w = {codes, scales, zeros, OUT, IN, BLOCK, QG_INT8};
    qg_weight b = {bias, NULL, NULL, 1, OUT, 0, QG_FLOAT32};
    qg_projector projector = {basis_codes, basis_scales, basis_zeros, RANK, OUT, BLOCK, QG_INT4};
    qg_moments moments = {m_codes, v_codes, m_absmax, v_absmax, BLOCK, QG_DYNAMIC8};
    qg_moments bias_moments = {bias_m, bias_v, bias_m_absmax, bias_v_absmax, BLOCK, QG_DYNAMIC8};
    for (int i = 0; i < RANK * IN; i++)
        m_codes[i] = 127;
    for (int i = 0; i < OUT; i++) {
        bias_m[i] = 127;
        bias[i] = 0.0f;
    }
    fill(weight, OUT * IN, 3, 0.1f, backend);
    must(qg_int8_quantize(&w, weight, QG_FLOAT32, backend));

    qg_step_task projected = {
        .weight = w, .moments = moments, .projector = projector, .gradient = gradient, .side = QG_LEFT, .bias_step = 1};
    qg_step_task plain = {.weight = b, .moments = bias_moments, .gradient = bias_gradient, .id = 1, .bias_step = 1};
    qg_step_params params = {.struct_size = sizeof params,
        .stochastic_round = 1,
        .beta1 = 0.9,
        .beta2 = 0.99,
        .eps = 1e-8,
        .scale = 1.0,
        .gemm_format = QG_FLOAT32};
    qg_subspace_params how = {.struct_size = sizeof how, .gemm_format = QG_FLOAT32};

    /* One piece of scratch memory that is enough for each call. */
    size_t bytes = 0, need;
    must(qg_galore_scratch_size(&projected, 1, &params, backend, &need));
    bytes = need;
    must(qg_adam8_scratch_size(&plain, 1, &params, backend, &need));
    bytes = need > bytes ? need : bytes;
    must(qg_subspace_scratch_size(OUT, IN, RANK, 1, QG_FLOAT32, backend, &linalg, &need));
    bytes = need > bytes ? need : bytes;
    must(qg_subspace_scratch_size(1, OUT, RANK, 1, QG_FLOAT32, backend, &linalg, &need));
    bytes = need > bytes ? need : bytes;
    void *scratch = malloc(bytes);
    if (scratch == NULL)
        return 1;

    must(qg_subspace_random(basis, RANK, OUT, 0, 0, 0, scratch, bytes, backend, &linalg));
    double first = 0.0, last = 0.0;
    for (int step = 1; step <= STEPS; step++) {
        must(qg_int8_dequantize(&w, weight, QG_FLOAT32, backend));
        last = loss_and_gradients();
        if (step == 1)
            first = last;
        if ((step - 1) % GAP == 0) {
            qg_subspace_report report = {.struct_size = sizeof report};
            if (step > 1)
                must(qg_projector_dequantize(&projector, basis, QG_FLOAT32, backend));
            must(qg_subspace_refresh(
                basis, RANK, gradient, QG_FLOAT32, OUT, IN, QG_LEFT, &how, &report, scratch, bytes, backend, &linalg));
            must(qg_projector_quantize(&projector, basis, backend));
            if ((step - 1) % (5 * GAP) == 0)
                printf("step %3d  loss %.5f  energy %.2f -> %.2f\n", step, last, report.energy_old, report.energy_new);
        }
        params.lr = 0.05 * (1.0 - (step - 1.0) / STEPS);
        projected.noise_step = projected.bias_step = plain.noise_step = plain.bias_step = step;
        must(qg_galore_step(&projected, 1, &params, scratch, bytes, backend, &linalg));
        must(qg_adam8_step(&plain, 1, &params, scratch, bytes, backend));
    }
    printf("loss %.5f -> %.5f\n", first, last);
    free(scratch);
    return last < first / 100.0 ? 0 : 1;
}
