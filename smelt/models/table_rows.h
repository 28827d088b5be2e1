// AdamW for some rows of a table, after the updates that they have missed: one pass over each, where torch would fetch
// rows from three places and put them back, twice. Part of kernels.cpp; training/lookup_table.py has the formulas.
#pragma once

namespace {

constexpr int64_t ROWS_AHEAD = 8;  // rows lie anywhere in memory, so they are asked for before they are needed

struct Adam {  // what one update does to a row
    float beta1, beta2, keeps, rate, root, epsilon;
};

inline void prefetch_row(const float *row, int64_t width) {
    for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(row + i, 1);
}

// Without gradients rows are only brought up to date.
inline void update_rows(float *masters, float *first, float *second, int32_t *last_seen, const int64_t *ids,
                        int64_t num_rows, int64_t width, const float *factors, int64_t num_missed,
                        const float *gradients, const Adam &adam) {
    for (int64_t r = 0; r < num_rows; r++) {
        if (r + ROWS_AHEAD < num_rows)
            for (const float *table : {masters, first, second}) prefetch_row(table + ids[r + ROWS_AHEAD] * width, width);
        const int64_t row = ids[r];
        float *p = masters + row * width, *m = first + row * width, *v = second + row * width;
        if (last_seen[row] < num_missed) {
            const float *factor = factors + 4 * last_seen[row];
            const float kept = factor[0], drift = factor[1], fades1 = factor[2], fades2 = factor[3];
            for (int64_t i = 0; i < width; i++) {
                p[i] = p[i] * kept - m[i] / (std::sqrt(v[i]) + adam.epsilon) * drift;
                m[i] *= fades1;
                v[i] *= fades2;
            }
        }
        if (gradients != nullptr) {
            const float *g = gradients + r * width;
            for (int64_t i = 0; i < width; i++) {
                m[i] += (g[i] - m[i]) * (1.0f - adam.beta1);
                v[i] = v[i] * adam.beta2 + g[i] * g[i] * (1.0f - adam.beta2);
                p[i] = p[i] * adam.keeps - adam.rate * m[i] / (std::sqrt(v[i]) / adam.root + adam.epsilon);
            }
        }
        last_seen[row] = int32_t(num_missed + (gradients != nullptr));
    }
}

}  // namespace

extern "C" void update_table_rows(float *masters, float *first, float *second, int32_t *last_seen, const int64_t *ids,
                                  int64_t num_rows, int64_t width, const float *factors, int64_t num_missed,
                                  const float *gradients, float beta1, float beta2, float keeps, float rate,
                                  float root, float epsilon) {
    update_rows(masters, first, second, last_seen, ids, num_rows, width, factors, num_missed, gradients,
                {beta1, beta2, keeps, rate, root, epsilon});
}
