// Weights as halves: N rows of K, contiguous. A panel is 16 rows, a step of it 64 contiguous bytes of each; lane l has rows l / 4 and
// l / 4 + 8. Rows of a K that is no multiple of 8 do not start at multiples of 16 bytes and are read half by half.
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

    // Where a lane reads: rows, and the input.
    struct Cursor {
        const half* row[2];
        int k;
    };
    __device__ Cursor cursor(int panel, int g, int lane) const {
        return {{row_at(panel * PANEL + row(lane, 0)), row_at(panel * PANEL + row(lane, 1))}, g * group() + lane % 4 * 8};
    }
    __device__ static void advance(Cursor& c, int by) { c.k += by * group(); }

    // Step j of the group that is b after the cursor's.
    __device__ Raw load(const Cursor& c, int b, int j, int) const {
        const int at = c.k + b * group() + j * STEP;
        return {{piece(c.row[0], at), piece(c.row[1], at)}};
    }
    __device__ static Scales scales(const Cursor&, int) { return {}; }

    __device__ static Raw load(const uint8_t* tile, int lane) {
        Raw raw;
#pragma unroll
        for (int i = 0; i < 2; i++) raw.of[i] = *(const uint4*)(tile + row(lane, i) * 64 + lane % 4 * 16);
        return raw;
    }

    __device__ void copy(uint8_t* tile, int panel, int g, int j, int i) const {
        const half* from = row_at(panel * PANEL + i / 4);
        const int at = g * group() + j * STEP + i % 4 * 8;
        if (k % 8 == 0) cp_async16(tile + 16 * i, at < k ? from + at : w, at < k ? 16 : 0);
        else *(uint4*)(tile + 16 * i) = piece(from, at);
    }

    __device__ static float2 scale_of(Scales) { return {1, 1}; }
    __device__ static void offsets(Scales, half2*) {}
    __device__ static void unpack(const Raw& raw, const half2*, uint4 to[2]) { to[0] = raw.of[0], to[1] = raw.of[1]; }

private:
    // Rows from N on are the last one: nobody asks for their sums.
    __device__ const half* row_at(int r) const { return w + (int64_t)min(r, n - 1) * k; }

    // Inputs at ... + 7 of a row; zeros from K on.
    __device__ uint4 piece(const half* row, int at) const {
        uint4 piece = {};
        if (k % 8 == 0) {
            if (at < k) piece = __ldg((const uint4*)(row + at));
            return piece;
        }
        uint32_t words[4] = {};
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (at + i < k) words[i / 2] |= (uint32_t)__ldg((const unsigned short*)row + at + i) << 16 * (i % 2);
        return {words[0], words[1], words[2], words[3]};
    }
};

}  // namespace moss_cuda
