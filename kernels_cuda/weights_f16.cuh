// Weights as halves: N rows of K, contiguous. Lane l has rows l / 4 and the one eight further on, in panels of 16; a step is 64 contiguous bytes of each of 16
// rows. Rows of a K that is no multiple of 8 do not start at 16 bytes and are read half by half.
#pragma once
#include "multiply.cuh"

namespace moss_cuda {

struct WeightsF16 {
    const half* w;
    int n, k, groups;

    static const bool SCALED = false;
    static const int STEPS = 2;         // of a group: inputs whose loads few tokens' kernel starts together, 64 bytes a lane
    static const int BATCH = 1;         // groups
    static const int BYTES = 64 * 16;  // of a step of a panel

    struct Raw { uint4 of[2]; };
    struct Scales {};

    __device__ static int row(int lane, int i) { return lane / 4 + 8 * i; }
    __host__ __device__ static int group() { return STEP * STEPS; }
    __host__ __device__ static int steps() { return STEPS; }

    __device__ Raw load(int panel, int g, int j, int lane) const {
        Raw raw;
#pragma unroll
        for (int i = 0; i < 2; i++) raw.of[i] = piece(panel * PANEL + row(lane, i), g * group() + j * STEP + lane % 4 * 8);
        return raw;
    }

    __device__ static Raw load(const uint8_t* tile, int lane) {
        Raw raw;
#pragma unroll
        for (int i = 0; i < 2; i++) raw.of[i] = *(const uint4*)(tile + row(lane, i) * 64 + lane % 4 * 16);
        return raw;
    }

    __device__ void copy(uint8_t* tile, int panel, int g, int j, int i) const {
        const int r = panel * PANEL + i / 4, at = g * group() + j * STEP + i % 4 * 8;
        if (k % 8 == 0 && at < k) cp_async16(tile + 16 * i, w + (int64_t)min(r, n - 1) * k + at);
        else *(uint4*)(tile + 16 * i) = piece(r, at);
    }

    __device__ Scales scales(int, int, int) const { return {}; }
    __device__ static float2 scale_of(Scales) { return {1, 1}; }
    __device__ static void offsets(Scales, half2*) {}
    __device__ static void unpack(const Raw& raw, const half2*, uint4 to[2]) { to[0] = raw.of[0], to[1] = raw.of[1]; }

private:
    // Inputs at ... + 7 of row r; zeros from K on. Rows from N on are the last one: nobody asks for their sums.
    __device__ uint4 piece(int r, int at) const {
        const half* from = w + (int64_t)min(r, n - 1) * k + at;
        uint4 piece = {};
        if (k % 8 == 0) {
            if (at < k) piece = __ldg((const uint4*)from);
            return piece;
        }
        const unsigned short* halves = (const unsigned short*)from;
        uint32_t* words = &piece.x;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (at + i < k) words[i / 2] |= (uint32_t)__ldg(halves + i) << 16 * (i % 2);
        return piece;
    }
};

}  // namespace moss_cuda
