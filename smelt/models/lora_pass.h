// LoRA adapters of many sessions in one pass over a packed row, and their gradients: torch would make a dozen small
// calls for each fused matrix. Band of kernels.cpp. Each datum has an adapter, a slot of the stacked factors A
// (slots, parts x rank, in) and B (slots, out, rank). What a datum gets and gives is the same bits in any company: a
// factor's gradient is summed over the tokens of a datum, and then added to that of the datums before it.
#pragma once

namespace {

constexpr int64_t CHUNK = 32;          // tokens of a datum that a thread takes at a time; even
constexpr int64_t COLUMNS = 4 * LANES; // of a factor's gradient, likewise

struct Datums {
    const int64_t *starts, *lengths, *slots; // the datums of a slot lie together in this list
    int64_t num, num_slots;
};

template <class X> struct Stack {
    const X *a, *b;
    const float *scales;
    int64_t slot_stride; // in numbers, of A and of B
    LoraShape shape;

    int64_t num_hidden() const { return shape.num_parts * shape.rank; }
    const X *a_of(int64_t slot) const { return a + slot * slot_stride; }
    const X *b_of(int64_t slot) const { return b + slot * slot_stride; }
};

struct Band { // a part of a fused matrix: where its rows begin, and how many they are
    int64_t start, num_rows;
};

inline std::vector<Band> parts_of(const LoraShape &shape) {
    std::vector<Band> parts;
    int64_t start = 0;
    for (int64_t p = 0; p < shape.num_parts; p++)
        parts.push_back({start, shape.part_rows[p]}), start += shape.part_rows[p];
    return parts;
}

struct Piece {
    int64_t datum, first, count;
};

inline std::vector<Piece> pieces_of(const Datums &datums) {
    std::vector<Piece> pieces;
    for (int64_t d = 0; d < datums.num; d++)
        for (int64_t first = 0; first < datums.lengths[d]; first += CHUNK)
            pieces.push_back({d, first, std::min(CHUNK, datums.lengths[d] - first)});
    return pieces;
}

// Adds x W to what lies there, both rounded where torch does, which computes the sampler's prompts: so trainer and
// sampler agree three times as well.
template <class X, class E>
inline void add_product(Factor<E> x, Factor<E> w, int64_t num_rows, int64_t num_columns, int64_t depth, X *to,
                        int64_t stride) {
    multiply_into(x, w, num_rows, num_columns, depth, Factor<float>{nullptr, 0},
                  [&](int64_t m, int64_t n, floats sum) {
                      const int64_t at = m * stride + n, count = num_columns - n;
                      round_some(to + at, rounded<X>(sum) + widen_some(to + at, count), count);
                  });
}

// to = from * scale, rounded; `from_stride` numbers between rows of fp32.
template <class X>
inline void write_scaled(const float *from, int64_t from_stride, float scale, int64_t num_rows, int64_t count,
                         X *to, int64_t stride) {
    for (int64_t m = 0; m < num_rows; m++) write_row(from + m * from_stride, scale, to + m * stride, count);
}

// y += scale B (A x) for the tokens of the datums; `hidden` (N, parts x rank) is what lies between, scaled.
template <class X>
void lora_pass(const X *x, const Stack<X> &stack, const Datums &datums, X *y, X *hidden, int threads) {
    using E = ElementOf<X>;
    const LoraShape &shape = stack.shape;
    const int64_t rank = shape.rank, num_hidden = stack.num_hidden(), width = shape.width, num_out = shape.num_out;
    const int64_t wide = lanes(num_hidden), a_size = up_to(width, 2) * wide, b_depth = up_to(rank, 2);
    const auto parts = parts_of(shape);
    const auto pieces = pieces_of(datums);
    std::vector<int64_t> offsets; // of the parts' B, packed
    int64_t size = a_size;
    for (const Band &part : parts) offsets.push_back(size), size += b_depth * lanes(part.num_rows);
    on_team(threads, pieces.size() > 1, [&](const Team &team) {
        E *packed = team.shared<Room<E>>([&](Room<E> &room) { room.take(0, size * datums.num_slots); }).take(0, 0);
        team.each(datums.num_slots, [&](int64_t slot) {
            E *mine = packed + slot * size;
            pack_columns(stack.a_of(slot), width, width, num_hidden, mine, wide);
            for (size_t p = 0; p < parts.size(); p++)
                pack_columns(stack.b_of(slot) + parts[p].start * rank, rank, rank, parts[p].num_rows,
                             mine + offsets[p], lanes(parts[p].num_rows));
        });
        team.meet();
        team.each_in_turn(pieces.size(), [&](int64_t i) {
            static thread_local Room<E> laid;
            static thread_local Room<float> plain;
            const auto [datum, first, count] = pieces[i];
            const int64_t row = datums.starts[datum] + first, slot = datums.slots[datum];
            const E *mine = packed + slot * size;
            float *sums = plain.take(0, CHUNK * wide);
            multiply(rows_of(x + row * width, width, count, width, laid.take(0, CHUNK * (width + 1))),
                     Factor<E>{mine, wide * PAIR<X>}, count, num_hidden, width, sums, wide, false);
            X *between = hidden + row * num_hidden;
            write_scaled(sums, wide, stack.scales[slot], count, num_hidden, between, num_hidden);
            for (size_t p = 0; p < parts.size(); p++) {
                const int64_t columns = lanes(parts[p].num_rows), at = row * num_out + parts[p].start;
                const auto own =
                    rows_of(between + p * rank, num_hidden, count, rank, laid.take(1, CHUNK * b_depth));
                add_product(own, Factor<E>{mine + offsets[p], columns * PAIR<X>}, count, parts[p].num_rows, rank,
                            y + at, num_out);
            }
        });
    });
}

// Adds the gradient of one factor, a few of its columns: for each datum of the slot the transposed `left`
// (rows, tokens) times `right` (tokens, columns from `column`); `add(sums)` takes (rows, COLUMNS).
template <class X, class E, class Add>
inline void add_factor_gradient(const Datums &datums, int64_t slot, int64_t num_rows, int64_t count,
                                const std::vector<int64_t> &offsets, const E *left, int64_t left_rows,
                                int64_t left_row, const X *right, int64_t right_stride, Add add) {
    static thread_local Room<E> laid;
    static thread_local Room<float> plain;
    for (int64_t d = 0; d < datums.num; d++) {
        if (datums.slots[d] != slot) continue;
        const int64_t length = datums.lengths[d], stride = up_to(length, 2);
        E *packed = laid.take(0, stride * COLUMNS);
        float *sums = plain.take(0, num_rows * COLUMNS);
        pack_rows(right + datums.starts[d] * right_stride, right_stride, length, count, packed, COLUMNS);
        const Factor<E> own{left + offsets[d] * left_rows + left_row * stride, stride};
        multiply(own, Factor<E>{packed, COLUMNS * PAIR<X>}, num_rows, count, length, sums, COLUMNS, false);
        add(sums);
    }
}

// to (columns, rank) += sums (rank, COLUMNS) turned.
inline void add_turned(const float *sums, int64_t rank, int64_t count, float *to) {
    int64_t c = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
    for (; c + LANES <= count; c += LANES)
        for (int64_t first = 0; first < rank; first += LANES) {
            const int64_t some = std::min<int64_t>(LANES, rank - first);
            const __mmask16 mask = __mmask16((1u << some) - 1);
            __m512i lines[LANES];
            for (int r = 0; r < LANES; r++)
                lines[r] = r < some ? _mm512_loadu_si512(sums + (first + r) * COLUMNS + c) : _mm512_setzero_si512();
            turn(lines);
            for (int i = 0; i < LANES; i++) {
                float *at = to + (c + i) * rank + first;
                const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), _mm512_castsi512_ps(lines[i]));
                _mm512_mask_storeu_ps(at, mask, sum);
            }
        }
