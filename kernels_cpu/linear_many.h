// Products of many tokens. The arithmetic is the limit: a tile of w is unpacked once, into the L1 cache, to 16-bit numbers with
// rows in a vector's lanes, and used for all tokens; the sums of 2 vectors of rows times a block of tokens stay in registers.
#pragma once
#include "weights_f16.h"
#include "weights_grouped.h"

namespace moss {

const int ROWS = 2 * VEC;                  // of a tile
const int MANY_BLOCK = VEC == 16 ? 8 : 5;  // tokens whose sums stay in registers
const int64_t SHARE = 8;                   // tiles that share what the L2 cache holds of the inputs

// sums[t][ROWS] += a group of S inputs of a tile times a block of T tokens; values and scales as unpack and Sixteen have them.
template <int T>
inline void multiply(const int16_t* w, const float* w_scales, const int16_t* x, const float* x_scales, int64_t S, float* sums) {
    pairs acc[T][2];
    MOSS_UNROLL
    for (int t = 0; t < T; t++) acc[t][0] = acc[t][1] = zero_pairs();
    for (int64_t j = 0; j < S / 2; j++, w += 2 * ROWS, x += 2 * T) {
        const pairs a = load_pairs(w), b = load_pairs(w + 2 * VEC);
        MOSS_UNROLL
        for (int t = 0; t < T; t++) {
            const pairs xs = in_register(all_pairs(x + 2 * t));
            acc[t][0] = dot(acc[t][0], a, xs);
            acc[t][1] = dot(acc[t][1], b, xs);
        }
    }
    const vec a = load(w_scales), b = load(w_scales + VEC);
    MOSS_UNROLL
    for (int t = 0; t < T; t++) {
        float* s = sums + t * ROWS;
        const vec xs = all(x_scales[t]);
        store(s, fma(to_vec(acc[t][0]), mul(a, xs), load(s)));
        store(s + VEC, fma(to_vec(acc[t][1]), mul(b, xs), load(s + VEC)));
    }
}

// sums[tile][t][ROWS] of `tiles` tiles, from row n on: group by group, whose inputs stay in the L2 cache for all tiles, each
// unpacked into the L1 cache and used for all tokens.
template <class W>
inline void many_rows(const W& w, const Sixteen& x, int64_t n, int64_t tiles, int16_t* values, float* scales, float* sums) {
    std::fill_n(sums, tiles * x.T * ROWS, 0.f);
    for (int64_t g = 0; g < x.G; g++)
        for (int64_t i = 0; i < tiles; i++) {
            w.template unpack<ROWS>(n + i * ROWS, g, values, scales);
            for (int64_t b = 0; b < x.blocks(); b++)
                with_constant<MANY_BLOCK>(x.width(b), [&](auto width) {
                    multiply<decltype(width)::value>(values, scales, x.values_of(g, b), x.scales + x.at(g, b), x.S,
                                                     sums + (i * x.T + b * MANY_BLOCK) * ROWS);
                });
        }
}

// y[t, n] for rows n of w in [first, end), rows of y N long; then finish (linear.h).
template <class W, class Finish>
void many(const W& w, const Columns& columns, float* y, int64_t first, int64_t end, int64_t N, Finish finish) {
    const Sixteen x = room_for_sixteen(columns.T, columns.K, w.S, MANY_BLOCK);
#pragma omp parallel
    {
        static thread_local Scratch<int16_t> tile;
        static thread_local Scratch<float> tile_scales, tile_sums;
        int16_t* values = tile.get(x.S * ROWS);
        float *scales = tile_scales.get(ROWS), *sums = tile_sums.get(SHARE * x.T * ROWS);
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < x.blocks(); b++) round_block<typename W::Pairs>(columns, x, b, w.norm());
#pragma omp for schedule(dynamic)
        for (int64_t n0 = first; n0 < end; n0 += SHARE * ROWS) {
            const int64_t tiles = std::min<int64_t>(SHARE, (end - n0 + ROWS - 1) / ROWS);
            many_rows(w, x, n0, tiles, values, scales, sums);
            for (int64_t i = 0; i < tiles; i++)
                for (int64_t t = 0; t < x.T; t++) {
                    const int64_t n = n0 + i * ROWS;
                    std::copy_n(sums + (i * x.T + t) * ROWS, std::min<int64_t>(ROWS, end - n), y + t * N + n);
                    finish(y + t * N + n, t, n, std::min<int64_t>(ROWS, end - n));
                }
        }
    }
}

}  // namespace moss
