// Causal attention of the new tokens of several sequences over their caches, for H heads of S floats. Rotary, append and
// scores in one pass:
//   y      (T, Y) the first product's result; columns q (D), k (D), v (D) first, heads in order, D = H S
//   cache  keys (B, H, C, S) and values (B, H, C, S) in fp16, for B sequences of up to C tokens
//   angles (C, rotary / 2) cos, then the same of sin, for every position
//   out    (T, D)
// Each Sequence says which rows of y are its new tokens; those are written into the cache after the ones it has.
// Decode moves the cache once: 4 D (start + 1) bytes. Scores, softmax and sums are fp32.
//
// One token's scores come straight from the halves.
//
// Work is split over sequences, heads and tiles of QUERIES tokens. Keys pass in tiles of KEYS, converted to fp32 once for all
// queries of the tile; the softmax runs along (its maximum and sum are corrected as larger scores appear).
#pragma once
#include "tile.h"

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

// fp16 rows of S entries -> fp32 rows of P = S rounded up to vectors, filled with zeros.
inline void widen(const f16* from, float* to, int64_t rows, int64_t S, int64_t P) {
    for (int64_t r = 0; r < rows; r++, from += S, to += P) {
        int64_t i = 0;
        for (; i + VEC <= S; i += VEC) store(to + i, load_f16(from + i));
        if (i < S) store(to + i, load_f16_n(from + i, (int)(S - i)));
    }
}

// Query of one token, after rotary and divided by sqrt(S): P floats.
inline void query(const float* from, const float* angles, Heads h, int64_t at, float* to, int64_t P) {
    const float *cos = angles + at * (h.rotary / 2), *sin = cos + h.C * (h.rotary / 2), scale = 1 / std::sqrt((float)h.S);
    for (int64_t j = 0; j < h.rotary / 2; j++) {
        to[2 * j] = (from[2 * j] * cos[j] - from[2 * j + 1] * sin[j]) * scale;
        to[2 * j + 1] = (from[2 * j + 1] * cos[j] + from[2 * j] * sin[j]) * scale;
    }
    for (int64_t j = h.rotary; j < h.S; j++) to[j] = from[j] * scale;
    std::fill(to + h.S, to + P, 0.f);
}

const int64_t QUERIES = 24, KEYS = 32;  // a tile of keys and one of values in fp32, 64 KiB at S = 256, stay in L2

// What a thread needs to work on one tile of queries.
struct Tile {
    float *q, *acc, *k32, *v32, *scores, best[QUERIES], total[QUERIES];
    static int64_t floats(int64_t P) { return 2 * (QUERIES + KEYS) * P + QUERIES * KEYS; }
    Tile(float* memory, int64_t P)
        : q(memory), acc(q + QUERIES * P), k32(acc + QUERIES * P), v32(k32 + KEYS * P), scores(v32 + KEYS * P) {}
};

// Scores of a tile of keys -> weights in place, relative to the largest score so far; what was summed before shrinks to match.
inline void soften(Tile& tile, int64_t i, int64_t seen, int64_t P) {
    float *p = tile.scores + i * KEYS, top = *std::max_element(p, p + seen);
    if (top > tile.best[i]) {
        float shrink = std::exp(tile.best[i] - top);
        tile.best[i] = top, tile.total[i] *= shrink;
        map(tile.acc + i * P, P, [=](vec v, int64_t, int) { return mul(v, all(shrink)); });
    }
    float most = tile.best[i], s = 0;
    map(p, seen, [=](vec v, int64_t, int) { return exp(sub(v, all(most))); });
    for (int64_t j = 0; j < seen; j++) s += p[j];
    tile.total[i] += s;
}

inline vec get(const float* p) { return load(p); }
inline vec get(const f16* p) { return load_f16(p); }

// acc += sum over n rows of p[j] v[j], rows of P entries; four at a time, so that acc is not the limit.
template <class E>
inline void gather(const float* p, const E* v, int64_t n, float* acc, int64_t P) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4, v += 4 * P) {
        vec p0 = all(p[j]), p1 = all(p[j + 1]), p2 = all(p[j + 2]), p3 = all(p[j + 3]);
        for (int64_t d = 0; d < P; d += VEC) {
            vec a = fma(p0, get(v + d), load(acc + d)), b = mul(p1, get(v + P + d));
            a = fma(p2, get(v + 2 * P + d), a), b = fma(p3, get(v + 3 * P + d), b);
            store(acc + d, add(a, b));
        }
    }
    for (; j < n; j++, v += P)
        for (int64_t d = 0; d < P; d += VEC) store(acc + d, fma(all(p[j]), get(v + d), load(acc + d)));
}

