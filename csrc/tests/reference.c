#include "reference.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* ---------------------------------------------------------------- noise */

void ref_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]) {
    uint32_t x0 = counter[0], x1 = counter[1], x2 = counter[2], x3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)x0 * 0xD2511F53u, b = (uint64_t)x2 * 0xCD9E8D57u;
        x0 = (uint32_t)(b >> 32) ^ x1 ^ k0;
        x2 = (uint32_t)(a >> 32) ^ x3 ^ k1;
        x1 = (uint32_t)b;
        x3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = x0, out[1] = x1, out[2] = x2, out[3] = x3;
}

uint32_t ref_noise(const qg_noise_stream *stream, uint64_t element) {
    uint32_t counter[4] = {
        stream->id, (uint32_t)stream->step, (uint32_t)(stream->step >> 32), (uint32_t)(element >> 32)};
    uint32_t key[2] = {(uint32_t)stream->seed, (uint32_t)(stream->seed >> 32)};
    uint32_t k[4];
    ref_philox(k, counter, key);
    uint32_t x = (uint32_t)element ^ k[0];
    x ^= x >> 16;
    x *= 0x7feb352du;
    x += k[1];
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return (x ^ k[2]) >> 8;
}

/* ---------------------------------------------------------------- float formats */

size_t ref_size(qg_format format) {
    return format == QG_FLOAT32 ? 4 : format == QG_BFLOAT16 || format == QG_FLOAT16 ? 2 : 1;
}

/* A 16-bit float: `fraction` explicit bits, exponents from `lowest`. */
static float half_to_float(uint16_t bits, int fraction, int lowest) {
    int exponent = (bits & 0x7FFF) >> fraction, top = (1 << (15 - fraction)) - 1;
    double mantissa = bits & ((1 << fraction) - 1), sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == top)
        return mantissa != 0.0 ? NAN : (float)(sign * INFINITY);
    if (exponent == 0)
        return (float)(sign * ldexp(mantissa, lowest - fraction));
    return (float)(sign * ldexp(mantissa + ldexp(1.0, fraction), exponent - 1 + lowest - fraction));
}

static uint16_t float_to_half(float value, int fraction, int lowest) {
    uint16_t sign = signbit(value) ? 0x8000 : 0, top = (uint16_t)(((1 << (15 - fraction)) - 1) << fraction);
    double x = fabs((double)value);
    if (isnan(value))
        return top | sign | 1;
    if (x == 0.0 || isinf(value))
        return sign | (x != 0.0 ? top : 0);
    int exponent = ilogb(x) < lowest ? lowest : ilogb(x);
    double steps = rint(ldexp(x, fraction - exponent)); /* at most 2^(fraction + 1) */
    double bits = steps + ldexp(exponent - lowest, fraction);
    return sign | (bits >= top ? top : (uint16_t)bits);
}

float ref_load(qg_format format, const void *array, int64_t index) {
    if (format == QG_FLOAT32)
        return ((const float *)array)[index];
    uint16_t bits = ((const uint16_t *)array)[index];
    return format == QG_BFLOAT16 ? half_to_float(bits, 7, -126) : half_to_float(bits, 10, -14);
}

void ref_store(qg_format format, void *array, int64_t index, float value) {
    if (format == QG_FLOAT32)
        ((float *)array)[index] = value;
    else
        ((uint16_t *)array)[index] =
            format == QG_BFLOAT16 ? float_to_half(value, 7, -126) : float_to_half(value, 10, -14);
}

/* ---------------------------------------------------------------- dynamic map */

/* Magnitudes: 0, then 2^e linearly spaced centres in each decade (0.1, 1] 10^(e - decades), then 1. */
static float magnitude(int index, int decades) {
    if (index == 0)
        return 0.0f;
    int e = ilogb(index), k = index - (1 << e);
    if (e > decades)
        return 1.0f;
    long double entry = 0.1L + 0.9L * (k + 0.5L) / (1 << e);
    for (int i = e; i < decades; i++)
        entry /= 10.0L;
    return (float)entry;
}

float ref_entry(int is_signed, int code) {
    if (is_signed)
        return code >= 127 ? magnitude(code - 127, 6) : -magnitude(127 - code, 6);
    return code == 0 ? 0.0f : magnitude(code + 1, 7);
}

