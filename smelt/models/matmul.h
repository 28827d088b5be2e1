// Products of many rows with a whole matrix of weights. Part of kernels.cpp. A few columns of the weights at a time are
// packed into a core's second-level cache, and all rows go past them. Each output is the sum over k in order: a row has
// the same bits in any company, however many rows there are, which no library promises.
#pragma once

namespace {

constexpr int64_t PANEL = 4 * LANES; // columns of the weights
constexpr int64_t STRIP = 96;        // rows, of which the sums stay in the first-level cache
constexpr int64_t STEPS = 512;       // of what is added up, before the next rows

constexpr int64_t WORTH_A_TEAM = 1 << 19; // products; for fewer it is slower to wake another thread

// y = x W for some rows and the columns of one panel, and plus the bias where it is not null.
template <class X>
inline void multiply_panel(const X *x, const ElementOf<X> *panel, const X *bias, X *y, int64_t num_rows,
                           int64_t num_columns, int64_t depth, int64_t num_out) {
    using E = ElementOf<X>;
    static thread_local Room<E> laid;
    alignas(64) static thread_local float sums[STRIP * PANEL];
    for (int64_t first = 0; first < num_rows; first += STRIP) {
        const int64_t count = std::min(STRIP, num_rows - first);
        const auto rows = rows_of(x + first * depth, depth, count, depth, laid.take(0, STRIP * (depth + 1)));
        const int64_t last = (depth - 1) / STEPS * STEPS;
        for (int64_t k = 0; k < last; k += STEPS)
            multiply(Factor<E>{rows.at + k, rows.stride}, Factor<E>{panel + k * PANEL, PANEL * PAIR<X>}, count,
                     num_columns, STEPS, sums, PANEL, k > 0);
        multiply_into(Factor<E>{rows.at + last, rows.stride}, Factor<E>{panel + last * PANEL, PANEL * PAIR<X>}, count,
                      num_columns, depth - last, Factor<float>{last > 0 ? sums : nullptr, PANEL},
                      [&](int64_t m, int64_t n, floats sum) {
                          const int64_t some = num_columns - n;
                          round_some(y + (first + m) * num_out + n, bias ? sum + widen_some(bias + n, some) : sum,
                                     some);
                      });
    }
}

// y (rows, out) = x (rows, depth) W, where W is (out, depth), or (depth, out) if it `lies_by_depth`.
template <class X>
void matmul(const X *x, const X *w, bool lies_by_depth, const X *bias, X *y, int64_t num_rows, int64_t num_out,
            int64_t depth, int threads) {
    using E = ElementOf<X>;
    constexpr int64_t BLOCK = 6;
    const int64_t num_blocks = (num_rows + BLOCK - 1) / BLOCK, num_panels = (num_out + PANEL - 1) / PANEL;
    on_team(threads, num_rows * num_out * depth > WORTH_A_TEAM, [&](const Team &team) {
        static thread_local Room<E> room;
        E *packed = room.take(0, up_to(depth, 2) * PANEL);
        // Blocks of rows, panel after panel, in equal shares: where one ends within a panel, two threads pack it.
        int64_t at = num_blocks * num_panels * team.rank / team.size;
        const int64_t last = num_blocks * num_panels * (team.rank + 1) / team.size;
        while (at < last) {
            const int64_t panel = at / num_blocks, end = std::min(last, (panel + 1) * num_blocks);
            const int64_t column = panel * PANEL, num_columns = std::min(PANEL, num_out - column);
            const int64_t first = (at - panel * num_blocks) * BLOCK;
            const int64_t count = std::min(num_rows, (end - panel * num_blocks) * BLOCK) - first;
            if (lies_by_depth)
                pack_rows(w + column, num_out, depth, num_columns, packed, PANEL);
            else
                pack_columns(w + column * depth, depth, depth, num_columns, packed, PANEL);
            multiply_panel(x + first * depth, packed, bias ? bias + column : nullptr, y + first * num_out + column,
                           count, num_columns, depth, num_out);
            at = end;
        }
    });
}

} // namespace
