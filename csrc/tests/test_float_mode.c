/* A caller that flushes denormals to zero (as torch.set_flush_denormal does) gets the same bytes, and its own mode back. */
#include "harness.h"
#include "reference.h"
#include "single.h"

#if defined(__x86_64__)
#include <xmmintrin.h>

enum { COUNT = 40000, FLUSH = 0x8040, DEFAULT = 0x1F80 };

/* Everything that one round of kernels writes. */
typedef struct results {
    int32_t noise[COUNT];
    double sum_of_squares;
    float absmax;
    float widened[COUNT];
    uint16_t narrowed[2][COUNT];
    uint8_t dynamic[COUNT];
    float dynamic_absmax[COUNT / 256 + 1];
    float decoded[COUNT];
    uint8_t codes[COUNT];
    float scales[COUNT / 256 + 1];
    int16_t zeros[COUNT / 256 + 1];
    uint16_t dequantised[COUNT];
    float exp_avg[COUNT];
    float exp_avg_sq[COUNT];
    float normalised[COUNT];
    float updated[COUNT];
    uint16_t updated_half[COUNT];
    float vector[COUNT];
    float vector_moments[2][COUNT];
    uint8_t basis[COUNT];
    uint16_t basis_scales[COUNT / 256 + 1];
    uint8_t basis_zeros[COUNT / 256 + 1];
    float basis_decoded[COUNT];
} results;

static float tiny[COUNT]; /* around the least normal number */
static uint16_t tiny_half[COUNT];

static void every_kernel(results *r, const qg_backend *backend) {
    qg_adam_coefficients adam = ref_adam_coefficients(0.9, 0.999, 0.0, 10);
    qg_update_coefficients update = {0.75f, 0.25f, 1.0f, 1};
    qg_noise_stream stream = {1, 2, 3};
    static float scratch[4 * 4096];
    memset(r, 0, sizeof *r);
    CHECK_OK(qg_noise(r->noise, 1, 2, 3, 0, COUNT, backend));
    CHECK_OK(qg_absmax(&r->absmax, &(qg_array){tiny_half, COUNT, QG_BFLOAT16}, 1, backend));
    backend->sum_squares(&r->sum_of_squares, tiny, QG_FLOAT32, COUNT, NULL);
    single_cast(backend, r->widened, QG_FLOAT32, tiny_half, QG_FLOAT16, 1, COUNT, COUNT);
    single_cast(backend, r->narrowed[0], QG_BFLOAT16, tiny, QG_FLOAT32, 1, COUNT, COUNT);
    single_cast(backend, r->narrowed[1], QG_FLOAT16, tiny, QG_FLOAT32, 1, COUNT, COUNT);
    CHECK_OK(qg_dynamic8_quantize(r->dynamic, r->dynamic_absmax, tiny, 1, COUNT, 256, 1, backend));
    CHECK_OK(qg_dynamic8_dequantize(r->decoded, r->dynamic, r->dynamic_absmax, 1, COUNT, 256, 1, backend));
    qg_weight weight = {r->codes, r->scales, r->zeros, 1, COUNT, 256, QG_INT8};
    CHECK_OK(qg_int8_quantize(&weight, tiny, QG_FLOAT32, backend));
    single_update(backend, &weight, 0, COUNT, tiny, QG_FLOAT32, &update, &stream, NULL);
    CHECK_OK(qg_int8_dequantize(&weight, r->dequantised, QG_BFLOAT16, backend));
    qg_moments moments = {r->exp_avg, r->exp_avg_sq, NULL, NULL, 0, QG_FLOAT32};
    for (int i = 0; i < COUNT; i++) {
        uint32_t bits = (uint32_t)i << 8; /* denormals and the least normal numbers, by their bits */
        memcpy(&r->exp_avg_sq[i], &bits, 4);
        memcpy(&r->updated[i], &bits, 4);
        memcpy(&r->vector[i], &bits, 4);
        r->updated_half[i] = (uint16_t)(i % 400);
    }
    single_adam(backend, &moments, COUNT, 1, 0, COUNT, tiny, QG_FLOAT32, COUNT, r->normalised, COUNT, &adam);
    weight = (qg_weight){r->updated, NULL, NULL, 1, COUNT, 0, QG_FLOAT32};
    single_update(backend, &weight, 0, COUNT, tiny, QG_FLOAT32, &update, &stream, NULL);
    weight = (qg_weight){r->updated_half, NULL, NULL, 1, COUNT, 0, QG_BFLOAT16};
    single_update(backend, &weight, 0, COUNT, tiny, QG_FLOAT32, &update, &stream, NULL);
    weight = (qg_weight){r->vector, NULL, NULL, 1, COUNT, 0, QG_FLOAT32};
    moments = (qg_moments){r->vector_moments[0], r->vector_moments[1], NULL, NULL, 0, QG_FLOAT32};
    single_adam_update(backend, &weight, &moments, tiny, QG_FLOAT32, &adam, &update, &stream, NULL, 4096, scratch);
    qg_projector projector = {r->basis, r->basis_scales, r->basis_zeros, 1, COUNT, 256, QG_INT8};
    CHECK_OK(qg_projector_quantize(&projector, tiny, backend));
    CHECK_OK(qg_projector_dequantize(&projector, r->basis_decoded, QG_FLOAT32, backend));
}

int main(void) {
    static results want, got;
    random_seed(13);
    for (int i = 0; i < COUNT; i++) {
        tiny[i] = (float)(ldexp(random_normal(), -126 - i / 256 % 20));
        tiny_half[i] = (uint16_t)(random_bits() % 2048);
    }
    for (int simd = 0; simd < LEVELS; simd++) {
        for (int threads = 1; level(simd) != NULL && threads <= 2; threads++) {
            omp_set_num_threads(threads);
            every_kernel(&want, level(simd));
            _mm_setcsr(DEFAULT | FLUSH);
            unsigned set = _mm_getcsr(); /* valgrind keeps no such mode */
            every_kernel(&got, level(simd));
            unsigned mode = _mm_getcsr();
            _mm_setcsr(DEFAULT);
            CHECK((mode & FLUSH) == (set & FLUSH), "level %d: the caller's mode is lost", simd);
            CHECK_BYTES(
                &got, &want, sizeof want, "level %d, %d threads, denormals flushed by the caller", simd, threads);
        }
    }
    return check_finish();
}
#else
int main(void) {
    CHECK(1, "no such mode here");
    return check_finish();
}
#endif
