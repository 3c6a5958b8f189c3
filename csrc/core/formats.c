/* formats.c - noise and formats of the C interface: arguments are checked here, then the kernels trust them. */
#include "core/backend.h"
#include "core/check.h"
#include "core/status.h"

/* ---------------------------------------------------------------- checks */

static qg_status check_pointer(const char *what, const void *pointer) {
    return pointer != NULL ? QG_SUCCESS : qg_fail(QG_INVALID_ARGUMENT, "%s: expected an array, got NULL", what);
}

static qg_status check_block(const char *what, int32_t block) {
    return block > 0 ? QG_SUCCESS : qg_fail(QG_INVALID_ARGUMENT, "%s: expected at least 1, got %d", what, (int)block);
}

static qg_status check_float_format(const char *what, qg_format format, int with_float16) {
    if (format == QG_FLOAT32 || format == QG_BFLOAT16 || (format == QG_FLOAT16 && with_float16)) {
        return QG_SUCCESS;
    }
    return qg_fail(
        QG_UNSUPPORTED, "%s: expected FLOAT32 (0)%s, got format %d", what,
        with_float16 ? ", BFLOAT16 (1) or FLOAT16 (2)" : " or BFLOAT16 (1)", (int)format);
}

/* Nothing may be written when a value is not finite, so one more pass reads the source first. */
static qg_status check_finite(
    const char *what,
    const void *source,
    qg_format format,
    int64_t count,
    const qg_backend *backend) {
    const int finite = backend->finite(source, format, count, backend->queue);
    const qg_status status = qg_finish(backend, QG_SUCCESS);
    if (status == QG_SUCCESS && !finite) {
        return qg_fail(QG_INVALID_ARGUMENT, "%s: holds a value that is not finite", what);
    }
    return status;
}

static qg_status check_int8_weight(const qg_weight *weight) {
    qg_status status = check_pointer("weight", weight);
    if (status == QG_SUCCESS) {
        status = qg_check_sizes("weight", weight->rows, weight->cols);
    }
    if (status == QG_SUCCESS && weight->format != QG_INT8) {
        status = qg_fail(QG_UNSUPPORTED, "weight: expected format INT8 (16), got %d", (int)weight->format);
    }
    if (status == QG_SUCCESS) {
        status = check_block("group_size", weight->group_size);
    }
    if (status != QG_SUCCESS || weight->rows * weight->cols == 0) {
        return status;
    }
    if (weight->data == NULL || weight->scales == NULL || weight->zeros == NULL) {
        return qg_fail(QG_INVALID_ARGUMENT, "weight: expected data, scales and zeros, one of them is NULL");
    }
    return QG_SUCCESS;
}

static qg_status check_projector(const qg_projector *projector) {
    const qg_status status = check_pointer("projector", projector);
    return status == QG_SUCCESS ? qg_check_projector("projector", projector) : status;
}

static qg_status check_dynamic8(int64_t rows, int64_t cols, int32_t block, int is_signed, const qg_backend *backend) {
    qg_status status = qg_check_backend(backend);
    if (status == QG_SUCCESS) {
        status = qg_check_sizes("moments", rows, cols);
    }
    if (status == QG_SUCCESS) {
        status = check_block("block", block);
    }
    if (status == QG_SUCCESS && is_signed != 0 && is_signed != 1) {
        status = qg_fail(QG_INVALID_ARGUMENT, "is_signed: expected 0 or 1, got %d", is_signed);
    }
    return status;
}

/* ---------------------------------------------------------------- noise, absmax */

qg_status qg_noise(
    int32_t *out,
    uint64_t seed,
    uint32_t id,
    uint64_t step,
    int64_t start,
    int64_t count,
    const qg_backend *backend) {
    qg_status status = qg_check_backend(backend);
    if (status == QG_SUCCESS && (start < 0 || count < 0 || start > INT64_MAX - count)) {
        status = qg_fail(
            QG_INVALID_ARGUMENT, "start, count: expected numbers >= 0 whose sum fits 63 bits, got %lld, %lld",
            (long long)start, (long long)count);
    }
    if (status != QG_SUCCESS || count == 0 || (status = check_pointer("out", out)) != QG_SUCCESS) {
        return status;
    }
    const qg_noise_stream stream = {.seed = seed, .step = step, .id = id};
    backend->noise(out, &stream, start, count, backend->queue);
    return qg_finish(backend, QG_SUCCESS);
}

static qg_status check_array(const qg_array *array) {
    qg_status status = qg_check_sizes("array", 1, array->count);
    if (status == QG_SUCCESS) {
        status = check_float_format("array", array->format, 1);
    }
    return status == QG_SUCCESS && array->count > 0 ? check_pointer("array", array->data) : status;
}

qg_status qg_absmax(float *out, const qg_array *arrays, int64_t count, const qg_backend *backend) {
    qg_status status = qg_check_backend(backend);
    if (status == QG_SUCCESS && count < 0) {
        status = qg_fail(QG_INVALID_ARGUMENT, "count: expected a number >= 0, got %lld", (long long)count);
    }
    if (status != QG_SUCCESS || count == 0) {
        return status;
    }
    status = check_pointer("out", out);
    if (status == QG_SUCCESS) {
        status = check_pointer("arrays", arrays);
    }
    for (int64_t i = 0; status == QG_SUCCESS && i < count; i++) {
        status = check_array(&arrays[i]);
    }
    if (status != QG_SUCCESS) {
        return status;
    }
    backend->absmax(out, arrays, count, backend->queue);
    return qg_finish(backend, QG_SUCCESS);
}

