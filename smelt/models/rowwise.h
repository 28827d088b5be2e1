// What a decoder does to each row between its products: small work, of which torch makes many small calls.
// Part of kernels.cpp. Rounds to bf16 where torch's own steps do, so that both give the same up to fp32's last bits.
#pragma once

namespace {

constexpr int64_t ROWS_PER_THREAD = 16;  // fewer are not worth waking another one
constexpr int64_t PIECE = 512;           // numbers

// work(row) for each row; alone where there are fewer than `worth` of them, unless within a recording.
template <class F> void rowwise(int64_t num_rows, int64_t worth, int threads, F work) {
    on_team(threads, num_rows >= worth, [&](const Team &team) { team.each(num_rows, work); });
}

// Small work: in company only within a recording.
template <class F> void rowwise(int64_t num_rows, F work) {
    on_team(1, false, [&](const Team &team) { team.each(num_rows, work); });
}

// work(first, end) for pieces of so many numbers; likewise.
template <class F> void piecewise(int64_t count, F work) {
    on_team(1, false, [&](const Team &team) {
        team.each((count + PIECE - 1) / PIECE,
                  [&](int64_t i) { work(i * PIECE, std::min(count, (i + 1) * PIECE)); });
    });
}

template <class X> inline void rms_norm_row(const X *x, const X *weight, X *y, int64_t width, float eps) {
    floats sums = {};
    float sum = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) sums += widen(x + i) * widen(x + i);
    for (; i < width; i++) sums[0] += to_float(x[i]) * to_float(x[i]);
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    const float scale = 1.0f / std::sqrt(sum / float(width) + eps);
    for (i = 0; i + LANES <= width; i += LANES) round_to(y + i, widen(x + i) * scale * widen(weight + i));
    for (; i < width; i++) assign(y[i], to_float(x[i]) * scale * to_float(weight[i]));
}

template <class X>
void rms_norm(const X *x, const X *weight, X *y, int64_t num_rows, int64_t width, float eps, int threads) {
    rowwise(num_rows, 2 * ROWS_PER_THREAD, threads,
            [&](int64_t r) { rms_norm_row(x + r * width, weight, y + r * width, width, eps); });
}

// Each head of a row by itself: the first `num_queries` by one weight, the others by another.
template <class X>
void norm_heads(const X *x, int64_t x_stride, const X *of_queries, const X *of_keys, X *y, int64_t num_rows,
                int64_t num_queries, int64_t num_heads, int64_t width, float eps) {
    rowwise(num_rows, [&](int64_t r) {
        for (int64_t h = 0; h < num_heads; h++)
            rms_norm_row(x + r * x_stride + h * width, h < num_queries ? of_queries : of_keys,
                         y + (r * num_heads + h) * width, width, eps);
    });
}

// bias may be null.
template <class X>
inline void layer_norm_row(const X *x, const X *weight, const X *bias, X *y, int64_t width, float eps) {
    floats sums = {}, squares = {};
    float sum = 0.0f, square = 0.0f;
    const int64_t whole = width / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) sums += widen(x + i);
    for (int64_t i = whole; i < width; i++) sums[0] += to_float(x[i]);
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    const float mean = sum / float(width);
    for (int64_t i = 0; i < whole; i += LANES) {
        const floats apart = widen(x + i) - mean;
        squares += apart * apart;
    }
    for (int64_t i = whole; i < width; i++) squares[0] += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
    for (int lane = 0; lane < LANES; lane++) square += squares[lane];
    const float scale = 1.0f / std::sqrt(square / float(width) + eps);
    for (int64_t i = 0; i < whole; i += LANES) {
        const floats shift = bias ? widen(bias + i) : floats{};
        round_to(y + i, (widen(x + i) - mean) * scale * widen(weight + i) + shift);
    }
    for (int64_t i = whole; i < width; i++)
        assign(y[i], (to_float(x[i]) - mean) * scale * to_float(weight[i]) + (bias ? to_float(bias[i]) : 0.0f));
}

template <class X>
void layer_norm(const X *x, const X *weight, const X *bias, X *y, int64_t num_rows, int64_t width, float eps) {
    rowwise(num_rows,
            [&](int64_t r) { layer_norm_row(x + r * width, weight, bias, y + r * width, width, eps); });
}

