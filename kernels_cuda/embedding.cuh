// x[t] = wte[ids[t]]: T rows of D halves, as floats. wte may be the host's memory, mapped: then the 2 T D bytes that are read cross
// the link, and what counts is that all reads are on their way at once: each thread reads 16 bytes, once.
#pragma once
#include "device.cuh"

namespace moss_cuda {

constexpr int EMBEDDING_THREADS = 128;

__global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_kernel(const int32_t* __restrict__ ids, const half* __restrict__ wte, float* __restrict__ x, int64_t D) {
    const half* row = wte + (ids ? ids[blockIdx.x] : blockIdx.x) * D;
    float* to = x + blockIdx.x * D;
    const int64_t i = ((int64_t)blockIdx.y * EMBEDDING_THREADS + threadIdx.x) * 8;
    if (D % 8 == 0) {  // then all rows are aligned
        if (i >= D) return;
        const uint4 v = load16(row + i);
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const float2 two = __half22float2(as_half2(pairs[p]));
            to[i + 2 * p] = two.x, to[i + 2 * p + 1] = two.y;
        }
    } else {
        for (int64_t e = i; e < i + 8 && e < D; e++) to[e] = __half2float(row[e]);
    }
}

// ids (T), each a row of wte, or null: its rows as they are; wte half (V, D), aligned to 16 bytes; x float (T, D).
inline void launch_embedding(const int32_t* ids, const half* wte, float* x, int64_t T, int64_t D, cudaStream_t stream) {
    const int64_t per_block = EMBEDDING_THREADS * 8;
    MOSS_LAUNCH(embedding_kernel, dim3(T, (D + per_block - 1) / per_block), dim3(EMBEDDING_THREADS), 0, stream, ids, wte, x, D);
}

}  // namespace moss_cuda
