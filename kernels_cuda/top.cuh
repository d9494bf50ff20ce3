// The k greatest of each row of V logits, greatest first, of equal ones the lower id first: the same for every launch.
// A warp holds SLICE numbers in its registers, finds the greatest k times, and takes it out; what the warps of a row found is
// sliced again, until one warp has it all. 107,008 logits take two rounds for k = 1 and four for k = 64.
#pragma once
#include "device.cuh"

namespace moss_cuda {

constexpr int TOP_MOST = 64;                       // k is at most this
constexpr int TOP_EACH = 16, TOP_SLICE = 32 * TOP_EACH;
constexpr int TOP_WARPS = 4;                       // of a block

// A number and its id as one integer that orders them. 0 is below all. NaN counts as more than infinity, -0 as 0.
__device__ __forceinline__ uint64_t top_key(float value, uint32_t id) {
    uint32_t bits = __float_as_uint(value);
    if (bits == 0x80000000u) bits = 0;
    const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)ordered << 32 | ~id;
}
__device__ __forceinline__ float top_value(uint64_t key) {
    const uint32_t ordered = (uint32_t)(key >> 32);
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ uint64_t top_read(const float* row, int64_t i) { return top_key(row[i], (uint32_t)i); }
__device__ __forceinline__ uint64_t top_read(const uint64_t* row, int64_t i) { return row[i]; }

// from (T, n) logits or keys; to (T, slices, k) keys, or from the last round values and ids (T, k).
template <typename From>
__global__ void __launch_bounds__(32 * TOP_WARPS)
    top_kernel(const From* __restrict__ from, uint64_t* __restrict__ to, float* __restrict__ values, int32_t* __restrict__ ids,
               int64_t n, int slices, int k) {
    const int lane = threadIdx.x % 32, slice = blockIdx.y * TOP_WARPS + threadIdx.x / 32;
    if (slice >= slices) return;
    const From* row = from + blockIdx.x * n;
    uint64_t keys[TOP_EACH], best = 0;
#pragma unroll
    for (int e = 0; e < TOP_EACH; e++) {
        const int64_t i = (int64_t)slice * TOP_SLICE + e * 32 + lane;
        keys[e] = i < n ? top_read(row, i) : 0;
        best = keys[e] > best ? keys[e] : best;
    }
    const int64_t at = ((int64_t)blockIdx.x * slices + slice) * k;
    for (int r = 0; r < k; r++) {
        const uint64_t found = warp_max(best);
        if (lane == 0) {
            if (values) {
                values[at + r] = top_value(found);
                ids[at + r] = (int32_t)~(uint32_t)found;
            } else {
                to[at + r] = found;
            }
        }
        if (best != found || !found) continue;
        best = 0;
#pragma unroll
        for (int e = 0; e < TOP_EACH; e++) {
            if (keys[e] == found) keys[e] = 0;
            best = keys[e] > best ? keys[e] : best;
        }
    }
}

inline int64_t top_slices(int64_t n) { return (n + TOP_SLICE - 1) / TOP_SLICE; }

// Bytes of the workspace, aligned to 8: the keys of the first round, and of the second.
inline int64_t top_k_workspace(int64_t T, int64_t V, int64_t k) {
    const int64_t first = top_slices(V) * k;
    return T * (first + top_slices(first) * k) * (int64_t)sizeof(uint64_t);
}

template <typename From>
inline void launch_top_round(const From* from, uint64_t* to, float* values, int32_t* ids, int64_t T, int64_t n, int k, cudaStream_t s) {
    const int slices = (int)top_slices(n);
    const dim3 grid(T, (slices + TOP_WARPS - 1) / TOP_WARPS);
    MOSS_LAUNCH(top_kernel<From>, grid, dim3(32 * TOP_WARPS), 0, s, from, slices > 1 ? to : nullptr, slices > 1 ? nullptr : values,
                ids, n, slices, k);
}

// logits float (T, V), k from 1 to TOP_MOST and to V; values float (T, k), ids (T, k).
inline void launch_top_k(const float* logits, float* values, int32_t* ids, int64_t T, int64_t V, int64_t k, void* workspace,
                         cudaStream_t stream) {
    uint64_t* to = (uint64_t*)workspace;
    uint64_t* other = to + T * top_slices(V) * k;
    launch_top_round(logits, to, values, ids, T, V, (int)k, stream);
    for (int64_t n = V; top_slices(n) > 1;) {
        n = top_slices(n) * k;
        launch_top_round(to, other, values, ids, T, n, (int)k, stream);
        uint64_t* const next = other;
        other = to, to = next;
    }
}

}  // namespace moss_cuda
