/* check.h - argument checks that the entry points share. */
#ifndef QG_CORE_CHECK_H
#define QG_CORE_CHECK_H

#include "q_galore.h"

qg_status qg_check_backend(const qg_backend *backend);

/* A projector that the kernels can read: format, sizes, block, and the arrays that the format has. `what` names it. */
qg_status qg_check_projector(const char *what, const qg_projector *projector);

/* The caller's scratch against the size that was asked for. */
qg_status qg_check_scratch(const void *scratch, size_t have, size_t need);

/* Sizes that no index arithmetic can overflow. */
qg_status qg_check_sizes(const char *what, int64_t rows, int64_t cols);

/* Every task of a step; `projected`: of a galore step, so projector and side are checked too. */
qg_status qg_check_tasks(
    const qg_step_task *tasks,
    int64_t count,
    const qg_step_params *params,
    int projected,
    const qg_backend *backend);

/* `status`, or what has failed on the backend's device since it was asked last. */
qg_status qg_finish(const qg_backend *backend, qg_status status);

#endif
