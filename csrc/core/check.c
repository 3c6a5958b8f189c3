/* check.c - every argument of a step is checked before the first byte is written; each failure is one sentence. */
#include "core/check.h"

#include <math.h>
#include <stdio.h>

#include "core/backend.h"
#include "core/layout.h"
#include "core/status.h"

qg_status qg_check_sizes(const char *what, int64_t rows, int64_t cols) {
    if (rows < 0 || cols < 0 || (cols > 0 && rows > INT64_MAX / 16 / cols)) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "%s: expected sizes >= 0 and fewer than 2^59 elements, got %lld x %lld", what,
            (long long)rows, (long long)cols);
    }
    return QG_SUCCESS;
}

qg_status qg_check_backend(const qg_backend *backend) {
    return backend != NULL ? QG_SUCCESS
                           : qg_fail(QG_INVALID_ARGUMENT, "backend: expected a table of kernels, got NULL");
}

qg_status qg_finish(const qg_backend *backend, qg_status status) {
    const char *sentence = "";
    const qg_status failure = backend->failure == NULL ? QG_SUCCESS : backend->failure(&sentence, backend->queue);
    return failure == QG_SUCCESS ? status : qg_fail(failure, "%s", sentence);
}

qg_status qg_check_scratch(const void *scratch, size_t have, size_t need) {
    if (have < need || (need > 0 && scratch == NULL)) {
        return qg_fail(QG_INVALID_ARGUMENT, "scratch: expected %zu bytes, got %zu", need, have);
    }
    return QG_SUCCESS;
}

static qg_status check_params(const qg_step_params *params) {
    if (params == NULL || params->struct_size != sizeof *params) {
        return qg_fail(QG_INVALID_ARGUMENT, "params: expected a qg_step_params with struct_size %zu", sizeof *params);
    }
    if (!(params->beta1 >= 0.0 && params->beta1 < 1.0) || !(params->beta2 >= 0.0 && params->beta2 < 1.0)) {
        return qg_fail(QG_INVALID_ARGUMENT, "betas: expected [0, 1), got (%g, %g)", params->beta1, params->beta2);
    }
    float rate = (float)(params->lr * params->scale);
    float decay = (float)(params->lr * params->weight_decay);
    float eps = (float)params->eps;
    if (!isfinite(rate) || !isfinite(decay) || !isfinite(eps) || eps < 0.0f) {
        return qg_fail(
            QG_INVALID_ARGUMENT,
            "lr, scale, weight_decay and eps must be finite in float32 and eps >= 0, got %g, %g, %g, %g", params->lr,
            params->scale, params->weight_decay, params->eps);
    }
    if (!(params->norm_growth_limit >= 0.0 && isfinite(params->norm_growth_limit))) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "norm_growth_limit: expected 0 (off) or a finite number > 0, got %g",
            params->norm_growth_limit);
    }
    return QG_SUCCESS;
}

static qg_status check_weight(const qg_weight *weight, int64_t index) {
    char name[40];
    snprintf(name, sizeof name, "weight %lld", (long long)index);
    qg_status status = qg_check_sizes(name, weight->rows, weight->cols);
    if (status != QG_SUCCESS) {
        return status;
    }
    if (weight->rows == 0 || weight->cols == 0) {
        return QG_SUCCESS;
    }
    if (weight->data == NULL) {
        return qg_fail(QG_INVALID_ARGUMENT, "weight %lld: data is NULL", (long long)index);
    }
    switch (weight->format) {
    case QG_FLOAT32:
    case QG_BFLOAT16:
    case QG_FLOAT16:
        return QG_SUCCESS;
    case QG_INT8:
        if (weight->group_size < 1 || weight->scales == NULL || weight->zeros == NULL) {
            return qg_fail(
                QG_INVALID_ARGUMENT, "weight %lld: INT8 needs scales, zeros and group_size >= 1, got %d",
                (long long)index, (int)weight->group_size);
        }
        return QG_SUCCESS;
    default:
        return qg_fail(
            QG_UNSUPPORTED, "weight %lld: format %d cannot be trained", (long long)index, (int)weight->format);
    }
}

static qg_status check_moments(const qg_moments *moments, int64_t index) {
    if (moments->exp_avg == NULL || moments->exp_avg_sq == NULL) {
        return qg_fail(QG_INVALID_ARGUMENT, "moments %lld: exp_avg or exp_avg_sq is NULL", (long long)index);
    }
    switch (moments->format) {
    case QG_FLOAT32:
        return QG_SUCCESS;
    case QG_DYNAMIC8:
        if (moments->block < 1 || moments->exp_avg_absmax == NULL || moments->exp_avg_sq_absmax == NULL) {
            return qg_fail(
                QG_INVALID_ARGUMENT, "moments %lld: DYNAMIC8 needs both absmax arrays and block >= 1, got %d",
                (long long)index, (int)moments->block);
        }
        return QG_SUCCESS;
    default:
        return qg_fail(
            QG_UNSUPPORTED, "moments %lld: format %d holds no moments", (long long)index, (int)moments->format);
    }
}

static qg_status check_projector_format(const char *what, qg_format format) {
    switch (format) {
    case QG_FLOAT32:
    case QG_BFLOAT16:
    case QG_INT8:
    case QG_INT4:
    case QG_FP8_E4M3:
    case QG_FP4:
    case QG_NF4:
    case QG_DYNAMIC8:
        return QG_SUCCESS;
    default:
        return qg_fail(
            QG_UNSUPPORTED,
            "%s: expected FLOAT32 (0), BFLOAT16 (1), INT8 (16), INT4 (17), FP8_E4M3 (18), FP4 (19), NF4 (20) or "
            "DYNAMIC8 (32), got format %d",
            what, (int)format);
    }
}

