// Products of few rows and attention of one query per row, for CPUs: torch's own reach half of the memory's speed.
// A plain C interface over plain pointers, so that it compiles in seconds without torch's headers.
//
// Every output is the sum of the same terms in the same order whatever is computed beside it: a row's result does
// not depend on its company, and not on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BF16_PAIRS 1
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_INT8_QUADS 1
#endif
#include "team.h"

namespace {

using std::int64_t;
struct bf16 {
    uint16_t bits;
};

// A vector is one register, and as many sums are held at a time as there are registers for.
#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16, SUMS = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 8;
#else
constexpr int LANES = 4, SUMS = 16;
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

template <class V> inline V load(const void *at) {  // one instruction; the address need not be aligned
    V value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
inline void store(float *at, floats value) { std::memcpy(at, &value, sizeof value); }

inline floats widen(const float *at) { return load<floats>(at); }
#if defined(__AVX512F__) && defined(__AVX512BW__)
inline floats widen(const bf16 *at) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16);
}
#else
inline floats widen(const bf16 *at) { return (floats)(__builtin_convertvector(load<halves>(at), words) << 16); }
#endif
inline floats widen(const int8_t *at) { return __builtin_convertvector(load<bytes>(at), floats); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void assign(float &to, float x) { to = x; }
inline void assign(bf16 &to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        to.bits = uint16_t((bits >> 16) | 0x40);  // a NaN stays one
    else
        to.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

template <class X> inline float rounded(float x) {
    X kept;
    assign(kept, x);
    return to_float(kept);
}

inline void round_to(float *at, floats value) { store(at, value); }
inline void round_to(bf16 *at, floats value) {  // as `assign`, LANES at a time
#ifdef HAS_BF16_PAIRS
    const __m256bh result = _mm512_cvtneps_pbh((__m512)value);  // numbers below 1e-38 become 0
#else
    const words bits = (words)value, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const words kept = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
    const halves result = __builtin_convertvector(kept, halves);
#endif
    std::memcpy(at, &result, sizeof result);
}

// Adds up the lanes of each of SUMS vectors, all in the same way: lanes half a vector apart, then a quarter, ...
inline void add_lanes(const floats *v, float *totals) {
#ifdef __AVX512F__
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) {
        __m512 x = (__m512)v[i], y = (__m512)v[i + 8];
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    }
    for (int i = 0; i < 4; i++)
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_ps(b[i], b[i + 2], 0x44), _mm512_shuffle_ps(b[i], b[i + 2], 0xee));
    __m512 d = _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd));
    // The quarters of d belong to v[0..3], v[8..11], v[4..7], v[12..15], and in each the middle two are swapped.
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    _mm512_storeu_ps(totals, _mm512_permutexvar_ps(order, d));
#else
    for (int i = 0; i < SUMS; i++) {
        floats part = v[i];
        for (int apart = LANES / 2; apart; apart /= 2)
            for (int lane = 0; lane < apart; lane++) part[lane] += part[lane + apart];
        totals[i] = part[0];
    }
#endif
}

// What a product is made of: `Step` is a piece of a row of x in the form that suits the weights W.

template <class Weight> struct Widened {  // everything in fp32
    using W = Weight;
    using Vector = floats;
    struct Step {
        float x[LANES];
    };
    static constexpr int WIDTH = LANES;

    template <class X> static void prepare(const X *x, int count, Step &step) {
        for (int i = 0; i < LANES; i++) step.x[i] = i < count ? to_float(x[i]) : 0.0f;
    }
    static Vector weights(const W *at) { return widen(at); }
    static floats add(floats sum, Vector w, const Step &step) { return sum + w * load<floats>(step.x); }
};

#ifdef HAS_BF16_PAIRS
struct Bf16Pairs {  // bf16 by bf16 into fp32, two at a time in each lane
    using W = bf16;
    using Vector = __m512i;
    struct Step {
        bf16 x[2 * LANES];
    };
    static constexpr int WIDTH = 2 * LANES;

    static void prepare(const bf16 *x, int count, Step &step) {
        step = {};
        std::memcpy(step.x, x, count * sizeof(bf16));
    }
    static Vector weights(const W *at) { return _mm512_loadu_si512(at); }
    static floats add(floats sum, Vector w, const Step &step) {
        return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(step.x));
    }
};
#else
using Bf16Pairs = Widened<bf16>;
#endif

