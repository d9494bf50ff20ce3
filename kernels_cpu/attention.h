// Causal attention of the new tokens of several sequences over their caches, for H heads of S floats. Rotary, append and
// scores in one pass:
//   y      (T, Y) the first product's result; columns q (D), k (D), v (D) first, heads in order, D = H S
//   cache  keys (B, H, C, S) and values (B, H, C, S), for B sequences of up to C tokens, each a class of cache.h
//   angles (C, rotary / 2) cos, then the same of sin, for every position
//   out    (T, D)
// Each Sequence says which rows of y are its new tokens; those are written into the cache after the ones it has.
// Decode moves the cache once: 4 D (start + 1) bytes in fp16. Scores, softmax and sums are fp32; of an int8 cache the numbers are
// converted in registers, and scores and weights multiplied by the scales of their keys and values.
//
// Work is split over sequences, heads and parts of TILES x QUERIES tokens. QUERIES tokens are the lanes of two vectors: so the
// softmax needs no sum across lanes. Keys and values pass in tiles of KEYS, converted to fp32 once for all of a part's queries; the
// softmax runs along (its maximum and sum are corrected as larger scores appear). Few tokens read the cache as it is instead.
#pragma once
#include "cache.h"
#include "inputs.h"

namespace moss {

struct Heads {
    int64_t H, S, rotary, C;  // heads, size of a head, rotated entries of it, positions in the cache
    int64_t D() const { return H * S; }
};

struct Sequence {
    int32_t slot, start, first, count;  // of the cache's B; tokens it has; rows [first, first + count) of y are new
};

// A head of the token at position `at`, after rotary and times `scale`: pairs (0,1), (2,3) ... of its first `rotary` entries turn
// by the position's angles.
inline void rotate(const float* from, const float* angles, Heads h, int64_t at, float scale, float* to) {
    const float *cos = angles + at * (h.rotary / 2), *sin = cos + h.C * (h.rotary / 2);
    for (int64_t i = 0; i < h.rotary / 2; i++) {
        to[2 * i] = (from[2 * i] * cos[i] - from[2 * i + 1] * sin[i]) * scale;
        to[2 * i + 1] = (from[2 * i + 1] * cos[i] + from[2 * i] * sin[i]) * scale;
    }
    for (int64_t i = h.rotary; i < h.S; i++) to[i] = from[i] * scale;
}

// Key and value of the token in row `row` of y, at position `at` of its cache; memory: S floats.
template <class Cache>
void append(const float* y, int64_t Y, const float* angles, Cache keys, Cache values, Heads h, int64_t row, int64_t at,
            float* memory) {
    for (int64_t head = 0; head < h.H; head++) {
        const float *k = y + row * Y + h.D() + head * h.S, *v = k + h.D();
        rotate(k, angles, h, at, 1, memory);
        keys.put(head * h.C + at, memory, h.S);
        values.put(head * h.C + at, v, h.S);
    }
}

// Query of one token, after rotary and divided by sqrt(S): P floats.
inline void query(const float* from, const float* angles, Heads h, int64_t at, float* to, int64_t P) {
    rotate(from, angles, h, at, 1 / std::sqrt((float)h.S), to);
    std::fill(to + h.S, to + P, 0.f);
}

// ---- one token --------------------------------------------------------------------------------------------------------------

const int64_t KEYS = 64;  // of a tile

// The running softmax of one query: weights relative to the largest score so far; what was summed before shrinks to match.
struct Softmax {
    float best = -1e30f, total = 0;

