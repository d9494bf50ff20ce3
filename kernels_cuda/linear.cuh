// The model's products: y[t, n] = sum over k of x[t, k] w[n, k], for T tokens, N outputs, K inputs, with what comes before (norm) and
// after (bias, gelu, residual). Inputs are rounded to halves, sums are fp32.
//   up to 32 tokens (8 without tensor cores)  linear_few.cuh: the bytes of the weights are the limit
//   more                                      linear_many.cuh: arithmetic is the limit; without tensor cores, few at a time
// The norm is a kernel of its own: it moves 6 T D bytes, where each of a product's hundreds of blocks would read and norm all of x.
#pragma once
#include "linear_few.cuh"
#include "linear_many.cuh"

namespace moss_cuda {

// A matrix (n, k) as docs/formats.md has it on disk: halves at q, or numbers of 8 or 4 bits. order (orders, k): stored input i is input
// order[i]; two of them are for rows of q, k and v (whole panels), and for those of fc_in.
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
    int64_t slices, slice;    // of so many groups each
};

// Few tokens: as many slices as the card has room for at once, each of four batches at least.
inline Division divide_few(int64_t tokens, int64_t blocks, int64_t groups, int64_t batch, int64_t multiprocessors) {
    const int64_t resident = multiprocessors * few_resident(tokens <= 8 ? 1 : 2);
    const int64_t slices = std::max<int64_t>(1, std::min(resident / blocks, groups / (4 * batch)));
    const int64_t slice = ceil_div(ceil_div(groups, slices), batch) * batch;
    return {tokens, 0, ceil_div(groups, slice), slice};
}

// Many tokens: the number of slices that takes the least time, counted in steps of a block while every multiprocessor is busy. A
// round of blocks takes eight more to begin and end. Adding slices takes eight for the launch, and 20 blocks / resident for the bytes of each
// slice: written and read they are 8 for each output, which is 4096 multiply-adds of 128 inputs at 160 a byte.
inline Division divide_many(int64_t tokens, int64_t row_blocks, int64_t groups, int64_t steps, int64_t multiprocessors) {
    // Blocks of 64 tokens where those of 128 would compute a quarter more, for nobody.
    const int64_t columns = tokens <= 64 || ceil_div(tokens, 128) * 128 * 4 > ceil_div(tokens, 64) * 64 * 5 ? 1 : 2;
    const int64_t blocks = row_blocks * ceil_div(tokens, columns * WARP_TOKENS), resident = multiprocessors * (3 - columns);
    Division best = {tokens, columns, 1, groups};
    double least = 1e300;
    for (int64_t slices = 1; slices <= std::min<int64_t>(16, groups); slices++) {
        const int64_t slice = ceil_div(groups, slices), there = ceil_div(groups, slice);
        const double adding = there > 1 ? 8 + 20. * there * blocks / resident : 0;
        const double time = ceil_div(blocks * there, resident) * (slice * steps + 8) + adding;
        if (time < least) least = time, best.slices = there, best.slice = slice;
    }
    return best;
}

// split: rows of the first of two orders.
inline Panels panels_of(const Weights& w, int64_t split) {
    const int all = (int)ceil_div(w.n, PANEL);
    return {all, w.orders == 2 ? (int)(split / PANEL) : all};
}

template <class W>
inline Division divide(const W& w, const Panels& panels, int64_t T) {
    const Device card = device();
    const int64_t few = card.arch >= 750 ? 32 : 8;
    if (T > few && card.arch >= 750)
        return divide_many(T, panels.blocks(MANY_PANELS), w.groups, w.steps(), card.multiprocessors);
    return divide_few(std::min(T, few), panels.blocks(FEW_WARPS), w.groups, W::BATCH, card.multiprocessors);
}

// ---- launching ---------------------------------------------------------------------------------------------------------------

template <int TILES, class W>
void launch_few(const W& w, const Inputs& x, const Panels& panels, const Division& d, const Partial& partial, const After& after,
                cudaStream_t stream) {
    const int64_t group_bytes = x.tokens * w.steps() * STEP * 2;
    const int64_t stage = std::min(d.slice, FEW_SHARED / group_bytes / W::BATCH * W::BATCH);
    const dim3 grid(panels.blocks(FEW_WARPS), d.slices);
    MOSS_LAUNCH((linear_few<TILES, W>), grid, dim3(FEW_THREADS), stage * group_bytes, stream, w, x, panels, (int)d.slice, (int)stage,
                partial, after);
}

template <int COLUMNS, class W>
void launch_many(const W& w, const Inputs& x, const Panels& panels, const Division& d, const Partial& partial, const After& after,
                 cudaStream_t stream) {
    typedef Stage<W, COLUMNS> S;
    const dim3 grid(ceil_div(x.tokens, COLUMNS * WARP_TOKENS), panels.blocks(MANY_PANELS), d.slices);
    MOSS_LAUNCH((linear_many<COLUMNS, W>), grid, dim3(128 * COLUMNS), S::COUNT * sizeof(S), stream, w, x, panels, (int)d.slice, partial,
                after);
}

// What a product of T tokens needs of the workspace: first the inputs, where they have to be made or put in order, then partial sums.
struct Room {
    int64_t inputs, partial;  // bytes
};

