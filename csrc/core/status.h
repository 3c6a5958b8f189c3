/* status.h - how a function of the C interface fails. */
#ifndef QG_CORE_STATUS_H
#define QG_CORE_STATUS_H

#include "q_galore.h"

/* Keeps the sentence for qg_last_error() and returns status: `return qg_fail(QG_INVALID_ARGUMENT, "...", ...);`. */
qg_status qg_fail(qg_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The status of a call into the caller's qg_linalg, with a sentence where that failed. */
qg_status qg_from_linalg(const char *member, qg_status status);

#endif