qg_status qg_check_projector(const char *what, const qg_projector *projector) {
    qg_status status = qg_check_sizes(what, projector->rank, projector->dim);
    if (status == QG_SUCCESS) {
        status = check_projector_format(what, projector->format);
    }
    if (status != QG_SUCCESS) {
        return status;
    }
    const int is_float = qg_projector_is_float(projector->format);
    if (!is_float && projector->block < 0) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "%s: expected a block >= 0 (0: one scale for all), got %d", what,
            (int)projector->block);
    }
    if (projector->rank * projector->dim == 0) {
        return QG_SUCCESS;
    }
    const char *missing = NULL;
    if (qg_projector_is_affine(projector->format) && projector->zeros == NULL) {
        missing = "zeros";
    }
    if (!is_float && projector->scales == NULL) {
        missing = "scales";
    }
    if (projector->codes == NULL) {
        missing = "codes";
    }
    if (missing != NULL) {
        return qg_fail(QG_INVALID_ARGUMENT, "%s: expected its %s, got NULL", what, missing);
    }
    return QG_SUCCESS;
}

/* A basis of vectors of length dim; `what` names it. */
static qg_status check_basis(const char *what, const qg_projector *projector, int64_t dim, const qg_weight *weight) {
    if (projector->rank < 1 || projector->dim != dim) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "%s: expected rank >= 1 vectors of length %lld, got %lld of %lld", what,
            (long long)dim, (long long)projector->rank, (long long)projector->dim);
    }
    qg_status status = qg_check_sizes("R", projector->rank, weight->rows + weight->cols);
    return status == QG_SUCCESS ? qg_check_projector(what, projector) : status;
}

static qg_status check_right_basis(const qg_step_task *task, int64_t index) {
    const qg_projector *right = &task->right_projector;
    int64_t rank = task->projector.rank;
    char name[40];
    snprintf(name, sizeof name, "right_projector %lld", (long long)index);
    qg_status status = check_basis(name, right, task->weight.cols, &task->weight);
    if (status == QG_SUCCESS && right->rank != rank) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "%s: expected %lld vectors like the left one, got %lld", name, (long long)rank,
            (long long)right->rank);
    }
    return status == QG_SUCCESS ? qg_check_sizes("R", rank, rank) : status;
}

static qg_status check_projection(const qg_step_task *task, int64_t index) {
    const qg_weight *weight = &task->weight;
    char name[40];
    snprintf(name, sizeof name, "projector %lld", (long long)index);
    qg_status status;
    switch (task->side) {
    case QG_RIGHT:
        return check_basis(name, &task->projector, weight->cols, weight);
    case QG_LEFT:
        return check_basis(name, &task->projector, weight->rows, weight);
    case QG_FULL:
        status = check_basis(name, &task->projector, weight->rows, weight);
        return status == QG_SUCCESS ? check_right_basis(task, index) : status;
    default:
        return qg_fail(
            QG_UNSUPPORTED, "task %lld: side %d is not right (0), left (1) or full (2)", (long long)index,
            (int)task->side);
    }
}

static qg_status check_norm(const qg_step_task *task, int64_t index, const qg_backend *backend) {
    if (task->norm != NULL && backend->asynchronous) {
        return QG_SUCCESS; /* not for the host to read */
    }
    if (task->norm == NULL || !(*task->norm >= 0.0 && isfinite(*task->norm))) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "task %lld: norm_growth_limit needs a norm that is finite and >= 0, got %g",
            (long long)index, task->norm == NULL ? NAN : *task->norm);
    }
    return QG_SUCCESS;
}

static qg_status check_task(
    const qg_step_task *task,
    int64_t index,
    const qg_step_params *params,
    int projected,
    const qg_backend *backend) {
    qg_status status = check_weight(&task->weight, index);
    if (status != QG_SUCCESS || task->weight.rows == 0 || task->weight.cols == 0) {
        return status;
    }
    if (projected && (status = check_projection(task, index)) != QG_SUCCESS) {
        return status;
    }
    if ((status = check_moments(&task->moments, index)) != QG_SUCCESS) {
        return status;
    }
    if (task->gradient == NULL) {
        return qg_fail(QG_INVALID_ARGUMENT, "gradient %lld is NULL", (long long)index);
    }
    if (task->grad_format != QG_FLOAT32 && task->grad_format != QG_BFLOAT16 && task->grad_format != QG_FLOAT16) {
        return qg_fail(
            QG_UNSUPPORTED, "gradient %lld: format %d is not a float format", (long long)index, (int)task->grad_format);
    }
    if (task->bias_step < 1 || task->noise_step < 0) {
        return qg_fail(
            QG_INVALID_ARGUMENT, "task %lld: expected bias_step >= 1 and noise_step >= 0, got %lld and %lld",
            (long long)index, (long long)task->bias_step, (long long)task->noise_step);
    }
    return projected && params->norm_growth_limit > 0.0 ? check_norm(task, index, backend) : QG_SUCCESS;
}

qg_status qg_check_tasks(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    int projected,
    const qg_backend *backend) {
    if (count < 0 || (count > 0 && tasks == NULL)) {
        return qg_fail(QG_INVALID_ARGUMENT, "tasks: expected count >= 0 and a list, got %lld", (long long)count);
    }
    qg_status status = check_params(params);
    for (int64_t i = 0; status == QG_SUCCESS && i < count; i++) {
        status = check_task(&tasks[i], i, params, projected, backend);
    }
    return status;
}