int ref_encode(int is_signed, float x) {
    static double entries[2][256];
    if (entries[1][255] == 0.0) {
        for (int code = 0; code < 256; code++) {
            entries[0][code] = ref_entry(0, code);
            entries[1][code] = ref_entry(1, code);
        }
    }
    const double *map = entries[is_signed];
    double best = DBL_MAX;
    int nearest = 0;
    for (int code = 0; code < 256; code++) {
        double distance = fabs(x - map[code]);
        nearest = distance < best ? code : nearest;
        best = fmin(best, distance);
    }
    return nearest;
}

void ref_dynamic8(uint8_t *codes, float *absmax, const float *values, int64_t count, int is_signed, int keep_sign) {
    float largest = 0.0f;
    for (int64_t i = 0; i < count; i++)
        largest = fmaxf(largest, fabsf(values[i]));
    *absmax = largest;
    int zero = is_signed ? 127 : 0;
    float pre = largest < 0x1p-100f ? 0x1p100f : largest > 0x1p100f ? 0x1p-100f : 1.0f;
    float inverse = largest > 0.0f ? 1.0f / (largest * pre) : 0.0f;
    for (int64_t i = 0; i < count; i++) {
        int code = largest > 0.0f ? ref_encode(is_signed, (values[i] * pre) * inverse) : zero;
        if (keep_sign && code == zero && values[i] != 0.0f)
            code += values[i] > 0.0f ? 1 : -1;
        codes[i] = (uint8_t)code;
    }
}

/* ---------------------------------------------------------------- INT8 weights */

static float range_scale(double lo, double hi) {
    double scale = fmax(fmax((hi - lo) / 247.0, fmax(fabs(lo), fabs(hi)) / 32512.0), 0x1p-100);
    return scale > FLT_MAX ? FLT_MAX : (float)scale;
}

/* The scale and zero point of a group with values from lo to hi. */
static void range(float *scale, int16_t *zero, double lo, double hi) {
    if (lo == hi && fabs(lo) * 0x1p-14 >= 0x1p-100) {
        double exact = fabs(lo) * 0x1p-14;
        *scale = exact > FLT_MAX ? FLT_MAX : (float)exact;
        *zero = lo > 0.0 ? 128 - 16384 : 128 + 16384;
        return;
    }
    *scale = range_scale(lo, hi);
    double middle = rint(127.5 - (hi + lo) / (2.0 * *scale));
    *zero = (int16_t)fmax(-32767.0, fmin(32767.0, middle));
}

static uint8_t clamp_code(double code) {
    return (uint8_t)fmax(0.0, fmin(255.0, code));
}

void ref_int8_quantize(uint8_t *codes, float *scale, int16_t *zero, const float *values, int64_t count) {
    float lo = values[0], hi = values[0];
    for (int64_t i = 1; i < count; i++) {
        lo = fminf(lo, values[i]);
        hi = fmaxf(hi, values[i]);
    }
    range(scale, zero, lo, hi);
    for (int64_t i = 0; i < count; i++)
        codes[i] = clamp_code(rint((double)(values[i] / *scale)) + *zero);
}

static double round_by(double x, int32_t j, int stochastic) {
    return stochastic ? floor(x) + (j < rint(0x1p24 * (x - floor(x)))) : rint(x);
}

int ref_int8_update(
    uint8_t *codes,
    float *scale,
    int16_t *zero,
    const float *u,
    int64_t count,
    const qg_update_coefficients *c,
    const int32_t *j) {
    float s = *scale, step = c->rate / s;
    double x_lo = DBL_MAX, x_hi = -DBL_MAX, y_lo = DBL_MAX, y_hi = -DBL_MAX, q_lo = DBL_MAX, q_hi = -DBL_MAX;
    float d[4096];
    double rounded[4096];
    int moved = 0;
    for (int64_t i = 0; i < count; i++) {
        float kept = -(c->decay * (float)(codes[i] - *zero));
        d[i] = fmaxf(-FLT_MAX, fminf(FLT_MAX, kept - step * u[i]));
        moved |= d[i] != 0.0f;
        float x = (float)codes[i] + d[i];
        x_lo = fmin(x_lo, x);
        x_hi = fmax(x_hi, x);
        y_lo = fmin(y_lo, codes[i] + (double)d[i]);
        y_hi = fmax(y_hi, codes[i] + (double)d[i]);
        rounded[i] = codes[i] + round_by(fmax(-0x1p20, fmin(0x1p20, d[i])), j[i], c->stochastic);
        q_lo = fmin(q_lo, rounded[i]);
        q_hi = fmax(q_hi, rounded[i]);
    }
    if (!moved)
        return REF_UNTOUCHED;
    if (!(range_scale((double)s * (x_lo - *zero), (double)s * (x_hi - *zero)) < s * 0.5f)) {
        double shift = q_lo >= 0.0 && q_hi <= 255.0 ? 0.0 : rint(127.5 - (q_hi + q_lo) / 2.0);
        if (q_hi - q_lo <= 255.0 && fabs(*zero + shift) <= 32767.0) {
            for (int64_t i = 0; i < count; i++)
                codes[i] = (uint8_t)(rounded[i] + shift);
            *zero = (int16_t)(*zero + shift);
            return shift != 0.0 ? REF_SHIFTED : REF_KEPT;
        }
    }
    int16_t z = *zero;
    range(scale, zero, s * (y_lo - z), s * (y_hi - z));
    for (int64_t i = 0; i < count; i++) {
        double relative = codes[i] + (double)d[i] - z;
        codes[i] = clamp_code(round_by(relative * ((double)s / *scale) + *zero, j[i], c->stochastic));
    }
    return REF_RERANGED;
}

