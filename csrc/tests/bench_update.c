/* bench_update.c - the INT8 update pass of a weight against a plain copy of the bytes that it moves, as JSON.
 *
 * The direction changes its sign from call to call, so that the weights stay where they are: a group whose range has to
 * grow in each call costs several times as much, but in training one in a hundred does.
 *
 * The pass reads a code and a float32 of U and writes a code: 6 bytes an element. The copy reads 3 and writes 3. Both
 * run on one thread, in turns; each figure is the median over the rounds, the ratios are formed round by round.
 */
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/backend.h"
#include "single.h"

enum { ROUNDS = 15, WARMUP = 2, LEVELS = 3, GROUP = 256, ELEMENTS = 2048 * 5461 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void *allocate(size_t bytes) {
    void *memory = malloc(bytes);
    if (memory == NULL) {
        fprintf(stderr, "bench_update: out of memory\n");
        exit(1);
    }
    memset(memory, 1, bytes);
    return memory;
}

static void report(const char *name, const double *seconds, const double *base) {
    double ratio[ROUNDS], ms[ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        ratio[i] = seconds[i] / base[i];
        ms[i] = 1e3 * seconds[i];
    }
    qsort(ratio, ROUNDS, sizeof *ratio, ascending);
    qsort(ms, ROUNDS, sizeof *ms, ascending);
    printf(
        "\"%s\": {\"ratio\": %.4f, \"ratio_min\": %.4f, \"ratio_max\": %.4f, \"ms\": %.4f}", name, ratio[ROUNDS / 2],
        ratio[0], ratio[ROUNDS - 1], ms[ROUNDS / 2]);
}

int main(void) {
    static const char *const names[LEVELS] = {"update scalar", "update avx2", "update avx512"};
    const int64_t groups = (ELEMENTS + GROUP - 1) / GROUP;
    float *values = allocate(ELEMENTS * sizeof(float)), *u = allocate(ELEMENTS * sizeof(float));
    unsigned char *from = allocate(3 * (size_t)ELEMENTS), *to = allocate(3 * (size_t)ELEMENTS);
    qg_weight weight = {
        .data = allocate(ELEMENTS),
        .scales = allocate((size_t)groups * sizeof(float)),
        .zeros = allocate((size_t)groups * sizeof(int16_t)),
        .rows = 2048,
        .cols = 5461,
        .group_size = GROUP,
        .format = QG_INT8,
    };
    omp_set_num_threads(1);
    uint32_t state = 1;
    for (int64_t i = 0; i < ELEMENTS; i++) { /* weights of +-0.05, directions of +-1 */
        state = state * 1664525u + 1013904223u;
        values[i] = ((float)(state >> 8) / 8388608.0f - 1.0f) * 0.05f;
        state = state * 1664525u + 1013904223u;
        u[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
    const qg_backend *kernels[LEVELS] = {NULL};
    for (int level = 0; level <= (int)qg_cpu_best_simd(); level++) {
        qg_cpu_backend((qg_simd)level, &kernels[level]);
    }
    if (qg_int8_quantize(&weight, values, QG_FLOAT32, kernels[0]) != QG_SUCCESS) {
        fprintf(stderr, "bench_update: %s\n", qg_last_error());
        return 1;
    }
    qg_update_coefficients coefficients = {.keep = 1.0f, .decay = 1e-5f, .rate = 1e-4f, .stochastic = 1};
    double copy[ROUNDS], pass[LEVELS][ROUNDS];
    for (int round = -WARMUP; round < ROUNDS; round++) {
        double start = now();
        memcpy(to, from, 3 * (size_t)ELEMENTS);
        double seconds = now() - start;
        if (round >= 0) {
            copy[round] = seconds;
        }
        for (int level = 0; level < LEVELS; level++) {
            if (kernels[level] == NULL) {
                continue;
            }
            qg_noise_stream stream = {.seed = 0, .step = (uint64_t)(round + WARMUP), .id = 0};
            coefficients.rate = -coefficients.rate;
            start = now();
            single_update(kernels[level], &weight, 0, ELEMENTS, u, QG_FLOAT32, &coefficients, &stream, NULL);
            seconds = now() - start;
            if (round >= 0) {
                pass[level][round] = seconds;
            }
        }
    }
    printf("{");
    report("copy", copy, copy);
    for (int level = 0; level < LEVELS; level++) {
        if (kernels[level] != NULL) {
            printf(", ");
            report(names[level], pass[level], copy);
        }
    }
    printf("}\n");
    fprintf(stderr, "checksum %d\n", to[ELEMENTS] + ((unsigned char *)weight.data)[ELEMENTS - 1]);
    return 0;
}
