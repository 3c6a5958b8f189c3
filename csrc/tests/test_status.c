/* Every refusal: its status, a sentence that names the argument and what was wrong, and nothing written. */
#include "harness.h"
#include "reference.h"

#include <stdio.h>

/* A call that has to be refused with this status and a sentence that contains each of two words. */
#define REFUSED(call, status, word1, word2) refused((call), (status), (word1), (word2), #call, __LINE__)

static void refused(qg_status got, qg_status want, const char *word1, const char *word2, const char *call, int line) {
    const char *sentence = qg_last_error();
    CHECK(got == want, "line %d: %s gives %s, not %s", line, call, qg_status_string(got), qg_status_string(want));
    CHECK(
        strstr(sentence, word1) != NULL && strstr(sentence, word2) != NULL,
        "line %d: '%s' is about neither '%s' nor '%s'", line, sentence, word1, word2);
    CHECK(strlen(sentence) > 10 && strchr(sentence, '\n') == NULL, "line %d: '%s' is no sentence", line, sentence);
    CHECK(
        qg_cpu_backend((qg_simd)77, NULL) == QG_INVALID_ARGUMENT, "the next sentence"); /* so that none is left over */
}

enum { COUNT = 64 };

static uint8_t codes[COUNT], zeros8[COUNT];
static float values[COUNT], floats[COUNT], absmax[COUNT];
static uint16_t scales16[COUNT];
static int16_t zeros16[COUNT];
static int32_t noise[COUNT];
static const qg_backend *cpu;

static void test_names(void) {
    static const qg_status all[] = {
        QG_SUCCESS, QG_INVALID_ARGUMENT, QG_UNSUPPORTED, QG_OUT_OF_MEMORY, QG_CUDA, QG_INTERNAL};
    for (int i = 0; i < 6; i++) {
        CHECK((int)all[i] == i, "a status has changed its number");
        for (int k = 0; k < i; k++)
            CHECK(
                strcmp(qg_status_string(all[i]), qg_status_string(all[k])) != 0, "statuses %d and %d read alike", i, k);
    }
    CHECK(qg_status_string((qg_status)99) != NULL, "an unknown status has no name");
    CHECK(strcmp(qg_version(), QG_VERSION) == 0, "the version is %s", qg_version());
    CHECK(
        QG_FLOAT32 == 0 && QG_BFLOAT16 == 1 && QG_FLOAT16 == 2 && QG_INT8 == 16 && QG_INT4 == 17 && QG_DYNAMIC8 == 32,
        "a format has changed its number");
}

static void test_backend(void) {
    const qg_backend *backend = NULL;
    REFUSED(qg_cpu_backend(QG_SIMD_SCALAR, NULL), QG_INVALID_ARGUMENT, "backend", "NULL");
    REFUSED(qg_cpu_backend((qg_simd)3, &backend), QG_INVALID_ARGUMENT, "level", "3");
    REFUSED(qg_cpu_backend((qg_simd)-1, &backend), QG_INVALID_ARGUMENT, "level", "-1");
    for (int simd = qg_cpu_best_simd() + 1; simd <= QG_SIMD_AVX512; simd++)
        REFUSED(qg_cpu_backend((qg_simd)simd, &backend), QG_UNSUPPORTED, "processor", "AVX");
    for (int simd = 0; simd <= (int)qg_cpu_best_simd(); simd++)
        CHECK_OK(qg_cpu_backend((qg_simd)simd, &backend));
}

/* The last error belongs to the thread that made it. */
static void test_threads_apart(void) {
    qg_cpu_backend(QG_SIMD_SCALAR, NULL);
    char mine[512];
    snprintf(mine, sizeof mine, "%s", qg_last_error());
    int apart = 1;
#pragma omp parallel num_threads(2) reduction(& : apart)
    {
        if (omp_get_thread_num() == 1) {
            apart &= strcmp(qg_last_error(), mine) != 0;
            qg_cpu_backend((qg_simd)55, NULL);
            qg_cpu_backend((qg_simd)55, &cpu);
        }
    }
    CHECK(apart && strcmp(qg_last_error(), mine) == 0, "another thread's error is seen here");
}

