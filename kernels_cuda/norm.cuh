// y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, for each of T rows of D floats; y in halves.
// Moves 6 T D bytes. A block of threads has a row, and reads it three times: after the first it lies in the L1 cache, and a second
// pass is exact where E[x^2] - E[x]^2 would cancel.
#pragma once
#include "device.cuh"

namespace moss_cuda {

struct Norm {
    const float *weight, *bias;  // D
    float eps;
};

template <int THREADS>
__global__ void __launch_bounds__(THREADS) layer_norm_kernel(const float* __restrict__ x, Norm norm, half* __restrict__ y, int64_t D) {
    x += blockIdx.x * D, y += blockIdx.x * D;
    float sum = 0;
    for (int64_t i = threadIdx.x; i < D; i += THREADS) sum += x[i];
    const float mean = block_sum<THREADS>(sum) / D;
    sum = 0;
    for (int64_t i = threadIdx.x; i < D; i += THREADS) sum += (x[i] - mean) * (x[i] - mean);
    const float scale = rsqrtf(block_sum<THREADS>(sum) / D + norm.eps);
    for (int64_t i = threadIdx.x; i < D; i += THREADS)
        y[i] = __float2half_rn((x[i] - mean) * scale * norm.weight[i] + norm.bias[i]);
}

// x float (T, D), y half (T, D).
inline void launch_layer_norm(const float* x, const Norm& norm, half* y, int64_t T, int64_t D, cudaStream_t stream) {
    constexpr int THREADS = 512;
    MOSS_LAUNCH(layer_norm_kernel<THREADS>, dim3(T), dim3(THREADS), 0, stream, x, norm, y, D);
}

}  // namespace moss_cuda
