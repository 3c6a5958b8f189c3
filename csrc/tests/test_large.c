/* More than 2^31 elements: index arithmetic in 64 bits. The arrays are reserved but hardly touched, so a few pages of
 * memory suffice; each result is compared with the same work on a small array. */
#include "harness.h"
#include "reference.h"
#include "single.h"

#include <stdio.h>
#include <sys/mman.h>

#define HUGE_COUNT ((INT64_C(1) << 33) + 3 * 256 + 77) /* beyond 2^32 elements, and a ragged tail */
enum { TAIL = 2 * 256 + 77 };

/* `bytes` of zeros that take no memory until written, or NULL (counted as skipped). */
static void *reserve(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory != MAP_FAILED)
        return memory;
    printf("skipped: %zu bytes of address space are not to be had\n", bytes);
    return NULL;
}

/* The last groups of a huge weight, next to a small weight that holds the same groups. Noise depends on the element's
 * place, so the small one is rounded to nearest; the float formats and the noise itself are tested beside. */
static void test_weight_update(qg_format format) {
    int64_t groups = (HUGE_COUNT + 255) / 256, first = HUGE_COUNT - TAIL;
    size_t element = ref_size(format);
    uint8_t *data = reserve((size_t)HUGE_COUNT * element);
    float *scales = reserve((size_t)groups * 4), u[TAIL], small_scales[3];
    int16_t *zeros = reserve((size_t)groups * 2), small_zeros[3];
    uint8_t small[TAIL * 4];
    for (int simd = 0; simd < LEVELS && data != NULL && scales != NULL && zeros != NULL; simd++) {
        uint8_t *tail = data + first * (int64_t)element;
        for (int64_t i = 0; i < TAIL; i++) {
            u[i] = (float)(0.05 * random_normal());
            if (format == QG_INT8)
                tail[i] = (uint8_t)random_bits();
            else
                ref_store(format, tail, i, (float)random_normal());
        }
        for (int g = 0; g < 3; g++) {
            scales[groups - 3 + g] = small_scales[g] = 0.01f;
            zeros[groups - 3 + g] = small_zeros[g] = 128;
        }
        memcpy(small, tail, TAIL * element);
        qg_update_coefficients c = {.keep = 0.999f, .decay = 0.001f, .rate = 1.0f, .stochastic = 0};
        qg_noise_stream stream = {1, 2, 3};
        qg_weight huge = {data, scales, zeros, 1, HUGE_COUNT, 256, format};
        qg_weight same = {small, small_scales, small_zeros, 1, TAIL, 256, format};
        if (level(simd) == NULL)
            continue;
        single_update(level(simd), &huge, first, TAIL, u, QG_FLOAT32, &c, &stream, NULL);
        single_update(level(simd), &same, 0, TAIL, u, QG_FLOAT32, &c, &stream, NULL);
        CHECK_BYTES(tail, small, TAIL * element, "the end of 2^33 elements, format %d, level %d", format, simd);
        CHECK_BYTES(scales + groups - 3, small_scales, 12, "scales, level %d", simd);
        CHECK_BYTES(zeros + groups - 3, small_zeros, 6, "zeros, level %d", simd);
        CHECK(tail[-1] == 0, "the element before the tile is written");

        /* Stochastic rounding of the same tail, against the noise at these places. */
        if (format == QG_INT8) {
            int32_t j[256];
            CHECK_OK(qg_noise(j, 1, 3, 2, first, 256, level(simd)));
            memcpy(small, tail, 256);
            c.stochastic = 1;
            ref_int8_update(small, small_scales, small_zeros, u, 256, &c, j);
            single_update(level(simd), &huge, first, TAIL, u, QG_FLOAT32, &c, &stream, NULL);
            CHECK_BYTES(tail, small, 256, "stochastic rounding beyond 2^32 elements, level %d", simd);
        }
    }
    if (data != NULL)
        munmap(data, (size_t)HUGE_COUNT * element);
    if (scales != NULL)
        munmap(scales, (size_t)groups * 4);
    if (zeros != NULL)
        munmap(zeros, (size_t)groups * 2);
}