template <class X> inline floats rounded(floats x) {
    X kept[LANES];
    round_to(kept, x);
    return widen(kept);
}

template <class X>
inline void turn(const X *x, const X *other, const X *c, const X *s, X *to, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        round_to(to + i, rounded<X>(widen(x + i) * widen(c + i)) + widen(other + i) * widen(s + i));
    for (; i < count; i++)
        assign(to[i], rounded<X>(to_float(x[i]) * to_float(c[i])) + to_float(other[i]) * to_float(s[i]));
}

// Each head of a row, `width` numbers, is turned by the row's angles; x may have other heads after these.
template <class X>
void rotate(const X *x, int64_t x_stride, const X *cos, const X *sin, X *y, int64_t num_rows, int64_t num_heads,
            int64_t width, int threads) {
    const int64_t half = width / 2;
    rowwise(num_rows, 2 * ROWS_PER_THREAD, threads, [&](int64_t r) {
        for (int64_t h = 0; h < num_heads; h++) {
            const X *from = x + r * x_stride + h * width, *c = cos + r * width, *s = sin + r * width;
            X *to = y + (r * num_heads + h) * width;
            turn(from, from + half, c, s, to, half);
            turn(from + half, from, c + half, s + half, to + half, half);
        }
    });
}

// x / (1 + exp(-z)), with z = x for SiLU.
inline floats gated(floats x, floats z) {
    const floats power = exponential(z < 0.0f ? z : -z);
    return x * (z < 0.0f ? power : floats{} + 1.0f) / (power + 1.0f);
}

// y = silu(gate) * up, where each row of x has all gates first.
template <class X> void swiglu(const X *x, X *y, int64_t num_rows, int64_t width, int threads) {
    rowwise(num_rows, ROWS_PER_THREAD, threads, [&](int64_t r) {
        const X *gates = x + 2 * r * width, *ups = gates + width;
        X *to = y + r * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            const floats gate = widen(gates + i), silu = gated(gate, gate);
            round_to(to + i, rounded<X>(silu) * widen(ups + i));
        }
        for (; i < width; i++) {
            const float gate = to_float(gates[i]);
            assign(to[i], rounded<X>(gate / (1.0f + std::exp(-gate))) * to_float(ups[i]));
        }
    });
}

// GELU in its tanh form: (1 + tanh(z / 2)) / 2 = 1 / (1 + exp(-z)).
template <class X> void gelu_tanh(const X *x, X *y, int64_t count) {
    const auto gelu = [](floats v) { return gated(v, 1.5957691216f * (v + 0.044715f * v * v * v)); };
    piecewise(count, [&](int64_t i, int64_t end) {
        for (; i + LANES <= end; i += LANES) round_to(y + i, gelu(widen(x + i)));
        for (; i < end; i++) assign(y[i], gelu(floats{} + to_float(x[i]))[0]);
    });
}

// What `rotate` takes: cosines and signed sines of position times frequency, each frequency for both halves of a head.
template <class X>
void rotary_tables(const int64_t *positions, const float *frequencies, X *cos, X *sin, int64_t num_rows,
                   int64_t half) {
    rowwise(num_rows, [&](int64_t r) {
        X *cosines = cos + 2 * r * half, *sines = sin + 2 * r * half;
        for (int64_t i = 0; i < half; i++) {
            const float angle = float(positions[r]) * frequencies[i], c = std::cos(angle), s = std::sin(angle);
            assign(cosines[i], c), assign(cosines[half + i], c);
            assign(sines[i], -s), assign(sines[half + i], s);
        }
    });
}

template <class X> void add(const X *a, const X *b, X *sum, int64_t count) {
    piecewise(count, [&](int64_t i, int64_t end) {
        for (; i + LANES <= end; i += LANES) round_to(sum + i, widen(a + i) + widen(b + i));
        for (; i < end; i++) assign(sum[i], to_float(a[i]) + to_float(b[i]));
    });
}

}  // namespace

