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

// Which of the B the tokens of a sequence are in, and how many it has there; rows first ... first + count - 1 of what
// goes in are its new ones.
struct Sequence {
    int32_t place, start, first, count;
};

// Keys or values of one sequence and head: C rows of S entries.
template <class Entry>
struct CacheRows {
    Entry* entries;
    float* scales;

    __device__ CacheRows(void* all, float* scales, const Heads& heads, int place, int head)
        : entries((Entry*)all + (place * heads.H + head) * heads.C * heads.S),
          scales(scales ? scales + (place * heads.H + head) * heads.C : nullptr) {}
    __device__ float scale(int at) const;
};
template <>
__device__ inline float CacheRows<half>::scale(int) const { return 1; }
template <>
__device__ inline float CacheRows<int8_t>::scale(int at) const { return scales[at]; }

// q + 2^23 + 128 has q + 128 as its last bits; putting them there is one instruction where a conversion takes several cycles.
__device__ inline void widen8(const uint2& raw, float* to) {
    const uint32_t words[2] = {raw.x ^ 0x80808080u, raw.y ^ 0x80808080u};
#pragma unroll
    for (int i = 0; i < 8; i++)
        to[i] = __uint_as_float(0x4b000000u | (words[i / 4] >> (i % 4 * 8) & 0xff)) - 8388736.f;
}

// E entries, loaded and stored at once. Loads do not go through the read-only cache: the block may have written them itself.
template <class Entry, int E>
struct CachePiece;
template <>
struct CachePiece<half, 8> {
    uint4 raw;
    __device__ void load(const half* from) { raw = *(const uint4*)from; }
    __device__ void widen(float* to) const { widen8(raw, to); }
    __device__ static void store(const float* x, half* to, float = 1) {
        half2 pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
        uint4 raw;
        memcpy(&raw, pairs, 16);
        *(uint4*)to = raw;
    }
};
template <>
struct CachePiece<half, 1> {
    half raw;
    __device__ void load(const half* from) { raw = *from; }
    __device__ void widen(float* to) const { *to = __half2float(raw); }
    __device__ static void store(const float* x, half* to, float = 1) { *to = __float2half_rn(*x); }
};

// What a row is stored with. The divisions are exact ones, whatever the compiler's flags: the CPU's cache has the same entries.
struct RowScale {
    float scale, by;
    __device__ explicit RowScale(float most) : scale(0), by(0) {
        if (most < 1e-35f) return;  // its inverse would be no float
        scale = __fdiv_rn(most, 127.f), by = __fdiv_rn(127.f, most);
    }
};

template <>
struct CachePiece<int8_t, 8> {
    uint2 raw;
    __device__ void load(const int8_t* from) { raw = *(const uint2*)from; }
    __device__ void widen(float* to) const { widen8(raw, to); }
    __device__ static void store(const float* x, int8_t* to, float by) {
        uint32_t words[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 8; i++) words[i / 4] |= (__float2int_rn(x[i] * by) & 0xffu) << (i % 4 * 8);
        *(uint2*)to = make_uint2(words[0], words[1]);
    }
};
template <>
struct CachePiece<int8_t, 1> {
    int8_t raw;
    __device__ void load(const int8_t* from) { raw = *from; }
    __device__ void widen(float* to) const { *to = raw; }
    __device__ static void store(const float* x, int8_t* to, float by) { *to = (int8_t)__float2int_rn(*x * by); }
};

// A warp finds what to multiply row `at` by, and writes its scale.
template <int E>
__device__ inline float new_scale(const half*, const Angles&, int, int, const CacheRows<half>&, int) { return 1; }
template <int E>
__device__ inline float new_scale(const half* from, const Angles& angles, int S, int rotary, const CacheRows<int8_t>& to,
                                  int at) {
    float most = 0, x[E];
    for (int e = threadIdx.x % 32 * E; e < S; e += 32 * E) {
        angles.turn<E>(from, e, rotary, at, x);
#pragma unroll
        for (int i = 0; i < E; i++) most = fmaxf(most, fabsf(x[i]));
    }
    const RowScale row(warp_max(most));
    if (threadIdx.x % 32 == 0) to.scales[at] = row.scale;
    return row.by;
}

// A warp writes row `at` from a head of a token, whose first `rotary` entries turn (none of a value's).
template <int E, class Entry>
__device__ inline void append_row(const half* from, const Angles& angles, int S, int rotary, const CacheRows<Entry>& to,
                                  int at) {
    const float by = new_scale<E>(from, angles, S, rotary, to, at);
    for (int e = threadIdx.x % 32 * E; e < S; e += 32 * E) {
        float x[E];
        angles.turn<E>(from, e, rotary, at, x);
        CachePiece<Entry, E>::store(x, to.entries + (int64_t)at * S + e, by);
    }
}

}  // namespace moss_cuda
