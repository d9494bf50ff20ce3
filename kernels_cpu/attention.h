// Causal attention of the new tokens of several sequences over their caches, for H heads of S floats. Rotary, append and
// scores in one pass:
//   y      (T, Y) the first product's result; columns q (D), k (D), v (D) first, heads in order, D = H S
//   cache  keys (B, H, C, S) and values (B, H, C, S) in fp16, for B sequences of up to C tokens
//   angles (C, rotary / 2) cos, then the same of sin, for every position
//   out    (T, D)
// Each Sequence says which rows of y are its new tokens; those are written into the cache after the ones it has.
// Decode moves the cache once: 4 D (start + 1) bytes. Scores, softmax and sums are fp32.
//
// Work is split over sequences, heads and tiles of QUERIES tokens. Keys pass in tiles of KEYS, converted to fp32 once for all
// queries of the tile; the softmax runs along (its maximum and sum are corrected as larger scores appear).
#pragma once
#include <algorithm>
#include <vector>
#include "simd.h"

namespace moss {

struct Heads {
    int64_t H, S, rotary, C;  // heads, size of a head, rotated entries of it, positions in the cache
    int64_t D() const { return H * S; }
};

struct Sequence {
    int32_t slot, start, first, count;  // of the cache's B; tokens it has; rows [first, first + count) of y are new
};

// Rotary: pairs (0,1), (2,3) ... of the first `rotary` entries of a head turn by the position's angles.
// Key and value of the token in row `row` of y, at position `at` of its cache.
inline void append(const float* y, int64_t Y, const float* angles, f16* keys, f16* values, Heads h, int64_t row, int64_t at) {
    const float *cos = angles + at * (h.rotary / 2), *sin = cos + h.C * (h.rotary / 2);
    for (int64_t head = 0; head < h.H; head++) {
        const float *k = y + row * Y + h.D() + head * h.S, *v = k + h.D();
        f16 *to_k = keys + (head * h.C + at) * h.S, *to_v = values + (head * h.C + at) * h.S;
        for (int64_t i = 0; i < h.rotary / 2; i++) {
            to_k[2 * i] = to_f16(k[2 * i] * cos[i] - k[2 * i + 1] * sin[i]);
            to_k[2 * i + 1] = to_f16(k[2 * i + 1] * cos[i] + k[2 * i] * sin[i]);
        }
        for (int64_t i = h.rotary; i < h.S; i++) to_k[i] = to_f16(k[i]);
        for (int64_t i = 0; i < h.S; i++) to_v[i] = to_f16(v[i]);
    }
}

inline float dot(const float* a, const float* b, int64_t n) {  // n a whole number of vectors
    vec s0 = zero(), s1 = zero();
    int64_t i = 0;
    for (; i + 2 * VEC <= n; i += 2 * VEC) {
        s0 = fma(load(a + i), load(b + i), s0);
        s1 = fma(load(a + i + VEC), load(b + i + VEC), s1);
    }
    if (i < n) s0 = fma(load(a + i), load(b + i), s0);
    return sum(add(s0, s1));
}

// fp16 rows of S entries -> fp32 rows of P = S rounded up to vectors, filled with zeros.
inline void widen(const f16* from, float* to, int64_t rows, int64_t S, int64_t P) {
    for (int64_t r = 0; r < rows; r++, from += S, to += P) {
        int64_t i = 0;
        for (; i + VEC <= S; i += VEC) store(to + i, load_f16(from + i));
        if (i < S) store(to + i, load_f16_n(from + i, (int)(S - i)));
    }
}

const int64_t QUERIES = 16, KEYS = 32;  // a tile of keys and one of values in fp32, 64 KiB at S = 256, stay in L2

// Attention of one head for `count` tokens in rows row ... of y and out, at positions at ... of their cache.
inline void attend(const float* y, int64_t Y, const float* angles, const f16* keys, const f16* values, float* out, Heads h,
                   int64_t head, int64_t row, int64_t at, int64_t count, float* work) {
    const int64_t P = (h.S + VEC - 1) / VEC * VEC;
    float *q = work, *acc = q + QUERIES * P, *k32 = acc + QUERIES * P, *v32 = k32 + KEYS * P;
    float best[QUERIES], total[QUERIES], p[KEYS];
    for (int64_t i = 0; i < count; i++) {
        const float *cos = angles + (at + i) * (h.rotary / 2), *sin = cos + h.C * (h.rotary / 2);
        const float* from = y + (row + i) * Y + head * h.S;
        float* to = q + i * P;
        for (int64_t j = 0; j < h.rotary / 2; j++) {
            to[2 * j] = from[2 * j] * cos[j] - from[2 * j + 1] * sin[j];
            to[2 * j + 1] = from[2 * j + 1] * cos[j] + from[2 * j] * sin[j];
        }
        std::copy(from + h.rotary, from + h.S, to + h.rotary);
        for (int64_t j = 0; j < h.S; j++) to[j] /= std::sqrt((float)h.S);
        std::fill(to + h.S, to + P, 0.f);
        std::fill_n(acc + i * P, P, 0.f);
        best[i] = -1e30f;
        total[i] = 0;
    }
    const f16 *ks = keys + head * h.C * h.S, *vs = values + head * h.C * h.S;
    for (int64_t k0 = 0; k0 < at + count; k0 += KEYS) {
        int64_t n = std::min(KEYS, at + count - k0);
        widen(ks + k0 * h.S, k32, n, h.S, P);
        widen(vs + k0 * h.S, v32, n, h.S, P);
        for (int64_t i = 0; i < count; i++) {
            int64_t seen = std::min(n, at + i + 1 - k0);  // keys of this tile not after the query
            if (seen <= 0) continue;
            float top = best[i];
            for (int64_t j = 0; j < seen; j++) top = std::max(top, p[j] = dot(q + i * P, k32 + j * P, P));
            float shrink = std::exp(best[i] - top);
            best[i] = top;
            map(p, seen, [=](vec v, int64_t, int) { return exp(sub(v, all(top))); });
            float s = 0;
            for (int64_t j = 0; j < seen; j++) s += p[j];
            total[i] = total[i] * shrink + s;
            for (int64_t d = 0; d < P; d += VEC) {
                vec a = mul(load(acc + i * P + d), all(shrink));
                for (int64_t j = 0; j < seen; j++) a = fma(all(p[j]), load(v32 + j * P + d), a);
                store(acc + i * P + d, a);
            }
        }
    }
    for (int64_t i = 0; i < count; i++) {
        float* to = out + (row + i) * h.D() + head * h.S;
        for (int64_t d = 0; d < h.S; d++) to[d] = acc[i * P + d] / total[i];
    }
}

inline void attention(const float* y, int64_t Y, const float* angles, f16* keys, f16* values, float* out, Heads h,
                      const Sequence* sequences, int64_t n) {
    const int64_t P = (h.S + VEC - 1) / VEC * VEC, slot = h.H * h.C * h.S;
    int64_t most = 0;
    for (int64_t s = 0; s < n; s++) most = std::max<int64_t>(most, sequences[s].count);
    const int64_t tiles = (most + QUERIES - 1) / QUERIES;
#pragma omp parallel
    {
        static thread_local std::vector<float> work;
        if ((int64_t)work.size() < 2 * (QUERIES + KEYS) * P) work.resize(2 * (QUERIES + KEYS) * P);
        for (int64_t i = 0; i < n; i++) {
            Sequence s = sequences[i];
#pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < s.count; t++)
                append(y, Y, angles, keys + s.slot * slot, values + s.slot * slot, h, s.first + t, s.start + t);
        }
#pragma omp barrier
        // Late tiles see more keys: they are handed out first, so that no thread starts a long one last.
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tiles * n * h.H; i++) {
            Sequence s = sequences[i / h.H % n];
            int64_t head = i % h.H, first = (tiles - 1 - i / h.H / n) * QUERIES;
            if (first < s.count)
                attend(y, Y, angles, keys + s.slot * slot, values + s.slot * slot, out, h, head, s.first + first,
                       s.start + first, std::min(QUERIES, s.count - first), work.data());
        }
    }
}

}  // namespace moss