static void test_noise_and_absmax(void) {
    REFUSED(qg_noise(noise, 1, 1, 1, 0, 5, NULL), QG_INVALID_ARGUMENT, "backend", "NULL");
    REFUSED(qg_noise(NULL, 1, 1, 1, 0, 5, cpu), QG_INVALID_ARGUMENT, "out", "NULL");
    REFUSED(qg_noise(noise, 1, 1, 1, -1, 5, cpu), QG_INVALID_ARGUMENT, "start", "-1");
    REFUSED(qg_noise(noise, 1, 1, 1, 0, -5, cpu), QG_INVALID_ARGUMENT, "count", "-5");
    REFUSED(qg_noise(noise, 1, 1, 1, INT64_MAX, 5, cpu), QG_INVALID_ARGUMENT, "start", "5");
    CHECK_OK(qg_noise(NULL, 1, 1, 1, 0, 0, cpu));
    REFUSED(qg_absmax(floats, &(qg_array){values, 5, QG_FLOAT32}, 1, NULL), QG_INVALID_ARGUMENT, "backend", "NULL");
    REFUSED(qg_absmax(NULL, &(qg_array){values, 5, QG_FLOAT32}, 1, cpu), QG_INVALID_ARGUMENT, "out", "NULL");
    REFUSED(qg_absmax(floats, &(qg_array){NULL, 5, QG_FLOAT32}, 1, cpu), QG_INVALID_ARGUMENT, "array", "NULL");
    REFUSED(qg_absmax(floats, &(qg_array){values, -5, QG_FLOAT32}, 1, cpu), QG_INVALID_ARGUMENT, "array", "-5");
    REFUSED(qg_absmax(floats, &(qg_array){values, 5, QG_INT8}, 1, cpu), QG_UNSUPPORTED, "array", "16");
    REFUSED(qg_absmax(floats, NULL, 1, cpu), QG_INVALID_ARGUMENT, "arrays", "NULL");
    REFUSED(qg_absmax(floats, NULL, -1, cpu), QG_INVALID_ARGUMENT, "count", "-1");
    CHECK_OK(qg_absmax(NULL, NULL, 0, cpu));
    CHECK_OK(qg_absmax(floats, &(qg_array){NULL, 0, QG_FLOAT32}, 1, cpu));
    CHECK(floats[0] == 0.0f, "absmax of nothing is %g", floats[0]);
}

