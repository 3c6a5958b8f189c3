/* dispatch.c - which SIMD levels this processor and this build have. */
#include "core/status.h"
#include "cpu/cpu.h"

qg_simd qg_cpu_best_simd(void) {
#if QG_HAVE_X86_LEVELS
    if (__builtin_cpu_supports("x86-64-v4")) {
        return QG_SIMD_AVX512;
    }
    if (__builtin_cpu_supports("x86-64-v3")) {
        return QG_SIMD_AVX2;
    }
#endif
    return QG_SIMD_SCALAR;
}

qg_status qg_cpu_backend(qg_simd level, const qg_backend **backend) {
    if (backend == NULL) {
        return qg_fail(QG_INVALID_ARGUMENT, "qg_cpu_backend: backend must not be NULL");
    }
    if (level < QG_SIMD_SCALAR || level > QG_SIMD_AVX512) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "qg_cpu_backend: level must be 0 (scalar), 1 (AVX2) or 2 (AVX-512), got %d",
            (int)level);
    }
    if (level > qg_cpu_best_simd()) {
        return qg_fail(
            QG_UNSUPPORTED, "qg_cpu_backend: this processor or this build has no %s",
            level == QG_SIMD_AVX512 ? "AVX-512 (x86-64-v4)" : "AVX2 (x86-64-v3)");
    }
    switch (level) {
#if QG_HAVE_X86_LEVELS
    case QG_SIMD_AVX512:
        *backend = &qg_cpu_avx512;
        return QG_SUCCESS;
    case QG_SIMD_AVX2:
        *backend = &qg_cpu_avx2;
        return QG_SUCCESS;
#endif
    case QG_SIMD_SCALAR:
        *backend = &qg_cpu_scalar;
        return QG_SUCCESS;
    default:
        return qg_fail(QG_INTERNAL, "qg_cpu_backend: no kernels for level %d", (int)level);
    }
}