extern "C" {

void rotary_tables_fp32(const int64_t *positions, const float *frequencies, float *cos, float *sin, int64_t num_rows,
                        int64_t half) {
    rotary_tables(positions, frequencies, cos, sin, num_rows, half);
}

void rotary_tables_bf16(const int64_t *positions, const float *frequencies, bf16 *cos, bf16 *sin, int64_t num_rows,
                        int64_t half) {
    rotary_tables(positions, frequencies, cos, sin, num_rows, half);
}

// Rows of a table, `width` bytes each, by their numbers.
void look_up(const char *table, const int64_t *ids, char *rows, int64_t num_rows, int64_t width) {
    rowwise(num_rows, [&](int64_t r) { std::memcpy(rows + r * width, table + ids[r] * width, width); });
}

void norm_heads_fp32(const float *x, int64_t x_stride, const float *of_queries, const float *of_keys, float *y, int64_t num_rows,
                     int64_t num_queries, int64_t num_heads, int64_t width, float eps) {
    norm_heads(x, x_stride, of_queries, of_keys, y, num_rows, num_queries, num_heads, width, eps);
}

void layer_norm_fp32(const float *x, const float *weight, const float *bias, float *y, int64_t num_rows, int64_t width,
                     float eps) {
    layer_norm(x, weight, bias, y, num_rows, width, eps);
}

void gelu_tanh_fp32(const float *x, float *y, int64_t count) { gelu_tanh(x, y, count); }

void add_fp32(const float *a, const float *b, float *sum, int64_t count) { add(a, b, sum, count); }

void norm_heads_bf16(const bf16 *x, int64_t x_stride, const bf16 *of_queries, const bf16 *of_keys, bf16 *y, int64_t num_rows,
                     int64_t num_queries, int64_t num_heads, int64_t width, float eps) {
    norm_heads(x, x_stride, of_queries, of_keys, y, num_rows, num_queries, num_heads, width, eps);
}

void layer_norm_bf16(const bf16 *x, const bf16 *weight, const bf16 *bias, bf16 *y, int64_t num_rows, int64_t width,
                     float eps) {
    layer_norm(x, weight, bias, y, num_rows, width, eps);
}

void gelu_tanh_bf16(const bf16 *x, bf16 *y, int64_t count) { gelu_tanh(x, y, count); }

void add_bf16(const bf16 *a, const bf16 *b, bf16 *sum, int64_t count) { add(a, b, sum, count); }

void swiglu_fp32(const float *x, float *y, int64_t num_rows, int64_t width, int threads) {
    swiglu(x, y, num_rows, width, threads);
}

void swiglu_bf16(const bf16 *x, bf16 *y, int64_t num_rows, int64_t width, int threads) {
    swiglu(x, y, num_rows, width, threads);
}

void rms_norm_fp32(const float *x, const float *weight, float *y, int64_t num_rows, int64_t width, float eps,
                   int threads) {
    rms_norm(x, weight, y, num_rows, width, eps, threads);
}

void rms_norm_bf16(const bf16 *x, const bf16 *weight, bf16 *y, int64_t num_rows, int64_t width, float eps,
                   int threads) {
    rms_norm(x, weight, y, num_rows, width, eps, threads);
}

void rotate_fp32(const float *x, int64_t x_stride, const float *cos, const float *sin, float *y, int64_t num_rows,
                 int64_t num_heads, int64_t width, int threads) {
    rotate(x, x_stride, cos, sin, y, num_rows, num_heads, width, threads);
}

void rotate_bf16(const bf16 *x, int64_t x_stride, const bf16 *cos, const bf16 *sin, bf16 *y, int64_t num_rows,
                 int64_t num_heads, int64_t width, int threads) {
    rotate(x, x_stride, cos, sin, y, num_rows, num_heads, width, threads);
}

// Vectors of `width` bytes: each token's heads, one after the other, go to the places with these numbers, in two caches.
void write_cache(const char *k, int64_t k_stride, const char *v, int64_t v_stride, const int64_t *places, char *keys,
                 char *values, int64_t num_tokens, int64_t num_heads, int64_t width) {
    rowwise(num_tokens, [&](int64_t n) {
        for (int64_t h = 0; h < num_heads; h++) {
            const int64_t place = places[n * num_heads + h];
            std::memcpy(keys + place * width, k + n * k_stride + h * width, width);
            std::memcpy(values + place * width, v + n * v_stride + h * width, width);
        }
    });
}
}
