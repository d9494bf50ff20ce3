// Many tokens times a few rows of weights that are in the cache: the inner part of every product that arithmetic limits.
#pragma once
#include "inputs.h"
#include "lanes.h"

namespace moss {

// y[t, r] += sums of R rows of a tile of w (row stride w_stride) times T tokens; K a whole number of steps.
template <class L, int R, int T>
inline void tile(const typename L::E* w, int64_t w_stride, const typename L::E* x, int64_t x_stride, int64_t K, float* y,
                 int64_t N) {
    vec acc[R][T];
    MOSS_UNROLL
    for (int r = 0; r < R; r++)
        MOSS_UNROLL
        for (int t = 0; t < T; t++) acc[r][t] = zero();
    for (int64_t k = 0; k < K; k += L::STEP) {
        typename L::V ws[R];
        MOSS_UNROLL
        for (int r = 0; r < R; r++) ws[r] = L::get(w + r * w_stride + k);
        MOSS_UNROLL
        for (int t = 0; t < T; t++) {
            typename L::V xs = L::keep(L::get(x + t * x_stride + k));
            MOSS_UNROLL
            for (int r = 0; r < R; r++) acc[r][t] = L::dot(ws[r], xs, acc[r][t]);
        }
    }
    MOSS_UNROLL
    for (int t = 0; t < T; t++)
        MOSS_UNROLL
        for (int r = 0; r < R; r++) y[t * N + r] += sum(acc[r][t]);
}

// T tokens (row stride x_stride) times a tile of `rows` rows of K inputs: y += x w^T.
template <class L>
inline void tile_all(const typename L::E* w, int64_t rows, int64_t K, const typename L::E* x, int64_t x_stride, int64_t T,
                     float* y, int64_t N) {
    const int R = VEC == 16 ? 4 : 2, TOKENS = 6;  // what the registers hold
    for (int64_t t = 0, step; t < T; t += step) {
        step = t + TOKENS <= T ? TOKENS : 1;
        const typename L::E* xs = x + t * x_stride;
        for (int64_t r = 0, height; r < rows; r += height) {
            height = r + R <= rows ? R : 1;
            float* ys = y + t * N + r;
            if (height == R && step == TOKENS) tile<L, R, TOKENS>(w + r * K, K, xs, x_stride, K, ys, N);
            else if (height == R) tile<L, R, 1>(w + r * K, K, xs, x_stride, K, ys, N);
            else if (step == TOKENS) tile<L, 1, TOKENS>(w + r * K, K, xs, x_stride, K, ys, N);
            else tile<L, 1, 1>(w + r * K, K, xs, x_stride, K, ys, N);
        }
    }
}

}  // namespace moss
