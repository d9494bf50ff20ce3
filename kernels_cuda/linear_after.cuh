// What follows a product, in the kernel that has its sums: bias, gelu, residual, and where the result goes.
#pragma once
#include "device.cuh"

namespace moss_cuda {

// One type for all three, so that each product is compiled once; all threads branch alike.
struct After {
    enum Kind { IN, OUT, HEAD } kind;
    const float* bias;
    int64_t D, I;          // OUT and HEAD: D outputs
    const float* x;        // OUT: (T, D)
    float* y;              // OUT, HEAD: (T, D)
    half *qkv, *both;      // IN: (T, 3 D), (T, D + I)

    // v is the sum of token t and output n.
    __device__ void operator()(int64_t t, int n, float v) const {
        if (kind == IN) {
            if (n < 3 * D) {
                qkv[t * 3 * D + n] = __float2half_rn(v);
                return;
            }
            v += bias[n - 3 * D];
            // gelu_new: 0.5 (1 + tanh(u)) is 1 / (1 + exp(-2 u)), which loses nothing where tanh(u) is near -1.
            const float u = 0.7978845608f * (v + 0.044715f * v * v * v);  // sqrt(2 / pi)
            both[t * (D + I) + n - 2 * D] = __float2half_rn(v / (1 + expf(-2 * u)));
        } else {
            v += bias[n];
            y[t * D + n] = kind == OUT ? x[t * D + n] + v : v;
        }
    }
};

// The sums of slices of the inputs that were multiplied apart: (slices, T, N), to be added in order. Null where there is one.
struct Partial {
    float* at;
    int slices, tokens, n;

    __device__ float* of(int slice, int t) const { return at + ((int64_t)slice * tokens + t) * n; }
};

// Where the sum of a slice, output n and token t, counted from `first` on, goes.
__device__ inline void put(const Partial& partial, const After& after, int slice, int first, int t, int n, float v) {
    if (partial.at) partial.of(slice, t)[n] = v;
    else after(first + t, n, v);
}

// Grid: parts of the outputs, tokens. first: the number of the first token.
__global__ void __launch_bounds__(256) add_slices_kernel(Partial partial, int first, After after) {
    const int t = blockIdx.y, n = blockIdx.x * 256 + threadIdx.x;
    if (n >= partial.n) return;
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < partial.slices; i++) sum += partial.of(i, t)[n];
    after(first + t, n, sum);
}

inline void launch_add_slices(const Partial& partial, int first, const After& after, cudaStream_t stream) {
    MOSS_LAUNCH(add_slices_kernel, dim3((partial.n + 255) / 256, partial.tokens), dim3(256), 0, stream, partial, first, after);
}

}  // namespace moss_cuda
