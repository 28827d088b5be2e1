// The log-probabilities of targets and their gradient, from logits in a row: torch would write out a row of fp32 for
// each step of it. Part of kernels.cpp. Each row by itself.
#pragma once

namespace {

// log sum exp of a row.
template <class X> inline float log_sum(const X *row, int64_t width) {
    float largest = -INFINITY, total = 0.0f;
    floats most = floats{} - INFINITY, sums = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        const floats value = widen(row + i);
        most = value > most ? value : most;
    }
    const int64_t whole = i;
    for (int lane = 0; lane < LANES; lane++) largest = std::max(largest, most[lane]);
    for (; i < width; i++) largest = std::max(largest, to_float(row[i]));
    for (i = 0; i < whole; i += LANES) sums += exponential(widen(row + i) - largest);
    for (total = total_of(sums); i < width; i++) total += std::exp(to_float(row[i]) - largest);
    return largest + std::log(total);
}

template <class X> void log_sums(const X *logits, float *sums, int64_t num_rows, int64_t width, int threads) {
    rowwise(num_rows, 2, threads, [&](int64_t r) { sums[r] = log_sum(logits + r * width, width); });
}

// to = sum over k of g_k (target k - softmax), rounded once; `sums` are those of log_sums.
template <class X>
void targets_back(const X *logits, const float *sums, const int64_t *targets, const float *g, X *to,
                  int64_t num_rows, int64_t num_targets, int64_t width, int threads) {
    rowwise(num_rows, 2, threads, [&](int64_t r) {
        const X *row = logits + r * width;
        const int64_t *own = targets + r * num_targets;
        const float *given = g + r * num_targets;
        float total = 0.0f;
        for (int64_t k = 0; k < num_targets; k++) total += given[k];
        const auto share = [&](floats logit) {
            const floats apart = logit - sums[r];
            return exponential(apart < 0.0f ? apart : floats{}) * -total;
        };
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) round_to(to + r * width + i, share(widen(row + i)));
        for (; i < width; i++) assign(to[r * width + i], share(floats{} + to_float(row[i]))[0]);
        for (int64_t k = 0; k < num_targets; k++) { // the few again, with all that they are given
            float value = share(floats{} + to_float(row[own[k]]))[0];
            for (int64_t j = 0; j < num_targets; j++)
                if (own[j] == own[k]) value += given[j];
            assign(to[r * width + own[k]], value);
        }
    });
}

} // namespace

extern "C" {

void log_sums_fp32(const float *logits, float *sums, int64_t num_rows, int64_t width, int threads) {
    log_sums(logits, sums, num_rows, width, threads);
}

void targets_back_fp32(const float *logits, const float *sums, const int64_t *targets, const float *g, float *to,
                       int64_t num_rows, int64_t num_targets, int64_t width, int threads) {
    targets_back(logits, sums, targets, g, to, num_rows, num_targets, width, threads);
}

void log_sums_bf16(const bf16 *logits, float *sums, int64_t num_rows, int64_t width, int threads) {
    log_sums(logits, sums, num_rows, width, threads);
}

void targets_back_bf16(const bf16 *logits, const float *sums, const int64_t *targets, const float *g, bf16 *to,
                       int64_t num_rows, int64_t num_targets, int64_t width, int threads) {
    targets_back(logits, sums, targets, g, to, num_rows, num_targets, width, threads);
}
}
