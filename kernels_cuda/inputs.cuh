// The inputs of a product: T tokens of K halves, in the order in which the weights are stored, in rows of a multiple of 8.
#pragma once
#include "multiply.cuh"
#include "norm.cuh"

namespace moss_cuda {

// Input k of token t, for the rows of order o: at[(o * all + t) * stride + k]; zeros from K to the stride.
struct Inputs {
    const half* at;
    int stride, all;    // of a row; tokens
    int first, tokens;  // those that are multiplied

    // Starts copying 8 inputs from k on to shared memory; zeros unless `any` are there.
    __device__ void copy(half* to, int order, int t, int k, bool any) const {
        any = any && k < stride;
        const half* row = at + ((int64_t)order * all + first + t) * stride;
        cp_async16(to, any ? row + k : row, any ? 16 : 0);
    }
};

inline int64_t row_stride(int64_t K) { return (K + 7) / 8 * 8; }

// y (T, stride) = x (T, K) in another order (or the same, where that is null), zeros from K on. Grid: tokens, parts of a row.
__global__ void __launch_bounds__(256)
    gather_kernel(const half* __restrict__ x, const int32_t* __restrict__ order, half* __restrict__ y, int64_t K, int64_t stride) {
    const int64_t i = blockIdx.y * 256 + threadIdx.x, t = blockIdx.x;
    if (i < stride) y[t * stride + i] = i < K ? x[t * K + (order ? order[i] : i)] : half(0.f);
}

inline void launch_gather(const half* x, const int32_t* order, half* y, int64_t T, int64_t K, int64_t stride, cudaStream_t stream) {
    MOSS_LAUNCH(gather_kernel, dim3(T, (stride + 255) / 256), dim3(256), 0, stream, x, order, y, K, stride);
}

}  // namespace moss_cuda
