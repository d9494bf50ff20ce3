// A whole block: x + out_proj(attention(h)) + fc_out(gelu_new(fc_in(h))), h = ln_1(x); and what follows the last one.
#pragma once
#include "attention.h"
#include "layer_norm.h"
#include "linear.h"

namespace moss {

struct Norm {
    const float *weight, *bias;
    float eps;
};

// x, out (T, D); in (3 D + I, D), out_w (D, D + I), each with a low-rank term; the rest as attention.h has it. What is in between stays in memory of the
// calling thread, which grows to the longest chunk.
template <class W, class Cache>
void block(const float* x, Norm norm, const W& in, LowRank in_more, const float* in_bias, const W& out_w, LowRank out_more,
           const float* out_bias, const float* angles, Cache keys, Cache values, Heads heads, const Sequence* sequences, int64_t n,
           float* out, int64_t T, int64_t D, int64_t I) {
    static thread_local Scratch<float> memory;
    const int64_t Y = 3 * D + I;
    float *h = memory.get(T * (2 * D + Y)), *y = h + T * D, *a = y + T * Y;
    layer_norm(x, norm.weight, norm.bias, h, T, D, norm.eps);
    linear_in(h, in, in_more, in_bias, y, T, Y, I);
    attention(y, Y, angles, keys, values, a, heads, sequences, n);
    linear_out(a, y, out_w, out_more, out_bias, x, out, T, D, D, Y);
}

// Logits (T, V) of states x (T, D).
template <class W>
void head(const float* x, Norm norm, const W& w, const float* bias, float* y, int64_t T, int64_t D, int64_t V) {
    static thread_local Scratch<float> memory;
    float* h = memory.get(T * D);
    layer_norm(x, norm.weight, norm.bias, h, T, D, norm.eps);
    linear_head(h, w, bias, y, T, V);
}

}  // namespace moss
