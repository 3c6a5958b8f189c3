/* check.h - argument checks that the entry points share. */
#ifndef QG_CORE_CHECK_H
#define QG_CORE_CHECK_H

#include "q_galore.h"

/* Sizes that no index arithmetic can overflow. */
qg_status qg_check_sizes(const char *what, int64_t rows, int64_t cols);

/* Every task of a step; `projected`: of a galore step, so projector and side are checked too. */
qg_status qg_check_tasks(const qg_step_task *tasks, int64_t count, const qg_step_params *params, int projected);

#endif