static void test_int8(void) {
    const qg_weight good = {codes, floats, zeros16, 4, 16, 32, QG_INT8};
    static const struct {
        int field;
        qg_status status;
        const char *word1, *word2;
    } wrong[] = {{0, QG_INVALID_ARGUMENT, "weight", "NULL"}, {1, QG_INVALID_ARGUMENT, "scales", "NULL"},
        {2, QG_INVALID_ARGUMENT, "zeros", "NULL"}, {3, QG_INVALID_ARGUMENT, "weight", "-4"},
        {4, QG_INVALID_ARGUMENT, "weight", "-16"}, {5, QG_INVALID_ARGUMENT, "group_size", "0"},
        {6, QG_INVALID_ARGUMENT, "group_size", "-32"}, {7, QG_UNSUPPORTED, "weight", "0"},
        {8, QG_UNSUPPORTED, "weight", "17"}, {9, QG_INVALID_ARGUMENT, "weight", "9223372036854775807"}};
    for (int i = 0; i < 10; i++) {
        qg_weight w = good;
        switch (wrong[i].field) {
        case 0:
            w.data = NULL;
            break;
        case 1:
            w.scales = NULL;
            break;
        case 2:
            w.zeros = NULL;
            break;
        case 3:
            w.rows = -4;
            break;
        case 4:
            w.cols = -16;
            break;
        case 5:
            w.group_size = 0;
            break;
        case 6:
            w.group_size = -32;
            break;
        case 7:
            w.format = QG_FLOAT32;
            break;
        case 8:
            w.format = QG_INT4;
            break;
        default:
            w.rows = INT64_MAX;
            break;
        }
        REFUSED(qg_int8_quantize(&w, values, QG_FLOAT32, cpu), wrong[i].status, wrong[i].word1, wrong[i].word2);
        REFUSED(qg_int8_dequantize(&w, values, QG_FLOAT32, cpu), wrong[i].status, wrong[i].word1, wrong[i].word2);
    }
    REFUSED(qg_int8_quantize(NULL, values, QG_FLOAT32, cpu), QG_INVALID_ARGUMENT, "weight", "NULL");
    REFUSED(qg_int8_dequantize(NULL, values, QG_FLOAT32, cpu), QG_INVALID_ARGUMENT, "weight", "NULL");
    REFUSED(qg_int8_quantize(&good, NULL, QG_FLOAT32, cpu), QG_INVALID_ARGUMENT, "source", "NULL");
    REFUSED(qg_int8_dequantize(&good, NULL, QG_FLOAT32, cpu), QG_INVALID_ARGUMENT, "target", "NULL");
    REFUSED(qg_int8_quantize(&good, values, QG_DYNAMIC8, cpu), QG_UNSUPPORTED, "source", "32");
    REFUSED(qg_int8_dequantize(&good, values, (qg_format)5, cpu), QG_UNSUPPORTED, "target", "5");
    REFUSED(qg_int8_quantize(&good, values, QG_FLOAT32, NULL), QG_INVALID_ARGUMENT, "backend", "NULL");
    REFUSED(qg_int8_dequantize(&good, values, QG_FLOAT32, NULL), QG_INVALID_ARGUMENT, "backend", "NULL");
    values[7] = NAN;
    REFUSED(qg_int8_quantize(&good, values, QG_FLOAT32, cpu), QG_INVALID_ARGUMENT, "source", "finite");
    values[7] = 0.0f;
    const qg_weight empty = {NULL, NULL, NULL, 0, 16, 32, QG_INT8};
    CHECK_OK(qg_int8_quantize(&empty, NULL, QG_FLOAT32, cpu));
    CHECK_OK(qg_int8_dequantize(&empty, NULL, QG_FLOAT32, cpu));
}

static void test_projector(void) {
    const qg_projector good = {codes, scales16, zeros8, 4, 16, 8, QG_INT4};
    for (int i = 0; i < 9; i++) {
        static const char *words[9][2] = {{"codes", "NULL"}, {"scales", "NULL"}, {"zeros", "NULL"}, {"projector", "-4"},
            {"projector", "-16"}, {"scales", "NULL"}, {"block", "-8"}, {"projector", "2"}, {"codes", "NULL"}};
        qg_projector p = good;
        switch (i) {
        case 0:
            p.codes = NULL;
            break;
        case 1:
            p.scales = NULL;
            break;
        case 2:
            p.zeros = NULL;
            break;
        case 3:
            p.rank = -4;
            break;
        case 4:
            p.dim = -16;
            break;
        case 5:
            p.format = QG_NF4;
            p.scales = NULL;
            break;
        case 6:
            p.block = -8;
            break;
        case 7:
            p.format = QG_FLOAT16;
            break;
        default:
            p = (qg_projector){NULL, NULL, NULL, 4, 16, 0, QG_FLOAT32};
            break;
        }
        qg_status status = i == 7 ? QG_UNSUPPORTED : QG_INVALID_ARGUMENT;
        REFUSED(qg_projector_quantize(&p, values, cpu), status, words[i][0], words[i][1]);
        REFUSED(qg_projector_dequantize(&p, values, QG_FLOAT32, cpu), status, words[i][0], words[i][1]);
    }
    REFUSED(qg_projector_quantize(NULL, values, cpu), QG_INVALID_ARGUMENT, "projector", "NULL");
    REFUSED(qg_projector_dequantize(NULL, values, QG_FLOAT32, cpu), QG_INVALID_ARGUMENT, "projector", "NULL");
    REFUSED(qg_projector_quantize(&good, NULL, cpu), QG_INVALID_ARGUMENT, "source", "NULL");
    REFUSED(qg_projector_dequantize(&good, NULL, QG_FLOAT32, cpu), QG_INVALID_ARGUMENT, "target", "NULL");
    REFUSED(qg_projector_dequantize(&good, values, QG_FLOAT16, cpu), QG_UNSUPPORTED, "target", "2");
    REFUSED(qg_projector_quantize(&good, values, NULL), QG_INVALID_ARGUMENT, "backend", "NULL");
    REFUSED(qg_projector_dequantize(&good, values, QG_FLOAT32, NULL), QG_INVALID_ARGUMENT, "backend", "NULL");
    values[9] = INFINITY;
    REFUSED(qg_projector_quantize(&good, values, cpu), QG_INVALID_ARGUMENT, "source", "finite");
    values[9] = 0.0f;
    const qg_projector empty = {NULL, NULL, NULL, 0, 16, 8, QG_INT4};
    CHECK_OK(qg_projector_quantize(&empty, NULL, cpu));
    CHECK_OK(qg_projector_dequantize(&empty, NULL, QG_BFLOAT16, cpu));
}

