// Products of matrices that lie in a core's cache, for what is trained: factors of adapters, attention of short texts.
// Part of kernels.cpp. out (M, N) = x (M, K) W (K, N), where x is laid out by rows and W is packed: PAIR of its rows
// side by side, because the instruction for bf16 adds two products at a time. N is filled up with zeros to whole
// vectors and K to whole pairs. Each output is the sum over k in order, whatever is computed beside it.
#pragma once

namespace {

// How numbers of type X are laid out and packed.
template <class X> struct Packing {
    using Element = float;
    static constexpr int PAIR = 1;
};
#ifdef HAS_BF16_PAIRS
template <> struct Packing<bf16> {
    using Element = bf16;
    static constexpr int PAIR = 2;
};
#endif
template <class X> using ElementOf = typename Packing<X>::Element;
template <class X> constexpr int PAIR = Packing<X>::PAIR;

constexpr int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }
constexpr int64_t lanes(int64_t count) { return up_to(count, LANES); }

inline floats add_step(floats sum, const float *w, const float *x) { return sum + load<floats>(w) * *x; }
#ifdef HAS_BF16_PAIRS
inline floats add_step(floats sum, const bf16 *w, const bf16 *x) {
    const __m512i pair = _mm512_set1_epi32(load<int32_t>(x));
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(w), (__m512bh)pair);
}
#endif

template <class E> struct Factor { // strides in elements
    const E *at;
    int64_t stride;
};

template <class E, int M, int V>
inline void multiply_block(Factor<E> x, Factor<E> w, int64_t num_steps, float *out, int64_t out_stride,
                           bool is_added) {
    constexpr int P = std::is_same<E, float>::value ? 1 : 2;
    floats sum[M][V] = {};
    if (is_added)
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) sum[m][v] = load<floats>(out + m * out_stride + v * LANES);
    for (int64_t step = 0; step < num_steps; step++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
                sum[m][v] =
                    add_step(sum[m][v], w.at + step * w.stride + v * LANES * P, x.at + m * x.stride + step * P);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(out + m * out_stride + v * LANES, sum[m][v]);
}

template <class E, int V>
inline void multiply_rows(Factor<E> x, Factor<E> w, int64_t num_rows, int64_t num_steps, float *out,
                          int64_t out_stride, bool is_added) {
    int64_t m = 0;
    const auto rows = [&] { return Factor<E>{x.at + m * x.stride, x.stride}; };
    for (; m + 6 <= num_rows; m += 6)
        multiply_block<E, 6, V>(rows(), w, num_steps, out + m * out_stride, out_stride, is_added);
    for (; m + 2 <= num_rows; m += 2)
        multiply_block<E, 2, V>(rows(), w, num_steps, out + m * out_stride, out_stride, is_added);
    for (; m < num_rows; m++)
        multiply_block<E, 1, V>(rows(), w, num_steps, out + m * out_stride, out_stride, is_added);
}

// out = x W, or what it was plus that; `num_columns` is filled up to whole vectors here.
template <class E>
inline void multiply(Factor<E> x, Factor<E> w, int64_t num_rows, int64_t num_columns, int64_t depth, float *out,
                     int64_t out_stride, bool is_added) {
    constexpr int P = std::is_same<E, float>::value ? 1 : 2;
    const int64_t num_steps = (depth + P - 1) / P, num_vectors = lanes(num_columns) / LANES;
    for (int64_t v = 0; v < num_vectors; v += 4) {
        const Factor<E> columns{w.at + v * LANES * P, w.stride};
        float *to = out + v * LANES;
        switch (num_vectors - v) {
        case 1: multiply_rows<E, 1>(x, columns, num_rows, num_steps, to, out_stride, is_added); break;
        case 2: multiply_rows<E, 2>(x, columns, num_rows, num_steps, to, out_stride, is_added); break;
        case 3: multiply_rows<E, 3>(x, columns, num_rows, num_steps, to, out_stride, is_added); break;
        default: multiply_rows<E, 4>(x, columns, num_rows, num_steps, to, out_stride, is_added);
        }
    }
}

// What is laid out and packed may be of another type than the result, so numbers go by way of fp32.
template <class S, class E> inline void move(const S &from, E &to) { assign(to, to_float(from)); }
inline void move(const bf16 &from, bf16 &to) { to = from; }

// x (M, K) by rows, each filled up to `stride` elements.
template <class S, class E>
inline void lay_rows(const S *x, int64_t x_stride, int64_t num_rows, int64_t depth, E *to, int64_t stride) {
    for (int64_t m = 0; m < num_rows; m++) {
        const S *from = x + m * x_stride;
        E *row = to + m * stride;
        int64_t k = 0;
        for (; k + LANES <= depth; k += LANES) round_to(row + k, widen(from + k));
        for (; k < depth; k++) move(from[k], row[k]);
        for (; k < stride; k++) row[k] = E{};
    }
}