/* ---------------------------------------------------------------- projector */

float ref_projector_entry(qg_format format, int code) {
    static const double fp4[16] = {-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12, 12};
    static const float nf4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
        -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f,
        0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
        0.7229568362236023f, 1.0f};
    int exponent = code >> 3 & 15, mantissa = code & 7;
    switch (format) {
    case QG_FP4:
        return (float)(fp4[code] / 12);
    case QG_NF4:
        return nf4[code];
    case QG_FP8_E4M3:
        return (code & 128 ? -1.0f : 1.0f) *
               (float)(exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9));
    default:
        return ref_entry(1, code);
    }
}

/* The nearest entry, found by trying all; of two as near the lower code, for E4M3 the even one with the sign of x. */
static int projector_encode(qg_format format, float x) {
    int is_e4m3 = format == QG_FP8_E4M3, first = is_e4m3 && signbit(x) ? 128 : 0, best = first;
    int count = is_e4m3 ? 127 : format == QG_FP4 ? 15 : format == QG_NF4 ? 16 : 256;
    for (int code = first; code < first + count; code++) {
        double distance = fabs((double)ref_projector_entry(format, code) - x);
        double least = fabs((double)ref_projector_entry(format, best) - x);
        if (distance < least || (distance == least && is_e4m3 && code % 2 == 0))
            best = code;
    }
    return best;
}

void ref_projector(
    uint8_t *codes,
    uint16_t *scale,
    uint8_t *zero,
    const float *values,
    int64_t count,
    qg_format format) {
    int affine = format == QG_INT4 || format == QG_INT8;
    float lo = 0.0f, hi = 0.0f, top = format == QG_INT4 ? 15 : format == QG_INT8 ? 255 : 1, s;
    if (format == QG_FP8_E4M3)
        top = 448;
    for (int64_t i = 0; i < count; i++) {
        lo = fminf(lo, values[i]);
        hi = fmaxf(hi, values[i]);
    }
    /* The least bfloat16 that is not below the exact float32 scale, or the largest: try the one below and go up. */
    float share = (affine ? hi - lo : fmaxf(hi, -lo)) / top;
    float least = fmaxf(isinf(share) ? hi / top - lo / top : share, 0x1p-100f);
    uint32_t word;
    memcpy(&word, &least, sizeof word);
    *scale = (uint16_t)(word >> 16);
    while (ref_load(QG_BFLOAT16, scale, 0) < least && *scale < 0x7f7f)
        ++*scale;
    s = ref_load(QG_BFLOAT16, scale, 0);
    if (affine)
        *zero = (uint8_t)rintf(-lo / s);
    for (int64_t i = 0; i < count; i++)
        codes[i] = affine ? (uint8_t)fmax(0.0, fmin(top, rint((double)(values[i] / s)) + *zero))
                          : (uint8_t)projector_encode(format, values[i] / s);
}

/* ---------------------------------------------------------------- Adam */

float ref_adam(float *m, float *v, float g, const qg_adam_coefficients *c) {
    float first = c->beta1 * *m, second = c->one_minus_beta1 * g;
    *m = first + second;
    float square = g * g;
    first = c->beta2 * *v;
    second = c->one_minus_beta2 * square;
    *v = first + second;
    float numerator = *m * c->bias1, root = sqrtf(*v) * c->bias2;
    return numerator / (root + c->eps);
}