static void test_dynamic8(void) {
    static const struct {
        int64_t rows, cols;
        int32_t block;
        int is_signed;
        const char *word1, *word2;
    } wrong[] = {{-1, 5, 4, 1, "moments", "-1"}, {2, -5, 4, 1, "moments", "-5"}, {2, 5, 0, 1, "block", "0"},
        {2, 5, -4, 0, "block", "-4"}, {2, 5, 4, 2, "is_signed", "2"},
        {INT64_MAX, 2, 4, 1, "moments", "9223372036854775807"}};
    for (int i = 0; i < 6; i++) {
        REFUSED(
            qg_dynamic8_quantize(
                codes, absmax, values, wrong[i].rows, wrong[i].cols, wrong[i].block, wrong[i].is_signed, cpu),
            QG_INVALID_ARGUMENT, wrong[i].word1, wrong[i].word2);
        REFUSED(
            qg_dynamic8_dequantize(
                floats, codes, absmax, wrong[i].rows, wrong[i].cols, wrong[i].block, wrong[i].is_signed, cpu),
            QG_INVALID_ARGUMENT, wrong[i].word1, wrong[i].word2);
    }
    for (int i = 0; i < 3; i++) {
        REFUSED(
            qg_dynamic8_quantize(
                i == 0 ? NULL : codes, i == 1 ? NULL : absmax, i == 2 ? NULL : values, 2, 5, 4, 1, cpu),
            QG_INVALID_ARGUMENT, "absmax", "NULL");
        REFUSED(
            qg_dynamic8_dequantize(
                i == 0 ? NULL : floats, i == 1 ? NULL : codes, i == 2 ? NULL : absmax, 2, 5, 4, 1, cpu),
            QG_INVALID_ARGUMENT, "absmax", "NULL");
    }
    REFUSED(qg_dynamic8_quantize(codes, absmax, values, 2, 5, 4, 1, NULL), QG_INVALID_ARGUMENT, "backend", "NULL");
    REFUSED(qg_dynamic8_dequantize(floats, codes, absmax, 2, 5, 4, 1, NULL), QG_INVALID_ARGUMENT, "backend", "NULL");
    values[3] = -INFINITY;
    REFUSED(qg_dynamic8_quantize(codes, absmax, values, 2, 5, 4, 1, cpu), QG_INVALID_ARGUMENT, "source", "finite");
    values[3] = 0.0f;
    CHECK_OK(qg_dynamic8_quantize(NULL, NULL, NULL, 0, 5, 4, 1, cpu));
    CHECK_OK(qg_dynamic8_dequantize(NULL, NULL, NULL, 5, 0, 4, 0, cpu));
}

int main(void) {
    cpu = level(QG_SIMD_SCALAR);
    test_names();
    test_backend();
    test_threads_apart();
    test_noise_and_absmax();
    test_int8();
    test_projector();
    test_dynamic8();
    return check_finish();
}
