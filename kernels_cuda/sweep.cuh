// A sweep: rows of the embedding through blocks that lie on the device, and from there to logits or the likeliest tokens.
// Only issues copies and launches, three or four a block; nothing waits.
#pragma once
#include <algorithm>
#include <iterator>
#include <vector>

#include "attention.cuh"
#include "embedding.cuh"
#include "linear.cuh"
#include "rows.cuh"
#include "top.cuh"

namespace moss_cuda {

// Filled by moss_jt/ops/sweep.py, field by field, 8 bytes each.

struct Matrix {
    const void* q;
    const half* scale;
    const uint8_t* zero;
    const int32_t* order;
};

struct BlockTensors {
    const float *norm_weight, *norm_bias, *in_bias, *out_bias;
    Matrix in, out;
    void *keys, *values;
    float *key_scales, *value_scales;
};

struct HeadTensors {
    const float *norm_weight, *norm_bias, *bias;
    Matrix weight;
    int64_t first, rows;  // of lm_head's; `bias` is theirs, too
};

// Addresses from here on count from the beginning of something that is moved about.
constexpr uint64_t MOVED = 1ull << 62;

// A table for a launch, where that something is at `moved`.
template <class Tensors> std::vector<Tensors> located(const Tensors* table, int64_t n, const void* moved) {
    static_assert(sizeof(Tensors) % 8 == 0, "fields of 8 bytes");
    std::vector<Tensors> found(table, table + n);
    uint64_t* const field = (uint64_t*)found.data();
    for (uint64_t* f = field; f < field + n * sizeof(Tensors) / 8; f++)
        if (*f >= MOVED) *f += (uint64_t)moved - MOVED;
    return found;
}

struct ModelSizes {
    int64_t D, I, V, heads, rotary, context;       // context: tokens that a cache has room for
    int64_t bits, group, ordered, head_bits, head_group, cache_bits;
    int64_t head_part;                             // rows of lm_head that are there at a time, at most; V where all are
    const float* angles;                           // (2, context, rotary / 2)
    double eps;

    Heads of_heads() const { return {heads, D / heads, rotary, context}; }
    Norm norm(const float* weight, const float* bias) const { return {weight, bias, (float)eps}; }
    Weights weights(const Matrix& w, int64_t N, int64_t K, int orders) const {
        return {(int)bits, w.q, w.scale, w.zero, w.order, ordered ? orders : 0, N, K, group};
    }
};

// Work space of sweeps of up to T tokens, and of R rows of logits.
struct Space {
    float* x;       // (T, D): the state
    half* qkv;      // (T, 3 D)
    half* both;     // (T, D + I)
    float* rows;    // (R, D): those whose logits are wanted
    float* logits;  // (R, V)
    void* work;     // for whatever kernel runs

    Space(const ModelSizes& m, int64_t T, int64_t R, char* at) {
        const auto take = [&at](int64_t bytes) {
            char* const here = at;
            at += (bytes + 255) / 256 * 256;
            return here;
        };
        x = (float*)take(4 * T * m.D);
        qkv = (half*)take(6 * T * m.D);
        both = (half*)take(2 * T * (m.D + m.I));
        rows = (float*)take(4 * R * m.D);
        logits = (float*)take(4 * R * m.V);
        work = at;
    }
};

// Bytes of it, from a multiple of 256 on, where the tokens are of up to `places` sequences.
inline int64_t space_bytes(const ModelSizes& m, int64_t T, int64_t R, int64_t places) {
    const int64_t needed[] = {linear_workspace(T, 3 * m.D + m.I, m.D), linear_workspace(T, m.D, m.D + m.I),
                              linear_workspace(R, m.V, m.D),           linear_workspace(R, m.head_part, m.D),
                              top_k_workspace(R, m.V, TOP_MOST),       attention_workspace(m.of_heads(), T, places)};
    const int64_t most = *std::max_element(std::begin(needed), std::end(needed));
    return (char*)Space(m, T, R, nullptr).work - (char*)nullptr + most;
}

// embedded: half (T, D) in pinned memory; where it is null, the state is what the blocks before left.
inline void run_blocks(const ModelSizes& m, const BlockTensors* blocks, int64_t n, const half* embedded, const Sequence* sequences, int64_t n_sequences,
                       int64_t T, const Space& s, cudaStream_t stream) {
    const int64_t D = m.D, I = m.I;
    if (embedded) launch_embedding(nullptr, embedded, s.x, T, D, stream);
    for (const BlockTensors* b = blocks; b < blocks + n; b++) {
        launch_linear_in(s.x, m.norm(b->norm_weight, b->norm_bias), m.weights(b->in, 3 * D + I, D, 2), b->in_bias, s.qkv, s.both, T, D, I,
                         s.work, stream);
        const Cache cache{(int)m.cache_bits, b->keys, b->values, b->key_scales, b->value_scales};
        launch_attention(s.qkv, m.angles, cache, m.of_heads(), sequences, n_sequences, s.both, I, s.work, stream);
        launch_linear_out(s.both, m.weights(b->out, D, D + I, 1), b->out_bias, s.x, s.x, T, D, I, s.work, stream);
    }
}

// Rows h.first to h.first + h.rows - 1 of lm_head's in s.logits, for the states that `rows` says.
inline void run_head(const ModelSizes& m, const HeadTensors& h, const int32_t* rows, int64_t R, const Space& s, cudaStream_t stream) {
    const Weights w{(int)m.head_bits, h.weight.q, h.weight.scale, h.weight.zero, nullptr, 0, h.rows, m.D, m.head_group};
    launch_rows(s.x, rows, s.rows, R, m.D, stream);
    launch_head(s.rows, m.norm(h.norm_weight, h.norm_bias), w, h.bias, s.logits + h.first, R, m.D, m.V, s.work, stream);
}

// The k likeliest after each of R rows of s.logits: values (R, k), then ids (R, k). Of each row, the logits of the ids from start[r]
// to start[r + 1], all different, are penalised before.
inline void run_top(const ModelSizes& m, const Penalties& p, const int32_t* ids, int64_t R, int64_t k, float* out, const Space& s,
                    cudaStream_t stream) {
    launch_penalise(s.logits, p, ids, R, m.V, stream);
    launch_top_k(s.logits, out, (int32_t*)(out + R * k), R, m.V, k, s.work, stream);
}

}  // namespace moss_cuda