/* ---------------------------------------------------------------- INT8 weights */

qg_status qg_int8_quantize(
    const qg_weight *weight,
    const void *source,
    qg_format source_format,
    const qg_backend *backend) {
    qg_status status = qg_check_backend(backend);
    if (status == QG_SUCCESS) {
        status = check_int8_weight(weight);
    }
    if (status == QG_SUCCESS) {
        status = check_float_format("source", source_format, 1);
    }
    if (status != QG_SUCCESS || weight->rows * weight->cols == 0) {
        return status;
    }
    if ((status = check_pointer("source", source)) != QG_SUCCESS) {
        return status;
    }
    status = check_finite("source", source, source_format, weight->rows * weight->cols, backend);
    if (status != QG_SUCCESS) {
        return status;
    }
    backend->int8_quantize(weight, source, source_format, backend->queue);
    return qg_finish(backend, QG_SUCCESS);
}

qg_status qg_int8_dequantize(
    const qg_weight *weight,
    void *target,
    qg_format target_format,
    const qg_backend *backend) {
    qg_status status = qg_check_backend(backend);
    if (status == QG_SUCCESS) {
        status = check_int8_weight(weight);
    }
    if (status == QG_SUCCESS) {
        status = check_float_format("target", target_format, 1);
    }
    if (status != QG_SUCCESS || weight->rows * weight->cols == 0) {
        return status;
    }
    if ((status = check_pointer("target", target)) != QG_SUCCESS) {
        return status;
    }
    backend->int8_dequantize(weight, target, target_format, backend->queue);
    return qg_finish(backend, QG_SUCCESS);
}

/* ---------------------------------------------------------------- projectors */

qg_status qg_projector_quantize(const qg_projector *projector, const float *source, const qg_backend *backend) {
    qg_status status = qg_check_backend(backend);
    if (status == QG_SUCCESS) {
        status = check_projector(projector);
    }
    if (status != QG_SUCCESS || projector->rank * projector->dim == 0) {
        return status;
    }
    if ((status = check_pointer("source", source)) != QG_SUCCESS) {
        return status;
    }
    status = check_finite("source", source, QG_FLOAT32, projector->rank * projector->dim, backend);
    if (status != QG_SUCCESS) {
        return status;
    }
    backend->projector_quantize(projector, source, backend->queue);
    return qg_finish(backend, QG_SUCCESS);
}

qg_status qg_projector_dequantize(
    const qg_projector *projector,
    void *target,
    qg_format target_format,
    const qg_backend *backend) {
    qg_status status = qg_check_backend(backend);
    if (status == QG_SUCCESS) {
        status = check_projector(projector);
    }
    if (status == QG_SUCCESS) {
        status = check_float_format("target", target_format, 0);
    }
    if (status != QG_SUCCESS || projector->rank * projector->dim == 0) {
        return status;
    }
    if ((status = check_pointer("target", target)) != QG_SUCCESS) {
        return status;
    }
    const qg_decode_item item = {projector, 0, projector->rank, 0, projector->dim, target};
    backend->projector_dequantize(&item, 1, target_format, backend->queue);
    return qg_finish(backend, QG_SUCCESS);
}

/* ---------------------------------------------------------------- dynamic map */

qg_status qg_dynamic8_quantize(
    uint8_t *codes,
    float *absmax,
    const float *source,
    int64_t rows,
    int64_t cols,
    int32_t block,
    int is_signed,
    const qg_backend *backend) {
    qg_status status = check_dynamic8(rows, cols, block, is_signed, backend);
    if (status != QG_SUCCESS || rows * cols == 0) {
        return status;
    }
    if (codes == NULL || absmax == NULL || source == NULL) {
        return qg_fail(QG_INVALID_ARGUMENT, "codes, absmax, source: expected three arrays, one of them is NULL");
    }
    status = check_finite("source", source, QG_FLOAT32, rows * cols, backend);
    if (status != QG_SUCCESS) {
        return status;
    }
    backend->dynamic8_quantize(codes, absmax, source, rows, cols, block, is_signed, backend->queue);
    return qg_finish(backend, QG_SUCCESS);
}

qg_status qg_dynamic8_dequantize(
    float *target,
    const uint8_t *codes,
    const float *absmax,
    int64_t rows,
    int64_t cols,
    int32_t block,
    int is_signed,
    const qg_backend *backend) {
    qg_status status = check_dynamic8(rows, cols, block, is_signed, backend);
    if (status != QG_SUCCESS || rows * cols == 0) {
        return status;
    }
    if (target == NULL || codes == NULL || absmax == NULL) {
        return qg_fail(QG_INVALID_ARGUMENT, "target, codes, absmax: expected three arrays, one of them is NULL");
    }
    backend->dynamic8_dequantize(target, codes, absmax, rows, cols, block, is_signed, backend->queue);
    return qg_finish(backend, QG_SUCCESS);
}
