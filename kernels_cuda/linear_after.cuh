// What follows a product: bias, gelu, residual, and where the result goes. Called with a sum of token t and output n.
#pragma once
#include "device.cuh"

namespace moss_cuda {

// [q k v] as it is, gelu_new(f + bias) into its place beside attention's result: qkv (T, 3 D), both (T, D + I) halves.
struct AfterIn {
    const float* bias;
    __half *qkv, *both;
    int D, I;
    __device__ void operator()(int t, int n, float v) const {
        if (n < 3 * D) {
            qkv[(int64_t)t * 3 * D + n] = __float2half(v);
            return;
        }
        v += bias[n - 3 * D];
        // 0.5 (1 + tanh(u)) is 1 / (1 + exp(-2 u)), which loses nothing where tanh(u) is near -1.
        const float u = 0.7978845608f * (v + 0.044715f * v * v * v);
        both[(int64_t)t * (D + I) + n - 2 * D] = __float2half(v / (1 + expf(-2 * u)));
    }
};

// y (T, D) = x + v + bias
struct AfterOut {
    const float *bias, *x;
    float* y;
    int D;
    __device__ void operator()(int t, int n, float v) const {
        const int64_t at = (int64_t)t * D + n;
        y[at] = x[at] + (v + bias[n]);
    }
};

// logits (T, V) = v + bias
struct AfterHead {
    const float* bias;
    float* logits;
    int V;
    __device__ void operator()(int t, int n, float v) const { logits[(int64_t)t * V + n] = v + bias[n]; }
};

// Slices of the inputs that were multiplied apart: partial (slices, T, N), added in order. Null where there is one slice.
struct Partial {
    float* at;
    int slices;

    template <class After>
    __device__ void put(int slice, int tokens, int N, int first, int t, int n, float v, const After& after) const {
        if (at) at[((int64_t)slice * tokens + t) * N + n] = v;
        else after(first + t, n, v);
    }
};

template <class After>
__global__ void __launch_bounds__(256) add_slices(Partial partial, int first, int N, After after) {
    const int t = blockIdx.y, n = blockIdx.x * 256 + threadIdx.x;
    if (n >= N) return;
    const float* from = partial.at + (int64_t)t * N + n;
    const int64_t apart = (int64_t)gridDim.y * N;
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < partial.slices; i++) sum += from[i * apart];
    after(first + t, n, sum);
}

}  // namespace moss_cuda
