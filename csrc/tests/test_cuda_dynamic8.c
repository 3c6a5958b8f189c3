/* Blocks of the dynamic map on an emulated GPU: the bits of the scalar table. */
#include "emulated.h"
#include "reference.h"

static const qg_backend *gpu, *cpu;

static const int64_t shapes[][3] = {/* rows, cols, block */
    {0, 7, 256}, {3, 0, 256}, {1, 1, 1}, {5, 7, 1}, {2, 33, 3}, {3, 64, 16}, {2, 1009, 64}, {3, 250, 100},
    {1, 255, 256}, {2, 256, 256}, {3, 257, 256}, {4, 512, 256}, {2, 1000, 300}, {1, 4097, 4096}, {37, 100, 4096},
    {300, 17, 4}}; /* the last has more blocks than one grid takes at a time */
enum { SHAPES = 16, KINDS = 7 };

static float value_of(int kind, int is_signed) {
    switch (kind) {
    case 0:
        return (float)random_normal();
    case 1: /* every decade of the map */
        return (float)(random_uniform(-1.0, 1.0) * pow(10.0, random_uniform(-9.0, 0.0)));
    case 2: /* entries, and midpoints of them: ties */
        return 0.5f * (ref_entry(is_signed, (int)random_below(256)) + ref_entry(is_signed, (int)random_below(256)));
    case 3:
        return random_below(2) == 0 ? 0.0f : -0.0f;
    case 4: /* denormals */
        return (float)(random_uniform(-1.0, 1.0) * 1e-40);
    case 5:
        return (float)(random_uniform(-1.0, 1.0) * 3e38);
    default:
        return random_finite();
    }
}

static void test_round_trip(void) {
    for (int c = 0; c < SHAPES * KINDS * 2 * 2; c++) {
        const int64_t *s = shapes[c % SHAPES];
        const int kind = c / SHAPES % KINDS, is_signed = c / SHAPES / KINDS % 2;
        const size_t offset = (size_t)(c / SHAPES / KINDS / 2);
        const int64_t count = s[0] * s[1], blocks = s[0] * ((s[1] + s[2] - 1) / s[2]);
        float *values = guarded((size_t)count * 4, 0), *back = guarded((size_t)count * 4, 0);
        float *absmax = guarded((size_t)blocks * 4, 0);
        uint8_t *codes = guarded((size_t)count, 0);
        for (int64_t i = 0; i < count; i++) {
            const float x = value_of(kind, is_signed);
            values[i] = kind == 2 && i % s[2] == 0 ? 1.0f : x;
        }
        cpu->dynamic8_quantize(codes, absmax, values, s[0], s[1], (int32_t)s[2], is_signed, NULL);
        cpu->dynamic8_dequantize(back, codes, absmax, s[0], s[1], (int32_t)s[2], is_signed, NULL);
        uint8_t *gpu_codes = emulated_poisoned((size_t)count, offset);
        float *gpu_absmax = emulated_poisoned((size_t)blocks * 4, 4 * offset);
        float *gpu_back = emulated_poisoned((size_t)count * 4, 4 * offset);
        const float *source = emulated_copy(values, (size_t)count * 4, 4 * offset);
        gpu->dynamic8_quantize(gpu_codes, gpu_absmax, source, s[0], s[1], (int32_t)s[2], is_signed, gpu->queue);
        gpu->dynamic8_dequantize(gpu_back, gpu_codes, gpu_absmax, s[0], s[1], (int32_t)s[2], is_signed, gpu->queue);
        CHECK_BYTES(gpu_codes, codes, (size_t)count, "codes of case %d", c);
        CHECK_BYTES(gpu_absmax, absmax, (size_t)blocks * 4, "absmax of case %d", c);
        CHECK_BYTES(gpu_back, back, (size_t)count * 4, "decoded, case %d", c);
        emulated_release();
        RELEASE("dynamic8");
    }
}

/* Every code of both maps. */
static void test_codes(void) {
    uint8_t codes[256];
    float want[256];
    const float absmax = 0.7f;
    for (int i = 0; i < 256; i++)
        codes[i] = (uint8_t)i;
    for (int is_signed = 0; is_signed < 2; is_signed++) {
        float *got = emulated_poisoned(sizeof want, 0);
        cpu->dynamic8_dequantize(want, codes, &absmax, 1, 256, 256, is_signed, NULL);
        gpu->dynamic8_dequantize(
            got, emulated_copy(codes, 256, 0), emulated_copy(&absmax, 4, 0), 1, 256, 256, is_signed, gpu->queue);
        CHECK_BYTES(got, want, sizeof want, "the values of all codes, signed %d", is_signed);
    }
    emulated_release();
}

int main(void) {
    random_seed(33);
    cpu = level(QG_SIMD_SCALAR);
    gpu = emulated_table();
    test_round_trip();
    test_codes();
    emulated_check("all calls");
    return check_finish();
}