#ifdef HAS_BF16_PAIRS
// The bits of LANES numbers in bf16.
inline words bits_of(const bf16 *at) { return __builtin_convertvector(load<halves>(at), words); }
inline words bits_of(const float *at) {
    bf16 kept[LANES];
    round_to(kept, load<floats>(at));
    return bits_of(kept);
}

// LANES numbers of a row beside those of the next one, where there is one.
template <class S> inline words pairs_at(const S *first, const S *second) {
    return second ? bits_of(first) | bits_of(second) << 16 : bits_of(first);
}
template <class S> inline uint32_t pair_at(const S *first, const S *second) {
    bf16 pair[2] = {};
    move(*first, pair[0]);
    if (second) move(*second, pair[1]);
    return load<uint32_t>(pair);
}

// x is (K, M) here: its columns become the rows.
template <class S>
inline void lay_columns(const S *x, int64_t x_stride, int64_t num_columns, int64_t depth, bf16 *to,
                        int64_t stride) {
    for (int64_t k = 0; k < depth; k += 2) {
        const S *first = x + k * x_stride, *second = k + 1 < depth ? first + x_stride : nullptr;
        int64_t m = 0;
        for (; m + LANES <= num_columns; m += LANES) {
            const words pairs = pairs_at(first + m, second ? second + m : nullptr);
            for (int lane = 0; lane < LANES; lane++) {
                const uint32_t pair = pairs[lane];
                std::memcpy(to + (m + lane) * stride + k, &pair, 4);
            }
        }
        for (; m < num_columns; m++) {
            const uint32_t pair = pair_at(first + m, second ? second + m : nullptr);
            std::memcpy(to + m * stride + k, &pair, 4);
        }
    }
}

// W (K, N) as it is; `width` is lanes(N).
template <class S>
inline void pack_rows(const S *w, int64_t w_stride, int64_t depth, int64_t count, bf16 *to, int64_t width) {
    for (int64_t k = 0; k < depth; k += 2) {
        const S *first = w + k * w_stride, *second = k + 1 < depth ? first + w_stride : nullptr;
        bf16 *row = to + k * width;
        int64_t n = 0;
        for (; n + LANES <= count; n += LANES) {
            const words pairs = pairs_at(first + n, second ? second + n : nullptr);
            std::memcpy(row + 2 * n, &pairs, sizeof pairs);
        }
        for (; n < width; n++) {
            const uint32_t pair = n < count ? pair_at(first + n, second ? second + n : nullptr) : 0;
            std::memcpy(row + 2 * n, &pair, 4);
        }
    }
}

// W is (N, K) here: its columns are what is added up.
inline void pack_columns(const bf16 *w, int64_t w_stride, int64_t depth, int64_t count, bf16 *to, int64_t width) {
    for (int64_t start = 0; start < width; start += LANES) // whole lines are written, one after the other
        for (int64_t k = 0; k < depth; k += 2)
            for (int64_t n = start; n < start + LANES; n++) {
                const bf16 *at = w + n * w_stride + k;
                const uint32_t pair = n >= count ? 0 : k + 1 < depth ? load<uint32_t>(at) : at->bits;
                std::memcpy(to + k * width + 2 * n, &pair, 4);
            }
}
#endif

template <class S>
inline void lay_columns(const S *x, int64_t x_stride, int64_t num_columns, int64_t depth, float *to,
                        int64_t stride) {
    for (int64_t k = 0; k < depth; k++)
        for (int64_t m = 0; m < num_columns; m++) to[m * stride + k] = to_float(x[k * x_stride + m]);
}

template <class S>
inline void pack_rows(const S *w, int64_t w_stride, int64_t depth, int64_t count, float *to, int64_t width) {
    lay_rows(w, w_stride, depth, count, to, width);
}

template <class S>
inline void pack_columns(const S *w, int64_t w_stride, int64_t depth, int64_t count, float *to, int64_t width) {
    for (int64_t start = 0; start < width; start += LANES)
        for (int64_t k = 0; k < depth; k++)
            for (int64_t n = start; n < start + LANES; n++)
                to[k * width + n] = n < count ? to_float(w[n * w_stride + k]) : 0.0f;
}

// What a thread lays out, by number: kept, because fresh memory is slow, and whole lines of the cache.
template <class E> struct Room {
    std::vector<E> kept[16];

    E *take(int number, int64_t count) {
        enlarge(kept[number], count + 64 / sizeof(E));
        const auto at = reinterpret_cast<uintptr_t>(kept[number].data());
        return reinterpret_cast<E *>((at + 63) / 64 * 64);
    }
};

// Rows of x as a factor: themselves where they are of the right type and length, or laid out at `spare`.
template <class E, class S>
inline Factor<E> rows_of(const S *x, int64_t x_stride, int64_t num_rows, int64_t depth, E *spare) {
    if constexpr (std::is_same<E, S>::value)
        if (std::is_same<E, float>::value || depth % 2 == 0) return {x, x_stride};
    lay_rows(x, x_stride, num_rows, depth, spare, up_to(depth, 2));
    return {spare, up_to(depth, 2)};
}

} // namespace
