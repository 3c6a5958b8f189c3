/* Stochastic rounding of INT8 weights: no update is lost, none is invented, and no range oscillates. */
#include "harness.h"
#include "reference.h"
#include "single.h"

enum { GROUP = 256, COUNT = 2048, GROUPS = COUNT / GROUP };

static const int16_t zero_points[] = {0, 128, 300, -3000, 32767, -32767};
enum { ZEROS = 6 };

static uint8_t codes[COUNT];
static float scales[GROUPS];
static int16_t zeros[GROUPS];
static float u[COUNT];

static qg_weight whole(int64_t count) {
    return (qg_weight){codes, scales, zeros, 1, count, GROUP, QG_INT8};
}

/* Codes over [20, 235]: ten steps either way stay inside, and the range is too wide to be made narrower. */
static void reset(int16_t zero, float scale) {
    for (int i = 0; i < COUNT; i++)
        codes[i] = (uint8_t)(i % GROUP == 0 ? 20 : i % GROUP == 1 ? 235 : 20 + i * 7 % 216);
    for (int g = 0; g < GROUPS; g++) {
        zeros[g] = zero;
        scales[g] = scale;
    }
}

static void update(int64_t count, float rate, float decay, int stochastic, uint64_t step, int64_t *stats) {
    static int simd;
    qg_weight weight = whole(count);
    qg_noise_stream stream = {.seed = 11, .step = step, .id = 4};
    qg_update_coefficients coefficients = {
        .keep = 1.0f - decay, .decay = decay, .rate = rate, .stochastic = stochastic};
    do
        simd = (simd + 1) % LEVELS; /* every level in turn */
    while (level(simd) == NULL);
    single_update(level(simd), &weight, 0, count, u, QG_FLOAT32, &coefficients, &stream, stats);
}

/* The mean of 100,000 draws is the exact update: |z| < 5. */
static void test_mean(void) {
    static const double sizes[] = {0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.77, 1.0, 1.3, 2.5, 5.9, 10.0};
    int64_t steps = check_count(49, 2);
    for (int c = 0; c < 12 * 2 * ZEROS; c++) {
        double size = sizes[c % 12] * (c / 12 % 2 ? -1.0 : 1.0), exact = 0.0, variance = 0.0, sum = 0.0;
        float scale = 0.0137f, decay = c % 5 == 0 ? 1e-4f : 0.0f;
        for (int64_t step = 0; step < steps; step++) {
            reset(zero_points[c / 24], scale);
            if (abs(zeros[0]) > 300)
                decay = 0.0f; /* decay alone would be more than ten steps */
            for (int i = 0; i < COUNT; i++) {
                u[i] = (float)(-size * scale);
                double d = -(double)decay * (codes[i] - zeros[0]) - u[i] / (double)scale;
                exact += d;
                variance += (d - floor(d)) * (1.0 - (d - floor(d)));
                sum -= codes[i];
            }
            update(COUNT, 1.0f, decay, 1, (uint64_t)(c * 1000 + step), NULL);
            for (int i = 0; i < COUNT; i++)
                sum += codes[i];
            for (int g = 0; g < GROUPS; g++)
                CHECK(zeros[g] == zero_points[c / 24] && scales[g] == scale, "the range moved");
        }
        CHECK(
            fabs(sum - exact) <= 5.0 * sqrt(variance) + 1e-3, "%g steps at z = %d: %g came instead of %g", size,
            zero_points[c / 24], sum, exact);
    }
}

/* The threshold, to the last j: with T = 2^24 frac(d), j = T stays and j = T - 1 goes up. As the noise of an element is
 * known, d is chosen for it, and the two tests of each element hold for all j between. */
