// Products of float matrices for training: c (M, N) = or += a (M, K) b (K, N). Inference has its own (linear.h); here both
// operands may be transposed, results are fp32 throughout, and the same numbers give the same bits, whatever the threads do.
//
// As in Goto and van de Geijn (2008): a slice of KC inputs of both operands is packed for the inner kernel, b's columns in
// panels of NR that stay in the L1 cache, a's rows in panels of MR, a block of which stays in the L2. The kernel keeps MR x NR sums in
// registers. Threads pack together and then take tiles of c; each tile's sums run over K in one order.
#pragma once
#include "inputs.h"

namespace moss {

const int MR = VEC == 16 ? 12 : 6, NR = 2 * VEC;
const int64_t KC = 256, MC = 20 * MR, NC = 2048, MB = 2048 / MC * MC;
const int64_t TILE_N = 8 * NR;  // columns of a tile of c, whose rows are MC

// n rows of `count` floats each (rows `stride` apart) -> to[count][W], n <= W, zeros from n on.
template <int W>
inline void interleave(const float* from, int64_t stride, int64_t n, int64_t count, float* to) {
    int64_t k = 0;
    if (n == W && W % VEC == 0)
        for (; k + VEC <= count; k += VEC)
            for (int j = 0; j < W; j += VEC) turn(from + j * stride + k, stride, to + k * W + j, W);
    else if (n == W)
        for (; k < count; k++)
            MOSS_UNROLL
            for (int j = 0; j < W; j++) to[k * W + j] = from[j * stride + k];
    for (; k < count; k++)
        for (int j = 0; j < W; j++) to[k * W + j] = j < n ? from[j * stride + k] : 0;
}

// Element (i, j) at p[i * row + j * column]; one of these strides is 1.
struct Strided {
    const float* p;
    int64_t row, column;

    // Rows [i, i + n) of columns [k, k + count) -> to[count][W].
    template <int W>
    void pack_rows(int64_t i, int64_t n, int64_t k, int64_t count, float* to) const {
        const float* from = p + i * row + k * column;
        if (column == 1) return interleave<W>(from, row, n, count, to);
        for (int64_t at = 0; at < count; at++, from += column, to += W)
            if (n == W) memcpy(to, from, 4 * W);
            else
                for (int64_t j = 0; j < W; j++) to[j] = j < n ? from[j] : 0;
    }
    Strided turned() const { return {p, column, row}; }
    // Of a right operand: columns [j, j + n) of rows [k, k + count) -> to[count][NR].
    void pack(int64_t j, int64_t n, int64_t k, int64_t count, float* to) const { turned().pack_rows<NR>(j, n, k, count, to); }
};

inline Strided plain(const float* p, int64_t row) { return {p, row, 1}; }
inline Strided transposed(const float* p, int64_t row) { return {p, 1, row}; }  // of a matrix whose rows are `row` apart

// c[MR][NR] = or += the product of packed panels; of it, m rows and n columns are wanted.
inline void multiply_panels(const float* a, const float* b, int64_t K, float* c, int64_t stride, int64_t m, int64_t n, bool add_to) {
    vec acc[MR][2];
    MOSS_UNROLL
    for (int i = 0; i < MR; i++) acc[i][0] = acc[i][1] = zero();
    for (int64_t k = 0; k < K; k++, a += MR, b += NR) {
        const vec b0 = load(b), b1 = load(b + VEC);
        MOSS_UNROLL
        for (int i = 0; i < MR; i++) {
            const vec x = in_register(all(a[i]));
            acc[i][0] = fma(x, b0, acc[i][0]), acc[i][1] = fma(x, b1, acc[i][1]);
        }
    }
    if (m == MR && n == NR) {
        MOSS_UNROLL
        for (int i = 0; i < MR; i++) {
            float* to = c + i * stride;
            store(to, add_to ? add(acc[i][0], load(to)) : acc[i][0]);
            store(to + VEC, add_to ? add(acc[i][1], load(to + VEC)) : acc[i][1]);
        }
        return;
    }
    float tile[MR][NR];
    MOSS_UNROLL
    for (int i = 0; i < MR; i++) store(tile[i], acc[i][0]), store(tile[i] + VEC, acc[i][1]);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) c[i * stride + j] = tile[i][j] + (add_to ? c[i * stride + j] : 0);
}

// a: Strided, M x K. b: K x N, anything with pack(). c: rows `stride` apart. Where threads are at work already, by one thread.
template <class B>
void gemm(Strided a, const B& b, float* c, int64_t stride, int64_t M, int64_t N, int64_t K, bool add_to) {
    static thread_local Scratch<float> for_a, for_b;
    const int64_t slice = std::min(KC, K);
    float *pa = for_a.get(round_up(std::min(MB, M), MR) * slice), *pb = for_b.get(round_up(std::min(NC, N), NR) * slice);
#pragma omp parallel if (M * N * K > 100000)
    for (int64_t j0 = 0; j0 < N; j0 += NC)
        for (int64_t k0 = 0; k0 < K; k0 += KC) {
            const int64_t n = std::min(NC, N - j0), count = std::min(KC, K - k0);
#pragma omp for schedule(dynamic) nowait
            for (int64_t j = 0; j < n; j += NR) b.pack(j0 + j, std::min<int64_t>(NR, n - j), k0, count, pb + j * count);
            for (int64_t i0 = 0; i0 < M; i0 += MB) {
                const int64_t m = std::min(MB, M - i0), across = (n + TILE_N - 1) / TILE_N;
#pragma omp for schedule(dynamic, 4)
                for (int64_t i = 0; i < m; i += MR)
                    a.template pack_rows<MR>(i0 + i, std::min<int64_t>(MR, m - i), k0, count, pa + i * count);
#pragma omp for schedule(dynamic)
                for (int64_t tile = 0; tile < (m + MC - 1) / MC * across; tile++) {
                    const int64_t first = tile / across * MC, end = std::min(m, first + MC);
                    const int64_t left = tile % across * TILE_N, right = std::min(n, left + TILE_N);
                    for (int64_t j = left; j < right; j += NR)
                        for (int64_t i = first; i < end; i += MR)
                            multiply_panels(pa + i * count, pb + j * count, count, c + (i0 + i) * stride + j0 + j, stride,
                                            std::min<int64_t>(MR, end - i), std::min<int64_t>(NR, right - j), add_to || k0);
                }
            }
        }
}

}  // namespace moss