    // n scores -> weights, in place; acc (P floats) shrinks where a larger score has come.
    void add(float* p, int64_t n, float* acc, int64_t P) {
        const float top = *std::max_element(p, p + n);
        if (top > best) {
            const float shrink = std::exp(best - top);
            best = top, total *= shrink;
            map(acc, P, [=](vec v, int64_t, int) { return mul(v, all(shrink)); });
        }
        const float most = best;
        map(p, n, [=](vec v, int64_t, int) { return exp(sub(v, all(most))); });
        for (int64_t j = 0; j < n; j++) total += p[j];
    }
};

// Scores of n keys, rows of S numbers; four at a time share what is loaded of the query, which has zeros from S on.
template <class Cache>
void score_one(const float* q, Cache keys, int64_t n, int64_t S, float* scores) {
    int64_t j = 0;
    for (; S % VEC == 0 && j + 4 <= n; j += 4) {
        const Cache k = keys.from(j, S);
        vec s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
        for (int64_t d = 0; d < S; d += VEC) {
            vec x = in_register(load(q + d));
            s0 = fma(k.load(d), x, s0), s1 = fma(k.load(S + d), x, s1);
            s2 = fma(k.load(2 * S + d), x, s2), s3 = fma(k.load(3 * S + d), x, s3);
        }
        scores[j] = sum(s0) * k.scale(0), scores[j + 1] = sum(s1) * k.scale(1);
        scores[j + 2] = sum(s2) * k.scale(2), scores[j + 3] = sum(s3) * k.scale(3);
    }
    for (; j < n; j++) {
        vec s = zero();
        for (int64_t d = 0; d < S; d += VEC)
            s = fma(keys.load_n(j * S + d, (int)std::min<int64_t>(VEC, S - d)), load(q + d), s);
        scores[j] = sum(s) * keys.scale(j);
    }
}

// acc += sum over n rows of p[j] v[j], rows of S numbers; four at a time, so that acc is not the limit.
template <class Cache>
void gather(const float* p, Cache values, int64_t n, float* acc, int64_t S) {
    int64_t j = 0;
    for (; S % VEC == 0 && j + 4 <= n; j += 4) {
        const Cache v = values.from(j, S);
        vec p0 = all(p[j] * v.scale(0)), p1 = all(p[j + 1] * v.scale(1));
        vec p2 = all(p[j + 2] * v.scale(2)), p3 = all(p[j + 3] * v.scale(3));
        for (int64_t d = 0; d < S; d += VEC) {
            vec a = fma(p0, v.load(d), load(acc + d)), b = mul(p1, v.load(S + d));
            a = fma(p2, v.load(2 * S + d), a), b = fma(p3, v.load(3 * S + d), b);
            store(acc + d, add(a, b));
        }
    }
    for (; j < n; j++)
        for (int64_t d = 0; d < S; d += VEC) {
            const int count = (int)std::min<int64_t>(VEC, S - d);
            store(acc + d, fma(all(p[j] * values.scale(j)), values.load_n(j * S + d, count), load(acc + d)));
        }
}

// One head, for the token at position `at` whose query is `from`; memory: 2 P floats.
template <class Cache>
void attend_one(const float* from, const float* angles, Cache keys, Cache values, float* out, Heads h, int64_t at, float* memory) {
    const int64_t P = round_up(h.S, VEC);
    float *q = memory, *acc = memory + P, scores[KEYS];
    query(from, angles, h, at, q, P);
    std::fill_n(acc, P, 0.f);
    Softmax softmax;
    for (int64_t k0 = 0; k0 <= at; k0 += KEYS) {
        const int64_t n = std::min(KEYS, at + 1 - k0);
        score_one(q, keys.from(k0, h.S), n, h.S, scores);
        softmax.add(scores, n, acc, P);
        gather(scores, values.from(k0, h.S), n, acc, h.S);
    }
    for (int64_t d = 0; d < h.S; d++) out[d] = acc[d] / softmax.total;
}

// ---- a tile of tokens -------------------------------------------------------------------------------------------------------

const int64_t QUERIES = 2 * VEC;
const int STEP = VEC == 16 ? 12 : 5;  // keys, or entries of a head, whose sums stay in registers

const int64_t TILES = 4;  // that share keys and values, once those are floats

// What a thread needs, for heads of S entries, P with whole vectors, W from row to row: queries and sums [TILES][P][QUERIES];
// keys and values [KEYS][W]; scores [KEYS][QUERIES].
struct Room {
    int64_t P, W;
    float *q, *acc, *k, *v, *scores;
    // Rows a power of two apart would share the few places that a cache has for them.
    static int64_t row(int64_t S) { return round_up(S, VEC) + VEC; }
    static int64_t floats(int64_t S) { return 2 * (TILES * QUERIES + KEYS) * row(S) + KEYS * QUERIES; }
    Room(float* memory, int64_t S)
        : P(round_up(S, VEC)), W(row(S)), q(memory), acc(q + TILES * QUERIES * P), k(acc + TILES * QUERIES * P), v(k + KEYS * W),
          scores(v + KEYS * W) {}
};

// n rows of S numbers -> floats, rows W apart.
template <class Cache>
void widen(Cache from, float* to, int64_t n, int64_t S, int64_t W) {
    for (int64_t r = 0; r < n; r++, to += W) {
        const vec scale = all(from.scale(r));
        int64_t i = 0;
        for (; i + VEC <= S; i += VEC) store(to + i, mul(from.load(r * S + i), scale));
        if (i < S) store(to + i, mul(from.load_n(r * S + i, (int)(S - i)), scale));
    }
}

// sums[j][lanes] = sums[j][lanes] keep + sum over K of x[j, k] b[k][lanes], for N rows. Rows of x are ROW floats apart, or `row`
// where ROW is 0, and its columns `column`. keep: two vectors, or null, and then nothing of sums is kept.
template <int N, int ROW>
inline void lanes_product(const float* x, int64_t row, int64_t column, const float* b, int64_t K, float* sums, const vec* keep) {
    vec acc[N][2];
    MOSS_UNROLL
    for (int j = 0; j < N; j++)
        MOSS_UNROLL
        for (int v = 0; v < 2; v++) acc[j][v] = keep ? mul(load(sums + j * QUERIES + v * VEC), keep[v]) : zero();
    for (int64_t k = 0; k < K; k++, x += column, b += QUERIES) {
        const vec b0 = load(b), b1 = load(b + VEC);
        MOSS_UNROLL
        for (int j = 0; j < N; j++) {
            const vec xs = in_register(all(x[j * (ROW ? ROW : row)]));
            acc[j][0] = fma(xs, b0, acc[j][0]);
            acc[j][1] = fma(xs, b1, acc[j][1]);
        }
    }
    MOSS_UNROLL
    for (int j = 0; j < N; j++)
        MOSS_UNROLL
        for (int v = 0; v < 2; v++) store(sums + j * QUERIES + v * VEC, acc[j][v]);
}

// The same for any number of rows.
template <int ROW>
inline void lanes_products(const float* x, int64_t rows, int64_t row, int64_t column, const float* b, int64_t K, float* sums,
                           const vec* keep) {
    for (int64_t j = 0; j < rows; j += STEP)
        with_constant<STEP>(std::min<int64_t>(STEP, rows - j), [&](auto n) {
            lanes_product<decltype(n)::value, ROW>(x + j * (ROW ? ROW : row), row, column, b, K, sums + j * QUERIES, keep);
        });
}

// A tile of up to QUERIES tokens at positions at ... of their cache, and its running softmax.
struct Tile {
    float *q, *acc;  // [P][QUERIES]
    int64_t at, count;
    vec best[2], total[2];

