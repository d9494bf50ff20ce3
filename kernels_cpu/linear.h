// y[t, n] = sum over k of x[t, k] w[n, k], for T tokens, N outputs, K inputs; w is fp16 with contiguous rows, the
// arithmetic fp32. `finish(y, t, n, count)` then turns count raw sums at y, outputs n ... of token t, into the result
// in place (bias, gelu, residual), while they are still in the cache.
//
// Few tokens: bytes moved are those of w, 2 N K, read once; the goal is the speed of memory. Each thread walks its own
// rows, ROWS at a time so that several streams are in flight, converts in registers and keeps the sums there.
// Many tokens: the arithmetic is the limit. A tile of w is converted to fp32 once, into the L2 cache, and used for all
// tokens; the sums of 4 rows x 6 tokens stay in registers (AVX-512; fewer where there are 16 registers).
#pragma once
#include <algorithm>
#include <vector>
#include "simd.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace moss {

const int FEW_TOKENS = 8;  // up to here every weight is used straight from the load that brought it

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The inputs of a product: T rows of K floats, 64-byte aligned, each padded with zeros to a whole number of vectors,
// so that the inner loops have no tails on this side. The storage is kept from call to call.
struct Inputs {
    std::vector<float> storage;
    float* at = nullptr;
    int64_t stride = 0;

    void resize(int64_t T, int64_t K) {
        stride = round_up(K, 16);
        if ((int64_t)storage.size() < T * stride + 16) storage.resize(T * stride + 16);
        at = (float*)round_up((int64_t)storage.data(), 64);
    }
    // Copy columns [k, k + n) of every row from rows of `from_stride` floats; the last call of a row pads it.
    void put(const float* from, int64_t from_stride, int64_t T, int64_t k, int64_t n) {
        for (int64_t t = 0; t < T; t++) {
            memcpy(at + t * stride + k, from + t * from_stride, 4 * n);
            std::fill(at + t * stride + k + n, at + (t + 1) * stride, 0.f);
        }
    }
    const float* row(int64_t t) const { return at + t * stride; }
};

// Sums over K of R rows of w (fp16, row stride K) times T tokens.
template <int R, int T>
inline void dot_f16(const f16* w, int64_t K, const float* x, int64_t x_stride, float sums[R][T]) {
    vec acc[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = zero();
    int64_t k = 0;
    for (; k + VEC <= K; k += VEC) {
        vec xs[T];
        for (int t = 0; t < T; t++) xs[t] = load(x + t * x_stride + k);
        for (int r = 0; r < R; r++) {
            vec ws = load_f16(w + r * K + k);
            for (int t = 0; t < T; t++) acc[r][t] = fma(ws, xs[t], acc[r][t]);
        }
    }
    if (k < K)
        for (int r = 0; r < R; r++) {
            vec ws = load_f16_n(w + r * K + k, (int)(K - k));
            for (int t = 0; t < T; t++) acc[r][t] = fma(ws, load(x + t * x_stride + k), acc[r][t]);
        }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) sums[r][t] = sum(acc[r][t]);
}

template <int R, int T>
inline void few_rows(const Inputs& x, const f16* w, float* y, int64_t n, int64_t N, int64_t K) {
    float sums[R][T];
    dot_f16<R, T>(w + n * K, K, x.row(0), x.stride, sums);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) y[t * N + n + r] = sums[r][t];
}

template <int T, class Finish>
void linear_few(const Inputs& x, const f16* w, float* y, int64_t N, int64_t K, Finish finish) {
    const int R = T <= 2 ? 4 : 2;
    // Rows are handed out in pieces of some 256 KiB as threads come for them: cores may differ in speed or be taken away.
    const int64_t piece = std::max<int64_t>(16, (1 << 17) / K / 16 * 16);
#pragma omp parallel for schedule(dynamic)
    for (int64_t n0 = 0; n0 < N; n0 += piece) {
        int64_t n = n0, end = std::min(N, n0 + piece);
        for (; n + R <= end; n += R) few_rows<R, T>(x, w, y, n, N, K);
        for (; n < end; n++) few_rows<1, T>(x, w, y, n, N, K);
        for (int t = 0; t < T; t++) finish(y + t * N + n0, t, n0, end - n0);
    }
}

