/* harness.h - what the test programs share: counting, guarded memory, random numbers, the SIMD levels. */
#ifndef QG_TESTS_HARNESS_H
#define QG_TESTS_HARNESS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <omp.h>

#include "core/backend.h"

/* Count one check; print a failed one (the first twenty of a program). Returns the condition. */
#define CHECK(condition, ...) check_that((condition) != 0, __FILE__, __LINE__, __VA_ARGS__)
int check_that(int condition, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* Equal bytes; a failure names the first difference. */
#define CHECK_BYTES(got, want, size, ...) check_bytes((got), (want), (size), __FILE__, __LINE__, __VA_ARGS__)
int check_bytes(const void *got, const void *want, size_t size, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 6, 7)));

/* A call that has to succeed. */
#define CHECK_OK(call) CHECK((call) == QG_SUCCESS, "%s: %s", #call, qg_last_error())

/* Print "N passed, N failed"; returns the exit status. */
int check_finish(void);

/* `full`, or `less` where loops have to be short (QG_TEST_SHORT is set: valgrind). */
int64_t check_count(int64_t full, int64_t less);

/* Poisoned memory of `size` bytes, `offset` bytes behind a 64-byte boundary, with guard bytes around. */
void *guarded(size_t size, size_t offset);

/* The same, filled with a copy of `source`. */
void *guarded_copy(const void *source, size_t size, size_t offset);

/* Check the guard bytes of everything that guarded() has given out, and free it. */
#define RELEASE(...) guarded_release(__FILE__, __LINE__, __VA_ARGS__)
void guarded_release(const char *file, int line, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Random numbers: one stream, restarted by random_seed. */
void random_seed(uint64_t seed);
uint64_t random_bits(void);
int64_t random_below(int64_t count); /* 0 .. count - 1 */
double random_uniform(double lo, double hi);
double random_normal(void);
float random_finite(void); /* any finite bit pattern */

/* The kernels of each SIMD level, NULL where this machine lacks it (said once). Level 0 is the scalar one. */
enum { LEVELS = 3 };
const qg_backend *level(qg_simd simd);

#endif