#endif
    for (; c < count; c++)
        for (int64_t r = 0; r < rank; r++) to[c * rank + r] += sums[r * COLUMNS + c];
}

// The gradient g of y adds to that of x, `x_gradient`, what comes by way of the adapters, and to those of the factors:
// gradients[(slot x parts + part) x 2] is A's (rank, in) of a part and the one behind it B's (its rows, rank),
// in fp32.
template <class X>
void lora_pass_back(const X *x, const X *g, const X *hidden, const Stack<X> &stack, const Datums &datums,
                    X *x_gradient, float *const *gradients, int threads) {
    using E = ElementOf<X>;
    const LoraShape &shape = stack.shape;
    const int64_t rank = shape.rank, num_hidden = stack.num_hidden(), width = shape.width, num_out = shape.num_out;
    const int64_t a_size = up_to(num_hidden, 2) * lanes(width), wide = lanes(rank);
    const auto parts = parts_of(shape);
    const auto pieces = pieces_of(datums);
    std::vector<int64_t> b_offsets,
        offsets; // of the parts' B, packed, and of the datums' tokens, filled up to pairs
    int64_t size = a_size, num_tokens = 0, widest = 0;
    for (const Band &part : parts) {
        b_offsets.push_back(size), size += up_to(part.num_rows, 2) * wide;
        widest = std::max(widest, part.num_rows);
    }
    for (int64_t d = 0; d < datums.num; d++)
        offsets.push_back(num_tokens), num_tokens += up_to(datums.lengths[d], 2);
    struct Task {
        int64_t slot, part, first, count; // columns of A's gradient where part is -1, or rows of a part's B
    };
    std::vector<Task> tasks;
    for (int64_t slot = 0; slot < datums.num_slots; slot++) {
        for (int64_t c = 0; c < width; c += COLUMNS) tasks.push_back({slot, -1, c, std::min(COLUMNS, width - c)});
        for (size_t p = 0; p < parts.size(); p++)
            for (int64_t c = 0; c < parts[p].num_rows; c += COLUMNS)
                tasks.push_back({slot, int64_t(p), c, std::min(COLUMNS, parts[p].num_rows - c)});
    }
    on_team(threads, pieces.size() > 1, [&](const Team &team) {
        Room<E> &room = team.shared<Room<E>>([&](Room<E> &mine) {
            mine.take(0, size * datums.num_slots), mine.take(1, num_tokens * num_hidden),
                mine.take(2, num_tokens * num_hidden);
        });
        E *packed = room.take(0, 0), *hidden_columns = room.take(1, 0), *slope_columns = room.take(2, 0);
        team.each(datums.num_slots, [&](int64_t slot) {
            E *mine = packed + slot * size;
            pack_rows(stack.a_of(slot), width, num_hidden, width, mine, lanes(width));
            for (size_t p = 0; p < parts.size(); p++)
                pack_rows(stack.b_of(slot) + parts[p].start * rank, rank, parts[p].num_rows, rank,
                          mine + b_offsets[p], wide);
        });
        team.meet();
        team.each_in_turn(pieces.size(), [&](int64_t i) {
            static thread_local Room<E> laid;
            static thread_local Room<float> plain;
            static thread_local Room<X> rounded;
            const auto [datum, first, count] = pieces[i];
            const int64_t row = datums.starts[datum] + first, slot = datums.slots[datum];
            const E *mine = packed + slot * size;
            X *slopes = rounded.take(0, CHUNK * num_hidden);
            float *sums = plain.take(0, CHUNK * wide);
            for (size_t p = 0; p < parts.size(); p++) {
                const X *own = g + row * num_out + parts[p].start;
                multiply(rows_of(own, num_out, count, parts[p].num_rows, laid.take(0, CHUNK * (widest + 1))),
                         Factor<E>{mine + b_offsets[p], wide * PAIR<X>}, count, rank, parts[p].num_rows, sums, wide,
                         false);
                write_scaled(sums, wide, stack.scales[slot], count, rank, slopes + p * rank, num_hidden);
            }
            add_product(rows_of(slopes, num_hidden, count, num_hidden, laid.take(1, CHUNK * (num_hidden + 1))),
                        Factor<E>{mine, lanes(width) * PAIR<X>}, count, width, num_hidden, x_gradient + row * width,
                        width);
            const int64_t stride = up_to(datums.lengths[datum], 2), at = offsets[datum] * num_hidden + first;
            lay_columns(slopes, num_hidden, num_hidden, count, slope_columns + at, stride);
            lay_columns(hidden + row * num_hidden, num_hidden, num_hidden, count, hidden_columns + at, stride);
        });
        team.meet();
        team.each_in_turn(tasks.size(), [&](int64_t i) {
            const auto [slot, part, column, count] = tasks[i];
            float *const *own = gradients + slot * parts.size() * 2;
            if (part < 0) {
                add_factor_gradient(datums, slot, num_hidden, count, offsets, slope_columns, num_hidden, 0,
                                    x + column, width, [&](const float *sums) {
                                        for (int64_t r = 0; r < num_hidden; r++) {
                                            float *to = own[r / rank * 2] + r % rank * width + column;
                                            for (int64_t c = 0; c < count; c++) to[c] += sums[r * COLUMNS + c];
                                        }
                                    });
                return;
            }
            float *to = own[part * 2 + 1] + column * rank;
            add_factor_gradient(datums, slot, rank, count, offsets, hidden_columns, num_hidden, part * rank,
                                g + parts[part].start + column, num_out,
                                [&](const float *sums) { add_turned(sums, rank, count, to); });
        });
    });
}

} // namespace

