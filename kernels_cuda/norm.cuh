// y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, for each of T rows of D floats; y in halves.
// Moves 6 T D bytes. A block of threads has a row, and reads it three times: after the first it lies in the L1 cache, and a second
// pass is exact where E[x^2] - E[x]^2 would cancel. Where the weights that follow have their inputs in other orders, y has a part
// for each.
#pragma once
#include "device.cuh"

namespace moss_cuda {

struct Norm {
    const float *weight, *bias;  // D
    float eps;
};

// Grid: rows, orders.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    layer_norm_kernel(const float* __restrict__ x, Norm norm, const int32_t* __restrict__ order, half* __restrict__ y, int64_t D,
                      int64_t stride) {
    x += blockIdx.x * D, y += (blockIdx.y * (int64_t)gridDim.x + blockIdx.x) * stride;
    float sum = 0;
    for (int64_t i = threadIdx.x; i < D; i += THREADS) sum += x[i];
    const float mean = block_sum<THREADS>(sum) / D;
    sum = 0;
    for (int64_t i = threadIdx.x; i < D; i += THREADS) sum += (x[i] - mean) * (x[i] - mean);
    const float scale = rsqrtf(block_sum<THREADS>(sum) / D + norm.eps);
    for (int64_t i = threadIdx.x; i < stride; i += THREADS) {
        const int64_t from = order && i < D ? order[blockIdx.y * D + i] : i;
        y[i] = i < D ? __float2half_rn((x[from] - mean) * scale * norm.weight[from] + norm.bias[from]) : half(0.f);
    }
}

// x float (T, D), y half (max(orders, 1), T, stride), zeros from D on. order (orders, D): entry i of y's rows is entry order[i]; null
// where there is none.
inline void launch_layer_norm(const float* x, const Norm& norm, const int32_t* order, int orders, half* y, int64_t T, int64_t D,
                              int64_t stride, cudaStream_t stream) {
    constexpr int THREADS = 512;
    const dim3 grid(T, orders > 1 ? orders : 1);
    MOSS_LAUNCH(layer_norm_kernel<THREADS>, grid, dim3(THREADS), 0, stream, x, norm, order, y, D, stride);
}

}  // namespace moss_cuda
