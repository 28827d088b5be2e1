// Attention within whole texts and its gradient, for CPUs: torch's own runs at a tenth of the speed of its products.
// Part of kernels.cpp. A text's scores for a few queries lie in a core's cache, so the softmax is the plain one. Each
// text is computed alone, and a head of keys by one thread: company changes no bits.
#pragma once

namespace {

constexpr int64_t QUERIES = 32; // at a time; even, since their numbers are packed in pairs

template <class X> struct Texts { // strides in numbers, from one token to the next
    const X *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;
    const int64_t *starts;                                            // num_texts + 1
    int64_t num_texts, num_heads, num_kv_heads, width, window, ahead; // keys up to itself, and behind it

    int64_t group() const { return num_heads / num_kv_heads; }
    float scale() const { return 1.0f / std::sqrt(float(width)); }
};

// Queries `first` up to `end` of a text, and the keys that they see: `begin` up to `last`.
struct Span {
    int64_t first, end, begin, last;
    template <class X>
    Span(int64_t first, int64_t length, const Texts<X> &texts)
        : first(first), end(std::min(first + QUERIES, length)),
          begin(std::max<int64_t>(0, first - texts.window + 1) / LANES * LANES),
          last(std::min(end + texts.ahead, length)) {}
    int64_t num_queries() const { return end - first; }
    int64_t num_keys() const { return last - begin; }
    int64_t stride() const { return lanes(num_keys()); }
};

// The first and the last key that query m of a span sees, counted from the span's first.
template <class X> inline int64_t first_seen(const Span &span, int64_t m, const Texts<X> &texts) {
    return std::max<int64_t>(0, span.first + m - texts.window + 1 - span.begin);
}
template <class X> inline int64_t last_seen(const Span &span, int64_t m, const Texts<X> &texts) {
    return std::min(span.first + m + texts.ahead, span.last - 1) - span.begin;
}

// The lanes of a vector at `at` that lie from `first` up to and with `last`.
inline floats only_seen(floats value, int64_t at, int64_t first, int64_t last, float other) {
    if (at >= first && at + LANES - 1 <= last) return value;
    for (int lane = 0; lane < LANES; lane++)
        if (at + lane < first || at + lane > last) value[lane] = other;
    return value;
}

inline float total_of(floats sums) {
    float total = 0.0f;
    for (int lane = 0; lane < LANES; lane++) total += sums[lane];
    return total;
}

// Scores become exp(score - largest), 0 where nothing is seen; log of their sum plus the largest.
inline float soften_row(float *scores, int64_t stride, int64_t first, int64_t last, float scale, float &sum) {
    floats most = floats{} - INFINITY;
    for (int64_t i = 0; i < stride; i += LANES) {
        const floats value = only_seen(load<floats>(scores + i) * scale, i, first, last, -INFINITY);
        store(scores + i, value);
        most = value > most ? value : most;
    }
    float largest = most[0];
    for (int lane = 1; lane < LANES; lane++) largest = std::max(largest, most[lane]);
    floats sums = {};
    for (int64_t i = 0; i < stride; i += LANES) {
        const floats value = exponential(load<floats>(scores + i) - largest);
        store(scores + i, value);
        sums += value;
    }
    sum = total_of(sums);
    return largest + std::log(sum);
}

template <class X> inline void write_row(const float *from, float factor, X *to, int64_t width) {
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) round_to(to + d, load<floats>(from + d) * factor);
    for (; d < width; d++) assign(to[d], from[d] * factor);
}

template <class X> inline float dot(const X *a, const X *b, int64_t width) {
    floats sums = {};
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) sums += widen(a + d) * widen(b + d);
    float total = total_of(sums);
    for (; d < width; d++) total += to_float(a[d]) * to_float(b[d]);
    return total;
}

