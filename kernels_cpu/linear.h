// The model's products: y[t, n] = sum over k of x[t, k] w[n, k], for T tokens, N outputs, K inputs, and what follows each.
// `finish(y, t, n, count)` turns count raw sums at y, outputs n ... of token t, into the result in place (bias, gelu, residual),
// while they are still in the cache. W is one of the classes in weights_*.h.
#pragma once
#include "linear_few.h"
#include "linear_many.h"
#include "low_rank.h"

namespace moss {

// Rows [first, end) of w.
template <class Finish>
void linear_rows(const WeightsF16& w, const Columns& x, float* y, int64_t first, int64_t end, int64_t N, Finish finish) {
    const int FEW = 8;  // tokens; up to here every weight is used straight from the load that brought it
    if (x.T > FEW) return many(w, x, y, first, end, N, finish);
    const Floats floats = as_floats(x);
    with_constant<FEW>(x.T, [&](auto tokens) { few<decltype(tokens)::value>(w, floats, y, first, end, N, finish); });
}

template <int BITS, class Finish>
void linear_rows(const WeightsGrouped<BITS>& w, const Columns& x, float* y, int64_t first, int64_t end, int64_t N, Finish finish) {
    const int BLOCK = VEC == 16 ? 8 : 4, FEW = 16;  // tokens at once, and in all, up to where unpacking tiles does not pay
    if (x.T > FEW) return many(w, x, y, first, end, N, finish);
    const Sixteen numbers = room_for_sixteen(x.T, x.K, w.S, BLOCK);
    for (int64_t b = 0; b < numbers.blocks(); b++) round_block<typename WeightsGrouped<BITS>::Pairs>(x, numbers, b, w.norm());
    few<BLOCK>(w, numbers, y, first, end, N, finish);
}

// All rows. Of two orders, the first is that of the inputs of the first `split` rows, a multiple of PANEL.
template <class W, class Finish>
void linear(const W& w, Columns x, float* y, int64_t N, int64_t split, Finish finish) {
    x.order = w.order;
    if (w.orders < 2) return linear_rows(w, x, y, 0, N, N, finish);
    linear_rows(w, x, y, 0, split, N, finish);
    x.order = w.order + w.K;
    linear_rows(w, x, y, split, N, N, finish);
}

// The first product of a block: y = [q k v gelu(fc_in)], where x is the normed state (T, K), w (N, K), and the bias
// belongs to the last I outputs, which pass through gelu_new. `low_rank` is added to w.
template <class W>
void linear_in(const float* x, const W& w, LowRank low_rank, const float* bias, float* y, int64_t T, int64_t N, int64_t I) {
    const Columns inputs = columns(x, T, w.K);
    const float* inner = low_rank.inner(inputs);
    linear(w, inputs, y, N, N - I, [=](float* ys, int64_t t, int64_t n, int64_t count) {
        low_rank.add(inner, ys, t, n, count);
        int64_t skip = std::min(std::max<int64_t>(N - I - n, 0), count);
        const float* b = bias + (n + skip - (N - I));
        map(ys + skip, count - skip, [=](vec v, int64_t i, int m) {
            return gelu_new(add(v, m == VEC ? load(b + i) : load_n(b + i, m)));
        });
    });
}

// The second product: y = residual + [a, m] w^T + bias; a is attention's result (T, A), m the last w.K - A columns of the
// first product's (T, M), w (N, K), to which `low_rank` is added.
template <class W>
void linear_out(const float* a, const float* mlp, const W& w, LowRank low_rank, const float* bias, const float* residual, float* y,
                int64_t T, int64_t N, int64_t A, int64_t M) {
    Columns x = columns(a, T, w.K);
    x.a_stride = x.split = A, x.b = mlp + M - (w.K - A), x.b_stride = M;
    const float* inner = low_rank.inner(x);
    linear(w, x, y, N, N, [=](float* ys, int64_t t, int64_t n, int64_t count) {
        low_rank.add(inner, ys, t, n, count);
        for (int64_t i = 0; i < count; i++) ys[i] += bias[n + i] + residual[t * N + n + i];
    });
}

// lm_head: y = x w^T + bias.
template <class W>
void linear_head(const float* x, const W& w, const float* bias, float* y, int64_t T, int64_t N) {
    linear(w, columns(x, T, w.K), y, N, N, [=](float* ys, int64_t, int64_t n, int64_t count) {
        for (int64_t i = 0; i < count; i++) ys[i] += bias[n + i];
    });
}

}  // namespace moss