extern "C" {

void lora_pass_fp32(const float *x, const float *a, const float *b, const float *scales, const int64_t *part_rows,
                    int64_t slot_stride, int64_t num_parts, int64_t rank, int64_t width, int64_t num_out,
                    const int64_t *starts,
                    const int64_t *lengths, const int64_t *slots, int64_t num_datums, int64_t num_slots,
                    float *y, float *hidden, int threads) {
    lora_pass(x, Stack<float>{a, b, scales, slot_stride, {part_rows, num_parts, rank, width, num_out}},
              Datums{starts, lengths, slots, num_datums, num_slots}, y, hidden, threads);
}

void lora_pass_back_fp32(const float *x, const float *a, const float *b, const float *scales,
                         const int64_t *part_rows, int64_t slot_stride, int64_t num_parts, int64_t rank, int64_t width, int64_t num_out,
                         const int64_t *starts, const int64_t *lengths, const int64_t *slots, int64_t num_datums,
                         int64_t num_slots, const float *g, const float *hidden, float *x_gradient,
                         float *const *gradients, int threads) {
    lora_pass_back(x, g, hidden, Stack<float>{a, b, scales, slot_stride, {part_rows, num_parts, rank, width, num_out}},
                   Datums{starts, lengths, slots, num_datums, num_slots}, x_gradient, gradients, threads);
}

void lora_pass_bf16(const bf16 *x, const bf16 *a, const bf16 *b, const float *scales, const int64_t *part_rows,
                    int64_t slot_stride, int64_t num_parts, int64_t rank, int64_t width, int64_t num_out,
                    const int64_t *starts,
                    const int64_t *lengths, const int64_t *slots, int64_t num_datums, int64_t num_slots,
                    bf16 *y, bf16 *hidden, int threads) {
    lora_pass(x, Stack<bf16>{a, b, scales, slot_stride, {part_rows, num_parts, rank, width, num_out}},
              Datums{starts, lengths, slots, num_datums, num_slots}, y, hidden, threads);
}

void lora_pass_back_bf16(const bf16 *x, const bf16 *a, const bf16 *b, const float *scales, const int64_t *part_rows,
                         int64_t slot_stride, int64_t num_parts, int64_t rank, int64_t width, int64_t num_out, const int64_t *starts,
                         const int64_t *lengths, const int64_t *slots, int64_t num_datums, int64_t num_slots,
                         const bf16 *g, const bf16 *hidden, bf16 *x_gradient, float *const *gradients,
                         int threads) {
    lora_pass_back(x, g, hidden, Stack<bf16>{a, b, scales, slot_stride, {part_rows, num_parts, rank, width, num_out}},
                   Datums{starts, lengths, slots, num_datums, num_slots}, x_gradient, gradients, threads);
}
}
