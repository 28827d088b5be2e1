// What LoRA adapters add to the products of few rows, each row by its own adapter: torch would copy every adapter's
// factors and call a product for each part. Part of kernels.cpp; shapes as in lora.py.
#pragma once

namespace {

struct LoraRows {  // sorted by slot: those of group g are order[starts[g]] up to order[starts[g + 1] - 1]
    const int64_t *order, *starts, *slots;
    int64_t num_groups;
};

struct LoraShape {
    const int64_t *part_rows;  // of each part of a fused matrix
    int64_t num_parts, rank, width, num_out;
};

constexpr int VECTORS = 8;
constexpr int64_t OUTPUTS = VECTORS * LANES;  // that are computed at a time

// y[out] += sum over r of hidden[r] * b[r][out], for the outputs from `first` up to `end`, OUTPUTS at most.
template <class X>
inline void add_mixed(const float *hidden, const X *b, int64_t rank, int64_t num_out, X *y, int64_t first,
                      int64_t end) {
    floats sum[VECTORS] = {};
    const int64_t whole = (end - first) / LANES, rest = first + whole * LANES;
    if (whole == VECTORS) {
        for (int64_t r = 0; r < rank; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sum[v] += hidden[r] * widen(b + r * num_out + first + v * LANES);
    } else {
        for (int64_t v = 0; v < whole; v++)
            for (int64_t r = 0; r < rank; r++) sum[v] += hidden[r] * widen(b + r * num_out + first + v * LANES);
    }
    for (int64_t v = 0; v < whole; v++)
        for (int lane = 0; lane < LANES; lane++) {
            X &to = y[first + v * LANES + lane];
            assign(to, to_float(to) + rounded<X>(sum[v][lane]));
        }
    for (int64_t out = rest; out < end; out++) {
        float total = 0.0f;
        for (int64_t r = 0; r < rank; r++) total += hidden[r] * to_float(b[r * num_out + out]);
        assign(y[out], to_float(y[out]) + rounded<X>(total));
    }
}

// y[row] += B_p (scale A_p x[row]) in the outputs of each part p; rounded where `lora_pass` does.
template <class K, class X>
void lora(const X *x, const X *a, const X *b, const float *scales, X *y, const LoraRows &rows, const LoraShape &shape,
          int threads) {
    const int64_t num_rows = rows.starts[rows.num_groups], num_hidden = shape.num_parts * shape.rank;
    const int64_t num_steps = (shape.width + K::WIDTH - 1) / K::WIDTH;
    struct Block {
        int64_t part, first, end;
    };
    std::vector<Block> blocks;
    for (int64_t part = 0, end = 0; part < shape.num_parts; part++) {
        int64_t first = end;
        for (end += shape.part_rows[part]; first < end; first += OUTPUTS)
            blocks.push_back({part, first, std::min(first + OUTPUTS, end)});
    }
    struct Between {
        std::vector<typename K::Step> x;
        std::vector<float> hidden;
    };
    const auto prepare = [&](Between &kept) {
        enlarge(kept.x, num_rows * num_steps), enlarge(kept.hidden, num_rows * num_hidden);
    };
    const int64_t num_blocks = blocks.size(), num_tiles = (num_hidden + SUMS - 1) / SUMS;

    on_team(threads, true, [&](const Team &team) {
        Between &between = team.shared<Between>(prepare);
        auto *steps = between.x.data();
        float *hidden = between.hidden.data();
        team.each(num_rows, [&](int64_t m) {
            prepare_row<K>(x + rows.order[m] * shape.width, shape.width, steps + m * num_steps);
        });
        team.meet();
        team.each(rows.num_groups * num_tiles, [&](int64_t i) {
            const int64_t g = i / num_tiles, first = i % num_tiles * SUMS;
            const int64_t start = rows.starts[g], count = rows.starts[g + 1] - start;
            const int64_t base = rows.slots[g] * num_hidden;
            const X *of_a[SUMS];
            for (int n = 0; n < SUMS; n++) of_a[n] = a + (base + std::min(first + n, num_hidden - 1)) * shape.width;
            products<K>(of_a, steps + start * num_steps, num_steps, count, shape.width,
                        [&](int n, int64_t m, float value) {
                            if (first + n < num_hidden)
                                hidden[(start + m) * num_hidden + first + n] = rounded<X>(value * scales[base + first + n]);
                        });
        });
        team.meet();
        team.each(rows.num_groups * num_blocks, [&](int64_t i) {
            const int64_t g = i / num_blocks;
            const auto [part, first, end] = blocks[i % num_blocks];
            const X *of_b = b + rows.slots[g] * shape.rank * shape.num_out;
            for (int64_t m = rows.starts[g]; m < rows.starts[g + 1]; m++) {
                const float *mine = hidden + m * num_hidden + part * shape.rank;
                add_mixed(mine, of_b, shape.rank, shape.num_out, y + rows.order[m] * shape.num_out, first, end);
            }
        });
    });
}

}  // namespace

extern "C" {

void lora_fp32(const float *x, const float *a, const float *b, const float *scales, float *y, const int64_t *order,
               const int64_t *starts, const int64_t *slots, int64_t num_groups, const int64_t *part_rows,
               int64_t num_parts, int64_t rank, int64_t width, int64_t num_out, int threads) {
    lora<Widened<float>>(x, a, b, scales, y, LoraRows{order, starts, slots, num_groups},
                         LoraShape{part_rows, num_parts, rank, width, num_out}, threads);
}

void lora_bf16(const bf16 *x, const bf16 *a, const bf16 *b, const float *scales, bf16 *y, const int64_t *order,
               const int64_t *starts, const int64_t *slots, int64_t num_groups, const int64_t *part_rows,
               int64_t num_parts, int64_t rank, int64_t width, int64_t num_out, int threads) {
    lora<Bf16Pairs>(x, a, b, scales, y, LoraRows{order, starts, slots, num_groups},
                    LoraShape{part_rows, num_parts, rank, width, num_out}, threads);
}
}
