// Attention of many new tokens: prompts. A block takes 64 tokens and one head, and goes over the positions in tiles of
// 32 with a running softmax; both products are the tensor cores' (sm_75 and up), with queries, keys, weights and values
// in half, sums in fp32. The tokens' own keys and values are appended by a kernel before.
//
// For T tokens after `start`, a head's cache is read T / 64 times, mostly from the L2 cache: 4 S (start + T) bytes each
// time. There are 4 S (start + T / 2) operations a token and head; beside a block's products, 24 D S of them, that is
// little until start + T / 2 comes near 6 D.
//
// Tiles lie in shared memory in rows of S halves, whose 16-byte chunks change places with the row's number, so that
// eight rows' equal chunks are in different banks. While scores are computed the values' tile is on its way, and the
// next keys' tile while they are used: 64 KB for S = 256, which all these devices have.
#pragma once
#include "attention_few.cuh"

namespace moss_cuda {
namespace attention {

const int MANY_THREADS = 128, MANY_QUERIES = 64, MANY_KEYS = 32;

inline int64_t many_shared(int64_t S) { return (MANY_QUERIES + 2 * MANY_KEYS) * S * sizeof(half); }

// Grid (most tokens, H / 2, parts): a warp for keys or values of one head.
template <class Entry, int E>
__global__ void __launch_bounds__(MANY_THREADS)
    append_many(const half* qkv, Angles angles, Cache cache, Heads heads, Parts parts) {
    const Sequence s = parts.part[blockIdx.z].sequence;
    const int side = blockIdx.y * (MANY_THREADS / 32) + threadIdx.x / 32, head = side / 2;
    if ((int)blockIdx.x >= s.count || head >= heads.H) return;
    const int at = s.start + blockIdx.x, S = (int)heads.S;
    const half* from = qkv + (s.first + blockIdx.x) * 3 * heads.D() + head * S;
    const CacheRows<Entry> keys(cache.keys, cache.key_scale, heads, s.place, head);
    const CacheRows<Entry> values(cache.values, cache.value_scale, heads, s.place, head);
    if (side % 2 == 0) append_row<E>(from + heads.D(), angles, S, (int)heads.rotary, keys, at);
    else append_row<E>(from + 2 * heads.D(), angles, S, 0, values, at);
}

template <int S>
__device__ inline half* chunk_of(half* tile, int row, int chunk) {
    return tile + row * S + (chunk ^ (row & 7)) * 8;
}

// MANY_KEYS positions from k0 on. Those from `end` on repeat the last: masked, but never something that is no number.
template <int S>
__device__ inline void load_tile(const CacheRows<half>& from, int k0, int end, half* tile) {
#pragma unroll 4
    for (int i = threadIdx.x; i < MANY_KEYS * S / 8; i += MANY_THREADS) {
        const int row = i / (S / 8), chunk = i % (S / 8);
        cp_async16(chunk_of<S>(tile, row, chunk), from.entries + (int64_t)min(k0 + row, end - 1) * S + chunk * 8);
    }
}
template <int S>
__device__ inline void load_tile(const CacheRows<int8_t>& from, int k0, int end, half* tile) {
#pragma unroll 4
    for (int i = threadIdx.x; i < MANY_KEYS * S / 8; i += MANY_THREADS) {
        const int row = i / (S / 8), chunk = i % (S / 8), at = min(k0 + row, end - 1);
        CachePiece<int8_t, 8> piece;
        float x[8];
        piece.load(from.entries + (int64_t)at * S + chunk * 8);
        piece.widen(x);
        const float scale = from.scale(at);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] *= scale;
        CachePiece<half, 8>::store(x, chunk_of<S>(tile, row, chunk));
    }
}

__device__ inline uint32_t half_pair(float a, float b) {
    const half2 pair = __floats2half2_rn(a, b);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}

// What a warp has of its 16 queries. In a lane's four of a 16 x 8 tile, 0 and 1 are of row lane / 4, 2 and 3 of that + 8, in
// columns 2 (lane % 4) and the next.
template <int S>
struct ManyQueries {
    float sum[S / 8][4];
    float best[2], total[2];

    __device__ ManyQueries() : sum{}, best{LOWEST, LOWEST}, total{0, 0} {}

