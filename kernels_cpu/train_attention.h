// Causal attention of whole sequences and its derivative: B sequences of T tokens, one head of one sequence at a time. Of the
// scores, a tile of TOKENS queries is held, with all keys that it sees; backwards they are computed again.
#pragma once
#include "gemm.h"

namespace moss {

// q, k and v in rows of `row` floats: in our order, head by head, or in the official one of qkv_proj (docs/formats.md).
struct Projected {
    int64_t B, T, H, S, rotary, row;
    bool official;
    const float* angles;  // (2, T, rotary / 2): cos, sin

    int64_t D() const { return H * S; }
    // The first column of head h of q (which = 0), k (1) or v (2).
    int64_t column(int which, int64_t h) const {
        if (!official) return which * D() + h * S;
        const int64_t part = h / (H / 4), place = which == 0 ? 0 : 3 - which;
        return (3 * part + place) * (D() / 4) + h % (H / 4) * S;
    }
};

// Turn q and k of all rows by their positions' angles; `way` is 1, or -1 for back.
inline void turn_rows(const Projected& p, float* y, float way) {
    const int64_t half = p.rotary / 2;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < p.B * p.T; row++) {
        const float *cos = p.angles + row % p.T * half, *sin = cos + p.T * half;
        for (int which = 0; which < 2; which++)
            for (int64_t h = 0; h < p.H; h++) {
                float* x = y + row * p.row + p.column(which, h);
                for (int64_t i = 0; i < half; i++) {
                    const float a = x[2 * i], b = x[2 * i + 1], s = way * sin[i];
                    x[2 * i] = a * cos[i] - b * s, x[2 * i + 1] = b * cos[i] + a * s;
                }
            }
    }
}

const int64_t TOKENS = 128;  // of a tile of queries

// Weights of n keys for the queries from `first` on, `count` of them; those of later keys are zero. p: (count, n).
inline void weigh(const float* q, const float* k, int64_t row, int64_t S, int64_t first, int64_t count, int64_t n, float* p) {
    gemm(plain(q + first * row, row), transposed(k, row), p, n, count, n, S, false);
    const float scale = 1 / std::sqrt((float)S);
    for (int64_t i = 0; i < count; i++) {
        float *x = p + i * n, top = x[0], total = 0;
        const int64_t seen = first + i + 1;
        for (int64_t j = 1; j < seen; j++) top = std::max(top, x[j]);
        map(x, seen, [=](vec v, int64_t, int) { return exp(mul(sub(v, all(top)), all(scale))); });
        for (int64_t j = 0; j < seen; j++) total += x[j];
        total = 1 / total;
        for (int64_t j = 0; j < seen; j++) x[j] *= total;
        std::fill(x + seen, x + n, 0.f);
    }
}

// y: q and k turned, and v. out: rows `stride` apart, heads in order.
inline void attention_forward(const Projected& p, const float* y, float* out, int64_t stride) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t head = 0; head < p.B * p.H; head++) {
        static thread_local Scratch<float> memory;
        float* weights = memory.get(TOKENS * p.T);
        const int64_t h = head % p.H, first = head / p.H * p.T;
        const float *at = y + first * p.row, *q = at + p.column(0, h), *k = at + p.column(1, h), *v = at + p.column(2, h);
        for (int64_t i = 0; i < p.T; i += TOKENS) {
            const int64_t count = std::min(TOKENS, p.T - i), n = i + count;
            weigh(q, k, p.row, p.S, i, count, n, weights);
            gemm(plain(weights, n), plain(v, p.row), out + (first + i) * stride + h * p.S, stride, count, p.S, n, false);
        }
    }
}

// From dout the derivatives dy of turned q and k, and of v, in rows as y's.
inline void attention_backward(const Projected& p, const float* y, const float* dout, int64_t stride, float* dy) {
    const float scale = 1 / std::sqrt((float)p.S);
#pragma omp parallel for schedule(dynamic)
    for (int64_t head = 0; head < p.B * p.H; head++) {
        static thread_local Scratch<float> memory;
        float *weights = memory.get(2 * TOKENS * p.T), *d = weights + TOKENS * p.T;
        const int64_t h = head % p.H, first = head / p.H * p.T, qc = p.column(0, h), kc = p.column(1, h), vc = p.column(2, h);
        const float *at = y + first * p.row, *q = at + qc, *k = at + kc, *v = at + vc;
        float* to = dy + first * p.row;
        for (int64_t t = 0; t < p.T; t++) {
            std::fill_n(to + t * p.row + kc, p.S, 0.f);
            std::fill_n(to + t * p.row + vc, p.S, 0.f);
        }
        for (int64_t i = 0; i < p.T; i += TOKENS) {
            const int64_t count = std::min(TOKENS, p.T - i), n = i + count;
            const float* from = dout + (first + i) * stride + h * p.S;
            weigh(q, k, p.row, p.S, i, count, n, weights);
            gemm(transposed(weights, n), plain(from, stride), to + vc, p.row, n, p.S, count, true);
            gemm(plain(from, stride), transposed(v, p.row), d, n, count, n, p.S, false);
            for (int64_t r = 0; r < count; r++) {  // through the softmax: w (d - sum of w d)
                const float* w = weights + r * n;
                float sum = 0;
                for (int64_t j = 0; j < n; j++) sum += w[j] * d[r * n + j];
                for (int64_t j = 0; j < n; j++) d[r * n + j] = w[j] * (d[r * n + j] - sum) * scale;
            }
            gemm(plain(d, n), plain(k, p.row), to + i * p.row + qc, p.row, count, p.S, n, false);
            gemm(transposed(d, n), plain(q + i * p.row, p.row), to + kc, p.row, n, p.S, count, true);
        }
    }
}

}  // namespace moss
