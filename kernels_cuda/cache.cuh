// Keys and values of the tokens so far: (B, H, C, S) for B sequences of up to C tokens, in one of two codings:
//   16 bits  half
//    8 bits  int8, and a float scale for each token and head, (B, H, C): an entry stands for q * scale, scale = max |x| / 127
// Keys are stored after rotary.
#pragma once
#include "rotary.cuh"

namespace moss_cuda {

struct Cache {
    int bits;
    void *keys, *values;
    float *key_scale, *value_scale;  // of 8 bits, else null
};

// Rows at places of the cache: new tokens are rows first ... first + count - 1 of what goes in, at positions start ... of it.
struct Sequence {
    int32_t place, start, first, count;
};

// Keys or values of one sequence and head: C rows of S entries.
template <class Entry>
struct Rows {
    Entry* entries;
    float* scales;

    __device__ Rows(void* all, float* scales, const Heads& heads, int place, int head)
        : entries((Entry*)all + (place * heads.H + head) * heads.C * heads.S), scales(scales ? scales + (place * heads.H + head) * heads.C : nullptr) {}
    __device__ float scale(int at) const;
};
template <>
__device__ inline float Rows<half>::scale(int) const { return 1; }
template <>
__device__ inline float Rows<int8_t>::scale(int at) const { return scales[at]; }

// Eight entries in one load, as floats. Plain loads, not through the read-only cache: the block itself may have written them.
__device__ inline void widen8(const uint4& raw, float* to) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        half2 pair;
        memcpy(&pair, &words[i], 4);
        to[2 * i] = __low2float(pair), to[2 * i + 1] = __high2float(pair);
    }
}
// q + 2^23 + 128 has q + 128 as its last bits; putting them there is one instruction where a conversion takes several cycles.
__device__ inline void widen8(const uint2& raw, float* to) {
    const uint32_t words[2] = {raw.x ^ 0x80808080u, raw.y ^ 0x80808080u};
#pragma unroll
    for (int i = 0; i < 8; i++)
        to[i] = __uint_as_float(0x4b000000u | (words[i / 4] >> (i % 4 * 8) & 0xff)) - 8388736.f;
}

// What is loaded at once: E entries.
template <class Entry, int E>
struct Piece;
template <>
struct Piece<half, 8> {
    uint4 raw;
    __device__ void load(const half* from) { raw = *(const uint4*)from; }
    __device__ void widen(float* to) const { widen8(raw, to); }
};
template <>
struct Piece<int8_t, 8> {
    uint2 raw;
    __device__ void load(const int8_t* from) { raw = *(const uint2*)from; }
    __device__ void widen(float* to) const { widen8(raw, to); }
};
template <>
struct Piece<half, 1> {
    half raw;
    __device__ void load(const half* from) { raw = *from; }
    __device__ void widen(float* to) const { *to = __half2float(raw); }
};
template <>
struct Piece<int8_t, 1> {
    int8_t raw;
    __device__ void load(const int8_t* from) { raw = *from; }
    __device__ void widen(float* to) const { *to = raw; }
};

// One warp writes row `at` from a head of a token, whose first `rotary` entries turn (none of a value's).
__device__ inline void append(const half* from, const Angles& angles, int S, int rotary, const Rows<half>& to, int at) {
    for (int e = threadIdx.x % 32; e < S; e += 32) to.entries[(int64_t)at * S + e] = __float2half_rn(angles.turned(from, e, rotary, at));
}
// The divisions are exact ones, whatever the compiler's flags: the CPU's cache has the same entries.
__device__ inline void append(const half* from, const Angles& angles, int S, int rotary, const Rows<int8_t>& to, int at) {
    const int lane = threadIdx.x % 32;
    float most = 0;
    for (int e = lane; e < S; e += 32) most = fmaxf(most, fabsf(angles.turned(from, e, rotary, at)));
    const float scale = __fdiv_rn(warp_max(most), 127.f);
    for (int e = lane; e < S; e += 32) {
        const float x = angles.turned(from, e, rotary, at);
        to.entries[(int64_t)at * S + e] = (int8_t)(scale > 0 ? __float2int_rn(__fdiv_rn(x, scale)) : 0);
    }
    if (lane == 0) to.scales[at] = scale;
}

}  // namespace moss_cuda