#ifdef HAS_INT8_QUADS
// int8 by int8 into int32, four at a time in each lane. Each 64 numbers of x get a scale of their own. The instruction
// wants one side unsigned: the weights are shifted by 128, and each lane starts with what undoes it.
struct Int8Quads {
    using W = int8_t;
    using Vector = __m512i;
    struct Step {
        int8_t x[4 * LANES];
        int32_t start[LANES];
        float scale;
    };
    static constexpr int WIDTH = 4 * LANES;

    template <class X> static void prepare(const X *x, int count, Step &step) {
        float largest = 0.0f;
        for (int i = 0; i < count; i++) largest = std::max(largest, std::fabs(to_float(x[i])));
        step = {};
        step.scale = largest / 127.0f;
        const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        for (int i = 0; i < count; i++) step.x[i] = int8_t(std::nearbyint(to_float(x[i]) * inverse));
        for (int i = 0; i < WIDTH; i++) step.start[i / 4] -= 128 * step.x[i];
    }
    static Vector weights(const W *at) {
        return _mm512_xor_si512(_mm512_loadu_si512(at), _mm512_set1_epi8(int8_t(0x80)));
    }
    static floats add(floats sum, Vector w, const Step &step) {
        __m512i dot = _mm512_dpbusd_epi32(_mm512_loadu_si512(step.start), w, _mm512_loadu_si512(step.x));
        return (floats)_mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(step.scale), (__m512)sum);
    }
};
#else
using Int8Quads = Widened<int8_t>;
#endif

// totals[n * MR + m] = the product of weight row n and row m of x.
template <class K, int NR, int MR>
inline void tile(const typename K::W *const *w, const typename K::Step *const *x, int64_t width, float *totals) {
    floats sum[NR * MR] = {};
    const int64_t whole = width / K::WIDTH;
    for (int64_t step = 0; step < whole; step++) {
        typename K::Vector weights[NR];
#pragma GCC unroll 16
        for (int n = 0; n < NR; n++) {
            weights[n] = K::weights(w[n] + step * K::WIDTH);
            // The rows after next, into the second-level cache: 1.5 times the speed of what the hardware foresees.
            __builtin_prefetch(w[n] + step * K::WIDTH + 2 * SUMS * width, 0, 2);
        }
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
            for (int n = 0; n < NR; n++) sum[n * MR + m] = K::add(sum[n * MR + m], weights[n], x[m][step]);
    }
    if (const int64_t rest = width % K::WIDTH) {
        for (int n = 0; n < NR; n++) {
            typename K::W padded[K::WIDTH] = {};
            std::memcpy(padded, w[n] + whole * K::WIDTH, rest * sizeof(padded[0]));
            for (int m = 0; m < MR; m++) sum[n * MR + m] = K::add(sum[n * MR + m], K::weights(padded), x[m][whole]);
        }
    }
    add_lanes(sum, totals);
}

// write(n, m, product) for SUMS / MR weight rows at a time and MR rows of x, of which `num_x` are wanted.
template <class K, int MR, class Write>
inline void tiles(const typename K::W *const *w, const typename K::Step *x, int64_t num_steps, int num_x,
                  int64_t width, Write write) {
    constexpr int NR = SUMS / MR;
    const typename K::Step *rows[MR];
    for (int m = 0; m < MR; m++) rows[m] = x + std::min(m, num_x - 1) * num_steps;
    for (int first = 0; first < SUMS; first += NR) {
        float totals[SUMS];
        tile<K, NR, MR>(w + first, rows, width, totals);
        for (int m = 0; m < num_x; m++)
            for (int n = 0; n < NR; n++) write(first + n, m, totals[n * MR + m]);
    }
}

// write(n, m, product) for SUMS weight rows (w points to each) and all rows of x.
template <class K, class Write>
inline void products(const typename K::W *const *w, const typename K::Step *x, int64_t num_steps, int64_t num_x,
                     int64_t width, Write write) {
    for (int64_t m = 0; m < num_x;) {
        auto write_here = [&](int n, int row, float value) { write(n, m + row, value); };
        const auto *rows = x + m * num_steps;
        const int64_t left = num_x - m;
        if (left == 1)
            tiles<K, 1>(w, rows, num_steps, 1, width, write_here);
        else if (left == 2)
            tiles<K, 2>(w, rows, num_steps, 2, width, write_here);
        else
            tiles<K, 4>(w, rows, num_steps, std::min<int64_t>(left, 4), width, write_here);
        m += 4;
    }
}

template <class K, class X> void prepare_row(const X *x, int64_t width, typename K::Step *steps) {
    for (int64_t at = 0; at < width; at += K::WIDTH)
        K::prepare(x + at, int(std::min<int64_t>(width - at, K::WIDTH)), *steps++);
}