    // Queries in rows of Y floats from `from` on.
    void begin(const float* from, int64_t Y, const float* angles, Heads h, const Room& room) {
        float* rows = room.k;  // there are no keys yet
        for (int64_t i = 0; i < QUERIES; i++)
            if (i < count) query(from + i * Y, angles, h, at + i, rows + i * room.W, room.P);
            else std::fill_n(rows + i * room.W, room.P, 0.f);
        for (int64_t i = 0; i < QUERIES; i += VEC)
            for (int64_t d = 0; d < room.P; d += VEC) turn(rows + i * room.W + d, room.W, q + d * QUERIES + i, QUERIES);
        std::fill_n(acc, QUERIES * room.P, 0.f);
        best[0] = best[1] = all(-1e30f), total[0] = total[1] = zero();
    }

    // Keys k0 ... k0 + n - 1, which are in room.k, and their values.
    void add(int64_t k0, int64_t n, int64_t S, const Room& room) {
        n = std::min(n, at + count - k0);  // those after the last query are nobody's
        if (n <= 0) return;
        float* scores = room.scores;
        const int64_t W = room.W;
        if (W == 256 + VEC) lanes_products<256 + VEC>(room.k, n, W, 1, q, S, scores, nullptr);  // MOSS's heads
        else lanes_products<0>(room.k, n, W, 1, q, S, scores, nullptr);
        for (int64_t j = std::max<int64_t>(0, at + 1 - k0); j < n; j++)  // keys after the first queries
            std::fill_n(scores + j * QUERIES, k0 + j - at, -1e30f);
        vec keep[2];
        for (int v = 0; v < 2; v++) {
            vec top = best[v];
            for (int64_t j = 0; j < n; j++) top = higher(top, load(scores + j * QUERIES + v * VEC));
            keep[v] = exp(sub(best[v], top));
            best[v] = top, total[v] = mul(total[v], keep[v]);
            for (int64_t j = 0; j < n; j++) {
                const vec p = exp(sub(load(scores + j * QUERIES + v * VEC), top));
                total[v] = moss::add(total[v], p);
                store(scores + j * QUERIES + v * VEC, p);
            }
        }
        lanes_products<1>(room.v, S, 1, W, scores, n, acc, keep);
    }

