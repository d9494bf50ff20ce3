// A block that learns, x + out_proj(attention(h)) + fc_out(gelu_new(fc_in(h))) with h = ln_1(x), and its derivative; and what
// follows the last one, to the loss.
//
// Forwards, only the result is kept. Backwards, all that is in between is computed again from x (Chen et al., 2016): so a whole
// model takes the memory of one block's insides and of one state a block.
#pragma once
#include "train_attention.h"
#include "train_linear.h"
#include "train_rows.h"

namespace moss {

struct BlockLearned {
    Learned norm_weight, norm_bias, in_bias, out_bias;
    int64_t n_in, n_out, n_adapters_in, n_adapters_out;
    Linear in[2], out[2];  // inputs are h, outputs rows [q k v fc_in]; inputs [attention gelu], outputs x's columns
    Adapter adapters_in[2], adapters_out[2];
};

struct Sizes {
    int64_t B, T, D, I, H, rotary, official;  // official: q, k and v lie as in qkv_proj
    double eps;
    const float* angles;  // (2, T, rotary / 2)

    int64_t M() const { return B * T; }
    int64_t Y() const { return 3 * D + I; }
    int64_t Z() const { return D + I; }
    Projected projected() const { return {B, T, H, D / H, rotary, Y(), official != 0, angles}; }
};

// What a block computes on the way: h (M, D) and its norm's statistics; y (M, Y) [q k v fc_in]; z (M, Z) [attention gelu].
struct Inside {
    float *h, *stats, *y, *z;
    Inside(const Sizes& s, float* memory)
        : h(memory), stats(h + s.M() * s.D), y(stats + 2 * s.M()), z(y + s.M() * s.Y()) {}
    static int64_t floats(const Sizes& s) { return s.M() * (s.D + 2 + s.Y() + s.Z()); }
};

inline void compute_inside(const BlockLearned& b, const Sizes& s, const float* x, const Inside& to) {
    const int64_t M = s.M(), D = s.D, I = s.I, Y = s.Y(), Z = s.Z();
    norm_forward(x, b.norm_weight.value, b.norm_bias.value, to.h, to.stats, M, D, (float)s.eps);
    const Rows h{to.h, D}, y{to.y, Y};
    for (int64_t i = 0; i < b.n_in; i++) linear_forward(b.in[i], h, y, M, false);
    for (int64_t i = 0; i < b.n_adapters_in; i++) adapter_forward(b.adapters_in[i], h, y, M);
    turn_rows(s.projected(), to.y, 1);
    attention_forward(s.projected(), to.y, to.z, Z);
    const float* bias = b.in_bias.value;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < M; t++) {
        float *f = to.y + t * Y + 3 * D, *g = to.z + t * Z + D;
        for (int64_t i = 0; i < I; i++) f[i] += bias[i];
        memcpy(g, f, 4 * I);
        map(g, I, [](vec v, int64_t, int) { return gelu_new(v); });
    }
}

// For the insides of a block, and for their derivatives.
inline float* inside_memory(int64_t floats) {
    static thread_local Scratch<float> memory;
    return memory.get(floats);
}

inline void block_forward(const BlockLearned& b, const Sizes& s, const float* x, float* out) {
    const Inside inside(s, inside_memory(Inside::floats(s)));
    compute_inside(b, s, x, inside);
    const int64_t M = s.M(), D = s.D;
    for (int64_t t = 0; t < M; t++)
        for (int64_t i = 0; i < D; i++) out[t * D + i] = x[t * D + i] + b.out_bias.value[i];
    const Rows z{inside.z, s.Z()}, to{out, D};
    for (int64_t i = 0; i < b.n_out; i++) linear_forward(b.out[i], z, to, M, true);
    for (int64_t i = 0; i < b.n_adapters_out; i++) adapter_forward(b.adapters_out[i], z, to, M);
}

// dx from dout; gradients grow.
inline void block_backward(const BlockLearned& b, const Sizes& s, const float* x, const float* dout, float* dx) {
    const int64_t M = s.M(), D = s.D, I = s.I, Y = s.Y(), Z = s.Z();
    float* room = inside_memory(2 * Inside::floats(s));
    const Inside inside(s, room), d(s, room + Inside::floats(s));
    compute_inside(b, s, x, inside);

    const Rows z{inside.z, Z}, dz{d.z, Z}, from{(float*)dout, D};
    if (b.out_bias.gradient) add_rows(dout, D, M, D, b.out_bias.gradient);
    for (int64_t i = 0; i < b.n_out; i++) linear_backward(b.out[i], z, from, dz, M, false);
    for (int64_t i = 0; i < b.n_adapters_out; i++) adapter_backward(b.adapters_out[i], z, from, dz, M);

#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < M; t++) {
        const float *f = inside.y + t * Y + 3 * D, *dg = d.z + t * Z + D;
        float* df = d.y + t * Y + 3 * D;
        memcpy(df, f, 4 * I);
        map(df, I, [](vec v, int64_t, int) { return gelu_new_slope(v); });
        for (int64_t i = 0; i < I; i++) df[i] *= dg[i];
    }
    attention_backward(s.projected(), inside.y, d.z, Z, d.y);
    turn_rows(s.projected(), d.y, -1);

    const Rows h{inside.h, D}, dh{d.h, D}, dy{d.y, Y};
    if (b.in_bias.gradient) add_rows(d.y + 3 * D, Y, M, I, b.in_bias.gradient);
    for (int64_t i = 0; i < b.n_in; i++) linear_backward(b.in[i], h, dy, dh, M, i > 0);
    for (int64_t i = 0; i < b.n_adapters_in; i++) adapter_backward(b.adapters_in[i], h, dy, dh, M);
    norm_backward(x, inside.stats, b.norm_weight, b.norm_bias, d.h, dout, dx, M, D);
}