// Scores of one query, straight from halves; four keys at a time share what is loaded of it.
inline void score_one(const float* q, const f16* keys, int64_t n, int64_t P, float* scores) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        vec s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
        for (int64_t d = 0; d < P; d += VEC) {
            const f16* k = keys + j * P + d;
            vec x = in_register(load(q + d));
            s0 = fma(load_f16(k), x, s0), s1 = fma(load_f16(k + P), x, s1);
            s2 = fma(load_f16(k + 2 * P), x, s2), s3 = fma(load_f16(k + 3 * P), x, s3);
        }
        scores[j] = sum(s0), scores[j + 1] = sum(s1), scores[j + 2] = sum(s2), scores[j + 3] = sum(s3);
    }
    for (; j < n; j++) {
        vec s = zero();
        for (int64_t d = 0; d < P; d += VEC) s = fma(load_f16(keys + j * P + d), load(q + d), s);
        scores[j] = sum(s);
    }
}

// Attention of one head for `count` tokens in rows row ... of y and out, at positions at ... of their cache.
inline void attend(const float* y, int64_t Y, const float* angles, const f16* keys, const f16* values, float* out, Heads h,
                   int64_t head, int64_t row, int64_t at, int64_t count, float* memory) {
    const int64_t P = round_up(h.S, VEC);
    Tile tile(memory, P);
    std::fill_n(tile.acc, count * P, 0.f);
    std::fill_n(tile.best, count, -1e30f);
    std::fill_n(tile.total, count, 0.f);
    for (int64_t i = 0; i < count; i++) query(y + (row + i) * Y + head * h.S, angles, h, at + i, tile.q + i * P, P);
    const f16 *ks = keys + head * h.C * h.S, *vs = values + head * h.C * h.S;
    for (int64_t k0 = 0; k0 < at + count; k0 += KEYS) {
        int64_t n = std::min(KEYS, at + count - k0);
        if (count == 1 && P == h.S) {  // nothing to share: the cache's bytes are the limit
            score_one(tile.q, ks + k0 * P, n, P, tile.scores);
            soften(tile, 0, n, P);
            gather(tile.scores, vs + k0 * P, n, tile.acc, P);
            continue;
        }
        widen(ks + k0 * h.S, tile.k32, n, h.S, P);
        widen(vs + k0 * h.S, tile.v32, n, h.S, P);
        std::fill_n(tile.scores, count * KEYS, 0.f);
        tile_all<Float32>(tile.k32, n, P, tile.q, P, count, tile.scores, KEYS);
        for (int64_t i = 0; i < count; i++) {
            int64_t seen = std::min(n, at + i + 1 - k0);  // keys of this tile not after the query
            if (seen <= 0) continue;
            soften(tile, i, seen, P);
            gather(tile.scores + i * KEYS, tile.v32, seen, tile.acc + i * P, P);
        }
    }
    for (int64_t i = 0; i < count; i++) {
        float *to = out + (row + i) * h.D() + head * h.S, whole = 1 / tile.total[i];
        for (int64_t d = 0; d < h.S; d++) to[d] = tile.acc[i * P + d] * whole;
    }
}

inline void attention(const float* y, int64_t Y, const float* angles, f16* keys, f16* values, float* out, Heads h,
                      const Sequence* sequences, int64_t n) {
    const int64_t P = round_up(h.S, VEC), slot = h.H * h.C * h.S;
    int64_t most = 0;
    for (int64_t s = 0; s < n; s++) most = std::max<int64_t>(most, sequences[s].count);
    const int64_t tiles = (most + QUERIES - 1) / QUERIES;
#pragma omp parallel
    {
        static thread_local Scratch<float> scratch;
        float* work = scratch.get(Tile::floats(P));
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
                       s.start + first, std::min(QUERIES, s.count - first), work);
        }
    }
}

}  // namespace moss