static void test_threshold(void) {
    static int32_t j[COUNT];
    static uint8_t before[COUNT];
    for (int c = 0; c < check_count(600, 60); c++) {
        int whole_steps = (c / 6 % 5) - 2, up = c / 30 % 2;
        int64_t grid = whole_steps == 0 || whole_steps == -1 ? 1 : 4; /* what float32 holds of whole_steps + frac */
        CHECK_OK(qg_noise(j, 11, 4, (uint64_t)c, 0, COUNT, level(QG_SIMD_SCALAR)));
        reset(zero_points[c % ZEROS], 0.25f);
        memcpy(before, codes, COUNT);
        for (int i = 0; i < COUNT; i++) {
            int64_t threshold = j[i] / grid * grid + (up ? grid : 0); /* up: j < T */
            u[i] = (float)(-0.25 * (whole_steps + (double)threshold * 0x1p-24));
        }
        update(COUNT, 1.0f, 0.0f, 1, (uint64_t)c, NULL);
        int wrong = 0;
        for (int i = 0; i < COUNT; i++)
            wrong += codes[i] != before[i] + whole_steps + up;
        CHECK(
            wrong == 0, "%d of %d elements round to the wrong side (d = %d + T / 2^24, up %d)", wrong, COUNT,
            whole_steps, up);
    }
}

/* Small updates, where sampling proves nothing: the elements whose j is rint(2^24 frac) - 1, rint(2^24 frac) and the
 * two ends are looked for among all (step, element), so exactly rint(2^24 frac) of the 2^24 values go up. */
static void test_enumeration(void) {
    static const double sizes[] = {1e-4, -1e-4, 1e-6, -1e-6, 3e-3, -3e-3, 6.1e-8, -6.1e-8};
    enum { SIZES = 8, WANTED = 4 * SIZES };
    static struct {
        int32_t j;
        int up;
        uint64_t step;
        int element;
        int found;
    } wanted[WANTED];
    static int32_t noise[COUNT];
    static uint8_t is_near[1 << 16]; /* some wanted j begins with these 16 bits */
    int missing = 0;
    for (int s = 0; s < SIZES; s++) {
        double d = (float)sizes[s], threshold = rint(0x1p24 * (d - floor(d)));
        int32_t j[4] = {0, (int32_t)threshold - 1, (int32_t)threshold, 0xFFFFFF};
        for (int k = 0; k < 4; k++) {
            wanted[4 * s + k].j = j[k];
            wanted[4 * s + k].up = j[k] < threshold;
            missing += j[k] >= 0 && j[k] < 1 << 24;
            is_near[j[k] >> 8 & 0xFFFF] = 1;
        }
    }
    for (uint64_t step = 0; missing > 0 && step < (uint64_t)check_count(1 << 16, 1); step++) {
        CHECK_OK(qg_noise(noise, 11, 4, step, 0, COUNT, level(QG_SIMD_SCALAR)));
        for (int i = 0; i < COUNT; i++) {
            for (int w = 0; is_near[noise[i] >> 8] && w < WANTED; w++) {
                if (noise[i] == wanted[w].j && !wanted[w].found) {
                    wanted[w].found = 1;
                    wanted[w].step = step;
                    wanted[w].element = i;
                    missing--;
                }
            }
        }
    }
    CHECK(missing == 0 || check_count(0, 1), "%d values of j were not found", missing);
    for (int w = 0; w < WANTED; w++) {
        for (int z = 0; z < ZEROS && wanted[w].found; z++) {
            double d = (float)sizes[w / 4];
            reset(zero_points[z], 1.0f);
            for (int i = 0; i < COUNT; i++)
                u[i] = (float)-d;
            int want = codes[wanted[w].element] + (d < 0.0 ? -1 : 0) + wanted[w].up;
            update(COUNT, 1.0f, 0.0f, 1, wanted[w].step, NULL);
            CHECK(
                codes[wanted[w].element] == want, "d = %g, z = %d, j = %d: %d instead of %d", d, zero_points[z],
                wanted[w].j, codes[wanted[w].element], want);
        }
    }
}

/* An update of zero changes no byte: whatever the codes, in constant groups and one-element tails, with weight decay
 * where the weights are zero, and next to groups that do move. */
