// y[t, n] = sum over k of x[t, k] w[n, k], for T tokens, N outputs, K inputs, in fp32. `finish(y, t, n, count)` then turns
// count raw sums at y, outputs n ... of token t, into the result in place (bias, gelu, residual), while they are still in
// the cache. W is one of the classes in weights_*.h.
//
// Few tokens: the bytes of w are read once and are all that counts; the goal is the speed of memory. Each thread walks
// rows, several at a time so that several streams are in flight, and keeps the sums in registers.
// Many tokens: the arithmetic is the limit. A tile of w is unpacked once, into the L2 cache, to what lanes.h multiplies, and
// used for all tokens; the sums of 4 rows x 6 tokens stay in registers (AVX-512; fewer where there are 16 registers).
#pragma once
#include "tile.h"
#include "weights_f16.h"
#include "weights_grouped.h"

namespace moss {

const int FEW_TOKENS = 8;  // up to here every weight is used straight from the load that brought it

template <int R, int T, class W>
inline void few_rows(const W& w, typename W::Few x, float* y, int64_t n, int64_t N) {
    float sums[R][T];
    w.template few<R, T>(x, n, sums);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) y[t * N + n + r] = sums[r][t];
}

template <int T, class W, class Finish>
void linear_few(const W& w, typename W::Few x, float* y, int64_t N, Finish finish) {
    const int R = T <= 2 ? 4 : 2;  // streams in flight, as far as registers hold their sums
    // Rows are handed out in pieces of some 256 KiB as threads come for them: cores may differ in speed or be taken away.
    const int64_t piece = std::max<int64_t>(16, (1 << 18) / w.row_bytes() / 16 * 16);
#pragma omp parallel for schedule(dynamic)
    for (int64_t n0 = 0; n0 < N; n0 += piece) {
        int64_t n = n0, end = std::min(N, n0 + piece);
        for (; n + R <= end; n += R) few_rows<R, T>(w, x, y, n, N);
        for (; n < end; n++) few_rows<1, T>(w, x, y, n, N);
        for (int t = 0; t < T; t++) finish(y + t * N + n0, t, n0, end - n0);
    }
}

template <class L, class W, class Finish>
void linear_many(const W& w, const Inputs& x, float* y, int64_t N, Finish finish) {
    typedef typename L::E E;
    const int64_t ROWS = 32, DEPTH = 4096 / sizeof(E);  // a tile of w: 128 KiB, to stay in a small L2 cache
    static thread_local Scratch<E> inputs;
    E* xs = inputs.get(x.T * x.stride);
#pragma omp parallel
    {
        static thread_local Scratch<E> memory;
        static thread_local Scratch<float> floats;
        E* tile = memory.get(ROWS * DEPTH);
        float* row = floats.get(DEPTH);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < x.T; t++) L::from_float(x.row(t), xs + t * x.stride, x.stride);
#pragma omp for schedule(dynamic)
        for (int64_t n0 = 0; n0 < N; n0 += ROWS) {
            int64_t rows = std::min(ROWS, N - n0);
            for (int64_t t = 0; t < x.T; t++) std::fill_n(y + t * N + n0, rows, 0.f);
            for (int64_t k0 = 0; k0 < x.stride; k0 += DEPTH) {
                int64_t depth = std::min(DEPTH, x.stride - k0);
                for (int64_t r = 0; r < rows; r++) {
                    w.unpack(n0 + r, k0, depth, row);
                    L::from_float(row, tile + r * depth, depth);
                }
                tile_all<L>(tile, rows, depth, xs + k0, x.stride, x.T, y + n0, N);
            }
            for (int64_t t = 0; t < x.T; t++) finish(y + t * N + n0, t, n0, rows);
        }
    }
}

template <class W, class Finish>
void linear(const W& w, const Inputs& x, float* y, int64_t N, Finish finish) {
    switch (x.T) {
        case 1: return linear_few<1>(w, w.prepare(x), y, N, finish);
        case 2: return linear_few<2>(w, w.prepare(x), y, N, finish);
        case 3: return linear_few<3>(w, w.prepare(x), y, N, finish);
        case 4: return linear_few<4>(w, w.prepare(x), y, N, finish);
        case 5: return linear_few<5>(w, w.prepare(x), y, N, finish);
        case 6: return linear_few<6>(w, w.prepare(x), y, N, finish);
        case 7: return linear_few<7>(w, w.prepare(x), y, N, finish);
        case 8: return linear_few<8>(w, w.prepare(x), y, N, finish);
        default: return linear_many<typename W::Many>(w, x, y, N, finish);
    }
}

inline Inputs& inputs() {  // one for each thread that calls, kept: no allocation once it has grown
    static thread_local Inputs x;
    return x;
}

// The first product of a block: y = [q k v gelu(fc_in)], where x is the normed state (T, K), w (N, K), and the bias
// belongs to the last I outputs, which pass through gelu_new.
template <class W>
void linear_in(const float* x, const W& w, const float* bias, float* y, int64_t T, int64_t N, int64_t I) {
    Inputs& in = inputs();
    in.resize(T, w.K);
    in.put(x, w.K, 0, w.K);
    linear(w, in, y, N, [=](float* ys, int64_t, int64_t n, int64_t count) {
        int64_t skip = std::min(std::max<int64_t>(N - I - n, 0), count);
        const float* b = bias + (n + skip - (N - I));
        map(ys + skip, count - skip, [=](vec v, int64_t i, int m) {
            return gelu_new(add(v, m == VEC ? load(b + i) : load_n(b + i, m)));
        });
    });
}

// The second product: y = residual + [a, m] w^T + bias; a is attention's result (T, A), m the last w.K - A columns of the
// first product's (T, M), w (N, K).
template <class W>
void linear_out(const float* a, const float* mlp, const W& w, const float* bias, const float* residual, float* y, int64_t T,
                int64_t N, int64_t A, int64_t M) {
    Inputs& in = inputs();
    in.resize(T, w.K);
    in.put(a, A, 0, A);
    in.put(mlp + M - (w.K - A), M, A, w.K - A);
    linear(w, in, y, N, [=](float* ys, int64_t t, int64_t n, int64_t count) {
        for (int64_t i = 0; i < count; i++) ys[i] += bias[n + i] + residual[t * N + n + i];
    });
}

// lm_head: y = x w^T + bias.
template <class W>
void linear_head(const float* x, const W& w, const float* bias, float* y, int64_t T, int64_t N) {
    Inputs& in = inputs();
    in.resize(T, w.K);
    in.put(x, w.K, 0, w.K);
    linear(w, in, y, N, [=](float* ys, int64_t, int64_t n, int64_t count) {
        for (int64_t i = 0; i < count; i++) ys[i] += bias[n + i];
    });
}

}  // namespace moss