qg_adam_coefficients ref_adam_coefficients(double beta1, double beta2, double eps, int64_t t) {
    return (qg_adam_coefficients){.beta1 = (float)beta1,
        .one_minus_beta1 = (float)(1.0 - beta1),
        .beta2 = (float)beta2,
        .one_minus_beta2 = (float)(1.0 - beta2),
        .bias1 = (float)(1.0 / (1.0 - pow(beta1, (double)t))),
        .bias2 = (float)(1.0 / sqrt(1.0 - pow(beta2, (double)t))),
        .eps = (float)eps};
}

/* ---------------------------------------------------------------- whole arrays */

/* bfloat16 by the noise: the upper 16 bits of bits + (j >> 8), never infinity from a finite value. */
static uint16_t stochastic_bfloat16(float value, uint32_t j) {
    uint32_t bits, up;
    memcpy(&bits, &value, sizeof bits);
    up = bits + (j >> 8);
    return (uint16_t)((up & 0x7F800000) == 0x7F800000 && isfinite(value) ? bits >> 16 : up >> 16);
}

static void update_group(
    const qg_weight *w,
    int64_t at,
    int64_t count,
    const float *u,
    const qg_update_coefficients *c,
    const qg_noise_stream *stream,
    int64_t *stats) {
    int32_t j[4096];
    int64_t g = at / w->group_size;
    for (int64_t i = 0; i < count; i++)
        j[i] = (int32_t)ref_noise(stream, (uint64_t)(at + i));
    int how = ref_int8_update((uint8_t *)w->data + at, &w->scales[g], &w->zeros[g], u, count, c, j);
    stats[0] += how == REF_SHIFTED;
    stats[1] += how == REF_RERANGED;
}

void ref_update(
    const qg_weight *w,
    int64_t first,
    int64_t count,
    const float *u,
    const qg_update_coefficients *c,
    const qg_noise_stream *stream,
    int64_t *stats) {
    if (w->format == QG_INT8) {
        for (int64_t at = 0, n = 0; at < count; at += n) {
            n = count - at < w->group_size ? count - at : w->group_size;
            update_group(w, first + at, n, u + at, c, stream, stats);
        }
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        float kept = ref_load(w->format, w->data, first + i) * c->keep, moved = c->rate * u[i];
        if (w->format == QG_BFLOAT16 && c->stochastic)
            ((uint16_t *)w->data)[first + i] =
                stochastic_bfloat16(kept - moved, ref_noise(stream, (uint64_t)(first + i)));
        else
            ref_store(w->format, w->data, first + i, kept - moved);
    }
}

static int64_t absmax_index(const qg_moments *a, int64_t row, int64_t cols, int64_t first) {
    return row * ((cols + a->block - 1) / a->block) + first / a->block;
}

void ref_load_moments(
    float *m,
    float *v,
    const qg_moments *a,
    int64_t row,
    int64_t cols,
    int64_t first,
    int64_t count) {
    int64_t at = row * cols + first;
    if (a->format == QG_FLOAT32) {
        memcpy(m, (float *)a->exp_avg + at, (size_t)count * 4);
        memcpy(v, (float *)a->exp_avg_sq + at, (size_t)count * 4);
        return;
    }
    int64_t b = absmax_index(a, row, cols, first);
    for (int64_t i = 0; i < count; i++) {
        m[i] = ref_entry(1, ((uint8_t *)a->exp_avg)[at + i]) * a->exp_avg_absmax[b];
        v[i] = ref_entry(0, ((uint8_t *)a->exp_avg_sq)[at + i]) * a->exp_avg_sq_absmax[b];
    }
}

void ref_adam_block(
    const qg_moments *a,
    int64_t row,
    int64_t cols,
    int64_t first,
    int64_t count,
    const float *g,
    float *normalised,
    const qg_adam_coefficients *c) {
    float m[5000], v[5000];
    int64_t at = row * cols + first;
    ref_load_moments(m, v, a, row, cols, first, count);
    for (int64_t i = 0; i < count; i++)
        normalised[i] = ref_adam(&m[i], &v[i], g[i], c);
    if (a->format == QG_FLOAT32) {
        memcpy((float *)a->exp_avg + at, m, (size_t)count * 4);
        memcpy((float *)a->exp_avg_sq + at, v, (size_t)count * 4);
        return;
    }
    int64_t b = absmax_index(a, row, cols, first);
    ref_dynamic8((uint8_t *)a->exp_avg + at, &a->exp_avg_absmax[b], m, count, 1, 1);
    ref_dynamic8((uint8_t *)a->exp_avg_sq + at, &a->exp_avg_sq_absmax[b], v, count, 0, 1);
}