static void test_zero_update(void) {
    static uint8_t before[COUNT];
    for (int c = 0; c < 5 * ZEROS * 2; c++) {
        int64_t count = c % 2 ? COUNT - GROUP + 1 : COUNT;
        reset(zero_points[c / 2 % ZEROS], (c / 2 + c / 12) % 3 ? 0.1f : 1e-30f);
        for (int i = 0; i < COUNT; i++) {
            int g = i / GROUP;
            codes[i] = (uint8_t)(c / 12 == 0   ? codes[i]
                                 : c / 12 == 1 ? 128
                                 : c / 12 == 2 ? 255
                                 : c / 12 == 3 ? 0
                                               : i % 256);
            u[i] = random_below(2) ? 0.0f : -0.0f;
            if (c / 12 == 1)
                zeros[g] = 128; /* all weights zero: decay has nothing to take */
            if (c / 12 == 4 && g == 3)
                u[i] = 0.3f * scales[g]; /* one group moves */
        }
        memcpy(before, codes, COUNT);
        int64_t stats[2] = {0, 0};
        for (uint64_t step = 0; step < 20; step++)
            update(count, 1.0f, c / 12 == 1 ? 0.01f : 0.0f, c % 5 != 0, step, stats);
        for (int g = 0; g < GROUPS; g++) {
            if (c / 12 == 4 && g == 3)
                continue;
            CHECK_BYTES(codes + g * GROUP, before + g * GROUP, GROUP, "case %d, group %d", c, g);
            CHECK(scales[g] == ((c / 2 + c / 12) % 3 ? 0.1f : 1e-30f), "case %d: the scale of group %d moved", c, g);
        }
        CHECK(c / 12 == 4 || stats[0] + stats[1] == 0, "case %d: an unmoved group was shifted", c);
    }
}

/* Groups of ones stay ones under updates of zero, and come back to exactly one when moved there and back. */
static void test_ones(void) {
    float ones[COUNT], back[COUNT];
    for (int i = 0; i < COUNT; i++)
        ones[i] = 1.0f;
    qg_weight weight = whole(COUNT - 100);
    CHECK_OK(qg_int8_quantize(&weight, ones, QG_FLOAT32, level(QG_SIMD_SCALAR)));
    memset(u, 0, sizeof u);
    for (uint64_t step = 0; step < 50; step++)
        update(COUNT - 100, 1.0f, 0.0f, 1, step, NULL);
    CHECK_OK(qg_int8_dequantize(&weight, back, QG_FLOAT32, level(QG_SIMD_SCALAR)));
    CHECK_BYTES(back, ones, 4 * (COUNT - 100), "ones decode to ones");
    for (int i = 0; i < COUNT; i++)
        u[i] = (i / GROUP % 2 ? 1.0f : -2.0f) / 16384.0f;
    update(COUNT - 100, 1.0f, 0.0f, 1, 51, NULL);
    for (int i = 0; i < COUNT; i++)
        u[i] = -u[i];
    update(COUNT - 100, 1.0f, 0.0f, 1, 52, NULL);
    CHECK_OK(qg_int8_dequantize(&weight, back, QG_FLOAT32, level(QG_SIMD_SCALAR)));
    CHECK_BYTES(back, ones, 4 * (COUNT - 100), "ones moved by whole steps and back");
}

/* When codes leave [0, 255] but fit into 256, codes and zero point move together: weights take exactly their update. */
static void test_shift_is_exact(void) {
    static uint8_t before[COUNT];
    int64_t stats[2] = {0, 0};
    for (int c = 0; c < 400; c++) {
        int by = (c / 6 % 2 ? 1 : -1) * (1 + c % 37);
        reset(zero_points[c % ZEROS], 0.5f);
        for (int i = 0; i < COUNT; i++) {
            codes[i] = (uint8_t)(by > 0 ? codes[i] + 20 : codes[i] - 20); /* [40, 255] or [0, 215] */
            u[i] = (float)(-0.5 * by);
        }
        int zero = zeros[0], shift = by > 0 ? -20 - by : 20 - by; /* give or take one */
        memcpy(before, codes, COUNT);
        int64_t shifted = stats[0];
        update(COUNT, 1.0f, 0.0f, random_below(2) != 0, (uint64_t)c, stats);
        if (abs(zero + shift) > 32766)
            continue;
        CHECK(stats[0] == shifted + GROUPS, "case %d: %lld groups shifted", c, (long long)(stats[0] - shifted));
        int wrong = 0;
        for (int i = 0; i < COUNT; i++)
            wrong += codes[i] - zeros[i / GROUP] != before[i] + by - zero;
        CHECK(wrong == 0 && scales[1] == 0.5f, "case %d: %d weights are off after a shift by %d", c, wrong, by);
    }
}

