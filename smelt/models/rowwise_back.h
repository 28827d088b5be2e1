// Gradients of the work on single rows, for models whose weights are frozen. Part of kernels.cpp; `rotate` is its own
// gradient, with the other sign.
#pragma once

namespace {

// y = x r w with r = 1 / sqrt(mean(x^2) + eps), so that of x it is r (g w - x r^2 mean(x g w)).
template <class X>
void rms_norm_back(const X *x, const X *weight, const X *g, X *x_gradient, int64_t num_rows, int64_t width,
                   float eps, int threads) {
    rowwise(num_rows, ROWS_PER_THREAD, threads, [&](int64_t r) {
        const X *from = x + r * width, *slope = g + r * width;
        X *to = x_gradient + r * width;
        floats squares = {}, dots = {};
        float square = 0.0f, dot = 0.0f;
        const int64_t whole = width / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES) {
            const floats value = widen(from + i);
            squares += value * value, dots += value * widen(slope + i) * widen(weight + i);
        }
        for (int64_t i = whole; i < width; i++) {
            const float value = to_float(from[i]);
            squares[0] += value * value, dots[0] += value * to_float(slope[i]) * to_float(weight[i]);
        }
        for (int lane = 0; lane < LANES; lane++) square += squares[lane], dot += dots[lane];
        const float scale = 1.0f / std::sqrt(square / float(width) + eps);
        const float along = scale * scale * dot / float(width);
        for (int64_t i = 0; i < whole; i += LANES)
            round_to(to + i, scale * (widen(slope + i) * widen(weight + i) - along * widen(from + i)));
        for (int64_t i = whole; i < width; i++)
            assign(to[i], scale * (to_float(slope[i]) * to_float(weight[i]) - along * to_float(from[i])));
    });
}

// y = silu(a) b, where each row of x has all of a first: of a it is g b s (1 + a (1 - s)) with s = sigmoid(a).
template <class X>
void swiglu_back(const X *x, const X *g, X *x_gradient, int64_t num_rows, int64_t width, int threads) {
    rowwise(num_rows, ROWS_PER_THREAD, threads, [&](int64_t r) {
        const X *gates = x + 2 * r * width, *ups = gates + width, *slopes = g + r * width;
        X *to_gates = x_gradient + 2 * r * width, *to_ups = to_gates + width;
        const auto both = [](floats a, floats b, floats slope, floats &of_gate, floats &of_up) {
            const floats s = gated(floats{} + 1.0f, a);
            of_gate = slope * b * s * (1.0f + a * (1.0f - s));
            of_up = slope * rounded<X>(a * s);
        };
        floats of_gate, of_up;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            both(widen(gates + i), widen(ups + i), widen(slopes + i), of_gate, of_up);
            round_to(to_gates + i, of_gate), round_to(to_ups + i, of_up);
        }
        for (; i < width; i++) {
            both(floats{} + to_float(gates[i]), floats{} + to_float(ups[i]), floats{} + to_float(slopes[i]), of_gate,
                 of_up);
            assign(to_gates[i], of_gate[0]), assign(to_ups[i], of_up[0]);
        }
    });
}

} // namespace

extern "C" {

void rms_norm_back_fp32(const float *x, const float *weight, const float *g, float *x_gradient, int64_t num_rows,
                        int64_t width, float eps, int threads) {
    rms_norm_back(x, weight, g, x_gradient, num_rows, width, eps, threads);
}

void rms_norm_back_bf16(const bf16 *x, const bf16 *weight, const bf16 *g, bf16 *x_gradient, int64_t num_rows,
                        int64_t width, float eps, int threads) {
    rms_norm_back(x, weight, g, x_gradient, num_rows, width, eps, threads);
}

void swiglu_back_fp32(const float *x, const float *g, float *x_gradient, int64_t num_rows, int64_t width,
                      int threads) {
    swiglu_back(x, g, x_gradient, num_rows, width, threads);
}

void swiglu_back_bf16(const bf16 *x, const bf16 *g, bf16 *x_gradient, int64_t num_rows, int64_t width, int threads) {
    swiglu_back(x, g, x_gradient, num_rows, width, threads);
}
}
