// Weights as halves: N rows of K, contiguous. 2 K bytes a row.
#pragma once
#include "inputs.h"

namespace moss {

struct WeightsF16 {
    const f16* w;
    int64_t N, K;

    static constexpr const int32_t* order = nullptr;  // inputs are in order
    static const int64_t orders = 0;
    static const int64_t S = 128;  // inputs that share a scale where many tokens are multiplied as 16-bit numbers

    struct Pairs {  // as pack() makes them
        static const int APART = 1;
        static int64_t first(int64_t j) { return j / VEC * 2 * VEC + first_packed(j % VEC); }
    };

    int64_t groups() const { return (K + S - 1) / S; }
    int64_t row_bytes() const { return 2 * K; }

    // As 16-bit numbers, a group of a row has this norm and a token's group the one below: by Cauchy and Schwarz no sum of their
    // products, nor a part of it, passes 2^31. The weights' steps are then 1 / 2900 of their deviation: an error of 1e-4.
    static constexpr float NORM = 32700, norm() { return 65600; }

    // sums[r][t] of rows n + r apart, each of them a stream of its own: a half is converted in the register it was loaded into,
    // and used for all tokens.
    template <int R, int T>
    void few(Floats x, int64_t n, int64_t apart, float sums[R][T]) const {
        const int U = R * T <= 4 ? 2 : 1;  // sums of a row that are kept apart, for their latency's sake
        const f16* rows[R];
        vec acc[R][T][U];
        MOSS_UNROLL
        for (int r = 0; r < R; r++) {
            rows[r] = w + (n + r * apart) * K;
            MOSS_UNROLL
            for (int t = 0; t < T; t++)
                MOSS_UNROLL
                for (int u = 0; u < U; u++) acc[r][t][u] = zero();
        }
        int64_t k = 0;
        for (; k + U * VEC <= K; k += U * VEC)
            MOSS_UNROLL
            for (int u = 0; u < U; u++) {
                vec xs[T];
                MOSS_UNROLL
                for (int t = 0; t < T; t++) xs[t] = load(x.row(t) + k + u * VEC);
                MOSS_UNROLL
                for (int r = 0; r < R; r++) {
                    const f16* from = rows[r] + k + u * VEC;
                    if (u % (32 / VEC) == 0) prefetch(from + AHEAD);
                    vec ws = load_f16(from);
                    MOSS_UNROLL
                    for (int t = 0; t < T; t++) acc[r][t][u] = fma(ws, xs[t], acc[r][t][u]);
                }
            }
        for (; k < K; k += VEC)
            MOSS_UNROLL
            for (int r = 0; r < R; r++) {
                vec ws = load_f16_n(rows[r] + k, (int)std::min<int64_t>(VEC, K - k));
                MOSS_UNROLL
                for (int t = 0; t < T; t++) acc[r][t][0] = fma(ws, load(x.row(t) + k), acc[r][t][0]);
            }
        MOSS_UNROLL
        for (int r = 0; r < R; r++)
            MOSS_UNROLL
            for (int t = 0; t < T; t++) {
                vec s = acc[r][t][0];
                MOSS_UNROLL
                for (int u = 1; u < U; u++) s = add(s, acc[r][t][u]);
                sums[r][t] = sum(s);
            }
    }

    // Group g of ROWS rows from row n on, as 16-bit numbers and their scales: values [S / 2][ROWS pairs], scales [ROWS].
    template <int ROWS>
    void unpack(int64_t n, int64_t g, int16_t* values, float* scales) const {
        alignas(64) int16_t numbers[VEC][S];
        for (int64_t row = 0; row < ROWS; row += VEC) {
            vec x[S / VEC], squares[VEC];
            for (int r = 0; r < VEC; r++) {
                load_group(n + row + r, g, x);
                squares[r] = zero();
                MOSS_UNROLL
                for (int i = 0; i < S / VEC; i++) squares[r] = fma(x[i], x[i], squares[r]);
            }
            // A group of zeros stays zeros: its scale is all but nothing, and its inverse finite.
            const vec norm = higher(root(sums_of(squares)), all(1e-20f)), inverse = div(all(NORM), norm);
            alignas(64) float inverses[VEC];
            store(inverses, inverse);
            store(scales + row, mul(norm, all(1 / NORM)));
            for (int r = 0; r < VEC; r++) {
                load_group(n + row + r, g, x);
                const vec times = all(inverses[r]);
                MOSS_UNROLL
                for (int i = 0; i < S / VEC; i += 2)
                    store_pairs(numbers[r] + i * VEC, pack(mul(x[i], times), mul(x[i + 1], times)));
            }
            for (int64_t j = 0; j < S / 2; j += VEC) {
                pairs v[VEC];
                MOSS_UNROLL
                for (int r = 0; r < VEC; r++) v[r] = load_pairs(numbers[r] + 2 * j);
                transpose(v);
                MOSS_UNROLL
                for (int r = 0; r < VEC; r++) store_pairs(values + ((j + r) * ROWS + row) * 2, v[r]);
            }
        }
    }

private:
    static const int AHEAD = 1024;  // halves

    // Group g of row n, which may lie behind the last one.
    void load_group(int64_t n, int64_t g, vec x[S / VEC]) const {
        const f16* from = w + std::min(n, N - 1) * K + g * S;
        const int count = (int)std::min<int64_t>(S, K - g * S);
        MOSS_UNROLL
        for (int i = 0; i < S / VEC; i++) {
            if (count == S) x[i] = load_f16(from + i * VEC);
            else x[i] = load_f16_n(from + i * VEC, std::max(0, std::min(VEC, count - i * VEC)));
            if (i % (32 / VEC) == 0) prefetch(from + 2 * S + i * VEC);
        }
    }
};

}  // namespace moss
