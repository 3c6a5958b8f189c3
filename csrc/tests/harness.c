#include "harness.h"

#include <stdarg.h>
#include <stdio.h>

enum { GUARD = 64, GUARD_BYTE = 0xA5, POISON = 0xCB, MOST_PRINTED = 20, MOST_BLOCKS = 1024 };

static int64_t passed;
static int64_t failed;

static int report(int condition, const char *file, int line, const char *format, va_list arguments) {
    if (condition) {
        passed++;
        return 1;
    }
    if (failed++ < MOST_PRINTED) {
        printf("%s:%d: ", file, line);
        vprintf(format, arguments);
        printf("\n");
    }
    return 0;
}

int check_that(int condition, const char *file, int line, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    report(condition, file, line, format, arguments);
    va_end(arguments);
    return condition;
}

int check_bytes(const void *got, const void *want, size_t size, const char *file, int line, const char *format, ...) {
    const unsigned char *a = got, *b = want;
    int equal = size == 0 || memcmp(a, b, size) == 0;
    va_list arguments;
    va_start(arguments, format);
    report(equal, file, line, format, arguments);
    va_end(arguments);
    if (!equal && failed <= MOST_PRINTED) {
        size_t i = 0, different = 0;
        while (a[i] == b[i])
            i++;
        for (size_t k = i; k < size; k++)
            different += a[k] != b[k];
        printf("    %zu of %zu bytes differ, the first at %zu: got %d, want %d\n", different, size, i, a[i], b[i]);
    }
    return equal;
}

int check_finish(void) {
    printf("%lld passed, %lld failed\n", (long long)passed, (long long)failed);
    return failed != 0 || passed == 0;
}

int64_t check_count(int64_t full, int64_t less) {
    return getenv("QG_TEST_SHORT") != NULL ? less : full;
}

/* ---------------------------------------------------------------- guarded memory */

typedef struct block {
    unsigned char *memory;
    size_t before; /* guard bytes in front of the data */
    size_t size;
    size_t after;
} block;

static block blocks[MOST_BLOCKS];
static int block_count;

/* Under a memory checker nothing follows the data, so that it sees every read past the end. */
static size_t guard_after(void) {
#ifdef __SANITIZE_ADDRESS__
    return 0;
#else
    return check_count(GUARD, 0);
#endif
}

void *guarded(size_t size, size_t offset) {
    block b = {.before = GUARD + offset, .size = size, .after = guard_after()};
    if (block_count == MOST_BLOCKS || posix_memalign((void **)&b.memory, 64, b.before + size + b.after) != 0) {
        printf("out of test memory\n");
        exit(2);
    }
    memset(b.memory, GUARD_BYTE, b.before + size + b.after);
    memset(b.memory + b.before, POISON, size);
    blocks[block_count++] = b;
    return b.memory + b.before;
}

void *guarded_copy(const void *source, size_t size, size_t offset) {
    void *data = guarded(size, offset);
    if (size > 0)
        memcpy(data, source, size);
    return data;
}

void guarded_release(const char *file, int line, const char *format, ...) {
    int intact = 1;
    for (int i = 0; i < block_count; i++) {
        block b = blocks[i];
        for (size_t k = 0; k < b.before; k++)
            intact &= b.memory[k] == GUARD_BYTE;
        for (size_t k = 0; k < b.after; k++)
            intact &= b.memory[b.before + b.size + k] == GUARD_BYTE;
        free(b.memory);
    }
    block_count = 0;
    va_list arguments;
    va_start(arguments, format);
    report(intact, file, line, format, arguments);
    va_end(arguments);
}

/* ---------------------------------------------------------------- random numbers (splitmix64) */

static uint64_t state;

void random_seed(uint64_t seed) {
    state = seed;
}

uint64_t random_bits(void) {
    uint64_t z = (state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

int64_t random_below(int64_t count) {
    return (int64_t)(random_bits() % (uint64_t)count);
}

double random_uniform(double lo, double hi) {
    return lo + (hi - lo) * ((double)(random_bits() >> 11) * 0x1p-53);
}

double random_normal(void) {
    return sqrt(-2.0 * log(random_uniform(0x1p-60, 1.0))) * cos(6.283185307179586 * random_uniform(0.0, 1.0));
}

float random_finite(void) {
    for (;;) {
        uint32_t bits = (uint32_t)random_bits();
        float value;
        memcpy(&value, &bits, sizeof value);
        if (isfinite(value))
            return value;
    }
}

/* ---------------------------------------------------------------- SIMD levels */

const qg_backend *level(qg_simd simd) {
    static int said[LEVELS];
    const qg_backend *backend = NULL;
    qg_status status = qg_cpu_backend(simd, &backend);
    if (status == QG_SUCCESS)
        return backend;
    if (!said[simd]) {
        said[simd] = 1;
        printf("skipped: SIMD level %d is not available here\n", (int)simd);
        CHECK(simd != QG_SIMD_SCALAR && status == QG_UNSUPPORTED, "level %d: %s", (int)simd, qg_last_error());
    }
    return NULL;
}