/* A new range rounds once and without bias: over many draws the mean is the exact value, in every kind of group. */
static void test_rerange(void) {
    static float start[COUNT];
    static double exact[COUNT], sum[COUNT], variance[COUNT];
    int64_t steps = check_count(400, 4);
    for (int c = 0; c < 8 * ZEROS; c++) {
        static const float sizes[] = {0.01f, 1e-30f, 1e30f, 1.0f};
        int kind = c % 8;
        float scale = sizes[(c + c / 8) % 4];
        memset(sum, 0, sizeof sum);
        memset(variance, 0, sizeof variance);
        for (int i = 0; i < COUNT; i++) {
            double by = kind < 4         ? (i % GROUP == 5 ? 300.0 : 0.3)
                        : kind < 6       ? -0.7 * (i % GROUP)
                        : i % GROUP == 9 ? -1e4
                                         : 0.01;
            start[i] = (float)(-by * scale);
        }
        for (int64_t step = 0; step < steps; step++) {
            int64_t stats[2] = {0, 0};
            reset(zero_points[c / 8], scale);
            memcpy(u, start, sizeof u);
            if (kind == 7)
                memset(codes, 130, sizeof codes); /* a constant group with one outlier */
            for (int i = 0; i < COUNT && step == 0; i++)
                exact[i] = (double)scale * (codes[i] - zeros[0]) - start[i];
            update(COUNT, 1.0f, 0.0f, 1, (uint64_t)step, stats);
            CHECK(stats[1] == GROUPS, "case %d: %lld groups re-ranged", c, (long long)stats[1]);
            for (int i = 0; i < COUNT; i++) {
                double t = exact[i] / scales[i / GROUP];
                sum[i] += codes[i] - zeros[i / GROUP] - t;
                variance[i] += (t - floor(t)) * (1.0 - (t - floor(t)));
            }
        }
        double total = 0.0, total_variance = 0.0;
        int off = 0;
        for (int i = 0; i < COUNT; i++) {
            off += fabs(sum[i]) > 6.0 * sqrt(variance[i]) + 3.0; /* + 3: few draws are not normal */
            total += sum[i];
            total_variance += variance[i];
        }
        CHECK(off == 0, "case %d: the mean of %d elements is not the exact value", c, off);
        CHECK(
            fabs(total) < 5.0 * sqrt(total_variance) + 1e-4 * COUNT, "case %d: the mean is off by %g steps", c,
            total / (COUNT * (double)steps));
    }
}

/* The threshold of a re-range, to the last j. The range becomes 494 steps, so the new scale is twice the old one and the
 * zero point rint(127.5 - 256 / 4) = 64: code 100 moved by T / 2^23 steps lands on 114 + T / 2^24. */
static void test_rerange_threshold(void) {
    static int32_t j[COUNT];
    for (int c = 0; c < check_count(60, 6); c++) {
        int up = c % 2;
        CHECK_OK(qg_noise(j, 11, 4, (uint64_t)c, 0, COUNT, level(QG_SIMD_SCALAR)));
        reset(0, 0.25f);
        for (int i = 0; i < COUNT; i++) {
            double steps = i % GROUP == 0 ? -119.0 : i % GROUP == 1 ? 120.0 : (j[i] + up) * 0x1p-23;
            codes[i] = i % GROUP == 0 ? 0 : i % GROUP == 1 ? 255 : 100;
            u[i] = (float)(-0.25 * steps);
        }
        update(COUNT, 1.0f, 0.0f, 1, (uint64_t)c, NULL);
        CHECK(scales[0] == 0.5f && zeros[0] == 64, "the new range is %g, %d", scales[0], zeros[0]);
        int wrong = 0;
        for (int i = 0; i < COUNT; i++)
            wrong += i % GROUP > 1 && codes[i] != 114 + up;
        CHECK(wrong == 0, "%d of %d elements round to the wrong side (up %d)", wrong, COUNT, up);
    }
}