template <class T> void enlarge(std::vector<T> &kept, size_t count) {
    if (kept.size() < count) kept.resize(count);
}

template <class K, class X>
void linear(const X *x, const typename K::W *w, const float *scales, const X *bias, X *y, int64_t num_x,
            int64_t num_out, int64_t width, int threads) {
    using Steps = std::vector<typename K::Step>;
    const int64_t num_steps = (width + K::WIDTH - 1) / K::WIDTH;
    on_team(threads, true, [&](const Team &team) {
        auto *steps = team.shared<Steps>([&](Steps &kept) { enlarge(kept, num_x * num_steps); }).data();
        team.each(num_x, [&](int64_t m) { prepare_row<K>(x + m * width, width, steps + m * num_steps); });
        team.meet();
        team.each((num_out + SUMS - 1) / SUMS, [&](int64_t part) {
            const typename K::W *rows[SUMS];
            for (int i = 0; i < SUMS; i++) rows[i] = w + std::min(part * SUMS + i, num_out - 1) * width;
            products<K>(rows, steps, num_steps, num_x, width, [&](int n, int64_t m, float value) {
                const int64_t out = part * SUMS + n;
                if (out >= num_out) return;
                if (scales) value *= scales[out];
                if (bias) value += to_float(bias[out]);
                assign(y[m * num_out + out], value);
            });
        });
    });
}

// exp(x) for x <= 0, to 2e-7 of its value; 0 below -87.
inline floats exponential(floats x) {
    const floats clamped = x < -87.0f ? floats{} - 87.0f : x;
    const floats scaled = clamped * 1.44269504f;
    const ints whole = __builtin_convertvector(scaled - 0.5f, ints);  // towards zero: to the nearest for x <= 0
    const floats power = __builtin_convertvector(whole, floats);
    const floats rest = (clamped - power * 0.693359375f) + power * 2.12194440e-4f;
    floats sum = floats{} + 1.9875691500e-4f;
    for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        sum = sum * rest + factor;
    sum = sum * rest * rest + rest + 1.0f;
    const floats value = (floats)((ints)sum + (whole << 23));
    return x < -87.0f ? floats{} : value;
}

