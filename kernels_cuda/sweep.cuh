// A sweep: from rows of the embedding, through blocks that lie on the device, to logits of the rows asked for or the likeliest
// tokens after them. Only issues copies and launches, some three a block; nothing waits.
#pragma once
#include "attention.cuh"
#include "embedding.cuh"
#include "linear.cuh"
#include "rows.cuh"
#include "top.cuh"

namespace moss_cuda {

// What follows is filled by moss_jt/ops/sweep.py, field by field: each takes 8 bytes.

struct Model {
    int64_t D, I, V, heads, rotary, context, places;  // context: tokens a cache has room for, of each of `places` sequences
    int64_t bits, group, orders, head_bits, head_group, cache_bits;
    const float* angles;                              // (2, context, rotary / 2)
    double eps;
};

struct Matrix {
    const void* q;
    const half* scale;
    const uint8_t* zero;
    const int32_t* order;
};

struct Block {
    const float *norm_weight, *norm_bias, *in_bias, *out_bias;
    Matrix in, out;
    void *keys, *values;
    float *key_scales, *value_scales;
};

struct Last {
    const float *norm_weight, *norm_bias, *bias;
    Matrix weight;
};

// What a sweep is given by the host, in pinned memory, and its copy on the device: in this order, each from a multiple of 16
// bytes on. The host fills it while nothing is on its way.
//   embedded   half (T, D)
//   sequences  Sequence (n)
//   rows       int32 (R)         whose logits are wanted
//   starts     int32 (R + 1)     where each one's penalised ids begin
//   penalised  int32 (starts[R]) all different for one row
struct Given {
    int64_t T, n, R, penalised;
    const char* host;
    char* device;

    static int64_t up(int64_t bytes) { return (bytes + 15) / 16 * 16; }
    int64_t sequences(int64_t D) const { return up(2 * T * D); }
    int64_t rows(int64_t D) const { return sequences(D) + up(16 * n); }
    int64_t starts(int64_t D) const { return rows(D) + up(4 * R); }
    int64_t ids(int64_t D) const { return starts(D) + up(4 * (R + 1)); }
    int64_t bytes(int64_t D) const { return ids(D) + up(4 * penalised); }
};

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Work space for up to T tokens of n sequences and logits of R rows.
struct Space {
    float *x, *y;   // (T, D): a block reads one and writes the other
    half *qkv;      // (T, 3 D)
    half *both;     // (T, D + I)
    float *state;   // (R, D): the rows asked for
    float *logits;  // (R, V)
    void *work;
    int64_t bytes;

    Space(const Model& m, int64_t T, int64_t R, char* at) {
        char* const start = at;
        const auto take = [&at](int64_t count) { char* here = at; at += (count + 255) / 256 * 256; return here; };
        x = (float*)take(4 * T * m.D);
        y = (float*)take(4 * T * m.D);
        qkv = (half*)take(6 * T * m.D);
        both = (half*)take(2 * T * (m.D + m.I));
        state = (float*)take(4 * R * m.D);
        logits = (float*)take(4 * R * m.V);
        work = take(most(most(linear_workspace(T, 3 * m.D + m.I, m.D), linear_workspace(T, m.D, m.D + m.I)),
                         most(most(linear_workspace(R, m.V, m.D), attention_workspace(T, m.heads, m.D / m.heads, m.context)),
                              top_workspace(R, m.V))));
        bytes = at - start;
    }
};
}  // namespace moss_cuda
