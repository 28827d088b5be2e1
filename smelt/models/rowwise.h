// What a decoder does to each row between its products: small work, of which torch makes many small calls.
// Part of kernels.cpp. Rounds to bf16 where torch's own steps do, so that both give the same up to fp32's last bits.
#pragma once

namespace {

constexpr int64_t ROWS_PER_THREAD = 16;  // fewer are not worth waking another one

template <class X> inline float rounded(float x) {
    X kept;
    assign(kept, x);
    return to_float(kept);
}

template <class X>
void rms_norm(const X *x, const X *weight, X *y, int64_t num_rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (num_rows >= 2 * ROWS_PER_THREAD)
    for (int64_t r = 0; r < num_rows; r++) {
        const X *from = x + r * width;
        float sums[LANES] = {}, sum = 0.0f;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES)
            for (int lane = 0; lane < LANES; lane++) sums[lane] += to_float(from[i + lane]) * to_float(from[i + lane]);
        for (; i < width; i++) sums[0] += to_float(from[i]) * to_float(from[i]);
        for (float part : sums) sum += part;
        const float scale = 1.0f / std::sqrt(sum / float(width) + eps);
        for (i = 0; i < width; i++) assign(y[r * width + i], to_float(from[i]) * scale * to_float(weight[i]));
    }
}

template <class X>
inline void turn(const X *x, const X *other, const X *c, const X *s, X *__restrict to, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        assign(to[i], rounded<X>(to_float(x[i]) * to_float(c[i])) + to_float(other[i]) * to_float(s[i]));
}

// Each head of a row, `width` numbers, is turned by the row's angles; x may have other heads after these.
template <class X>
void rotate(const X *x, int64_t x_stride, const X *cos, const X *sin, X *y, int64_t num_rows, int64_t num_heads,
            int64_t width, int threads) {
    const int64_t half = width / 2;
#pragma omp parallel for num_threads(threads) if (num_rows >= 2 * ROWS_PER_THREAD)
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t h = 0; h < num_heads; h++) {
            const X *from = x + r * x_stride + h * width, *c = cos + r * width, *s = sin + r * width;
            X *to = y + (r * num_heads + h) * width;
            turn(from, from + half, c, s, to, half);
            turn(from + half, from, c + half, s + half, to + half, half);
        }
}

// y = silu(gate) * up, where each row of x has all gates first.
template <class X> void swiglu(const X *x, X *y, int64_t num_rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (num_rows >= ROWS_PER_THREAD)
    for (int64_t r = 0; r < num_rows; r++) {
        const X *gates = x + 2 * r * width, *ups = gates + width;
        X *to = y + r * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            const floats gate = widen(gates + i), power = exponential(gate < 0.0f ? gate : -gate);
            const floats silu = gate * (gate < 0.0f ? power : floats{} + 1.0f) / (power + 1.0f);
            for (int lane = 0; lane < LANES; lane++)
                assign(to[i + lane], rounded<X>(silu[lane]) * to_float(ups[i + lane]));
        }
        for (; i < width; i++) {
            const float gate = to_float(gates[i]);
            assign(to[i], rounded<X>(gate / (1.0f + std::exp(-gate))) * to_float(ups[i]));
        }
    }
}

}  // namespace

extern "C" {

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
    for (int64_t n = 0; n < num_tokens; n++)
        for (int64_t h = 0; h < num_heads; h++) {
            const int64_t place = places[n * num_heads + h];
            std::memcpy(keys + place * width, k + n * k_stride + h * width, width);
            std::memcpy(values + place * width, v + n * v_stride + h * width, width);
        }
}
}
