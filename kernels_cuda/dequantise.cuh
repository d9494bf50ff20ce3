// A matrix as floats, for products that cuBLAS computes: rows of it, all of their K inputs, in the model's order of inputs.
// Moves what is stored, and 4 bytes a weight. (q - zero - 1) * scale has 20 bits at most, so every float is exact.
#pragma once
#include "weights_f16.cuh"
#include "weights_grouped.cuh"

namespace moss_cuda {

constexpr int DEQUANTISE_THREADS = 128, HALVES_THREADS = 256;

// A block of threads takes 8 chunks of a panel: each thread 4 bytes of a row, so that 8 neighbours write 128 or 256 bytes together.
template <int BITS>
__global__ void __launch_bounds__(DEQUANTISE_THREADS)
    dequantise_kernel(WeightsGrouped<BITS, 0> w, const int32_t* __restrict__ order, float* __restrict__ to, int first, int count) {
    constexpr int EACH = 32 / BITS;  // inputs in 4 bytes
    const int r = threadIdx.x / 8, c = blockIdx.y * 8 + threadIdx.x % 8, k = c * EACH;
    const int panel = first / PANEL + blockIdx.x, row = blockIdx.x * PANEL + r;
    if (row >= count || k >= w.k) return;
    const int g = c / w.chunks();
    const uint32_t word = __ldg((const unsigned int*)(w.chunk(panel, g, c % w.chunks()) + 4 * r));
    const int64_t scales = ((int64_t)panel * w.groups + g) * PANEL + r;
    const float scale = __half2float(w.scale[scales]);
    const int zero = w.zero[scales] + 1;
    float* const at = to + (int64_t)row * w.k;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (k + i < w.k) at[order ? order[k + i] : k + i] = (float)((int)(word >> BITS * i & ((1u << BITS) - 1)) - zero) * scale;
}

__global__ void __launch_bounds__(HALVES_THREADS)
    halves_kernel(const half* __restrict__ w, float* __restrict__ to, int64_t k) {
    const int64_t i = (int64_t)blockIdx.y * HALVES_THREADS + threadIdx.x, at = blockIdx.x * k + i;
    if (i < k) to[at] = __half2float(w[at]);
}

// As stored: of N rows and K inputs. order (K): stored input k is input order[k]; null where they are in order, and for halves.
struct Coded {
    int64_t bits, n, k, group;
    const void* q;
    const half* scale;
    const uint8_t* zero;
    const int32_t* order;
};

template <int BITS>
inline void launch_dequantise_grouped(const Coded& w, float* to, int64_t first, int64_t count, cudaStream_t stream) {
    const int64_t groups = (w.k + w.group - 1) / w.group, chunks = groups * w.group * BITS / 32;
    const WeightsGrouped<BITS, 0> of{(const uint8_t*)w.q, w.scale, w.zero, (int)w.n, (int)w.k, (int)groups, (int)w.group};
    const dim3 grid((count + PANEL - 1) / PANEL, (chunks + 7) / 8);
    MOSS_LAUNCH(dequantise_kernel<BITS>, grid, dim3(DEQUANTISE_THREADS), 0, stream, of, w.order, to, (int)first, (int)count);
}

// to (count, K): rows first, a multiple of 16, to first + count - 1.
inline void launch_dequantise(const Coded& w, float* to, int64_t first, int64_t count, cudaStream_t stream) {
    if (w.bits == 8) return launch_dequantise_grouped<8>(w, to, first, count, stream);
    if (w.bits == 4) return launch_dequantise_grouped<4>(w, to, first, count, stream);
    const dim3 grid(count, (w.k + HALVES_THREADS - 1) / HALVES_THREADS);
    MOSS_LAUNCH(halves_kernel, grid, dim3(HALVES_THREADS), 0, stream, (const half*)w.q + first * w.k, to, w.k);
}

}  // namespace moss_cuda
