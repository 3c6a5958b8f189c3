/* status.c - versions, the names of statuses, the last error of each thread. */
#include "core/status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_error[512];

qg_status qg_fail(qg_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

qg_status qg_from_linalg(const char *member, qg_status status) {
    return status == QG_SUCCESS ? status : qg_fail(status, "linalg: %s failed, %s", member, qg_status_string(status));
}

const char *qg_last_error(void) {
    return last_error;
}

const char *qg_version(void) {
    return QG_VERSION;
}

const char *qg_status_string(qg_status status) {
    switch (status) {
    case QG_SUCCESS:
        return "success";
    case QG_INVALID_ARGUMENT:
        return "invalid argument";
    case QG_UNSUPPORTED:
        return "unsupported";
    case QG_OUT_OF_MEMORY:
        return "out of memory";
    case QG_CUDA:
        return "CUDA error";
    case QG_INTERNAL:
        return "internal error";
    default:
        return "unknown status";
    }
}
