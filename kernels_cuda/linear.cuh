// The model's products: y[t, n] = sum over k of x[t, k] w[n, k], for T tokens, N outputs, K inputs, with what comes before (norm)
// and after (bias, gelu, residual). Inputs are rounded to halves, sums are fp32.
//   up to 32 tokens (8 without tensor cores)  linear_few.cuh: the bytes of the weights are the limit
//   more                                      linear_many.cuh: arithmetic is the limit; without tensor cores, few at a time
// The norm is a kernel of its own: it moves 6 T D bytes, where each of a product's hundreds of blocks would read and norm all of x.
// So a block of the model takes norm and product, attention, product and the sum of its slices: five launches.
#pragma once
#include <algorithm>

#include "linear_few.cuh"
#include "linear_many.cuh"

namespace moss_cuda {

// A matrix (n, k) as docs/formats.md has it on disk: halves at q, or numbers of 8 or 4 bits. order (orders, k): stored input i is
// input order[i]; two of them are for the rows of q, k and v, which are whole panels, and for those of fc_in.
struct Weights {
    int bits;
    const void* q;
    const half* scale;
    const uint8_t* zero;
    const int32_t* order;
    int orders;
    int64_t n, k, group;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- how a product is divided ------------------------------------------------------------------------------------------------

struct Division {
    int64_t tokens, columns;  // at once: all, or 8; linear_many's COLUMNS, 0: linear_few
    int64_t slices;           // at most
};

// Few tokens: as many slices as the card has room for at once, each of 1024 inputs at least.
inline Division divide_few(int64_t T, int64_t N, int64_t K, int64_t multiprocessors) {
    const int64_t resident = multiprocessors * few_resident(T <= 8 ? 1 : 2);
    return {T, 0, std::max<int64_t>(1, std::min(resident / ceil_div(N, PANEL * FEW_PANELS), K / 1024))};
}

// Many tokens: the number of slices that takes the least time, counted in steps of a block while every multiprocessor is busy. A
// round of blocks takes eight more to begin and end. Adding slices takes eight for its launch, and 20 blocks / resident for each
// slice: a sum is written and read, 8 bytes, and a step has 32 multiply-adds for it, of which cards do 80 in the time of a byte.
inline Division divide_many(int64_t T, int64_t N, int64_t K, int64_t multiprocessors) {
    // Blocks of 64 tokens where those of 128 would compute a quarter more, for nobody.
    const int64_t columns = T <= 64 || ceil_div(T, 128) * 128 * 4 > ceil_div(T, 64) * 64 * 5 ? 1 : 2;
    const int64_t blocks = ceil_div(N, PANEL * MANY_PANELS) * ceil_div(T, columns * WARP_TOKENS);
    const int64_t resident = multiprocessors * (3 - columns);
    Division best = {T, columns, 1};
    double least = 1e300;
    for (int64_t slices = 1; slices <= std::min<int64_t>(16, ceil_div(K, 128)); slices++) {
        const double adding = slices > 1 ? 8 + 20. * slices * blocks / resident : 0;
        const double time = ceil_div(blocks * slices, resident) * (ceil_div(K, slices * STEP) + 8) + adding;
        if (time < least) least = time, best.slices = slices;
    }
    return best;
}

inline Division divide(const Device& card, int64_t T, int64_t N, int64_t K) {
    if (card.arch < 750) return divide_few(std::min<int64_t>(T, 8), N, K, card.multiprocessors);
    return T <= 32 ? divide_few(T, N, K, card.multiprocessors) : divide_many(T, N, K, card.multiprocessors);
}

// ---- launching ---------------------------------------------------------------------------------------------------------------

template <int TILES, class W>
void launch_few(const W& w, const Inputs& x, const Panels& panels, int slice, const Partial& partial, const After& after,
                cudaStream_t stream) {
    const int group_bytes = x.tokens * w.steps() * STEP * 2;
    const int stage = std::min(slice, FEW_INPUTS_BYTES / group_bytes / W::BATCH * W::BATCH);
    const dim3 grid(panels.blocks(FEW_PANELS), partial.slices);
    MOSS_LAUNCH((linear_few<TILES, W>), grid, dim3(32 * FEW_PANELS), stage * group_bytes, stream, w, x, panels, slice, stage,
                partial, after);
}

template <int COLUMNS, class W>
void launch_many(const W& w, const Inputs& x, const Panels& panels, int slice, const Partial& partial, const After& after,
                 cudaStream_t stream) {
    typedef Stage<W, COLUMNS> S;
    const dim3 grid(ceil_div(x.tokens, COLUMNS * WARP_TOKENS), panels.blocks(MANY_PANELS), partial.slices);
    MOSS_LAUNCH((linear_many<COLUMNS, W>), grid, dim3(128 * COLUMNS), S::COUNT * sizeof(S), stream, w, x, panels, slice, partial,
                after);
}

// x: T rows of row_stride(k), of each order of the weights. partial: room for the sums of slices.
template <class W>
void launch_product(const W& w, const half* x, int64_t T, const Panels& panels, float* partial, const After& after,
                    cudaStream_t stream) {
    const Division d = divide(device(), T, w.n, w.k);
    const int slice = (int)(ceil_div(ceil_div(w.groups, d.slices), W::BATCH) * W::BATCH), slices = (int)ceil_div(w.groups, slice);
    for (int64_t t = 0; t < T; t += d.tokens) {
        const int tokens = (int)std::min(d.tokens, T - t);
        const Inputs inputs = {x, (int)row_stride(w.k), (int)T, (int)t, tokens};
        const Partial sums = {slices > 1 ? partial : nullptr, slices, tokens, w.n};
        if (d.columns == 2) launch_many<2>(w, inputs, panels, slice, sums, after, stream);
        else if (d.columns == 1) launch_many<1>(w, inputs, panels, slice, sums, after, stream);
        else if (tokens <= 8) launch_few<1>(w, inputs, panels, slice, sums, after, stream);
        else if (tokens <= 16) launch_few<2>(w, inputs, panels, slice, sums, after, stream);
        else launch_few<4>(w, inputs, panels, slice, sums, after, stream);
        if (sums.at) launch_add_slices(sums, (int)t, after, stream);
    }
}

// The same for weights as the caller has them, the first `split` rows of which have the first of two orders.
inline void launch_product(const Weights& w, const half* x, int64_t T, int64_t split, float* partial, const After& after,
                           cudaStream_t stream) {
    const int n = (int)w.n, k = (int)w.k, group = (int)w.group;
    const int groups = (int)ceil_div(k, w.bits == 16 ? WeightsF16::group() : group);
    const int all = (int)ceil_div(n, PANEL);
    const Panels panels = {all, w.orders == 2 ? (int)(split / PANEL) : all};
    const auto q = (const uint8_t*)w.q;
    const auto launch = [&](auto weights) { launch_product(weights, x, T, panels, partial, after, stream); };
    if (w.bits == 16) launch(WeightsF16{(const half*)w.q, n, k, groups});
    else if (w.bits == 8 && group == 128) launch(WeightsGrouped<8, 128>{q, w.scale, w.zero, n, k, groups, group});
    else if (w.bits == 8) launch(WeightsGrouped<8, 0>{q, w.scale, w.zero, n, k, groups, group});
    else if (group == 128) launch(WeightsGrouped<4, 128>{q, w.scale, w.zero, n, k, groups, group});
    else launch(WeightsGrouped<4, 0>{q, w.scale, w.zero, n, k, groups, group});
}

// ---- the model's three -------------------------------------------------------------------------------------------------------

// Of the workspace, inputs that have to be made or put in order come first, of up to two orders; then the sums of slices.
inline int64_t inputs_bytes(int64_t T, int64_t K) { return ceil_div(2 * T * row_stride(K) * 2, 256) * 256; }

// Bytes of workspace, from a multiple of 256 on, that a product of up to T tokens (fewer may have more slices), N outputs and K
// inputs needs on the current device, whatever its weights are. Its content does not matter, and is lost.
inline int64_t linear_workspace(int64_t T, int64_t N, int64_t K) {
    const Device card = device();
    int64_t most = 0;
    for (int64_t t = 1; t <= T; t++) {
        const Division d = divide(card, t, N, K);
        most = std::max(most, inputs_bytes(t, K) + (d.slices > 1 ? d.slices * d.tokens * N * 4 : 0));
    }
    return most;
}

inline float* partial_sums(void* workspace, int64_t T, int64_t K) { return (float*)((char*)workspace + inputs_bytes(T, K)); }

// qkv (T, 3 D) halves and the last I columns of both (T, D + I) halves, gelu_new(f + in_bias), of states x (T, D) floats.
inline void launch_linear_in(const float* x, const Norm& norm, const Weights& w, const float* in_bias, half* qkv, half* both,
                             int64_t T, int64_t D, int64_t I, void* workspace, cudaStream_t stream) {
    half* h = (half*)workspace;
    launch_layer_norm(x, norm, w.order, w.orders, h, T, D, row_stride(D), stream);
    After after = {After::IN, in_bias, D, I, nullptr, nullptr, qkv, both};
    launch_product(w, h, T, 3 * D, partial_sums(workspace, T, D), after, stream);
}

// y (T, D) = x + both outᵀ + out_bias; both (T, D + I) halves, x and y floats; y may be x.
inline void launch_linear_out(const half* both, const Weights& w, const float* out_bias, const float* x, float* y, int64_t T,
                              int64_t D, int64_t I, void* workspace, cudaStream_t stream) {
    const half* inputs = both;
    if (w.orders || (D + I) % 8) {
        launch_gather(both, w.order, (half*)workspace, T, D + I, row_stride(D + I), stream);
        inputs = (const half*)workspace;
    }
    After after = {After::OUT, out_bias, D, I, x, y, nullptr, nullptr};
    launch_product(w, inputs, T, D, partial_sums(workspace, T, D + I), after, stream);
}

// logits (T, V) floats of states x (T, D) floats.
inline void launch_head(const float* x, const Norm& norm, const Weights& w, const float* bias, float* logits, int64_t T, int64_t D,
                        int64_t V, void* workspace, cudaStream_t stream) {
    half* h = (half*)workspace;
    launch_layer_norm(x, norm, w.order, w.orders, h, T, D, row_stride(D), stream);
    After after = {After::HEAD, bias, V, 0, nullptr, logits, nullptr, nullptr};
    launch_product(w, h, T, V, partial_sums(workspace, T, D), after, stream);
}

}  // namespace moss_cuda
