// The inputs of a product, T tokens of K floats, made ready for what multiplies them.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>
#include "simd.h"

namespace moss {

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// f(std::integral_constant<int, N>) for N = n, 1 <= n <= MOST: what a template needs to know.
template <int MOST, class F>
inline typename std::enable_if<MOST == 1>::type with_constant(int64_t, F f) { f(std::integral_constant<int, 1>()); }
template <int MOST, class F>
inline typename std::enable_if<(MOST > 1)>::type with_constant(int64_t n, F f) {
    if (n == MOST) f(std::integral_constant<int, MOST>());
    else with_constant<MOST - 1>(n, f);
}

// Memory that only ever grows. Its content is lost when it does.
template <class E>
struct Scratch {
    std::vector<E> storage;
    E* get(int64_t n) {
        if ((int64_t)storage.size() < n + 64) std::vector<E>().swap(storage), storage.resize(n + 64);  // never old and new at once
        return (E*)round_up((int64_t)storage.data(), 64);
    }
};

// Where they lie: columns [0, split) of rows at a, then the columns at b. With an order, input k is column order[k].
struct Columns {
    const float* a;
    int64_t a_stride, split;
    const float* b;
    int64_t b_stride, T, K;
    const int32_t* order;

    // Inputs [k, k + n) of token t; zeros from K on.
    void get(int64_t t, int64_t k, int64_t n, float* to) const {
        const float *first = a + t * a_stride, *second = b + t * b_stride - split;
        int64_t end = std::min(K, k + n), i = k;
        if (order)
            for (; i < end; i++) *to++ = order[i] < split ? first[order[i]] : second[order[i]];
        else {
            int64_t there = std::max<int64_t>(0, std::min(split, end) - i), rest = end - std::max(i, split);
            if (there > 0) memcpy(to, first + i, 4 * there), to += there;
            if (rest > 0) memcpy(to, second + end - rest, 4 * rest), to += rest;
            i = std::max(i, end);
        }
        std::fill_n(to, k + n - i, 0.f);
    }
};

inline Columns columns(const float* x, int64_t T, int64_t K) { return {x, K, K, x, 0, T, K, nullptr}; }

// As floats: rows padded with zeros to whole vectors.
struct Floats {
    const float* at;
    int64_t stride;
    const float* row(int64_t t) const { return at + t * stride; }
};

inline Floats as_floats(const Columns& x) {
    static thread_local Scratch<float> memory;
    const int64_t stride = round_up(x.K, VEC);
    float* to = memory.get(x.T * stride);
    for (int64_t t = 0; t < x.T; t++) x.get(t, 0, stride, to + t * stride);
    return {to, stride};
}

// As 16-bit numbers with a scale for each token and each group of S inputs, two inputs in each 32 bits, for blocks of BLOCK
// tokens (the last one may have fewer, then t below is less wide):
//   values [G][block][S / 2 pairs][t]   scales [G][T]   offsets [G][T]: scale times the sum of the numbers
// A group's inputs lie together, since a tile of weights is used for all tokens group by group. Which two inputs are a pair is
// up to the weights. A number is off by 2^-16 of its group's largest at most.
struct Sixteen {
    int64_t T, K, S, G, block;
    int16_t* values;
    float *scales, *offsets;

    int64_t blocks() const { return (T + block - 1) / block; }
    int64_t width(int64_t b) const { return std::min(block, T - b * block); }
    int64_t at(int64_t g, int64_t b) const { return g * T + b * block; }  // scale and offset of block b's first token
    int16_t* values_of(int64_t g, int64_t b) const { return values + at(g, b) * S; }
};

inline Sixteen room_for_sixteen(int64_t T, int64_t K, int64_t S, int64_t block) {
    static thread_local Scratch<int16_t> values;
    static thread_local Scratch<float> scales, offsets;
    const int64_t G = (K + S - 1) / S;
    return {T, K, S, G, block, values.get(T * G * S), scales.get(T * G), offsets.get(T * G)};
}

const int64_t LARGEST_GROUP = 128;

// A group's numbers: x / scale, rounded, in `to`. `most`: the largest norm (square root of the sum of squares) they may have.
// Reads and writes whole vectors; n is a multiple of 8. Returns the scale, and in *total the numbers' sum.
inline float round_group(const float* x, int64_t n, float most, int16_t* to, int32_t* total_) {
    vec top = zero(), squares = zero();
    for (int64_t i = 0; i < n; i += VEC) {
        vec v = load(x + i);
        top = higher(top, higher(v, sub(zero(), v)));
        squares = fma(v, v, squares);
    }
    const float largest = highest(top);
    const float scale = std::max(largest / 32767, std::sqrt(sum(squares)) / most);
    const vec inverse = all(largest > 1e-30f ? 1 / scale : 0.f);
    for (int64_t i = 0; i < n; i += VEC) store_i16(to + i, mul(load(x + i), inverse));
    pairs sums = zero_pairs();
    for (int64_t i = 0; i < n; i += 2 * VEC) sums = dot(sums, load_pairs(to + i), all_pairs((int16_t)1));
    *total_ = total(sums);
    return scale;
}

// Fills a block of tokens. P says which inputs are a pair: P::first(j) and P::APART further on, j < S / 2.
template <class P>
void round_block(const Columns& x, const Sixteen& to, int64_t b, float most) {
    const int64_t width = to.width(b);
    alignas(64) float floats[LARGEST_GROUP + VEC] = {0};
    alignas(64) int16_t numbers[LARGEST_GROUP + 2 * VEC] = {0};
    int64_t first[LARGEST_GROUP / 2];
    for (int64_t j = 0; j < to.S / 2; j++) first[j] = P::first(j);
    for (int64_t t = 0; t < width; t++)
        for (int64_t g = 0; g < to.G; g++) {
            x.get(b * to.block + t, g * to.S, to.S, floats);
            int32_t total;
            const float scale = round_group(floats, to.S, most, numbers, &total);
            to.scales[to.at(g, b) + t] = scale;
            to.offsets[to.at(g, b) + t] = scale * total;
            char* values = (char*)(to.values_of(g, b) + 2 * t);
            for (int64_t j = 0; j < to.S / 2; j++) {
                const uint32_t low = (uint16_t)numbers[first[j]], high = (uint16_t)numbers[first[j] + P::APART];
                const uint32_t pair = low | high << 16;
                memcpy(values + 4 * j * width, &pair, 4);
            }
        }
}

}  // namespace moss
