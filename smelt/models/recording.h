// Calls whose arguments were noted as words of 8 bytes, made one after the other. Part of kernels.cpp; see recording.py.
#pragma once
#include <tuple>
#include <utility>

namespace {

constexpr int MOST_ARGUMENTS = 17;

template <class T> inline T from_word(int64_t word) {  // pointers, and numbers in a word's first bytes
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <class... T, size_t... I>
inline void call(void (*function)(T...), const int64_t *words, std::index_sequence<I...>) {
    static_assert(sizeof...(T) <= MOST_ARGUMENTS);
    function(from_word<T>(words[I])...);
}

template <class... T> inline void call(void (*function)(T...), const int64_t *words) {
    call(function, words, std::index_sequence_for<T...>{});
}

struct Call {
    void (*function)(const int64_t *words);
    int64_t words[MOST_ARGUMENTS];
};

}  // namespace

#define RECORDABLE(name)                                                                                             \
    void name##_of_words(const int64_t *words) { call(name, words); }
#define RECORDABLE_IN_BOTH(name) RECORDABLE(name##_fp32) RECORDABLE(name##_bf16)

extern "C" {

RECORDABLE_IN_BOTH(linear)
RECORDABLE_IN_BOTH(linear_int8)
RECORDABLE_IN_BOTH(attend)
RECORDABLE_IN_BOTH(lora)
RECORDABLE_IN_BOTH(rms_norm)
RECORDABLE_IN_BOTH(layer_norm)
RECORDABLE_IN_BOTH(norm_heads)
RECORDABLE_IN_BOTH(gelu_tanh)
RECORDABLE_IN_BOTH(swiglu)
RECORDABLE_IN_BOTH(rotate)
RECORDABLE_IN_BOTH(add)
RECORDABLE_IN_BOTH(rotary_tables)
RECORDABLE(look_up)
RECORDABLE(write_cache)

void replay(const Call *calls, int64_t num_calls, int threads) {
    Board board;
#pragma omp parallel num_threads(threads)
    {
        const Team team{omp_get_thread_num(), omp_get_num_threads(), &board};
        joined = &team;
        for (int64_t i = 0; i < num_calls; i++) calls[i].function(calls[i].words);
        joined = nullptr;
    }
}
}
