// y += x wᵀ and its derivative, for matrices that are learned (floats, with a gradient) or frozen (halves, or numbers of 8 or 4
// bits, which become floats where the product packs them), and for adapters beside those.
#pragma once
#include "gemm.h"
#include "weights_grouped.h"

namespace moss {

// Rows of halves as a right operand: of x wᵀ where TURNED, else of dy w.
template <bool TURNED>
struct HalvesOperand {
    const f16* w;
    int64_t K;

    static void widen(const f16* from, int64_t n, float* to) {
        int64_t i = 0;
        for (; i + VEC <= n; i += VEC) store(to + i, load_f16(from + i));
        for (; i < n; i++) to[i] = to_float(from[i]);
    }
    void pack(int64_t j, int64_t n, int64_t k, int64_t count, float* to) const {
        if (TURNED) {
            float rows[NR * KC];
            for (int64_t r = 0; r < n; r++) widen(w + (j + r) * K + k, count, rows + r * KC);
            return interleave<NR>(rows, KC, n, count, to);
        }
        for (int64_t at = 0; at < count; at++, to += NR) {
            widen(w + (k + at) * K + j, n, to);
            std::fill(to + n, to + NR, 0.f);
        }
    }
};

// The same for panels of 16 rows (weights_grouped.h).
template <int BITS, bool TURNED>
struct GroupedOperand {
    WeightsGrouped<BITS> w;

    // Inputs k ... k + 7 of a panel, k a multiple of 8, as to[8][16].
    void eight(int64_t panel, int64_t k, float* to) const {
        const int64_t g = k / w.S, in_group = k % w.S, scales = (panel * w.groups() + g) * PANEL;
        const uint8_t* from = w.chunk(panel, g, in_group * BITS / 32);
        const int32_t one[2] = {1, 1 << 16};  // picks one half of a lane
        const pairs low = all_pairs(one), high = all_pairs(one + 1);
        for (int v = 0; v < PANEL; v += VEC) {
            const vec s = load_f16(w.scale + scales + v), z = add(load_u8(w.zero_ + scales + v), all(1));
            const auto put = [&](int64_t i, pairs two, pairs half) {
                store(to + i * PANEL + v, mul(sub(to_vec(dot(zero_pairs(), two, half)), z), s));
            };
            if (BITS == 8) {
                for (int c = 0; c < 2; c++) {
                    const pairs q = load_pairs(from + 64 * c + 4 * v);
                    const pairs even = both(q, all_pairs((int16_t)255)), odd = right<8>(q);
                    put(4 * c, even, low), put(4 * c + 1, odd, low), put(4 * c + 2, even, high), put(4 * c + 3, odd, high);
                }
            } else {
                const pairs q = load_pairs(from + 4 * v), mask = all_pairs((int16_t)15);
                const pairs slices[4] = {both(q, mask), both(right<4>(q), mask), both(right<8>(q), mask), right<12>(q)};
                for (int i = 0; i < 4; i++) put(i, slices[i], low), put(4 + i, slices[i], high);
            }
        }
    }
    void pack(int64_t j, int64_t n, int64_t k, int64_t count, float* to) const {
        float some[8 * PANEL];
        if (TURNED) {  // rows j ..., and where there are none, what fills the last panel, or zeros
            for (int64_t p = 0; p < NR / PANEL; p++)
                for (int64_t i = 0; i < count; i += 8) {
                    const bool there = j / PANEL + p < w.panels;
                    if (there) eight(j / PANEL + p, k + i, some);
                    for (int64_t at = i; at < std::min(count, i + 8); at++)
                        for (int64_t r = 0; r < PANEL; r++) to[at * NR + p * PANEL + r] = there ? some[(at - i) * PANEL + r] : 0;
                }
            return;
        }
        for (int64_t p = 0; p < count; p += PANEL)
            for (int64_t i = 0; i < NR; i += 8) {
                const bool there = i < n;
                if (there) eight((k + p) / PANEL, j + i, some);
                for (int64_t r = 0; r < std::min<int64_t>(PANEL, count - p); r++)
                    for (int64_t at = 0; at < 8; at++) to[(p + r) * NR + i + at] = there ? some[at * PANEL + r] : 0;
            }
    }
};

// A matrix of N outputs and K inputs, of which x's columns from `x` on are its inputs and y's from `y` on its outputs. All that
// follows a pointer or is a number has 8 bytes: these structures are filled elsewhere.
struct Linear {
    int64_t N, K, x, y, bits, group;  // bits 32: floats
    const void* q;
    const f16* scale;
    const uint8_t* zero;
    const int32_t* order;  // stored input k is input order[k]; null where they are in order
    float* gradient;       // null where it is frozen; then bits may be less than 32

