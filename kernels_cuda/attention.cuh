// Causal attention of the new tokens of several sequences over their caches: rotary, append and scores.
//   qkv    (T, 3 D) half: q, k, v of every token, heads in order, D = H S
//   angles (2, C, rotary / 2) float: cos for every position, then sin
//   cache  as in cache.cuh; new tokens are written into it, after those it has
//   both   (T, D + I) half, of which columns 0 ... D - 1 are written
// Scores and softmax are fp32. Results depend on a sequence alone, not on others beside it, and are the same each time.
// Sequences of up to 8 new tokens: attention_few.cuh, one kernel, and a small one where a cache has more than 64 tokens.
// Those of more: attention_many.cuh, one kernel that appends and one for the rest.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "attention_many.cuh"

namespace moss_cuda {
namespace attention {

const int MOST_FEW = 8;  // new tokens of a sequence

// What all launches of one call have in common.
struct Call {
    const half* qkv;
    Angles angles;
    Cache cache;
    Heads heads;
    half* both;
    int64_t row;
    float* partials;
    cudaStream_t stream;
};

// Sequences that are launched together, and the most that one of them has.
struct Batch {
    Parts parts;
    int n = 0, count = 0, runs = 0;

    void add(const Sequence& s, int runs_of_it, int partial) {
        parts.part[n++] = Part{s, runs_of_it, partial};
        count = std::max(count, s.count);
        runs = std::max(runs, runs_of_it);
    }
};

template <class Entry, int E, int Q, int SIZE>
void launch_few_of(const Call& c, const Batch& b) {
    const dim3 grid(b.runs ? b.runs : (b.count + Q - 1) / Q, (unsigned)c.heads.H, b.n);
    const int64_t shared = few_shared(c.heads.S, Q) * sizeof(float);
    MOSS_LAUNCH((attention_few<Entry, E, Q, SIZE>), grid, FEW_THREADS, shared, c.stream, c.qkv, c.angles, c.cache, c.heads,
                b.parts, c.both, c.row, c.partials);
}
template <class Entry, int E, int SIZE>
void launch_few_for(const Call& c, const Batch& b) {
    if (b.count == 1) launch_few_of<Entry, E, 1, SIZE>(c, b);
    else if (b.count <= 4) launch_few_of<Entry, E, 4, SIZE>(c, b);
    else launch_few_of<Entry, E, MOST_FEW, SIZE>(c, b);
}
template <class Entry>
void launch_few(const Call& c, const Batch& b) {
    if (c.heads.S == 256) launch_few_for<Entry, 8, 256>(c, b);  // MOSS's heads
    else if (c.heads.S % 8 == 0) launch_few_for<Entry, 8, 0>(c, b);
    else launch_few_for<Entry, 1, 0>(c, b);
    const dim3 join((unsigned)c.heads.H, b.count, b.n);
    if (b.runs > 1)
        MOSS_LAUNCH(attention_join, join, FEW_THREADS, MOST_RUNS * sizeof(float), c.stream, c.heads, b.parts, c.both, c.row,
                    (const float*)c.partials);
}

template <class Entry, int S>
void launch_many_of(const Call& c, const Batch& b) {
    const dim3 grid((b.count + MANY_QUERIES - 1) / MANY_QUERIES, (unsigned)c.heads.H, b.n);
    MOSS_LAUNCH((attention_many<Entry, S>), grid, MANY_THREADS, many_shared(S), c.stream, c.qkv, c.angles, c.cache, c.heads,
                b.parts, c.both, c.row);
}
template <class Entry, int E>
void launch_append(const Call& c, const Batch& b) {
    const int sides = MANY_THREADS / 32;  // a warp each
    const dim3 grid(b.count, (unsigned)(2 * c.heads.H + sides - 1) / sides, b.n);
    MOSS_LAUNCH((append_many<Entry, E>), grid, MANY_THREADS, 0, c.stream, c.qkv, c.angles, c.cache, c.heads, b.parts);
}
template <class Entry>
void launch_many(const Call& c, const Batch& b) {
    if (c.heads.S % 8 == 0) launch_append<Entry, 8>(c, b);
    else launch_append<Entry, 1>(c, b);
    const bool products = device().arch >= 750;  // of matrices
    if (products && c.heads.S == 256) launch_many_of<Entry, 256>(c, b);
    else if (products && c.heads.S == 64) launch_many_of<Entry, 64>(c, b);
    else launch_few<Entry>(c, b);  // b.runs is 0: 8 tokens after 8
}

template <class Entry>
void launch_all(const Call& c, const Sequence* sequences, int64_t n) {
    Batch few, many;
    int partials = 0;
    for (int64_t i = 0; i < n; i++) {
        const Sequence& s = sequences[i];
        if (s.count <= MOST_FEW) {
            const int runs = runs_of(s.start + s.count);
            few.add(s, runs, partials);
            if (runs > 1) partials += s.count * runs;
        } else many.add(s, 0, 0);
        if (few.n == MOST_PARTS || (i == n - 1 && few.n)) launch_few<Entry>(c, few), few = Batch();
        if (many.n == MOST_PARTS || (i == n - 1 && many.n)) launch_many<Entry>(c, many), many = Batch();
    }
}

}  // namespace attention

// Bytes of workspace that launch_attention needs for up to T new tokens of up to n sequences.
inline int64_t attention_workspace(const Heads& heads, int64_t T, int64_t n) {
    using namespace attention;
    const int64_t few = std::min<int64_t>(T, MOST_FEW * n), tiles = (heads.C + RUN_KEYS - 1) / RUN_KEYS;
    return few * std::min<int64_t>(tiles, MOST_RUNS) * heads.H * (heads.S + 2) * sizeof(float);
}

// sequences: in the host's memory, needed no longer when this returns; I: the columns of `both` beyond D.
// Heads have at most 128 entries, or a multiple of 8 and at most 1024; std::invalid_argument otherwise.
inline void launch_attention(const half* qkv, const float* angles, const Cache& cache, const Heads& heads,
                             const Sequence* sequences, int64_t n, half* both, int64_t I, void* workspace,
                             cudaStream_t stream) {
    if (heads.S > (heads.S % 8 ? 1 : 8) * attention::FEW_THREADS) throw std::invalid_argument("attention: heads are too large");
    const attention::Call call{qkv, {angles, heads.C}, cache, heads, both, heads.D() + I, (float*)workspace, stream};
    if (cache.bits == 8) attention::launch_all<int8_t>(call, sequences, n);
    else attention::launch_all<half>(call, sequences, n);
}

}  // namespace moss_cuda