/* Stochastic rounding across element 2^33, where the upper half of the element's number changes inside a group. */
static void test_across(qg_format format) {
    enum { GROUP = 100, COUNT = 7 * GROUP };
    int64_t groups = HUGE_COUNT / GROUP + 1, first = ((INT64_C(1) << 33) / GROUP - 3) * GROUP;
    size_t element = ref_size(format);
    uint8_t *data = reserve((size_t)HUGE_COUNT * element), start[COUNT * 2], want[COUNT * 2];
    float *scales = reserve((size_t)groups * 4), u[COUNT];
    int16_t *zeros = reserve((size_t)groups * 2);
    int64_t stats[2] = {0, 0};
    for (int simd = 0; simd < LEVELS && data != NULL && scales != NULL && zeros != NULL; simd++) {
        uint8_t *tile = data + first * (int64_t)element;
        qg_update_coefficients c = {.keep = 0.999f, .decay = 0.001f, .rate = 1.0f, .stochastic = 1};
        qg_noise_stream stream = {1, 2, 3};
        qg_weight huge = {data, scales, zeros, 1, HUGE_COUNT, GROUP, format};
        for (int i = 0; i < COUNT; i++) {
            u[i] = (float)(0.05 * random_normal());
            if (format == QG_INT8)
                start[i] = (uint8_t)(20 + random_below(216));
            else
                ref_store(format, start, i, (float)random_normal());
            scales[first / GROUP + i / GROUP] = 0.05f;
            zeros[first / GROUP + i / GROUP] = 128;
        }
        if (level(simd) == NULL)
            continue;
        memcpy(tile, start, COUNT * element);
        ref_update(&huge, first, COUNT, u, &c, &stream, stats);
        memcpy(want, tile, COUNT * element);
        memcpy(tile, start, COUNT * element);
        single_update(level(simd), &huge, first, COUNT, u, QG_FLOAT32, &c, &stream, NULL);
        CHECK(stats[0] + stats[1] == 0, "a group left its range");
        CHECK_BYTES(tile, want, COUNT * element, "across element 2^33, format %d, level %d", format, simd);
    }
    if (data != NULL)
        munmap(data, (size_t)HUGE_COUNT * element);
    if (scales != NULL)
        munmap(scales, (size_t)groups * 4);
    if (zeros != NULL)
        munmap(zeros, (size_t)groups * 2);
}

/* The last vectors of a basis with more than 2^33 elements. */
static void test_projector(qg_format format) {
    int packed = format == QG_INT4 || format == QG_NF4, is_float = format == QG_FLOAT32 || format == QG_BFLOAT16;
    int64_t rank = 100003, dim = 99991, row_bytes = packed ? (dim + 1) / 2 : dim * (int64_t)ref_size(format);
    int64_t per_row = (dim + 255) / 256, col = dim - 301;
    uint8_t *codes = reserve((size_t)(rank * row_bytes)), *zeros = reserve((size_t)(rank * per_row));
    uint16_t *scales = reserve((size_t)(rank * per_row) * 2);
    for (int simd = 0; simd < LEVELS && codes != NULL && scales != NULL && zeros != NULL; simd++) {
        float got[2 * 301], want[2 * 301];
        for (int64_t row = rank - 2, at = 0; row < rank; row++) {
            for (int64_t i = col; i < dim; i++, at++) {
                int64_t block = row * per_row + i / 256;
                uint8_t code = (uint8_t)(i * 7 % 16), *place = codes + row * row_bytes + i / 2;
                scales[block] = 0x3C00;
                zeros[block] = 5;
                want[at] = 0x1p-7f * (format == QG_NF4 ? ref_projector_entry(format, code) : (float)(code - 5));
                if (packed)
                    *place = (uint8_t)(i % 2 ? (*place & 0x0F) | code << 4 : (*place & 0xF0) | code);
                else if (is_float)
                    ref_store(format, codes, row * dim + i, want[at]);
                else
                    codes[row * row_bytes + i] = code;
            }
        }
        qg_projector projector = {codes, scales, zeros, rank, dim, 256, format};
        if (level(simd) == NULL)
            continue;
        single_decode(level(simd), &projector, rank - 2, 2, col, 301, got, QG_FLOAT32);
        CHECK_BYTES(got, want, sizeof got, "the end of a huge basis, format %d, level %d", format, simd);
    }
    if (codes != NULL)
        munmap(codes, (size_t)(rank * row_bytes));
    if (zeros != NULL)
        munmap(zeros, (size_t)(rank * per_row));
    if (scales != NULL)
        munmap(scales, (size_t)(rank * per_row) * 2);
}