    // f(right operand of x wᵀ, or, not TURNED, of dy w).
    template <bool TURNED, class F>
    void with_operand(F f) const {
        if (bits == 32) f(TURNED ? transposed((const float*)q, K) : plain((const float*)q, K));
        else if (bits == 16) f(HalvesOperand<TURNED>{(const f16*)q, K});
        else if (bits == 8) f(GroupedOperand<8, TURNED>{grouped<8>()});
        else f(GroupedOperand<4, TURNED>{grouped<4>()});
    }

private:
    template <int BITS>
    WeightsGrouped<BITS> grouped() const {
        return {(const uint8_t*)q, scale, zero, (N + PANEL - 1) / PANEL, K, group, nullptr, 0};
    }
};

// A matrix of floats, rows `stride` apart.
struct Rows {
    float* p;
    int64_t stride;
    Rows from(int64_t column) const { return {p + column, stride}; }
};

// For inputs in another order, or after dropout, and for their derivatives.
inline float* inputs_memory(int64_t floats) {
    static thread_local Scratch<float> memory;
    return memory.get(floats);
}

// y = or += x wᵀ.
inline void linear_forward(const Linear& w, Rows x, Rows y, int64_t T, bool add_to) {
    x = x.from(w.x), y = y.from(w.y);
    if (w.order) {
        float* stored = inputs_memory(T * w.K);
#pragma omp parallel for schedule(static)
        for (int64_t t = 0; t < T; t++)
            for (int64_t k = 0; k < w.K; k++) stored[t * w.K + k] = x.p[t * x.stride + w.order[k]];
        x = {stored, w.K};
    }
    w.with_operand<true>([&](auto operand) { gemm(plain(x.p, x.stride), operand, y.p, y.stride, T, w.N, w.K, add_to); });
}

// dx = or += dy w; the gradient of w grows.
inline void linear_backward(const Linear& w, Rows x, Rows dy, Rows dx, int64_t T, bool add_to) {
    x = x.from(w.x), dy = dy.from(w.y), dx = dx.from(w.x);
    if (w.gradient) gemm(transposed(dy.p, dy.stride), plain(x.p, x.stride), w.gradient, w.K, w.N, w.K, T, true);
    const Rows to = w.order ? Rows{inputs_memory(T * w.K), w.K} : dx;
    w.with_operand<false>([&](auto operand) {
        gemm(plain(dy.p, dy.stride), operand, to.p, to.stride, T, w.K, w.N, add_to && !w.order);
    });
    if (!w.order) return;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < w.K; k++) {
            float& d = dx.p[t * dx.stride + w.order[k]];
            d = to.p[t * w.K + k] + (add_to ? d : 0);
        }
}

// y += scale (dropout(x) aᵀ) bᵀ, a (rank, K), b (N, rank). Where `parts` is not 0, b's rows are the official qkv_proj's, and y's
// columns q, k, v.
struct Adapter {
    int64_t N, K, rank, x, y, parts;
    double scale, dropout;
    uint64_t seed;  // of this time's mask
    float *a, *b, *da, *db;

    // f(first row of b, first column of y, how many).
    template <class F>
    void segments(F f) const {
        if (!parts) return f((int64_t)0, y, N);
        const int64_t n = N / (3 * parts), places[3] = {0, 2, 1};
        for (int64_t p = 0; p < parts; p++)
            for (int64_t c = 0; c < 3; c++) f((3 * p + places[c]) * n, y + (c * parts + p) * n, n);
    }
    // What the mask multiplies element i of x by: 0 or 1 / (1 - dropout).
    float kept(int64_t i) const {
        uint64_t z = seed + (uint64_t)i * 0x9e3779b97f4a7c15u;  // splitmix64
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u, z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return (float)((z ^ z >> 31) >> 40) < (float)dropout * (1 << 24) ? 0 : 1 / (1 - (float)dropout);
    }
    // dropout(x), in inputs_memory where there is dropout.
    Rows inputs(Rows x_, int64_t T) const {
        x_ = x_.from(x);
        if (!dropout) return x_;
        float* to = inputs_memory(T * K);
#pragma omp parallel for schedule(static)
        for (int64_t t = 0; t < T; t++)
            for (int64_t k = 0; k < K; k++) to[t * K + k] = x_.p[t * x_.stride + k] * kept(t * K + k);
        return {to, K};
    }
};

// scale (dropout(x) aᵀ) in `to` (T, rank).
inline void adapter_inner(const Adapter& l, Rows x, float* to, int64_t T) {
    gemm(plain(x.p, x.stride), transposed(l.a, l.K), to, l.rank, T, l.rank, l.K, false);
    for (int64_t i = 0; i < T * l.rank; i++) to[i] *= (float)l.scale;
}

inline void adapter_forward(const Adapter& l, Rows x, Rows y, int64_t T) {
    static thread_local Scratch<float> memory;
    float* inner = memory.get(T * l.rank);
    adapter_inner(l, l.inputs(x, T), inner, T);
    l.segments([&](int64_t row, int64_t column, int64_t n) {
        gemm(plain(inner, l.rank), transposed(l.b + row * l.rank, l.rank), y.p + column, y.stride, T, n, l.rank, true);
    });
}

// dx += the derivative; the gradients of a and b grow.
inline void adapter_backward(const Adapter& l, Rows x, Rows dy, Rows dx, int64_t T) {
    static thread_local Scratch<float> memory;
    float *inner = memory.get(2 * T * l.rank), *d = inner + T * l.rank;
    x = l.inputs(x, T);
    adapter_inner(l, x, inner, T);
    bool add_to = false;
    l.segments([&](int64_t row, int64_t column, int64_t n) {
        const float* from = dy.p + column;
        gemm(transposed(from, dy.stride), plain(inner, l.rank), l.db + row * l.rank, l.rank, n, l.rank, T, true);
        gemm(plain(from, dy.stride), plain(l.b + row * l.rank, l.rank), d, l.rank, T, l.rank, n, add_to);
        add_to = true;
    });
    for (int64_t i = 0; i < T * l.rank; i++) d[i] *= (float)l.scale;
    gemm(transposed(d, l.rank), plain(x.p, x.stride), l.da, l.K, l.rank, l.K, T, true);
    dx = dx.from(l.x);
    if (!l.dropout) return gemm(plain(d, l.rank), plain(l.a, l.K), dx.p, dx.stride, T, l.K, l.rank, true);
    float* wide = inputs_memory(T * l.K);
    gemm(plain(d, l.rank), plain(l.a, l.K), wide, l.K, T, l.K, l.rank, false);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < l.K; k++) dx.p[t * dx.stride + k] += wide[t * l.K + k] * l.kept(t * l.K + k);
}

}  // namespace moss