template <class X> void attend_texts(const Texts<X> &texts, X *out, float *log_sums, int threads) {
    using E = ElementOf<X>;
    const int64_t group = texts.group(), width = texts.width, deep = up_to(width, 2), wide = lanes(width);
    on_team(threads, true, [&](const Team &team) {
        team.each_in_turn(texts.num_texts * texts.num_kv_heads, [&](int64_t i) {
            static thread_local Room<E> laid;
            static thread_local Room<float> plain;
            const int64_t start = texts.starts[i / texts.num_kv_heads], kv_head = i % texts.num_kv_heads;
            const int64_t length = texts.starts[i / texts.num_kv_heads + 1] - start, all = lanes(length);
            E *keys = laid.take(0, deep * all), *queries = laid.take(1, QUERIES * deep);
            float *scores = plain.take(0, QUERIES * all), *mixed = plain.take(1, QUERIES * wide);
            float *values = plain.take(2, length * wide);
            pack_columns(texts.k + start * texts.k_stride + kv_head * width, texts.k_stride, width, length, keys,
                         all);
            lay_rows(texts.v + start * texts.v_stride + kv_head * width, texts.v_stride, length, width, values, wide);
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
                for (int64_t first = 0; first < length; first += QUERIES) {
                    const Span span(first, length, texts);
                    const int64_t num = span.num_queries(), stride = span.stride();
                    const X *q = texts.q + (start + first) * texts.q_stride + head * width;
                    lay_rows(q, texts.q_stride, num, width, queries, deep);
                    multiply(Factor<E>{queries, deep}, Factor<E>{keys + span.begin * PAIR<X>, all * PAIR<X>}, num,
                             span.num_keys(), width, scores, stride, false);
                    float sums[QUERIES];
                    for (int64_t m = 0; m < num; m++)
                        log_sums[(start + first + m) * texts.num_heads + head] =
                            soften_row(scores + m * stride, stride, first_seen(span, m, texts),
                                       last_seen(span, m, texts), texts.scale(), sums[m]);
                    // Not in bf16: so the sampler has it, token by token.
                    multiply(Factor<float>{scores, stride}, Factor<float>{values + span.begin * wide, wide}, num,
                             width, span.num_keys(), mixed, wide, false);
                    for (int64_t m = 0; m < num; m++) {
                        X *to = out + ((start + first + m) * texts.num_heads + head) * width;
                        write_row(mixed + m * wide, 1.0f / sums[m], to, width);
                    }
                }
        });
    });
}

// (rows of `from`) (count, width) of fp32 into a tensor whose tokens are `stride` numbers apart.
template <class X>
inline void write_transposed(const float *from, int64_t from_stride, int64_t count, int64_t width, X *to,
                             int64_t stride) {
    for (int64_t n = 0; n < count; n++)
        for (int64_t d = 0; d < width; d++) assign(to[n * stride + d], from[d * from_stride + n]);
}

template <class X> struct Gradients { // contiguous: (N, H, D) and twice (N, G, D)
    X *q, *k, *v;
};

// `out` and its gradient `g` are contiguous (N, H, D); `log_sums` (N, H) are those of attend_texts.
template <class X>
void attend_texts_back(const Texts<X> &texts, const X *out, const X *g, const float *log_sums, Gradients<X> to,
                       int threads) {
    using E = ElementOf<X>;
    const int64_t group = texts.group(), width = texts.width, deep = up_to(width, 2), wide = lanes(width);
    const int64_t row = texts.num_heads * width, kv_row = texts.num_kv_heads * width;
    const float scale = texts.scale();
    on_team(threads, true, [&](const Team &team) {
        team.each_in_turn(texts.num_texts * texts.num_kv_heads, [&](int64_t i) {
            static thread_local Room<E> laid;
            static thread_local Room<float> plain;
            const int64_t start = texts.starts[i / texts.num_kv_heads], kv_head = i % texts.num_kv_heads;
            const int64_t length = texts.starts[i / texts.num_kv_heads + 1] - start, all = lanes(length);
            E *keys = laid.take(0, deep * all), *values = laid.take(1, deep * all);
            E *key_rows = laid.take(2, up_to(length, 2) * wide);
            E *queries = laid.take(3, QUERIES * deep), *gradients = laid.take(4, QUERIES * deep);
            E *query_columns = laid.take(5, QUERIES * width), *gradient_columns = laid.take(6, QUERIES * width);
            E *slope_rows = laid.take(7, QUERIES * all), *slope_pairs = laid.take(8, QUERIES * all);
            E *weight_pairs = laid.take(9, QUERIES * all);
            float *weights = plain.take(0, QUERIES * all), *slopes = plain.take(1, QUERIES * all);
            float *q_gradient = plain.take(2, QUERIES * wide);
            float *k_gradient = plain.take(3, width * all), *v_gradient = plain.take(4, width * all); // (D, T)
            std::fill(k_gradient, k_gradient + width * all, 0.0f);
            std::fill(v_gradient, v_gradient + width * all, 0.0f);
            const X *k = texts.k + start * texts.k_stride + kv_head * width,
                    *v = texts.v + start * texts.v_stride + kv_head * width;
            pack_columns(k, texts.k_stride, width, length, keys, all);
            pack_columns(v, texts.v_stride, width, length, values, all);
            pack_rows(k, texts.k_stride, length, width, key_rows, wide);
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
                for (int64_t first = 0; first < length; first += QUERIES) {
                    const Span span(first, length, texts);
                    const int64_t num = span.num_queries(), stride = span.stride(), num_keys = span.num_keys();
                    const X *q = texts.q + (start + first) * texts.q_stride + head * width;
                    const X *g_here = g + (start + first) * row + head * width,
                            *out_here = out + (start + first) * row + head * width;
                    lay_rows(q, texts.q_stride, num, width, queries, deep);
                    lay_rows(g_here, row, num, width, gradients, deep);
                    lay_columns(q, texts.q_stride, width, num, query_columns, QUERIES);
                    lay_columns(g_here, row, width, num, gradient_columns, QUERIES);
                    const auto from = [&](const E *packed, int64_t w) {
                        return Factor<E>{packed + span.begin * PAIR<X>, w * PAIR<X>};
                    };
                    multiply(Factor<E>{queries, deep}, from(keys, all), num, num_keys, width, weights, stride,
                             false);
                    multiply(Factor<E>{gradients, deep}, from(values, all), num, num_keys, width, slopes, stride,
                             false);
                    for (int64_t m = 0; m < num; m++) {
                        const int64_t seen = first_seen(span, m, texts), last = last_seen(span, m, texts);
                        const float log_sum = log_sums[(start + first + m) * texts.num_heads + head];
                        const float pull =
                            dot(g_here + m * row, out_here + m * row, width); // which the softmax takes back
                        float *p = weights + m * stride, *s = slopes + m * stride;
                        for (int64_t n = 0; n < stride; n += LANES) {
                            const floats apart = load<floats>(p + n) * scale - log_sum;
                            const floats weight =
                                only_seen(exponential(apart < 0.0f ? apart : floats{}), n, seen, last, 0.0f);
                            store(s + n, weight * (load<floats>(s + n) - pull) * scale);
                            store(p + n, weight);
                        }
                    }
                    lay_rows(slopes, stride, num, stride, slope_rows, stride);
                    pack_rows(slopes, stride, num, stride, slope_pairs, stride);
                    pack_rows(weights, stride, num, stride, weight_pairs, stride);
                    multiply(Factor<E>{slope_rows, stride}, Factor<E>{key_rows + span.begin * wide, wide * PAIR<X>},
                             num, width, num_keys, q_gradient, wide, false);
                    for (int64_t m = 0; m < num; m++)
                        write_row(q_gradient + m * wide, 1.0f, to.q + (start + first + m) * row + head * width,
                                  width);
                    multiply(Factor<E>{query_columns, QUERIES}, Factor<E>{slope_pairs, stride * PAIR<X>}, width,
                             num_keys, num, k_gradient + span.begin, all, true);
                    multiply(Factor<E>{gradient_columns, QUERIES}, Factor<E>{weight_pairs, stride * PAIR<X>}, width,
                             num_keys, num, v_gradient + span.begin, all, true);
                }
            write_transposed(k_gradient, all, length, width, to.k + start * kv_row + kv_head * width, kv_row);
            write_transposed(v_gradient, all, length, width, to.v + start * kv_row + kv_head * width, kv_row);
        });
    });
}

} // namespace