/* Zero points reach +-32767 and no further: there a group that would be shifted is re-ranged. */
static void test_last_zero_points(void) {
    for (int c = 0; c < 2 * 60; c++) {
        int sign = c % 2 ? 1 : -1, zero = sign * (32767 - c / 2), by = -sign, shift = sign * 21;
        int64_t stats[2] = {0, 0};
        reset((int16_t)zero, 1.0f);
        for (int i = 0; i < COUNT; i++) {
            codes[i] = (uint8_t)(codes[i] - sign * 20); /* [0, 215] goes down by one, [40, 255] up */
            u[i] = (float)-by;
        }
        update(COUNT, 1.0f, 0.0f, 1, 1, stats);
        int fits = abs(zero + shift) <= 32767;
        CHECK(
            stats[0] == (fits ? GROUPS : 0) && stats[1] == (fits ? 0 : GROUPS), "z = %d: %lld shifted, %lld re-ranged",
            zero, (long long)stats[0], (long long)stats[1]);
        CHECK(!fits || zeros[0] == zero + shift, "z = %d becomes %d", zero, zeros[0]);
        double exact = sign > 0 ? 0 + by - zero : 40 + by - zero; /* element 0 of the group */
        CHECK(fabs(scales[0] * (double)(codes[0] - zeros[0]) - exact) <= scales[0], "z = %d: off", zero);
    }
}

/* Long runs: steps about the size of a code re-range few groups, a drift none, decay one each halving of the range. */
static void test_no_oscillation(void) {
    int64_t steps = check_count(3000, 20);
    int64_t stats[2] = {0, 0};
    reset(100, 0.01f);
    for (int64_t step = 0; step < steps; step++) {
        for (int i = 0; i < COUNT; i++)
            u[i] = (float)(0.01 * random_normal());
        update(COUNT, 1.0f, 1e-3f, 1, (uint64_t)step, stats);
    }
    CHECK(
        stats[1] <= steps * GROUPS / 100, "random steps: %lld of %lld group-steps re-range", (long long)stats[1],
        (long long)(steps * GROUPS));
    for (int half = 0; half < 2; half++) { /* half a step also spreads the group, slowly */
        memset(stats, 0, sizeof stats);
        reset(100, 0.0078125f);
        for (int i = 0; i < COUNT; i++)
            u[i] = half ? 0.00390625f : 0.0078125f;
        for (int64_t step = 0; step < steps; step++)
            update(COUNT, 1.0f, 0.0f, 1, (uint64_t)step, stats);
        CHECK(stats[1] <= (half ? steps * GROUPS / 100 : 0), "a drift: %lld re-ranges", (long long)stats[1]);
        CHECK(steps < 1000 || stats[0] >= 5 * GROUPS, "a drift: %lld shifts", (long long)stats[0]);
    }
    for (int narrow = 0; narrow < 2; narrow++) {
        memset(stats, 0, sizeof stats);
        reset(100, 0.01f);
        for (int i = 0; i < COUNT && narrow; i++)
            codes[i] = (uint8_t)(120 + codes[i] / 4);
        memset(u, 0, sizeof u);
        for (int64_t step = 0; step < 1000; step++)
            update(COUNT, 1.0f, 0.005f, 1, (uint64_t)step, stats);
        CHECK(
            stats[1] >= 5 * GROUPS && stats[1] <= 11 * GROUPS,
            "decay by e^-5 (7.2 halvings), narrow %d: %lld re-ranges of %d groups", narrow, (long long)stats[1],
            GROUPS);
    }
}

int main(void) {
    random_seed(5);
    omp_set_num_threads(1);
    test_mean();
    test_threshold();
    test_enumeration();
    test_zero_update();
    test_ones();
    test_shift_is_exact();
    test_rerange();
    test_rerange_threshold();
    test_last_zero_points();
    test_no_oscillation();
    return check_finish();
}
