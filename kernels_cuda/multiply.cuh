// The arithmetic of a warp's products: 16 rows of weights times 8 tokens, STEP = 32 inputs at a time, fp32 sums.
// Lane l has of two rows, which the weights say, inputs 8 (l % 4) ... + 7 of a step as halves, and of token l / 4 the same inputs: a
// matrix instruction takes the inputs of a sum in any order, as long as it is the same in both factors, so 16 bytes of a row and 16 of a token are
// what its fragments are made of. Without tensor cores (before sm_75) a lane sums over its own inputs.
#pragma once
#include "device.cuh"

namespace moss_cuda {

const int PANEL = 16;  // rows
const int STEP = 32;   // inputs

#if MOSS_MMA  // 16816 or 1688: what the card has

// c += 16 rows x 8 tokens of a step. Lane l then has its two rows' sums of tokens 2 (l % 4) and the one after it: c[2 row + token].
__device__ inline void multiply(float c[4], const uint4 rows[2], const uint4& x) {
    const uint4 &a = rows[0], &b = rows[1];
#if MOSS_MMA == 16816
    const uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
    mma_16816(c, first, &x.x);
    mma_16816(c, second, &x.z);
#else
    const uint32_t all[4][2] = {{a.x, b.x}, {a.y, b.y}, {a.z, b.z}, {a.w, b.w}};
    mma_1688(c, all[0], &x.x);
    mma_1688(c, all[1], &x.y);
    mma_1688(c, all[2], &x.z);
    mma_1688(c, all[3], &x.w);
#endif
}

// The sums of a panel and up to 8 TILES tokens.
template <int TILES>
struct Sums {
    float at[TILES][4] = {};

    // x: the step's inputs of T tokens, [T][STEP] halves. Tokens from T on get the last one's: nobody asks for their sums.
    __device__ void add(const uint4 rows[2], const __half* x, int T, int lane) {
#pragma unroll
        for (int i = 0; i < TILES; i++)
            multiply(at[i], rows, *(const uint4*)(x + min(8 * i + lane / 4, T - 1) * STEP + lane % 4 * 8));
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
struct Sums {
    float at[8 * TILES][2] = {};  // over the lane's inputs

    __device__ void add(const uint4 rows[2], const __half* x, int T, int lane) {
        float2 a[2][4];
#pragma unroll
        for (int r = 0; r < 2; r++) floats(rows[r], a[r]);
#pragma unroll
        for (int t = 0; t < 8 * TILES; t++)
            if (t < T) {
                float2 b[4];
                floats(*(const uint4*)(x + t * STEP + lane % 4 * 8), b);
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
        const __half2* h = (const __half2*)&halves;
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = __half22float2(h[i]);
    }
};

#endif

}  // namespace moss_cuda
