// Weights as halves: N rows of K, contiguous. 2 K bytes a row.
#pragma once
#include "inputs.h"
#include "lanes.h"

namespace moss {

struct WeightsF16 {
    const f16* w;
    int64_t K;

    int64_t row_bytes() const { return 2 * K; }

    typedef Float32 Many;
    // What few() wants of the inputs: the floats as they are.
    typedef const Inputs& Few;
    Few prepare(const Inputs& x) const { return x; }

    // sums[r][t] of rows n + r: each half is converted in the register it was loaded into and used for all tokens.
    template <int R, int T>
    void few(Few x, int64_t n, float sums[R][T]) const {
        const f16* rows = w + n * K;
        vec acc[R][T];
        MOSS_UNROLL
        for (int r = 0; r < R; r++)
            MOSS_UNROLL
            for (int t = 0; t < T; t++) acc[r][t] = zero();
        int64_t k = 0;
        for (; k + VEC <= K; k += VEC) {
            vec xs[T];
            MOSS_UNROLL
            for (int t = 0; t < T; t++) xs[t] = load(x.row(t) + k);
            MOSS_UNROLL
            for (int r = 0; r < R; r++) {
                vec ws = load_f16(rows + r * K + k);
                MOSS_UNROLL
                for (int t = 0; t < T; t++) acc[r][t] = fma(ws, xs[t], acc[r][t]);
            }
        }
        if (k < K)
            MOSS_UNROLL
            for (int r = 0; r < R; r++) {
                vec ws = load_f16_n(rows + r * K + k, (int)(K - k));
                MOSS_UNROLL
                for (int t = 0; t < T; t++) acc[r][t] = fma(ws, load(x.row(t) + k), acc[r][t]);
            }
        MOSS_UNROLL
        for (int r = 0; r < R; r++)
            MOSS_UNROLL
            for (int t = 0; t < T; t++) sums[r][t] = sum(acc[r][t]);
    }

    // Inputs [k, k + depth) of row n as floats, zeros from K on; depth a whole number of vectors.
    void unpack(int64_t n, int64_t k, int64_t depth, float* to) const {
        const f16* row = w + n * K;
        for (int64_t i = k; i < k + depth; i += VEC)
            store(to + i - k, i + VEC <= K ? load_f16(row + i) : load_f16_n(row + i, (int)std::max<int64_t>(0, K - i)));
    }
};

}  // namespace moss