// The last norm, lm_head and the loss.
struct HeadLearned {
    Learned norm_weight, norm_bias, bias;
    Linear lm_head;
};

struct Sums {  // over the rows that count
    double loss;
    int64_t right;
};

// -log p of the target, and, in place of the logits, scale times its derivative.
inline double cross_entropy(float* logits, int64_t V, int64_t target, float scale, bool* right) {
    const float *best = std::max_element(logits, logits + V), top = *best, wanted = logits[target];
    *right = best - logits == target;
    map(logits, V, [=](vec v, int64_t, int) { return exp(sub(v, all(top))); });
    double total = 0;
    for (int64_t i = 0; i < V; i += 4096) {
        float some = 0;
        for (int64_t j = i; j < std::min(V, i + 4096); j++) some += logits[j];
        total += some;
    }
    const float factor = scale / (float)total;
    for (int64_t i = 0; i < V; i++) logits[i] *= factor;
    logits[target] -= scale;
    return std::log(total) + (double)top - (double)wanted;
}

const int64_t LOGITS = 16 << 20;  // that are held at a time

// Of N rows of x (M, D), `rows` in rising order, the loss of predicting `targets`. dx (M, D), unless it is null: scale times the
// derivative of the sum of losses, and gradients grow; null: nothing but the sums is computed.
inline Sums head(const HeadLearned& l, const float* x, const int64_t* rows, const int64_t* targets, int64_t N, int64_t D,
                 double eps, float scale, float* dx, int64_t M) {
    static thread_local Scratch<float> memory;
    const int64_t V = l.lm_head.N, most = std::max<int64_t>(16, std::min<int64_t>(512, LOGITS / V));
    float *from = memory.get(most * (4 * D + 2 + V)), *h = from + most * D, *dh = h + most * D, *d = dh + most * D;
    float *stats = d + most * D, *logits = stats + 2 * most;
    std::vector<double> losses(most);
    std::vector<char> right(most);
    Sums sums{0, 0};
    if (dx) std::fill_n(dx, M * D, 0.f);
    for (int64_t n0 = 0; n0 < N; n0 += most) {
        const int64_t n = std::min(most, N - n0);
        for (int64_t i = 0; i < n; i++) memcpy(from + i * D, x + rows[n0 + i] * D, 4 * D);
        norm_forward(from, l.norm_weight.value, l.norm_bias.value, h, stats, n, D, (float)eps);
        linear_forward(l.lm_head, {h, D}, {logits, V}, n, false);
#pragma omp parallel for schedule(dynamic)
        for (int64_t i = 0; i < n; i++) {
            bool was = false;
            for (int64_t j = 0; j < V; j++) logits[i * V + j] += l.bias.value[j];
            losses[i] = cross_entropy(logits + i * V, V, targets[n0 + i], scale, &was);
            right[i] = was;
        }
        for (int64_t i = 0; i < n; i++) sums.loss += losses[i], sums.right += right[i];
        if (!dx) continue;
        if (l.bias.gradient) add_rows(logits, V, n, V, l.bias.gradient);
        linear_backward(l.lm_head, {h, D}, {logits, V}, {dh, D}, n, false);
        norm_backward(from, stats, l.norm_weight, l.norm_bias, dh, nullptr, d, n, D);
        for (int64_t i = 0; i < n; i++) memcpy(dx + rows[n0 + i] * D, d + i * D, 4 * D);
    }
    return sums;
}

// gradient[id] += dx for each of M tokens, in order.
inline void embedding_backward(const int32_t* ids, const float* dx, float* gradient, int64_t M, int64_t D) {
    by_columns(D, [=](int64_t first, int64_t end) {
        for (int64_t t = 0; t < M; t++)
            for (int64_t i = first; i < end; i++) gradient[ids[t] * D + i] += dx[t * D + i];
    });
}

}  // namespace moss
