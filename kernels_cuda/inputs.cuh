// The inputs of a product: T tokens of K halves, rows of a multiple of 8, from what the model has: normed states, or the results
// of attention and MLP. In the order in which the weights are stored.
#pragma once
#include "multiply.cuh"

namespace moss_cuda {

struct Norm {
    const float *weight, *bias;
    float eps;
};

// Input k of token t of the rows with order o: at[(o * all + t) * stride + k]; zeros from K to the stride.
struct Inputs {
    const __half* at;
    int stride, all;    // of a row; tokens
    int first, tokens;  // those that are to be multiplied

    __device__ const __half* row(int order, int t) const { return at + ((int64_t)order * all + first + t) * stride; }

    // Starts copying 8 inputs from k on to shared memory; zeros where there are none.
    __device__ void copy(__half* to, int order, int t, int k, bool any) const {
        if (any && k < stride) cp_async16(to, row(order, t) + k);
        else *(uint4*)to = uint4{0, 0, 0, 0};
    }
};

inline int64_t row_stride(int64_t K) { return (K + 7) / 8 * 8; }

const int NORM_THREADS = 512;

// The sum over a block.
__device__ inline float block_sum(float v) {
    __shared__ float sums[NORM_THREADS / 32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < NORM_THREADS / 32; i++) v += sums[i];
    __syncthreads();
    return v;
}

// to (orders, T, stride) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, x (T, K) floats. A block has a token and an order.
// Moves 4 T K bytes, and 2 T K for each order. Reading x again costs next to nothing: it lies in the L1 cache. A second pass is
// exact where E[x^2] - E[x]^2 would cancel.
__global__ void __launch_bounds__(NORM_THREADS) norm_inputs(const float* x, Norm norm, const int32_t* order, int K, int stride, __half* to) {
    const float* row = x + (int64_t)blockIdx.x * K;
    float sum = 0;
    for (int i = threadIdx.x; i < K; i += NORM_THREADS) sum += row[i];
    const float mean = block_sum(sum) / K;
    sum = 0;
    for (int i = threadIdx.x; i < K; i += NORM_THREADS) sum += (row[i] - mean) * (row[i] - mean);
    const float scale = rsqrtf(block_sum(sum) / K + norm.eps);
    to += ((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * stride;
    for (int i = threadIdx.x; i < stride; i += NORM_THREADS) {
        const int from = i < K && order ? order[(int64_t)blockIdx.y * K + i] : i;
        to[i] = __float2half(i < K ? (row[from] - mean) * scale * norm.weight[from] + norm.bias[from] : 0.f);
    }
}

// to (T, stride) = x (T, K) halves in another order, or in rows of a multiple of 8. A block has a token.
__global__ void __launch_bounds__(NORM_THREADS) gather_inputs(const __half* x, const int32_t* order, int K, int stride, __half* to) {
    const __half* row = x + (int64_t)blockIdx.x * K;
    to += (int64_t)blockIdx.x * stride;
    for (int i = threadIdx.x; i < stride; i += NORM_THREADS) to[i] = i < K ? row[order ? order[i] : i] : __float2half(0.f);
}

}  // namespace moss_cuda
