/* reference.h - the numbers that the library has to produce, written a second time in the plainest form: maps from
 * rationals, exhaustive search, double precision, one element after the other. Nothing here uses the library's code. */
#ifndef QG_TESTS_REFERENCE_H
#define QG_TESTS_REFERENCE_H

#include <stdint.h>

#include "core/backend.h"

/* ---------------------------------------------------------------- noise */

/* Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3". */
void ref_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]);

/* The 24-bit integer of one element. */
uint32_t ref_noise(const qg_noise_stream *stream, uint64_t element);

/* ---------------------------------------------------------------- float formats */

size_t ref_size(qg_format format);
float ref_load(qg_format format, const void *array, int64_t index);

/* Round a float32 value to nearest even and store it. */
void ref_store(qg_format format, void *array, int64_t index, float value);

/* ---------------------------------------------------------------- dynamic map */

float ref_entry(int is_signed, int code);

/* The nearest of the 256 entries, found by trying all of them; ties go to the lower code. */
int ref_encode(int is_signed, float x);

/* One block. keep_sign: a value that is not zero is not stored as zero. */
void ref_dynamic8(uint8_t *codes, float *absmax, const float *values, int64_t count, int is_signed, int keep_sign);

/* ---------------------------------------------------------------- INT8 weights, one group */

void ref_int8_quantize(uint8_t *codes, float *scale, int16_t *zero, const float *values, int64_t count);

/* How a group took its update. */
enum { REF_UNTOUCHED, REF_KEPT, REF_SHIFTED, REF_RERANGED };

/* j: the noise of the group's elements. */
int ref_int8_update(
    uint8_t *codes,
    float *scale,
    int16_t *zero,
    const float *u,
    int64_t count,
    const qg_update_coefficients *coefficients,
    const int32_t *j);

/* ---------------------------------------------------------------- projector, one block (codes one a byte) */

/* The value of a code in FP4, NF4, FP8_E4M3 or DYNAMIC8. */
float ref_projector_entry(qg_format format, int code);

/* zero is written for INT4 and INT8 alone. */
void ref_projector(
    uint8_t *codes,
    uint16_t *scale,
    uint8_t *zero,
    const float *values,
    int64_t count,
    qg_format format);

/* ---------------------------------------------------------------- Adam, one element in float32 */

float ref_adam(float *m, float *v, float g, const qg_adam_coefficients *c);
qg_adam_coefficients ref_adam_coefficients(double beta1, double beta2, double eps, int64_t t);

/* ---------------------------------------------------------------- whole arrays */

/* Elements [first, first + count) of a weight; for INT8, whole groups. stats: groups shifted, groups re-ranged. */
void ref_update(
    const qg_weight *weight,
    int64_t first,
    int64_t count,
    const float *u,
    const qg_update_coefficients *coefficients,
    const qg_noise_stream *stream,
    int64_t *stats);

/* Elements [first, first + count) of row `row`, within one block, of moments whose rows have `cols` elements. */
void ref_adam_block(
    const qg_moments *moments,
    int64_t row,
    int64_t cols,
    int64_t first,
    int64_t count,
    const float *g,
    float *normalised,
    const qg_adam_coefficients *coefficients);

/* The decoded moments of the same elements. */
void ref_load_moments(
    float *m,
    float *v,
    const qg_moments *moments,
    int64_t row,
    int64_t cols,
    int64_t first,
    int64_t count);

/* ---------------------------------------------------------------- linear algebra */

/* The context of the plain gemm below: calls are counted, and the call number `fail_at` (from 1) fails. */
typedef struct ref_gemm_context {
    int64_t calls;
    int64_t fail_at;
} ref_gemm_context;

/* c = a b, one dot product after the other, summed in double. */
qg_linalg ref_linalg(ref_gemm_context *context);

#endif