    __device__ static void scores(half* queries, half* keys, float score[MANY_KEYS / 8][4]) {
        const int lane = threadIdx.x % 32, query = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
        for (int n = 0; n < MANY_KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) score[n][i] = 0;
#if MOSS_TENSOR_CORES
#pragma unroll 2
        for (int d = 0; d < S / 16; d++) {
            uint32_t a[4];
            ldmatrix_x4(a, chunk_of<S>(queries, query, 2 * d + lane / 16));
#pragma unroll
            for (int n = 0; n < MANY_KEYS / 8; n += 2) {
                uint32_t b[4];
                ldmatrix_x4(b, chunk_of<S>(keys, n * 8 + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
                mma_16816(score[n], a, b);
                mma_16816(score[n + 1], a, b + 2);
            }
        }
#endif
    }
    // Scores of positions k0 ... -> weights; queries are at `at` and the next ones. scale: to units of log 2.
    __device__ void softmax(float score[MANY_KEYS / 8][4], float scale, int k0, int at) {
        const int lane = threadIdx.x % 32;
        at += threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = best[r], added = 0;
#pragma unroll
            for (int n = 0; n < MANY_KEYS / 8; n++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    const int position = k0 + n * 8 + lane % 4 * 2 + i % 2;
                    score[n][i] = position <= at + 8 * r ? score[n][i] * scale : LOWEST;
                    top = fmaxf(top, score[n][i]);
                }
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            const float shrink = exp2f(best[r] - top);
            best[r] = top;
#pragma unroll
            for (int n = 0; n < MANY_KEYS / 8; n++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) added += score[n][i] = exp2f(score[n][i] - top);
            total[r] = total[r] * shrink + added;  // of this lane's columns, until the end
#pragma unroll
            for (int j = 0; j < S / 8; j++) sum[j][2 * r] *= shrink, sum[j][2 * r + 1] *= shrink;
        }
    }
    __device__ void add(const float weight[MANY_KEYS / 8][4], half* values) {
#if MOSS_TENSOR_CORES
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < MANY_KEYS / 8; n += 2) {
            const float *first = weight[n], *second = weight[n + 1];
            const uint32_t a[4] = {half_pair(first[0], first[1]), half_pair(first[2], first[3]),
                                   half_pair(second[0], second[1]), half_pair(second[2], second[3])};
#pragma unroll
            for (int j = 0; j < S / 8; j += 2) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, chunk_of<S>(values, n * 8 + lane % 16, j + lane / 16));
                mma_16816(sum[j], a, b);
                mma_16816(sum[j + 1], a, b + 2);
            }
        }
#endif
    }
    // To rows of `out`, of which there are `count` for the block.
    __device__ void store(half* out, int64_t row, int count) {
        const int lane = threadIdx.x % 32, query = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
            total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
            if (query + 8 * r >= count) continue;
            const float share = 1 / total[r];
            half* to = out + (query + 8 * r) * row + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < S / 8; j++) {
                const uint32_t pair = half_pair(sum[j][2 * r] * share, sum[j][2 * r + 1] * share);
                memcpy(to + j * 8, &pair, 4);
            }
        }
    }
};

// Queries of the block's tokens, after rotary; rows beyond them are 0.
template <int S>
__device__ inline void load_queries(const half* from, const Angles& angles, const Heads& heads, int at, int count, half* tile) {
#pragma unroll 4
    for (int i = threadIdx.x; i < MANY_QUERIES * S / 8; i += MANY_THREADS) {
        const int q = i / (S / 8), chunk = i % (S / 8);
        float x[8] = {};
        if (q < count) angles.turn<8>(from + q * 3 * heads.D(), chunk * 8, (int)heads.rotary, at + q, x);
        CachePiece<half, 8>::store(x, chunk_of<S>(tile, q, chunk));
    }
}

// Grid (most tiles of tokens, H, parts).
template <class Entry, int S>
__global__ void __launch_bounds__(MANY_THREADS)
    attention_many(const half* qkv, Angles angles, Cache cache, Heads heads, Parts parts, half* both, int64_t row) {
    MOSS_DYNAMIC_SHARED(half, queries);
    half *k = queries + MANY_QUERIES * S, *v = k + MANY_KEYS * S;
    const Sequence s = parts.part[blockIdx.z].sequence;
    const int head = blockIdx.y, skip = (gridDim.x - 1 - blockIdx.x) * MANY_QUERIES;  // those that see most first
    if (skip >= s.count) return;
    const int at = s.start + skip, count = min(MANY_QUERIES, s.count - skip), end = at + count;
    const CacheRows<Entry> keys(cache.keys, cache.key_scale, heads, s.place, head);
    const CacheRows<Entry> values(cache.values, cache.value_scale, heads, s.place, head);
    const float scale = 1.4426950408889634f * rsqrtf((float)S);

    load_tile<S>(keys, 0, end, k);
    cp_async_commit();
    load_queries<S>(qkv + (s.first + skip) * 3 * heads.D() + head * S, angles, heads, at, count, queries);
    ManyQueries<S> mine;
    for (int k0 = 0; k0 < end; k0 += MANY_KEYS) {
        float score[MANY_KEYS / 8][4];
        load_tile<S>(values, k0, end, v);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        mine.scores(queries, k, score);
        __syncthreads();
        if (k0 + MANY_KEYS < end) load_tile<S>(keys, k0 + MANY_KEYS, end, k);
        cp_async_commit();
        mine.softmax(score, scale, k0, at);
        cp_async_wait<1>();
        __syncthreads();
        mine.add(score, v);
        __syncthreads();
    }
    mine.store(both + (s.first + skip) * row + head * S, row, count);
}

}  // namespace attention
}  // namespace moss_cuda
