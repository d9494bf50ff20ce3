// Attention of up to 8 new tokens a sequence: decode, and drafts. The cache is read once, whatever the tokens, in
// pieces: a block takes one head of one sequence and a run of its positions, so that even one sequence fills the
// device. It leaves the largest score, the sum of weights and the weighted values of its run, which a second kernel
// puts together in the order of positions.
//
// It must move 2 S (start + count) entries a head, and writes 4 (S + 2) bytes for each run and token: 2 % of what a run
// of 64 reads of a cache in halves.
//
// New tokens belong to the block in whose run they are. It alone appends them, and after a barrier reads them back like
// any others: the values are those the cache holds, and no block waits for another.
//
// Without runs the same kernel goes over all positions, for 8 tokens after 8: where there are many tokens and no tensor
// cores that fit. Then all are appended beforehand.
#pragma once
#include "cache.cuh"

namespace moss_cuda {
namespace attention {

const int FEW_THREADS = 128, FEW_WARPS = FEW_THREADS / 32;
const int RUN_KEYS = 64;  // whose scores are made before their values are read
const int MOST_RUNS = 32;
const float LOWEST = -1e30f;

// What is launched together travels as a kernel's argument: no copy to the device, and nothing to wait for.
const int MOST_PARTS = 64;
struct Part {
    Sequence sequence;
    int32_t runs, partial;  // how many; the first result among those of all parts, [count][runs][H]
};
struct Parts {
    Part part[MOST_PARTS];
};

// Positions of a run when there are n in all. It depends on nothing else, and so do a sequence's results.
__host__ __device__ inline int run_length(int n) {
    const int tiles = (n + RUN_KEYS - 1) / RUN_KEYS;
    return (tiles + MOST_RUNS - 1) / MOST_RUNS * RUN_KEYS;
}
__host__ __device__ inline int runs_of(int n) { return (n + run_length(n) - 1) / run_length(n); }

// Rows of S floats for threads that take a piece of E entries each: four entries of one piece, then those of the next, so that
// neighbouring threads read and write neighbouring fours.
template <int E>
__device__ inline int spread(int piece, int e, int S) {
    return E == 1 ? piece : ((e / 4) * (S / E) + piece) * 4 + e % 4;
}
// N floats, each four of them together and `step` from the four before.
template <int N>
__device__ inline void read(const float* from, float* to, int step) {
    if (N == 1) to[0] = from[0];
#pragma unroll
    for (int i = 0; i + 4 <= N; i += 4) {
        const float4 four = *(const float4*)(from + i / 4 * step);
        to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
}

// Scores of RUN_KEYS positions from k0 on for Q queries, [RUN_KEYS][Q]. Eight lanes share a key, and each takes several keys at
// once, which share what is read of the queries. Positions from `end` on, and after a query's own, get LOWEST.
template <class Entry, int E, int Q>
__device__ inline void few_scores(const CacheRows<Entry>& keys, const float* queries, int S, int k0, int end, int at,
                                  float* scores) {
    const int NEAR = Q > 4 ? 2 : 4, GROUPS = FEW_THREADS / 8;  // as many keys as registers allow
    const int lane = threadIdx.x % 8;
    for (int key = threadIdx.x / 8; key < RUN_KEYS; key += NEAR * GROUPS) {
        const Entry* rows[NEAR];
        float dot[NEAR][Q] = {};
#pragma unroll
        for (int j = 0; j < NEAR; j++) rows[j] = keys.entries + (int64_t)min(k0 + key + j * GROUPS, end - 1) * S;
#pragma unroll 2
        for (int piece = lane; piece < S / E; piece += 8) {
            CachePiece<Entry, E> raw[NEAR];
            float k[NEAR][E];
#pragma unroll
            for (int j = 0; j < NEAR; j++) raw[j].load(rows[j] + piece * E);
#pragma unroll
            for (int j = 0; j < NEAR; j++) raw[j].widen(k[j]);
#pragma unroll
            for (int q = 0; q < Q; q++) {
                float x[E];
                read<E>(queries + q * S + spread<E>(piece, 0, S), x, S / E * 4);
#pragma unroll
                for (int j = 0; j < NEAR; j++)
#pragma unroll
                    for (int e = 0; e < E; e++) dot[j][q] += k[j][e] * x[e];
            }
        }
#pragma unroll
        for (int j = 0; j < NEAR; j++) {
            const int place = key + j * GROUPS, position = k0 + place;
            const float scale = keys.scale(min(position, end - 1));
#pragma unroll
            for (int q = 0; q < Q; q++) {
                float sum = dot[j][q];
#pragma unroll
                for (int step = 4; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
                if (lane == q) scores[place * Q + q] = position < end && position <= at + q ? sum * scale : LOWEST;
            }
        }
    }
}

// The running softmax of the queries of one warp: q = warp, warp + FEW_WARPS ... Scores are in units of log 2.
template <int Q>
struct FewSoftmax {
    static const int MINE = (Q + FEW_WARPS - 1) / FEW_WARPS;
    float best[MINE], total[MINE];

    __device__ FewSoftmax() {
#pragma unroll
        for (int i = 0; i < MINE; i++) best[i] = LOWEST, total[i] = 0;
    }
    // scores [RUN_KEYS][Q] -> weights, for int8 times their values' scale; keep[Q]: what earlier sums shrink by.
    template <class Entry>
    __device__ void add(float* scores, const CacheRows<Entry>& values, int k0, int end, float* keep) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int q = warp + i * FEW_WARPS;
            if (q >= Q) break;
            float *one = scores + lane * Q + q, *two = one + 32 * Q;
            const float top = fmaxf(best[i], warp_max(fmaxf(*one, *two)));
            const float shrink = exp2f(best[i] - top), w1 = exp2f(*one - top), w2 = exp2f(*two - top);
            best[i] = top, total[i] = total[i] * shrink + warp_sum(w1 + w2);
            *one = w1 * values.scale(min(k0 + lane, end - 1)), *two = w2 * values.scale(min(k0 + lane + 32, end - 1));
            if (lane == 0) keep[q] = shrink;
        }
    }
    // [Q] and [Q].
    __device__ void store(float* bests, float* totals) const {
        const int warp = threadIdx.x / 32;
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int q = warp + i * FEW_WARPS;
            if (q < Q && threadIdx.x % 32 == 0) bests[q] = best[i], totals[q] = total[i];
        }
    }
};

// sums += weights times values: a thread has E entries of the values at every `groups`-th position, for all queries.
template <class Entry, int E, int Q>
struct FewValues {
    float sum[Q][E];
    int piece, group, groups;