extern "C" {

void attend_texts_fp32(const float *q, int64_t q_stride, const float *k, int64_t k_stride, const float *v,
                       int64_t v_stride, const int64_t *starts, int64_t num_texts, int64_t num_heads,
                       int64_t num_kv_heads, int64_t width, int64_t window, int64_t ahead, float *out,
                       float *log_sums, int threads) {
    const Texts<float> texts{
        q, k, v, q_stride, k_stride, v_stride, starts, num_texts, num_heads, num_kv_heads, width, window, ahead};
    attend_texts(texts, out, log_sums, threads);
}

void attend_texts_back_fp32(const float *q, int64_t q_stride, const float *k, int64_t k_stride, const float *v,
                            int64_t v_stride, const int64_t *starts, int64_t num_texts, int64_t num_heads,
                            int64_t num_kv_heads, int64_t width, int64_t window, int64_t ahead, const float *out,
                            const float *g, const float *log_sums, float *q_gradient, float *k_gradient,
                            float *v_gradient, int threads) {
    const Texts<float> texts{
        q, k, v, q_stride, k_stride, v_stride, starts, num_texts, num_heads, num_kv_heads, width, window, ahead};
    attend_texts_back(texts, out, g, log_sums, {q_gradient, k_gradient, v_gradient}, threads);
}

void attend_texts_bf16(const bf16 *q, int64_t q_stride, const bf16 *k, int64_t k_stride, const bf16 *v,
                       int64_t v_stride, const int64_t *starts, int64_t num_texts, int64_t num_heads,
                       int64_t num_kv_heads, int64_t width, int64_t window, int64_t ahead, bf16 *out,
                       float *log_sums, int threads) {
    const Texts<bf16> texts{
        q, k, v, q_stride, k_stride, v_stride, starts, num_texts, num_heads, num_kv_heads, width, window, ahead};
    attend_texts(texts, out, log_sums, threads);
}

void attend_texts_back_bf16(const bf16 *q, int64_t q_stride, const bf16 *k, int64_t k_stride, const bf16 *v,
                            int64_t v_stride, const int64_t *starts, int64_t num_texts, int64_t num_heads,
                            int64_t num_kv_heads, int64_t width, int64_t window, int64_t ahead, const bf16 *out,
                            const bf16 *g, const float *log_sums, bf16 *q_gradient, bf16 *k_gradient,
                            bf16 *v_gradient, int threads) {
    const Texts<bf16> texts{
        q, k, v, q_stride, k_stride, v_stride, starts, num_texts, num_heads, num_kv_heads, width, window, ahead};
    attend_texts_back(texts, out, g, log_sums, {q_gradient, k_gradient, v_gradient}, threads);
}
}