    // Results to rows of D floats.
    void end(float* out, int64_t S, int64_t D, const Room& room) {
        float *rows = room.k, totals[QUERIES];
        for (int64_t i = 0; i < QUERIES; i += VEC)
            for (int64_t d = 0; d < room.P; d += VEC) turn(acc + d * QUERIES + i, QUERIES, rows + i * room.W + d, room.W);
        store(totals, total[0]), store(totals + VEC, total[1]);
        for (int64_t i = 0; i < count; i++)
            for (int64_t d = 0; d < S; d++) out[i * D + d] = rows[i * room.W + d] / totals[i];
    }
};

// Attention of one head for `count` tokens at positions at ... of their cache, at most TILES tiles of them; queries in rows of Y
// floats from `from` on, results in rows of D floats from `out` on.
template <class Cache>
void attend(const float* from, int64_t Y, const float* angles, Cache keys, Cache values, float* out, Heads h, int64_t at,
            int64_t count, float* memory) {
    const Room room(memory, h.S);
    Tile tiles[TILES];
    const int64_t T = (count + QUERIES - 1) / QUERIES, tile = QUERIES * room.P;
    for (int64_t i = 0; i < T; i++) {
        const int64_t first = i * QUERIES;
        tiles[i].q = room.q + i * tile, tiles[i].acc = room.acc + i * tile;
        tiles[i].at = at + first, tiles[i].count = std::min(QUERIES, count - first);
        tiles[i].begin(from + first * Y, Y, angles, h, room);
    }
    for (int64_t k0 = 0; k0 < at + count; k0 += KEYS) {
        const int64_t n = std::min(KEYS, at + count - k0);
        widen(keys.from(k0, h.S), room.k, n, h.S, room.W);
        widen(values.from(k0, h.S), room.v, n, h.S, room.W);
        for (int64_t i = 0; i < T; i++) tiles[i].add(k0, n, h.S, room);
    }
    for (int64_t i = 0; i < T; i++) tiles[i].end(out + i * QUERIES * h.D(), h.S, h.D(), room);
}

// ---- all of it --------------------------------------------------------------------------------------------------------------

template <class Cache>
void attention(const float* y, int64_t Y, const float* angles, Cache keys, Cache values, float* out, Heads h,
               const Sequence* sequences, int64_t n) {
    const int64_t ONE_BY_ONE = 10;  // tokens; for more of them, converting the cache pays
    const int64_t MOST = TILES * QUERIES;
    int64_t most = 0;
    for (int64_t s = 0; s < n; s++) most = std::max<int64_t>(most, sequences[s].count);
    const int64_t parts = (most + MOST - 1) / MOST;
#pragma omp parallel
    {
        static thread_local Scratch<float> scratch;
        float* work = scratch.get(Room::floats(h.S));
        for (int64_t i = 0; i < n; i++) {
            Sequence s = sequences[i];
#pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < s.count; t++) {
                const int64_t slot = s.slot * h.H * h.C;
                append(y, Y, angles, keys.from(slot, h.S), values.from(slot, h.S), h, s.first + t, s.start + t, work);
            }
        }
#pragma omp barrier
        // Late parts see more keys: they are handed out first, so that no thread starts a long one last.
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < parts * n * h.H; i++) {
            const Sequence s = sequences[i / h.H % n];
            const int64_t head = i % h.H, first = (parts - 1 - i / h.H / n) * MOST, at = s.start + first;
            const int64_t count = std::min(MOST, s.count - first), row = (s.slot * h.H + head) * h.C;
            const Cache k = keys.from(row, h.S), v = values.from(row, h.S);
            const float* from = y + (s.first + first) * Y + head * h.S;
            float* to = out + (s.first + first) * h.D() + head * h.S;
            if (count > ONE_BY_ONE) attend(from, Y, angles, k, v, to, h, at, count, work);
            else
                for (int64_t t = 0; t < count; t++)
                    attend_one(from + t * Y, angles, k, v, to + t * h.D(), h, at + t, work);
        }
    }
}

}  // namespace moss