    __device__ FewValues(int S)
        : sum{}, piece(threadIdx.x % (S / E)), group(threadIdx.x / (S / E)), groups(FEW_THREADS / (S / E)) {}

    __device__ void add(const CacheRows<Entry>& values, const float* weights, const float* keep, int S, int k0, int end) {
        const int NEAR = 4;
        if (group >= groups) return;  // threads beyond a whole number of rows
#pragma unroll
        for (int q = 0; q < Q; q++)
#pragma unroll
            for (int e = 0; e < E; e++) sum[q][e] *= keep[q];
        const int n = min(RUN_KEYS, end - k0);
        const Entry* rows = values.entries + (int64_t)k0 * S + piece * E;
        for (int j0 = group; j0 < n; j0 += NEAR * groups) {
            CachePiece<Entry, E> raw[NEAR];
#pragma unroll
            for (int u = 0; u < NEAR; u++) raw[u].load(rows + (int64_t)min(j0 + u * groups, n - 1) * S);
#pragma unroll
            for (int u = 0; u < NEAR; u++) {
                const int j = j0 + u * groups;
                if (j >= n) break;
                float v[E], w[Q];
                raw[u].widen(v);
                read<Q>(weights + j * Q, w, 4);
#pragma unroll
                for (int q = 0; q < Q; q++)
#pragma unroll
                    for (int e = 0; e < E; e++) sum[q][e] += w[q] * v[e];
            }
        }
    }
    // Sums of all groups, in their order, to rows [Q][S] as `spread` has them.
    __device__ void gather(float* rows, int S) const {
        for (int turn = 0; turn < groups; turn++) {
            if (turn == group)
#pragma unroll
                for (int q = 0; q < Q; q++)
#pragma unroll
                    for (int e = 0; e < E; e++) {
                        float& to = rows[q * S + spread<E>(piece, e, S)];
                        to = turn ? to + sum[q][e] : sum[q][e];
                    }
            __syncthreads();
        }
    }
};

// Shared floats of a block: rows [Q][S] of queries, then of sums; scores [RUN_KEYS][Q]; three for each query.
__host__ __device__ inline int64_t few_shared(int64_t S, int Q) { return Q * (S + RUN_KEYS + 3); }

// Grid (most runs, H, parts); without runs (most groups of Q tokens, H, parts). SIZE: of a head, or 0 where only
// `heads` says it.
template <class Entry, int E, int Q, int SIZE>
__global__ void __launch_bounds__(FEW_THREADS, Q == 1 ? 6 : 3)
    attention_few(const half* qkv, Angles angles, Cache cache, Heads heads, Parts parts, half* both, int64_t row,
                  float* partials) {
    MOSS_DYNAMIC_SHARED(float, rows);
    const Part part = parts.part[blockIdx.z];
    Sequence s = part.sequence;
    const int S = SIZE ? SIZE : (int)heads.S, head = blockIdx.y;
    const int64_t D = heads.D();
    int begin = 0, end = s.start + s.count;
    if (part.runs) {
        if ((int)blockIdx.x >= part.runs) return;
        const int length = run_length(end);
        begin = blockIdx.x * length, end = min(end, begin + length);
    } else {  // the last tokens see most keys and come first
        const int skip = (gridDim.x - 1 - blockIdx.x) * Q;
        if (skip >= s.count) return;
        s.start += skip, s.first += skip, s.count = min(Q, s.count - skip);
        end = s.start + s.count;
    }
    const CacheRows<Entry> keys(cache.keys, cache.key_scale, heads, s.place, head);
    const CacheRows<Entry> values(cache.values, cache.value_scale, heads, s.place, head);
    const half* from = qkv + s.first * 3 * D + head * S;

    if (part.runs) {
        const int fresh = max(begin, s.start);
        for (int i = threadIdx.x / 32; i < 2 * (end - fresh); i += FEW_WARPS) {
            const int at = fresh + i / 2;
            const half* token = from + (at - s.start) * 3 * D;
            if (i % 2 == 0) append_row<E>(token + D, angles, S, (int)heads.rotary, keys, at);
            else append_row<E>(token + 2 * D, angles, S, 0, values, at);
        }
    }
    const float scale = 1.4426950408889634f * rsqrtf((float)S);
    for (int i = threadIdx.x; i < Q * S / E; i += FEW_THREADS) {
        const int q = i / (S / E), piece = i % (S / E);
        float x[E] = {};
        if (q < s.count) angles.turn<E>(from + q * 3 * D, piece * E, (int)heads.rotary, s.start + q, x);
#pragma unroll
        for (int e = 0; e < E; e++) rows[q * S + spread<E>(piece, e, S)] = x[e] * scale;
    }
    float *scores = rows + Q * S, *keep = scores + Q * RUN_KEYS, *bests = keep + Q, *totals = bests + Q;
    FewSoftmax<Q> softmax;
    FewValues<Entry, E, Q> sums(S);
    __syncthreads();
    for (int k0 = begin; k0 < end; k0 += RUN_KEYS) {
        few_scores<Entry, E, Q>(keys, rows, S, k0, end, s.start, scores);
        __syncthreads();
        softmax.add(scores, values, k0, end, keep);
        __syncthreads();
        sums.add(values, scores, keep, S, k0, end);
        __syncthreads();
    }
    softmax.store(bests, totals);
    sums.gather(rows, S);
    for (int i = threadIdx.x; i < s.count * S; i += FEW_THREADS) {
        const int q = i / S, e = i % S;
        const float sum = rows[q * S + spread<E>(e / E, e % E, S)];
        if (part.runs <= 1) both[(s.first + q) * row + head * S + e] = __float2half_rn(sum / totals[q]);
        else {
            float* to = partials + ((part.partial + (int64_t)q * part.runs + blockIdx.x) * heads.H + head) * (S + 2);
            to[e] = sum;
            if (e == 0) to[S] = bests[q], to[S + 1] = totals[q];
        }
    }
}

// Grid (H, most tokens, parts): what the runs left, put together.
__global__ void __launch_bounds__(FEW_THREADS)
    attention_join(Heads heads, Parts parts, half* both, int64_t row, const float* partials) {
    MOSS_DYNAMIC_SHARED(float, weight);  // MOST_RUNS
    const Part part = parts.part[blockIdx.z];
    const int q = blockIdx.y, head = blockIdx.x, S = (int)heads.S;
    if (q >= part.sequence.count || part.runs <= 1) return;
    const int64_t step = heads.H * (S + 2);
    const float* from = partials + (part.partial + (int64_t)q * part.runs) * step + head * (S + 2);
    if (threadIdx.x < 32) {
        const bool one = (int)threadIdx.x < part.runs;
        const float best = one ? from[threadIdx.x * step + S] : LOWEST, top = warp_max(best);
        const float share = one ? exp2f(best - top) : 0.f;
        const float total = warp_sum(one ? share * from[threadIdx.x * step + S + 1] : 0.f);
        weight[threadIdx.x] = share / total;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < S; e += FEW_THREADS) {
        float sum = 0;
#pragma unroll 8
        for (int r = 0; r < part.runs; r++) sum += weight[r] * from[r * step + e];
        both[(part.sequence.first + q) * row + head * S + e] = __float2half_rn(sum);
    }
}

}  // namespace attention
}  // namespace moss_cuda
