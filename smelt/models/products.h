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

// Of M rows and V vectors of columns: `emit(m, v, sum)` takes each, which begins as `before` has it, unless null.
template <class E, int M, int V, class Emit>
inline void multiply_block(Factor<E> x, Factor<E> w, int64_t num_steps, Factor<float> before, Emit emit) {
    constexpr int P = std::is_same<E, float>::value ? 1 : 2;
    floats sum[M][V] = {};
    if (before.at)
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) sum[m][v] = load<floats>(before.at + m * before.stride + v * LANES);
    for (int64_t step = 0; step < num_steps; step++)
#pragma GCC unroll 12
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                sum[m][v] =
                    add_step(sum[m][v], w.at + step * w.stride + v * LANES * P, x.at + m * x.stride + step * P);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) emit(m, v, sum[m][v]);
}

template <class E, int V, class Emit>
inline void multiply_rows(Factor<E> x, Factor<E> w, int64_t num_rows, int64_t num_steps, Factor<float> before,
                          Emit emit) {
    int64_t m = 0;
    const auto block = [&](auto size) {
        constexpr int M = decltype(size)::value;
        for (; m + M <= num_rows; m += M)
            multiply_block<E, M, V>({x.at + m * x.stride, x.stride}, w, num_steps,
                                    {before.at ? before.at + m * before.stride : nullptr, before.stride},
                                    [&](int row, int v, floats sum) { emit(m + row, v, sum); });
    };
    if (V <= 2) block(std::integral_constant<int, 12>{}); // there are registers for so many sums
    block(std::integral_constant<int, 6>{});
    block(std::integral_constant<int, 2>{});
    block(std::integral_constant<int, 1>{});
}

// x W, or what lies at `before` plus that. `emit(row, column, sums)` takes LANES at a time, the last ones filled up.
template <class E, class Emit>
inline void multiply_into(Factor<E> x, Factor<E> w, int64_t num_rows, int64_t num_columns, int64_t depth,
                          Factor<float> before, Emit emit) {
    constexpr int P = std::is_same<E, float>::value ? 1 : 2;
    const int64_t num_steps = (depth + P - 1) / P, num_vectors = lanes(num_columns) / LANES;
    for (int64_t v = 0; v < num_vectors; v += 4) {
        const auto columns = [&](auto size) {
            constexpr int V = decltype(size)::value;
            multiply_rows<E, V>(x, {w.at + v * LANES * P, w.stride}, num_rows, num_steps,
                                {before.at ? before.at + v * LANES : nullptr, before.stride},
                                [&](int64_t m, int n, floats sum) { emit(m, (v + n) * LANES, sum); });
        };
        switch (num_vectors - v) {
        case 1: columns(std::integral_constant<int, 1>{}); break;
        case 2: columns(std::integral_constant<int, 2>{}); break;
        case 3: columns(std::integral_constant<int, 3>{}); break;
        default: columns(std::integral_constant<int, 4>{});
        }
    }
}

// out = x W, or what it was plus that; `num_columns` is filled up to whole vectors here.
template <class E>
inline void multiply(Factor<E> x, Factor<E> w, int64_t num_rows, int64_t num_columns, int64_t depth, float *out,
                     int64_t out_stride, bool is_added) {
    multiply_into(x, w, num_rows, num_columns, depth, Factor<float>{is_added ? out : nullptr, out_stride},
                  [&](int64_t m, int64_t n, floats sum) { store(out + m * out_stride + n, sum); });
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

// LANES x LANES words, turned: word j of line i becomes word i of line j.
#if defined(__AVX512F__) && defined(__AVX512BW__)
inline void turn(__m512i *lines) {
    __m512i pairs[16], quads[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(lines[i], lines[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(lines[i], lines[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; half++) {
            quads[i + 2 * half] = _mm512_unpacklo_epi64(pairs[i + half], pairs[i + half + 2]);
            quads[i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[i + half], pairs[i + half + 2]);
        }
    for (int i = 0; i < 4; i++) { // of each quarter of a line the same word of four lines
        const __m512i low = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0x44);
        const __m512i high = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0xee);
        const __m512i next_low = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0x44);
        const __m512i next_high = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0xee);
        lines[i] = _mm512_shuffle_i32x4(low, next_low, 0x88);
        lines[i + 4] = _mm512_shuffle_i32x4(low, next_low, 0xdd);
        lines[i + 8] = _mm512_shuffle_i32x4(high, next_high, 0x88);
        lines[i + 12] = _mm512_shuffle_i32x4(high, next_high, 0xdd);
    }
}
#endif

// The columns of so many rows of W (LANES of them, or fewer at its end) from k on, word by word.
template <class E>
inline void pack_words(const E *w, int64_t w_stride, int64_t first_k, int64_t depth, int64_t count, E *to,
                       int64_t width) {
    constexpr int P = sizeof(uint32_t) / sizeof(E);
    for (int64_t k = first_k; k < depth; k += P)
        for (int64_t n = 0; n < LANES; n++) {
            E word[P] = {};
            if (n < count) std::memcpy(word, w + n * w_stride + k, std::min<int64_t>(P, depth - k) * sizeof(E));
            std::memcpy(to + k * width + P * n, word, sizeof word);
        }
}

// W is (N, K) here: its columns are what is added up.
template <class E>
inline void pack_columns(const E *w, int64_t w_stride, int64_t depth, int64_t count, E *to, int64_t width) {
    for (int64_t n = 0; n < width; n += LANES) { // whole lines are written, one after the other
        int64_t k = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
        constexpr int P = sizeof(uint32_t) / sizeof(E);
        for (; n + LANES <= count && k + LANES * P <= depth; k += LANES * P) {
            __m512i lines[LANES];
            for (int i = 0; i < LANES; i++) lines[i] = _mm512_loadu_si512(w + (n + i) * w_stride + k);
            turn(lines);
            for (int i = 0; i < LANES; i++) _mm512_storeu_si512(to + (k + P * i) * width + P * n, lines[i]);
        }
#endif
        pack_words(w + n * w_stride, w_stride, k, depth, count - n, to + sizeof(uint32_t) / sizeof(E) * n, width);
    }
}

inline void pack_columns(const bf16 *w, int64_t w_stride, int64_t depth, int64_t count, float *to, int64_t width) {
    for (int64_t start = 0; start < width; start += LANES)
        for (int64_t k = 0; k < depth; k++)
            for (int64_t n = start; n < start + LANES; n++)
                to[k * width + n] = n < count ? to_float(w[n * w_stride + k]) : 0.0f;
}

// The first `count` of LANES numbers, rounded.
template <class X> inline void round_some(X *to, floats value, int64_t count) {
    if (count >= LANES) return round_to(to, value);
    X kept[LANES];
    round_to(kept, value);
    std::memcpy(to, kept, count * sizeof(X));
}
template <class X> inline floats widen_some(const X *at, int64_t count) {
    if (count >= LANES) return widen(at);
    X kept[LANES] = {};
    std::memcpy(kept, at, count * sizeof(X));
    return widen(kept);
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
