// A low-rank term beside a product, up (down x), as an adapter adds it: 4 R (N + K) bytes for a token.
#pragma once
#include "inputs.h"

namespace moss {

// down (R, K), up (N, R), for products of N outputs and K inputs. R = 0: there is none.
struct LowRank {
    const float *down, *up;
    int64_t R;

    // down x, (T, R), in memory of the calling thread that its next call takes again.
    const float* inner(const Columns& x) const {
        static thread_local Scratch<float> memory;
        float* to = memory.get(x.T * R);
#pragma omp parallel for
        for (int64_t t = 0; t < (R ? x.T : 0); t++) {
            static thread_local Scratch<float> row;
            float* from = row.get(x.K);
            x.get(t, 0, x.K, from);
            for (int64_t r = 0; r < R; r++) to[t * R + r] = dot(down + r * x.K, from, x.K);
        }
        return to;
    }

    // Add it to count sums at y: outputs n ... of token t, whose part of inner is given.
    void add(const float* inner, float* y, int64_t t, int64_t n, int64_t count) const {
        for (int64_t i = 0; i < (R ? count : 0); i++) y[i] += dot(up + (n + i) * R, inner + t * R, R);
    }

  private:
    static float dot(const float* a, const float* b, int64_t n) {
        float sum = 0;
        for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
        return sum;
    }
};

}  // namespace moss
