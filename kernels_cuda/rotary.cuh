// Rotary position embedding of GPT-J: pairs (0, 1), (2, 3) ... of the first entries of a head turn by the angles of the token's
// position. Computed in fp32 as the head is read, so nothing moves for it but the angles.
#pragma once
#include "device.cuh"

namespace moss_cuda {

struct Heads {
    int64_t H, S, rotary, C;  // heads, size of a head, rotated entries of it, positions in the cache
    __host__ __device__ int64_t D() const { return H * S; }
};

// angles (2, C, rotary / 2): cos for every position, then sin.
struct Angles {
    const float* cos;
    int64_t C;

    // Entry e of the head at `head` for a token at position `at`, when its first `rotary` entries turn.
    __device__ float turned(const half* head, int e, int rotary, int at) const {
        const float x = __half2float(head[e]);
        if (e >= rotary) return x;
        const int64_t pairs = rotary / 2, i = at * pairs + e / 2;
        const float y = __half2float(head[e ^ 1]), c = cos[i], s = cos[C * pairs + i];
        return e & 1 ? x * c + y * s : x * c - y * s;
    }
};

}  // namespace moss_cuda