// Calls f(w) with the weights as the kernels' type has them.
template <class F>
auto with_weights(const Weights& w, F f) {
    const int n = (int)w.n, k = (int)w.k, group = (int)w.group;
    if (w.bits == 16) return f(WeightsF16{(const half*)w.q, n, k, (int)ceil_div(k, WeightsF16::group())});
    const uint8_t* q = (const uint8_t*)w.q;
    const int groups = (int)ceil_div(k, group);
    if (w.bits == 8 && group == 128) return f(WeightsGrouped<8, 128>{q, w.scale, w.zero, n, k, groups, group});
    if (w.bits == 8) return f(WeightsGrouped<8, 0>{q, w.scale, w.zero, n, k, groups, group});
    if (group == 128) return f(WeightsGrouped<4, 128>{q, w.scale, w.zero, n, k, groups, group});
    return f(WeightsGrouped<4, 0>{q, w.scale, w.zero, n, k, groups, group});
}

struct Divided {
    Panels panels;
    int64_t T;
    template <class W>
    Division operator()(const W& w) const { return divide(w, panels, T); }
};

inline Room room(const Weights& w, int64_t T, int64_t split) {
    const Division d = with_weights(w, Divided{panels_of(w, split), T});
    const int64_t inputs = std::max(w.orders, 1) * T * row_stride(w.k) * 2;
    return {ceil_div(inputs, 256) * 256, d.slices > 1 ? d.slices * d.tokens * w.n * 4 : 0};
}

struct Product {
    const half* x;  // rows of row_stride(k)
    int64_t T;
    Panels panels;
    float* partial;
    After after;
    cudaStream_t stream;

    template <class W>
    void operator()(const W& w) const {
        const Division d = divide(w, panels, T);
        for (int64_t t = 0; t < T; t += d.tokens) {
            const int tokens = (int)std::min(d.tokens, T - t);
            const Inputs inputs = {x, (int)row_stride(w.k), (int)T, (int)t, tokens};
            const Partial sums = {d.slices > 1 ? partial : nullptr, (int)d.slices, tokens, w.n};
            if (d.columns == 2) launch_many<2>(w, inputs, panels, d, sums, after, stream);
            else if (d.columns) launch_many<1>(w, inputs, panels, d, sums, after, stream);
            else if (tokens <= 8) launch_few<1>(w, inputs, panels, d, sums, after, stream);
            else if (tokens <= 16) launch_few<2>(w, inputs, panels, d, sums, after, stream);
            else launch_few<4>(w, inputs, panels, d, sums, after, stream);
            if (sums.at) launch_add_slices(sums, (int)t, after, stream);
        }
    }
};

// x: rows of row_stride(w.k) halves, in the weights' order.
inline void launch_product(const Weights& w, const half* x, int64_t T, int64_t split, void* partial, const After& after, cudaStream_t stream) {
    with_weights(w, Product{x, T, panels_of(w, split), (float*)partial, after, stream});
}

// ---- the model's three -------------------------------------------------------------------------------------------------------

// Bytes of workspace, aligned to 256, that any of the launches below needs for T tokens and these weights on the device that is
// current. split: 3 D for in.weight, else anything. Its content does not matter, and is lost.
inline int64_t linear_workspace(const Weights& w, int64_t T, int64_t split) {
    const Room r = room(w, T, split);
    return r.inputs + r.partial;
}

// qkv (T, 3 D) halves and the last I columns of both (T, D + I) halves, gelu_new(f + in_bias), of states x (T, D) floats.
inline void launch_linear_in(const float* x, const Norm& norm, const Weights& w, const float* in_bias, half* qkv, half* both, int64_t T,
                             int64_t D, int64_t I, void* workspace, cudaStream_t stream) {
    half* h = (half*)workspace;
    launch_layer_norm(x, norm, w.order, w.orders, h, T, D, row_stride(D), stream);
    After after = {After::IN, in_bias, D, I, nullptr, nullptr, qkv, both};
    launch_product(w, h, T, 3 * D, (char*)workspace + room(w, T, 3 * D).inputs, after, stream);
}

// y (T, D) = x + both outᵀ + out_bias; both (T, D + I) halves, x and y floats; y may be x.
inline void launch_linear_out(const half* both, const Weights& w, const float* out_bias, const float* x, float* y, int64_t T, int64_t D,
                              int64_t I, void* workspace, cudaStream_t stream) {
    const half* inputs = both;
    if (w.orders || (D + I) % 8) {
        launch_gather(both, w.order, (half*)workspace, T, D + I, row_stride(D + I), stream);
        inputs = (const half*)workspace;
    }
    After after = {After::OUT, out_bias, D, I, x, y, nullptr, nullptr};
    launch_product(w, inputs, T, D, (char*)workspace + room(w, T, D).inputs, after, stream);
}

// logits (T, V) floats of states x (T, D) floats.
inline void launch_head(const float* x, const Norm& norm, const Weights& w, const float* bias, float* logits, int64_t T, int64_t D,
                        int64_t V, void* workspace, cudaStream_t stream) {
    half* h = (half*)workspace;
    launch_layer_norm(x, norm, w.order, w.orders, h, T, D, row_stride(D), stream);
    After after = {After::HEAD, bias, V, 0, nullptr, logits, nullptr, nullptr};
    launch_product(w, h, T, V, (char*)workspace + room(w, T, V).inputs, after, stream);
}

}  // namespace moss_cuda
