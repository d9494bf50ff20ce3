// Rotary position embedding of GPT-J: pairs (0, 1), (2, 3) ... of the first entries of a head turn by the angles of the token's
// position. Computed in fp32 as the head is read, so nothing moves for it but the angles.
#pragma once
#include "device.cuh"

namespace moss_cuda {

struct Heads {
    int64_t H, S, rotary, C;  // heads, size of a head, rotated entries of it, positions in the cache
    __host__ __device__ int64_t D() const { return H * S; }
};

__device__ inline void widen8(const uint4& halves, float* to) {
    const uint32_t words[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        half2 pair;
        memcpy(&pair, &words[i], 4);
        to[2 * i] = __low2float(pair), to[2 * i + 1] = __high2float(pair);
    }
}

// angles (2, C, rotary / 2): cos for every position, then sin.
struct Angles {
    const float* cos;
    int64_t C;

    // Entries e ... e + E - 1 of the head at `head` for a token at position `at`, when its first `rotary` entries turn. E: 8,
    // and then e is a multiple of it and the head's address one of 16; or 1.
    template <int E>
    __device__ void turn(const half* head, int e, int rotary, int at, float* to) const;

    __device__ const float* pair(int e, int rotary, int at) const { return cos + at * (int64_t)(rotary / 2) + e / 2; }
    __device__ float sin_of(const float* pair, int rotary) const { return pair[C * (rotary / 2)]; }
};

template <>
__device__ inline void Angles::turn<1>(const half* head, int e, int rotary, int at, float* to) const {
    *to = __half2float(head[e]);
    if (e >= rotary) return;
    const float *of = pair(e, rotary, at), other = __half2float(head[e ^ 1]), sin = sin_of(of, rotary);
    *to = e % 2 ? *to * *of + other * sin : *to * *of - other * sin;
}
template <>
__device__ inline void Angles::turn<8>(const half* head, int e, int rotary, int at, float* to) const {
    widen8(load16(head + e), to);
#pragma unroll
    for (int i = 0; i < 8; i += 2)
        if (e + i < rotary) {
            const float *of = pair(e + i, rotary, at), sin = sin_of(of, rotary), x = to[i], y = to[i + 1];
            to[i] = x * *of - y * sin, to[i + 1] = y * *of + x * sin;
        }
}

}  // namespace moss_cuda