// mixed[r, :] += sum over positions of weights[r, position] * values[position, :], for R heads and C vectors of width.
template <int R, int C, class X>
inline void mix(const float *weights, int64_t weight_stride, const X *values, int64_t width, int64_t count,
                float *mixed) {
    floats sum[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = load<floats>(mixed + r * width + c * LANES);
    for (int64_t position = 0; position < count; position++) {
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            const floats value = widen(values + position * width + c * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sum[r][c] += weights[r * weight_stride + position] * value;
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(mixed + r * width + c * LANES, sum[r][c]);
}

template <int R, class X>
inline void mix_heads(const float *weights, int64_t weight_stride, const X *values, int64_t width, int64_t count,
                      float *mixed) {
    int64_t at = 0;
    for (; at + 4 * LANES <= width; at += 4 * LANES)
        mix<R, 4>(weights, weight_stride, values + at, width, count, mixed + at);
    for (; at < width; at += LANES) mix<R, 1>(weights, weight_stride, values + at, width, count, mixed + at);
}

struct Cache {  // of one layer: blocks of (num_kv_heads, block_size, width)
    const void *keys, *values;
    int64_t block_stride, num_kv_heads, block_size, width;
};

constexpr int64_t PART = 128;  // positions that one thread takes at a time; fixed, so that sums keep their order

constexpr int64_t WORTH_A_THREAD = 1 << 16;  // numbers to read; for fewer it is slower to wake another thread

// What a part of the positions gives for R heads: largest score, sum of exp(score - largest), and the mixed values.
template <class K, class X> struct Part {
    const Cache &cache;
    const int32_t *table;
    int64_t group, kv_head, first, last;
    const typename K::Step *queries;  // (group, num_steps)
    int64_t num_steps;
    float scale;

    const X *row_of(const void *blocks, int64_t position) const {
        const int64_t block = table[position / cache.block_size], offset = position % cache.block_size;
        return static_cast<const X *>(blocks) + block * cache.block_stride +
               (kv_head * cache.block_size + offset) * cache.width;
    }

    void scores(float *found) const {
        for (int64_t start = first; start < last; start += SUMS) {
            const X *rows[SUMS];
            for (int i = 0; i < SUMS; i++) rows[i] = row_of(cache.keys, std::min<int64_t>(start + i, last - 1));
            products<K>(rows, queries, num_steps, group, cache.width, [&](int n, int64_t r, float value) {
                if (start + n < last) found[r * PART + start + n - first] = value * scale;
            });
        }
    }

    void soften(float *found, float &largest, float &total) const {  // scores to exp(score - largest)
        const int64_t count = last - first;
        largest = *std::max_element(found, found + count);
        for (int64_t i = count; i % LANES; i++) found[i] = -INFINITY;
        floats sum = {};
        for (int64_t i = 0; i < count; i += LANES) {
            const floats value = exponential(load<floats>(found + i) - largest);
            store(found + i, value);
            sum += value;
        }
        total = 0.0f;
        for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    }

    void run(float *largest, float *total, float *mixed) const {
        static thread_local std::vector<float> kept;
        enlarge(kept, group * PART);
        float *weights = kept.data();
        scores(weights);
        for (int64_t r = 0; r < group; r++) soften(weights + r * PART, largest[r], total[r]);
        std::fill(mixed, mixed + group * cache.width, 0.0f);
        for (int64_t start = first; start < last;) {
            const int64_t end = std::min(last, (start / cache.block_size + 1) * cache.block_size);
            const X *values = row_of(cache.values, start);
            for (int64_t r = 0; r < group;) {
                const float *from = weights + r * PART + start - first;
                float *to = mixed + r * cache.width;
                const int64_t left = group - r;
                if (left >= 4) mix_heads<4>(from, PART, values, cache.width, end - start, to), r += 4;
                else if (left == 3) mix_heads<3>(from, PART, values, cache.width, end - start, to), r += 3;
                else if (left == 2) mix_heads<2>(from, PART, values, cache.width, end - start, to), r += 2;
                else mix_heads<1>(from, PART, values, cache.width, end - start, to), r += 1;
            }
            start = end;
        }
    }
};

template <class K, class X>
void attend(const X *q, int64_t q_stride, const Cache &cache, const int32_t *tables, int64_t table_width,
            const int32_t *lengths, int64_t window, X *out, int64_t num_rows, int64_t num_heads, int threads) {
    const int64_t group = num_heads / cache.num_kv_heads, width = cache.width;
    const int64_t num_steps = (width + K::WIDTH - 1) / K::WIDTH;
    const float scale = 1.0f / std::sqrt(float(width));

    struct Plan {  // the parts of all rows, one after the other
        std::vector<int64_t> row_of, part_of, first_task;
        std::vector<typename K::Step> queries;
        std::vector<float> largest, total, mixed;
    };
    const auto prepare = [&](Plan &plan) {
        plan.row_of.clear(), plan.part_of.clear(), plan.first_task.assign(1, 0);
        for (int64_t b = 0; b < num_rows; b++) {
            for (int64_t part = std::max<int64_t>(0, lengths[b] - window) / PART; part * PART < lengths[b]; part++)
                plan.row_of.push_back(b), plan.part_of.push_back(part);
            plan.first_task.push_back(plan.row_of.size());
        }
        const int64_t num_results = plan.row_of.size() * num_heads;
        enlarge(plan.queries, num_rows * num_heads * num_steps);
        enlarge(plan.largest, num_results), enlarge(plan.total, num_results), enlarge(plan.mixed, num_results * width);
    };
    int64_t num_read = 0;
    for (int64_t b = 0; b < num_rows; b++) num_read += std::min<int64_t>(lengths[b], window) * cache.num_kv_heads * width;

    on_team(threads, num_read > WORTH_A_THREAD, [&](const Team &team) {
        Plan &plan = team.shared<Plan>(prepare);
        auto *queries = plan.queries.data();
        float *largest = plan.largest.data(), *total = plan.total.data(), *mixed = plan.mixed.data();
        team.each(num_rows, [&](int64_t b) {
            for (int64_t h = 0; h < num_heads; h++)
                prepare_row<K>(q + b * q_stride + h * width, width, queries + (b * num_heads + h) * num_steps);
        });
        team.meet();
        team.each_in_turn(plan.row_of.size() * cache.num_kv_heads, [&](int64_t i) {
            const int64_t task = i / cache.num_kv_heads, g = i % cache.num_kv_heads;
            const int64_t b = plan.row_of[task], head = task * num_heads + g * group, part = plan.part_of[task];
            const int64_t first = std::max({int64_t(0), lengths[b] - window, part * PART});
            const int64_t last = std::min<int64_t>(lengths[b], (part + 1) * PART);
            const auto *mine = queries + (b * num_heads + g * group) * num_steps;
            Part<K, X>{cache, tables + b * table_width, group, g, first, last, mine, num_steps, scale}.run(
                largest + head, total + head, mixed + head * width);
        });
        team.meet();
        team.each(num_rows * num_heads, [&](int64_t i) {  // the parts become one, each by its own largest score
            const int64_t b = i / num_heads, h = i % num_heads, begin = plan.first_task[b], end = plan.first_task[b + 1];
            float most = -INFINITY, sum = 0.0f;
            for (int64_t task = begin; task < end; task++) most = std::max(most, largest[task * num_heads + h]);
            for (int64_t task = begin; task < end; task++)
                sum += total[task * num_heads + h] * std::exp(largest[task * num_heads + h] - most);
            for (int64_t d = 0; d < width; d += LANES) {
                floats value = {};
                for (int64_t task = begin; task < end; task++)
                    value += load<floats>(mixed + (task * num_heads + h) * width + d) *
                             (std::exp(largest[task * num_heads + h] - most) / sum);
                round_to(out + i * width + d, value);
            }
        });
    });
}

}  // namespace

#include "lora.h"
#include "rowwise.h"
#include "products.h"
#include "matmul.h"
#include "attention.h"
#include "lora_pass.h"
#include "rowwise_back.h"
#include "targets.h"
#include "table_rows.h"

extern "C" {

// y (num_x, num_out) = x (num_x, width) times w (num_out, width) transposed, plus bias where it is not null.
void linear_fp32(const float *x, const float *w, const float *bias, float *y, int64_t num_x, int64_t num_out,
                 int64_t width, int threads) {
    linear<Widened<float>>(x, w, nullptr, bias, y, num_x, num_out, width, threads);
}

void linear_bf16(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *y, int64_t num_x, int64_t num_out,
                 int64_t width, int threads) {
    linear<Bf16Pairs>(x, w, nullptr, bias, y, num_x, num_out, width, threads);
}

// The same with int8 weights and a scale for each of their rows.
void linear_int8_fp32(const float *x, const int8_t *w, const float *scales, const float *bias, float *y,
                      int64_t num_x, int64_t num_out, int64_t width, int threads) {
    linear<Int8Quads>(x, w, scales, bias, y, num_x, num_out, width, threads);
}

void linear_int8_bf16(const bf16 *x, const int8_t *w, const float *scales, const bf16 *bias, bf16 *y, int64_t num_x,
                      int64_t num_out, int64_t width, int threads) {
    linear<Int8Quads>(x, w, scales, bias, y, num_x, num_out, width, threads);
}

// The same for many rows; and where `lies_by_depth`, w is (width, num_out).
void matmul_fp32(const float *x, const float *w, int lies_by_depth, const float *bias, float *y, int64_t num_x,
                 int64_t num_out, int64_t width, int threads) {
    matmul(x, w, lies_by_depth != 0, bias, y, num_x, num_out, width, threads);
}

void matmul_bf16(const bf16 *x, const bf16 *w, int lies_by_depth, const bf16 *bias, bf16 *y, int64_t num_x,
                 int64_t num_out, int64_t width, int threads) {
    matmul(x, w, lies_by_depth != 0, bias, y, num_x, num_out, width, threads);
}

// One query per row over blocks of keys and values; see paged_attention.py. Strides are in numbers.
void attend_fp32(const float *q, int64_t q_stride, const float *keys, const float *values, int64_t block_stride,
                 const int32_t *tables, int64_t table_width, const int32_t *lengths, int64_t window, float *out,
                 int64_t num_rows, int64_t num_heads, int64_t num_kv_heads, int64_t block_size, int64_t width,
                 int threads) {
    const Cache cache{keys, values, block_stride, num_kv_heads, block_size, width};
    attend<Widened<float>>(q, q_stride, cache, tables, table_width, lengths, window, out, num_rows, num_heads, threads);
}

void attend_bf16(const bf16 *q, int64_t q_stride, const bf16 *keys, const bf16 *values, int64_t block_stride,
                 const int32_t *tables, int64_t table_width, const int32_t *lengths, int64_t window, bf16 *out,
                 int64_t num_rows, int64_t num_heads, int64_t num_kv_heads, int64_t block_size, int64_t width,
                 int threads) {
    const Cache cache{keys, values, block_stride, num_kv_heads, block_size, width};
    attend<Bf16Pairs>(q, q_stride, cache, tables, table_width, lengths, window, out, num_rows, num_heads, threads);
}
}

#include "recording.h"
