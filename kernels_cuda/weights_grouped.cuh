// Weights as whole numbers of BITS bits, 8 or 4, with a scale and a zero for each group of inputs (a multiple of 8, at most
// 128): w[n, k] = (q[n, k] - zero[n, g] - 1) * scale[n, g], g = k / group. As docs/formats.md has them, with P panels of 16 rows,
// G groups, and C = group BITS / 32 chunks of 64 bytes a group:
//   q      (P, G, C, 16, 4 bytes)  4 bytes of each row: 4 inputs of 8 bits, or 8 of 4 bits, the first one lowest
//   scale  (P, G, 16) halves
//   zero   (P, G, 16) bytes
// A warp takes a step of a panel at a time, 256 bytes in int4 and 512 in int8, all of them in one place. Lane l has rows 2 (l / 4)
// and the one after it, whose 4 bytes of a chunk lie together. A group that is no multiple of 32 ends in a step of which some
// lanes have nothing; the inputs are zeros there.
// q - zero - 1 is a whole number from -256 to 255, exact as a half; the scale is for the fp32 sum of a group.
#pragma once
#include "multiply.cuh"

namespace moss_cuda {

// GROUP: inputs of a group, where that is known when compiling; or 0.
template <int BITS, int GROUP>
struct WeightsGrouped {
    const uint8_t* q;
    const half* scale;
    const uint8_t* zero;
    int n, k, groups, inputs;  // inputs: of a group

    static const bool SCALED = true;
    static const int STEPS = 4;          // of a group, at most
    static const int BATCH = 8 / BITS;   // groups that few tokens' kernel loads together: 64 bytes a lane
    static const int CHUNKS = BITS;      // of a step
    static const int BYTES = 64 * BITS;  // of a step of a panel
    static const int WORDS = BITS / 4;   // chunks of a step that are a lane's

    struct Raw { uint2 of[WORDS]; };  // a chunk of both rows
    struct Scales {
        uint32_t scale;
        uint16_t zero;
    };  // of both rows, as stored

    __device__ static int row(int lane, int i) { return lane / 4 * 2 + i; }
    __host__ __device__ int group() const { return GROUP ? GROUP : inputs; }
    __host__ __device__ int steps() const { return (group() + STEP - 1) / STEP; }
    __device__ int chunks() const { return group() * BITS / 32; }
    __device__ const uint8_t* chunk(int panel, int g, int c) const {
        return q + (((int64_t)panel * groups + g) * chunks() + c) * 64;
    }

    // Where a lane reads.
    struct Cursor {
        const uint8_t* q;
        const half* scale;
        const uint8_t* zero;
    };
    __device__ Cursor cursor(int panel, int g, int lane) const {
        const int64_t at = ((int64_t)panel * groups + g) * PANEL + lane / 4 * 2;
        return {chunk(panel, g, lane % 4 * WORDS) + lane / 4 * 8, scale + at, zero + at};
    }
    __device__ void advance(Cursor& c, int by) const { c.q += by * chunks() * 64, c.scale += by * PANEL, c.zero += by * PANEL; }

    // Step j of the group that is b after the cursor's, where it has something for the lane.
    __device__ Raw load(const Cursor& c, int b, int j, int lane) const {
        Raw raw = {};
        if (j * STEP + lane % 4 * 8 >= group()) return raw;
#pragma unroll
        for (int i = 0; i < WORDS; i++) raw.of[i] = __ldg((const uint2*)(c.q + (b * chunks() + j * CHUNKS + i) * 64));
        return raw;
    }

    __device__ static Scales scales(const Cursor& c, int b) {
        return {__ldg((const unsigned int*)(c.scale + b * PANEL)), __ldg((const unsigned short*)(c.zero + b * PANEL))};
    }

    // A lane's part of a step that was copied to shared memory.
    __device__ static Raw load(const uint8_t* tile, int lane) {
        Raw raw;
        const uint8_t* from = tile + lane % 4 * WORDS * 64 + lane / 4 * 8;
#pragma unroll
        for (int i = 0; i < WORDS; i++) raw.of[i] = *(const uint2*)(from + 64 * i);
        return raw;
    }

    // Starts copying 16-byte piece i of a step; zeros where there is none.
    __device__ void copy(uint8_t* tile, int panel, int g, int j, int i) const {
        const bool any = j * CHUNKS + i / 4 < chunks();
        cp_async16(tile + 16 * i, any ? chunk(panel, g, j * CHUNKS) + 16 * i : q, any ? 16 : 0);
    }

    __device__ static float2 scale_of(Scales s) { return __half22float2(as_half2(s.scale)); }

    // What makes q of the two rows from numbers that have it in their last bits: 0x6400 is 1024, where a half's last bit is 1.
    __device__ static void offsets(Scales s, half2 to[2]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t below = 0xE401 + (s.zero >> 8 * i & 255);  // -1024 - (zero + 1)
            to[i] = as_half2(below << 16 | below);
            if (BITS == 4) to[i] = __hadd2(to[i], as_half2(0x63800000));  // in the upper half -64 - (zero + 1)
        }
    }

    // q - zero - 1 of the lane's inputs, of both rows.
    __device__ static void unpack(const Raw& raw, const half2 offset[2], uint4 to[2]) {
        if (BITS == 8) {
            to[0] = {pair8(raw.of[0].x, 0x4140, offset[0]), pair8(raw.of[0].x, 0x4342, offset[0]),
                     pair8(raw.of[WORDS - 1].x, 0x4140, offset[0]), pair8(raw.of[WORDS - 1].x, 0x4342, offset[0])};
            to[1] = {pair8(raw.of[0].y, 0x4140, offset[1]), pair8(raw.of[0].y, 0x4342, offset[1]),
                     pair8(raw.of[WORDS - 1].y, 0x4140, offset[1]), pair8(raw.of[WORDS - 1].y, 0x4342, offset[1])};
        } else {
            to[0] = {pair4(raw.of[0].x, 0x0000, offset[0]), pair4(raw.of[0].x, 0x1111, offset[0]),
                     pair4(raw.of[0].x, 0x2222, offset[0]), pair4(raw.of[0].x, 0x3333, offset[0])};
            to[1] = {pair4(raw.of[0].y, 0x0000, offset[1]), pair4(raw.of[0].y, 0x1111, offset[1]),
                     pair4(raw.of[0].y, 0x2222, offset[1]), pair4(raw.of[0].y, 0x3333, offset[1])};
        }
    }

private:
    __device__ static half2 as_half2(uint32_t bits) {
        half2 h;
        *(uint32_t*)&h = bits;
        return h;
    }
    __device__ static uint32_t bits_of(half2 h) { return *(uint32_t*)&h; }

    // Two bytes that `bytes` selects, each under the upper byte of 1024.
    __device__ static uint32_t pair8(uint32_t w, uint32_t bytes, half2 offset) {
        return bits_of(__hadd2(as_half2(__byte_perm(w, 0x64646464, bytes)), offset));
    }

    // Both halves of one byte: 1024 + the lower, and 1024 + 16 times the upper one, which multiplied by 1/16 is 64 + it.
    __device__ static uint32_t pair4(uint32_t w, uint32_t byte, half2 offset) {
        const uint32_t both = lop3<0xEA>(__byte_perm(w, 0, byte), 0x00F0000F, 0x64006400);  // (a & b) | c
        return bits_of(__hfma2(as_half2(both), as_half2(0x2C003C00), offset));  // times 1, 1/16
    }
};

}  // namespace moss_cuda