// y[t, n] += sums of R rows of a tile of w (fp32, row stride w_stride) times T tokens, K a whole number of vectors.
template <int R, int T>
inline void tile_f32(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t K, float* y, int64_t N) {
    vec acc[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = zero();
    for (int64_t k = 0; k < K; k += VEC) {
        vec ws[R];
        for (int r = 0; r < R; r++) ws[r] = load(w + r * w_stride + k);
        for (int t = 0; t < T; t++) {
            vec xs = load(x + t * x_stride + k);
            for (int r = 0; r < R; r++) acc[r][t] = fma(ws[r], xs, acc[r][t]);
        }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) y[t * N + r] += sum(acc[r][t]);
}

template <class Finish>
void linear_many(const Inputs& x, const f16* w, float* y, int64_t T, int64_t N, int64_t K, Finish finish) {
#if defined(MOSS_AVX512)
    const int R = 4, TOKENS = 6;
#else
    const int R = 2, TOKENS = 4;
#endif
    const int64_t ROWS = 32, DEPTH = 1024;  // a tile of w: 128 KiB in fp32, half of a small L2 cache
#pragma omp parallel
    {
        std::vector<float> storage(ROWS * DEPTH + 16);
        float* tile = (float*)round_up((int64_t)storage.data(), 64);
#pragma omp for schedule(dynamic)
        for (int64_t n0 = 0; n0 < N; n0 += ROWS) {
            int64_t rows = std::min(ROWS, N - n0);
            for (int64_t t = 0; t < T; t++) std::fill_n(y + t * N + n0, rows, 0.f);
            for (int64_t k0 = 0; k0 < K; k0 += DEPTH) {
                int64_t depth = std::min(DEPTH, K - k0), padded = round_up(depth, VEC);
                for (int64_t r = 0; r < rows; r++) {
                    const f16* from = w + (n0 + r) * K + k0;
                    float* to = tile + r * padded;
                    int64_t k = 0;
                    for (; k + VEC <= depth; k += VEC) store(to + k, load_f16(from + k));
                    if (k < depth) store(to + k, load_f16_n(from + k, (int)(depth - k)));
                }
                for (int64_t t = 0; t < T;) {
                    bool whole = t + TOKENS <= T;
                    const float* xs = x.row(t) + k0;
                    float* ys = y + t * N + n0;
                    int64_t r = 0;
                    for (; r + R <= rows; r += R) {
                        if (whole) tile_f32<R, TOKENS>(tile + r * padded, padded, xs, x.stride, padded, ys + r, N);
                        else tile_f32<R, 1>(tile + r * padded, padded, xs, x.stride, padded, ys + r, N);
                    }
                    for (; r < rows; r++) {
                        if (whole) tile_f32<1, TOKENS>(tile + r * padded, padded, xs, x.stride, padded, ys + r, N);
                        else tile_f32<1, 1>(tile + r * padded, padded, xs, x.stride, padded, ys + r, N);
                    }
                    t += whole ? TOKENS : 1;
                }
            }
            for (int64_t t = 0; t < T; t++) finish(y + t * N + n0, t, n0, rows);
        }
    }
}

template <class Finish>
void linear(const Inputs& x, const f16* w, float* y, int64_t T, int64_t N, int64_t K, Finish finish) {
    switch (T) {
        case 1: return linear_few<1>(x, w, y, N, K, finish);
        case 2: return linear_few<2>(x, w, y, N, K, finish);
        case 3: return linear_few<3>(x, w, y, N, K, finish);
        case 4: return linear_few<4>(x, w, y, N, K, finish);
        case 5: return linear_few<5>(x, w, y, N, K, finish);
        case 6: return linear_few<6>(x, w, y, N, K, finish);
        case 7: return linear_few<7>(x, w, y, N, K, finish);
        case 8: return linear_few<8>(x, w, y, N, K, finish);
        default: return linear_many(x, w, y, T, N, K, finish);
    }
}

inline Inputs& inputs() {  // one a thread that calls, kept: no allocation once it has grown
    static thread_local Inputs x;
    return x;
}

// The first product of a block: y = [q k v gelu(fc_in)], where x is the normed state (T, K), w (N, K), and the bias
// belongs to the last I outputs, which pass through gelu_new.
inline void linear_in(const float* x, const f16* w, const float* bias, float* y, int64_t T, int64_t N, int64_t K, int64_t I) {
    Inputs& in = inputs();
    in.resize(T, K);
    in.put(x, K, T, 0, K);
    linear(in, w, y, T, N, K, [=](float* ys, int64_t, int64_t n, int64_t count) {
        int64_t skip = std::min(std::max<int64_t>(N - I - n, 0), count);
        const float* b = bias + (n + skip - (N - I));
        map(ys + skip, count - skip, [=](vec v, int64_t i, int m) { return gelu_new(add(v, m == VEC ? load(b + i) : load_n(b + i, m))); });
    });
}

// The second product: y = residual + [a, m] w^T + bias; a is attention's result (T, A), m the last I columns of the
// first product's (T, M), w (N, A + I).
inline void linear_out(const float* a, const float* mlp, const f16* w, const float* bias, const float* residual, float* y,
                       int64_t T, int64_t N, int64_t A, int64_t I, int64_t M) {
    Inputs& in = inputs();
    in.resize(T, A + I);
    in.put(a, A, T, 0, A);
    in.put(mlp + M - I, M, T, A, I);
    linear(in, w, y, T, N, A + I, [=](float* ys, int64_t t, int64_t n, int64_t count) {
        for (int64_t i = 0; i < count; i++) ys[i] += bias[n + i] + residual[t * N + n + i];
    });
}

// lm_head: y = x w^T + bias.
inline void linear_head(const float* x, const f16* w, const float* bias, float* y, int64_t T, int64_t N, int64_t K) {
    Inputs& in = inputs();
    in.resize(T, K);
    in.put(x, K, T, 0, K);
    linear(in, w, y, T, N, K, [=](float* ys, int64_t, int64_t n, int64_t count) {
        for (int64_t i = 0; i < count; i++) ys[i] += bias[n + i];
    });
}

}  // namespace moss
