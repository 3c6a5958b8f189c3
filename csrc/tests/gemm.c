/* gemm.c - the linear-algebra table of the tests: matrix products in the plainest form. */
#include "reference.h"

#include <string.h>

/* ref_load for the two formats of a GEMM, without its calls of ldexp. */
static inline double gemm_load(qg_format format, const void *array, int64_t index) {
    if (format == QG_FLOAT32)
        return ((const float *)array)[index];
    uint32_t bits = (uint32_t)((const uint16_t *)array)[index] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static qg_status plain_gemm(
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
    ref_gemm_context *counted = context;
    if (++counted->calls == counted->fail_at)
        return QG_INTERNAL;
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = 0.0;
            for (int64_t l = 0; l < k; l++)
                sum += gemm_load(format, a, i * a_row + l * a_col) * gemm_load(format, b, l * b_row + j * b_col);
            if (accumulate != 0)
                sum = gemm_load(format, c, i * c_row + j) + accumulate * sum;
            ref_store(format, c, i * c_row + j, (float)sum);
        }
    }
    return QG_SUCCESS;
}

qg_linalg ref_linalg(ref_gemm_context *context) {
    return (qg_linalg){
        .struct_size = sizeof(qg_linalg),
        .context = context,
        .gemm = plain_gemm,
        .potrf = qg_cpu_potrf,
        .trtri = qg_cpu_trtri,
        .qr = qg_cpu_qr,
        .work_size = qg_cpu_work_size,
    };
}
