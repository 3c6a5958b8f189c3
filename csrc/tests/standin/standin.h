/* standin.h - what the stand-ins for cuBLAS and cuSOLVER share: counting calls, failing on demand, and how a test asks.
 *
 * Each defines STANDIN_FUNCTIONS(X), its list of csrc/cuda/libraries.h, and includes this. A test takes the functions at
 * the end from the library with dlsym; both libraries have their own. They work on emulated device memory, the host's.
 */
#ifndef QG_TESTS_STANDIN_H
#define QG_TESTS_STANDIN_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/libraries.h"

#define STANDIN_EXPORT __attribute__((visibility("default")))

/* The prototypes that the loader uses: a definition that differs does not compile. */
#define STANDIN_DECLARE(type, name, arguments) STANDIN_EXPORT type name arguments;
STANDIN_FUNCTIONS(STANDIN_DECLARE)

#define STANDIN_NUMBER(type, name, arguments) NUMBER_##name,
enum { STANDIN_FUNCTIONS(STANDIN_NUMBER) FUNCTIONS };

#define STANDIN_NAME(type, name, arguments) #name,
static const char *const names[] = {STANDIN_FUNCTIONS(STANDIN_NAME)};

static int64_t calls[FUNCTIONS];
static unsigned failure[FUNCTIONS]; /* of the next call */
static int reports[FUNCTIONS];      /* the info of the next call */
static int handles;                 /* made and not destroyed */

static unsigned enter(int number) {
    const unsigned status = failure[number];
    calls[number]++;
    failure[number] = 0;
    return status;
}

/* Count the call; leave with the failure that a test has asked for. */
#define ENTER(name)                                    \
    do {                                               \
        const unsigned status_ = enter(NUMBER_##name); \
        if (status_ != 0) {                            \
            return status_;                            \
        }                                              \
    } while (0)

#define REQUIRE(condition, status) \
    do {                           \
        if (!(condition)) {        \
            return (status);       \
        }                          \
    } while (0)

static int number_of(const char *name) {
    for (int i = 0; i < FUNCTIONS; i++) {
        if (strcmp(names[i], name) == 0) {
            return i;
        }
    }
    abort();
}

STANDIN_EXPORT int64_t standin_calls(const char *name);
STANDIN_EXPORT void standin_fail(const char *name, unsigned status);
STANDIN_EXPORT void standin_report(const char *name, int number);
STANDIN_EXPORT int standin_handles(void);

int64_t standin_calls(const char *name) {
    return calls[number_of(name)];
}

void standin_fail(const char *name, unsigned status) {
    failure[number_of(name)] = status;
}

void standin_report(const char *name, int number) {
    reports[number_of(name)] = number;
}

int standin_handles(void) {
    return handles;
}

#endif
