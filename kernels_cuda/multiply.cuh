// The arithmetic of a warp's products: 16 rows of weights times tokens, a step of 32 inputs at a time, with fp32 sums.
// Lane l has inputs 8 (l % 4) ... + 7 of a step: of two rows (which ones, the weights say), and of token l / 4. A matrix
// instruction takes the inputs of a sum in any order that is the same for both factors, so 16 bytes of a row and 16 of a token are
// its fragments as they are. Without tensor cores (before sm_75) a lane sums over its own inputs, and lanes are added at the end.
#pragma once
#include "device.cuh"

namespace moss_cuda {

const int PANEL = 16;  // rows
const int STEP = 32;   // inputs

#if MOSS_TENSOR_CORES

// c += 16 rows x 8 tokens of a step. c[2 i + j] is the sum of the lane's row i and token 2 (l % 4) + j.
__device__ inline void multiply(float c[4], const uint4 rows[2], const uint4& x) {
    const uint32_t first[4] = {rows[0].x, rows[1].x, rows[0].y, rows[1].y};
    const uint32_t second[4] = {rows[0].z, rows[1].z, rows[0].w, rows[1].w};
    const uint32_t of_first[2] = {x.x, x.y}, of_second[2] = {x.z, x.w};
    mma_16816(c, first, of_first);
    mma_16816(c, second, of_second);
}

// Where a lane finds its inputs among those of a step, [T][STEP] halves. Of tokens from T on it takes the last one's: nobody asks
// for their sums.
template <int TILES>
struct Columns {
    int at[TILES];
    __device__ Columns(int T, int lane) {
#pragma unroll
        for (int i = 0; i < TILES; i++) at[i] = min(8 * i + lane / 4, T - 1) * STEP + lane % 4 * 8;
    }
};

// The sums of a panel and up to 8 TILES tokens.
template <int TILES>
struct Sums {
    float at[TILES][4] = {};

    // x: the inputs of a step.
    __device__ void add(const uint4 rows[2], const half* x, const Columns<TILES>& columns) {
#pragma unroll
        for (int i = 0; i < TILES; i++) multiply(at[i], rows, *(const uint4*)(x + columns.at[i]));
    }

    __device__ void add_scaled(const Sums& s, float2 scale) {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) at[i][j] += s.at[i][j] * (j < 2 ? scale.x : scale.y);
    }

    // f(token, which of the lane's rows, sum)
    template <class F>
    __device__ void each(int T, int lane, F f) {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int t = 8 * i + lane % 4 * 2 + j % 2;
                if (t < T) f(t, j / 2, at[i][j]);
            }
    }
};

#else

template <int TILES>
struct Columns {
    int T, at;
    __device__ Columns(int T, int lane) : T(T), at(lane % 4 * 8) {}
};

template <int TILES>
struct Sums {
    float at[8 * TILES][2] = {};  // over the lane's inputs

    __device__ void add(const uint4 rows[2], const half* x, const Columns<TILES>& columns) {
        float2 a[2][4];
        floats(rows[0], a[0]), floats(rows[1], a[1]);
#pragma unroll
        for (int t = 0; t < 8 * TILES; t++)
            if (t < columns.T) {
                float2 b[4];
                floats(*(const uint4*)(x + t * STEP + columns.at), b);
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int i = 0; i < 4; i++) at[t][r] += a[r][i].x * b[i].x + a[r][i].y * b[i].y;
            }
    }

    __device__ void add_scaled(const Sums& s, float2 scale) {
#pragma unroll
        for (int t = 0; t < 8 * TILES; t++) at[t][0] += s.at[t][0] * scale.x, at[t][1] += s.at[t][1] * scale.y;
    }

    template <class F>
    __device__ void each(int T, int lane, F f) {
#pragma unroll
        for (int t = 0; t < 8 * TILES; t++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float s = at[t][r];
                s += __shfl_xor_sync(~0u, s, 1);
                s += __shfl_xor_sync(~0u, s, 2);
                if (t < T && t % 4 == lane % 4) f(t, r, s);
            }
    }

private:
    __device__ static void floats(const uint4& halves, float2 to[4]) {
        const half2* h = (const half2*)&halves;
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = __half22float2(h[i]);
    }
};

#endif

}  // namespace moss_cuda