/* The last columns of two rows of 2^33 moments, and a cast of two such rows. */
static void test_adam_and_cast(qg_format format) {
    int64_t cols = HUGE_COUNT, first = cols - TAIL, blocks = (cols + 255) / 256, all = 2 * cols;
    size_t element = format == QG_FLOAT32 ? 4 : 1;
    uint8_t *m = reserve((size_t)all * element), *v = reserve((size_t)all * element);
    float *m_absmax = reserve((size_t)blocks * 8), *v_absmax = reserve((size_t)blocks * 8);
    uint8_t small_m[2 * TAIL * 4], small_v[2 * TAIL * 4];
    float g[2 * TAIL], n[2 * TAIL], small_n[2 * TAIL], small_m_absmax[6], small_v_absmax[6], copied[2 * TAIL];
    qg_adam_coefficients c = ref_adam_coefficients(0.9, 0.999, 1e-8, 1);
    for (int simd = 0; simd < LEVELS && m != NULL && v != NULL && m_absmax != NULL && v_absmax != NULL; simd++) {
        if (level(simd) == NULL)
            continue;
        for (int i = 0; i < 2 * TAIL; i++)
            g[i] = (float)random_normal();
        for (int64_t row = 0; row < 2; row++) {
            memcpy(
                small_m + row * TAIL * (int64_t)element, m + (row * cols + first) * (int64_t)element, TAIL * element);
            memcpy(
                small_v + row * TAIL * (int64_t)element, v + (row * cols + first) * (int64_t)element, TAIL * element);
            memcpy(small_m_absmax + 3 * row, m_absmax + (row + 1) * blocks - 3, 12);
            memcpy(small_v_absmax + 3 * row, v_absmax + (row + 1) * blocks - 3, 12);
        }
        qg_moments huge = {m, v, m_absmax, v_absmax, 256, format};
        qg_moments same = {small_m, small_v, small_m_absmax, small_v_absmax, 256, format};
        single_adam(level(simd), &huge, cols, 2, first, TAIL, g, QG_FLOAT32, TAIL, n, TAIL, &c);
        single_adam(level(simd), &same, TAIL, 2, 0, TAIL, g, QG_FLOAT32, TAIL, small_n, TAIL, &c);
        CHECK_BYTES(n, small_n, sizeof n, "N at the end of huge moments, format %d, level %d", format, simd);
        for (int64_t row = 0; row < 2; row++) {
            CHECK_BYTES(
                m + (row * cols + first) * (int64_t)element, small_m + row * TAIL * (int64_t)element, TAIL * element,
                "exp_avg, row %lld, level %d", (long long)row, simd);
            CHECK_BYTES(
                m_absmax + (row + 1) * blocks - 3, small_m_absmax + 3 * row, format == QG_DYNAMIC8 ? 12 : 0,
                "absmax, row %lld, level %d", (long long)row, simd);
        }
        if (format == QG_FLOAT32) {
            single_cast(level(simd), copied, QG_FLOAT32, (float *)m + first, QG_FLOAT32, 2, TAIL, cols);
            CHECK_BYTES(copied, small_m, sizeof copied, "rows 2^33 elements apart, level %d", simd);
        }
    }
    for (int i = 0; i < 2; i++) {
        if ((i ? v : m) != NULL)
            munmap(i ? v : m, (size_t)all * element);
        if ((i ? v_absmax : m_absmax) != NULL)
            munmap(i ? v_absmax : m_absmax, (size_t)blocks * 8);
    }
}

/* A whole gradient of more than 2^31 elements whose only large value is the last. */
static void test_absmax(void) {
    int64_t count = (INT64_C(1) << 31) + 1001;
    uint16_t *gradient = reserve((size_t)count * 2);
    if (gradient == NULL)
        return;
    gradient[count - 1] = 0xC040; /* -3 */
    qg_simd simd = qg_cpu_best_simd();
    float got = 0.0f;
    CHECK_OK(qg_absmax(&got, &(qg_array){gradient, count, QG_BFLOAT16}, 1, level(simd)));
    CHECK(got == 3.0f, "absmax of 2^31 + 1001 elements is %g", got);
    munmap(gradient, (size_t)count * 2);
}

int main(void) {
    int full = 1;
#ifdef __SANITIZE_ADDRESS__
    full = 0; /* the checker would spend its time on the shadow of empty pages */
#endif
    random_seed(9);
    omp_set_num_threads(2);
    test_weight_update(QG_INT8);
    test_weight_update(QG_BFLOAT16);
    test_weight_update(QG_FLOAT16);
    test_weight_update(QG_FLOAT32);
    test_across(QG_INT8);
    test_across(QG_BFLOAT16);
    test_projector(QG_INT4);
    test_projector(QG_INT8);
    test_projector(QG_FLOAT32);
    test_projector(QG_BFLOAT16);
    test_projector(QG_NF4);
    test_adam_and_cast(QG_DYNAMIC8);
    test_adam_and_cast(QG_FLOAT32);
    if (full && check_count(1, 0))
        test_absmax();
    return check_finish();
}
