/* The encoder of the dynamic map on every 37th float32 from 2^-31 to 1, on each of them with QG_TEST_ALL=1 in the
 * environment (a minute or two); and Adam's own encoder around every threshold. Below 2^-31 everything is zero, which
 * test_dynamic8 samples. */
#include "harness.h"
#include "reference.h"
#include "single.h"

enum { BLOCK = 4096, CHUNK = 64 * BLOCK, FIRST = 0x30000000, ONE = 0x3F800000 };

static float values[CHUNK];
static uint8_t codes[CHUNK], want[CHUNK];

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* How many codes above zero's (or below, for negative x) the value with these bits is, by trying all entries. */
static int steps_from_zero(int is_signed, int negative, uint32_t bits) {
    int code = ref_encode(is_signed, negative ? -from_bits(bits) : from_bits(bits));
    return negative ? 127 - code : is_signed ? code - 127 : code;
}

/* edges[k]: the first bits that are k steps from zero. The nearest entry never falls while x rises. */
static void find_edges(uint32_t edges[257], int is_signed, int negative) {
    int last = steps_from_zero(is_signed, negative, ONE);
    for (int k = 0; k <= 256; k++) {
        uint32_t low = 0, high = ONE; /* the edge is in (low, high] */
        while (k > 0 && k <= last && high - low > 1) {
            uint32_t middle = low + (high - low) / 2;
            if (steps_from_zero(is_signed, negative, middle) >= k)
                high = middle;
            else
                low = middle;
        }
        edges[k] = k == 0 ? 0 : k <= last ? high : UINT32_MAX;
    }
}

/* Every stride-th float; the first of each block is 1, so that the block's absmax is. */
static void test_every_float(int is_signed, int negative, uint32_t stride) {
    static float absmax[CHUNK / BLOCK];
    uint32_t edges[257], bits = FIRST;
    int64_t wrong[LEVELS] = {0};
    find_edges(edges, is_signed, negative);
    for (int k = 0; bits <= ONE;) {
        int64_t count = 0;
        for (; count < CHUNK && bits <= ONE; count++) {
            if (count % BLOCK == 0) {
                values[count] = 1.0f;
                want[count] = 255;
                continue;
            }
            while (bits >= edges[k + 1])
                k++;
            values[count] = from_bits(negative ? bits | 0x80000000 : bits);
            want[count] = (uint8_t)(negative ? 127 - k : is_signed ? 127 + k : k);
            bits += stride;
        }
        for (int simd = 0; simd < LEVELS; simd++) {
            if (level(simd) == NULL)
                continue;
            qg_status status = qg_dynamic8_quantize(codes, absmax, values, 1, count, BLOCK, is_signed, level(simd));
            if (status == QG_SUCCESS && memcmp(codes, want, (size_t)count) == 0)
                continue;
            for (int64_t i = 0; i < count; i++) {
                if (codes[i] != want[i] && wrong[simd]++ == 0)
                    CHECK(
                        0, "signed %d, level %d: %a becomes %d, not %d", is_signed, simd, values[i], codes[i], want[i]);
            }
        }
    }
    for (int simd = 0; simd < LEVELS; simd++)
        CHECK(
            wrong[simd] == 0, "signed %d, negative %d, level %d: %lld wrong", is_signed, negative, simd,
            (long long)wrong[simd]);
}

/* ---------------------------------------------------------------- inside Adam */

static int64_t pending;

/* With both betas 0 the new moments are g and g^2, so that their codes are those of any value wanted. `size` scales g by
 * a power of two; g^2 is then looked at only if it is 1. */
static void adam_pending(float size) {
    static uint8_t m_codes[CHUNK], v_codes[CHUNK], want_v[CHUNK];
    static float absmax[2][CHUNK / BLOCK], n[CHUNK];
    qg_adam_coefficients c = {
        .one_minus_beta1 = 1.0f, .one_minus_beta2 = 1.0f, .bias1 = 1.0f, .bias2 = 1.0f, .eps = 1.0f};
    for (int64_t i = 0; i < pending; i++) {
        int code = ref_encode(1, values[i]);
        want[i] = (uint8_t)(code == 127 && values[i] != 0.0f ? values[i] > 0.0f ? 128 : 126 : code);
        float v = values[i] * values[i];
        int v_code = ref_encode(0, v);
        want_v[i] = (uint8_t)(v_code == 0 && v != 0.0f ? 1 : v_code);
        values[i] *= size;
    }
    for (int simd = 0; simd < LEVELS; simd++) {
        qg_moments moments = {m_codes, v_codes, absmax[0], absmax[1], BLOCK, QG_DYNAMIC8};
        memset(m_codes, 127, sizeof m_codes);
        memset(v_codes, 0, sizeof v_codes);
        memset(absmax, 0, sizeof absmax);
        if (level(simd) == NULL)
            continue;
        single_adam(level(simd), &moments, pending, 1, 0, pending, values, QG_FLOAT32, pending, n, pending, &c);
        CHECK_BYTES(m_codes, want, (size_t)pending, "first moments, scaled by %g, level %d", size, simd);
        if (size == 1.0f)
            CHECK_BYTES(v_codes, want_v, (size_t)pending, "second moments, level %d", simd);
    }
    pending = 0;
}

static void add(float value, float size) {
    if (pending % BLOCK == 0)
        values[pending++] = 1.0f;
    if (fabsf(value) <= 1.0f && value * size / size == value) /* scaled without loss */
        values[pending++] = value;
    if (pending == CHUNK)
        adam_pending(size);
}

/* Around each threshold and each entry; for the second moment the square roots of these. */
static void test_adam_encoder(float size) {
    int reach = (int)check_count(600, 5);
    for (int is_signed = 0; is_signed < 2; is_signed++) {
        for (int code = 0; code < 255; code++) {
            double entry = ref_entry(is_signed, code), next = ref_entry(is_signed, code + 1);
            float around[2] = {(float)((entry + next) / 2.0), (float)entry};
            for (int k = 0; k < 2; k++) {
                float x = is_signed ? around[k] : sqrtf(around[k]), up = x, down = x;
                for (int i = 0; i < (k == 0 ? reach : 5); i++) {
                    add(up, size);
                    add(down, size);
                    up = nextafterf(up, 2.0f);
                    down = nextafterf(down, -2.0f);
                }
            }
        }
    }
    for (int64_t i = 0; i < check_count(300000, 5000); i++)
        add((float)((i % 2 ? 1.0 : -1.0) * exp(-random_uniform(0.0, 20.0))), size);
    static const float special[] = {0.0f, -0.0f, 1e-10f, -1e-10f, 1e-20f, -1e-20f, 1.0f, -1.0f};
    for (int i = 0; i < 8; i++)
        add(special[i], size);
    adam_pending(size);
}

int main(void) {
    random_seed(14);
    uint32_t stride = getenv("QG_TEST_ALL") != NULL ? 1 : (uint32_t)check_count(37, 100003);
    test_every_float(0, 0, stride);
    test_every_float(1, 0, stride);
    test_every_float(1, 1, stride);
    test_adam_encoder(1.0f);
    test_adam_encoder(0x1p-101f);
    return check_finish();
}
