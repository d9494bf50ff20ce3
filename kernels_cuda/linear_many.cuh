// Products of many tokens: arithmetic is the limit. On tensor cores only.
//
// A block has 128 rows and 64 COLUMNS tokens; a warp 32 rows and 64 tokens, whose sums stay in registers, so 16 bytes of inputs
// from shared memory serve 32 rows. Inputs pass in steps of 32, and weights as they are stored, in a ring of stages that cp.async
// fills ahead:
//   weights  [panel][W::BYTES]
//   inputs   [token][STEP] halves
// A lane takes 16 bytes of a row of 64, and rows lie one after the other: no two lanes of a quarter warp meet in a bank. A warp
// unpacks its rows for 64 tokens: in int4 48 instructions beside 32 matrix instructions.
#pragma once
#include "linear_few.cuh"

namespace moss_cuda {

const int MANY_PANELS = 8;   // of a block
const int WARP_PANELS = 2, WARP_TILES = 8;
const int WARP_TOKENS = 8 * WARP_TILES;

template <class W, int COLUMNS>
struct Stage {
    static const int BYTES = MANY_PANELS * W::BYTES + COLUMNS * WARP_TOKENS * STEP * 2;
    static const int COUNT = BYTES <= 12288 ? 4 : 3;  // within the 48 KB that every card gives a block

    uint8_t weights[MANY_PANELS][W::BYTES];
    half inputs[COLUMNS * WARP_TOKENS][STEP];
};

// Which step of which group.
struct Step {
    int group, step;
    __device__ void next(int steps) {
        if (++step == steps) step = 0, group++;
    }
};

// What a block computes.
struct Place {
    int order, first, panels_end, token;
};

template <class W, int COLUMNS>
__device__ inline void copy_step(const W& w, const Inputs& x, const Place& b, Step at, Stage<W, COLUMNS>* to) {
    const int threads = 128 * COLUMNS;
#pragma unroll
    for (int i = threadIdx.x; i < MANY_PANELS * W::BYTES / 16; i += threads) {
        const int panel = i / (W::BYTES / 16);
        w.copy(to->weights[panel], min(b.first + panel, b.panels_end - 1), at.group, at.step, i % (W::BYTES / 16));
    }
#pragma unroll
    for (int i = threadIdx.x; i < COLUMNS * WARP_TOKENS * 4; i += threads) {
        const int t = i / 4, k = at.step * STEP + i % 4 * 8;
        x.copy(to->inputs[t] + i % 4 * 8, b.order, min(b.token + t, x.tokens - 1), at.group * w.group() + k, k < w.group());
    }
}

#if MOSS_TENSOR_CORES

typedef float WarpSums[WARP_PANELS][WARP_TILES][4];

// sums += a step, weights from where the warp's begin, inputs as well.
template <class W>
__device__ inline void multiply_step(const uint8_t (*weights)[W::BYTES], const half (*x)[STEP], const half2 offset[WARP_PANELS][2],
                                     int lane, WarpSums& sums) {
    uint4 rows[WARP_PANELS][2];
#pragma unroll
    for (int p = 0; p < WARP_PANELS; p++) W::unpack(W::load(weights[p], lane), offset[p], rows[p]);
#pragma unroll
    for (int i = 0; i < WARP_TILES; i++) {
        const uint4 column = *(const uint4*)(x[8 * i + lane / 4] + lane % 4 * 8);
#pragma unroll
        for (int p = 0; p < WARP_PANELS; p++) multiply(sums[p][i], rows[p], column);
    }
}

// whole += the sums of a group, which begin anew.
__device__ inline void end_group(WarpSums& whole, WarpSums& sums, const float2 scale[WARP_PANELS]) {
#pragma unroll
    for (int p = 0; p < WARP_PANELS; p++)
#pragma unroll
        for (int i = 0; i < WARP_TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                whole[p][i][j] += sums[p][i][j] * (j < 2 ? scale[p].x : scale[p].y);
                sums[p][i][j] = 0;
            }
}

#endif

// Grid: tokens' blocks, which share the weights in the L2 cache; blocks of panels; slices of `slice` groups.
template <int COLUMNS, class W>
__global__ void __launch_bounds__(128 * COLUMNS, COLUMNS == 1 ? 2 : 1)
    linear_many(W w, Inputs x, Panels panels, int slice, Partial partial, After after) {
#if MOSS_TENSOR_CORES
    const int STAGES = Stage<W, COLUMNS>::COUNT;
    MOSS_DYNAMIC_SHARED(unsigned char, memory);
    Stage<W, COLUMNS>* stages = (Stage<W, COLUMNS>*)memory;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_panel = warp % 4 * WARP_PANELS, warp_token = warp / 4 * WARP_TOKENS;
    Place b;
    b.order = panels.of(blockIdx.y, MANY_PANELS, &b.first, &b.panels_end);
    b.token = blockIdx.x * COLUMNS * WARP_TOKENS;
    const int begin = blockIdx.z * slice, end = min(begin + slice, w.groups);

    Step coming = {begin, 0};
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (coming.group < end) copy_step(w, x, b, coming, stages + i);
        cp_async_commit();
        coming.next(w.steps());
    }
    WarpSums whole = {}, sums = {};
    typename W::Scales stored[WARP_PANELS];
    int panel[WARP_PANELS];
#pragma unroll
    for (int p = 0; p < WARP_PANELS; p++) {
        panel[p] = min(b.first + warp_panel + p, b.panels_end - 1);
        stored[p] = W::scales(w.cursor(panel[p], begin, lane), 0);
    }
    int stage = 0;
    for (int g = begin; g < end; g++) {
        half2 offset[WARP_PANELS][2];
        float2 scale[WARP_PANELS];
#pragma unroll
        for (int p = 0; p < WARP_PANELS; p++) {
            W::offsets(stored[p], offset[p]);
            scale[p] = W::scale_of(stored[p]);
            stored[p] = W::scales(w.cursor(panel[p], min(g + 1, end - 1), lane), 0);
        }
        for (int j = 0; j < w.steps(); j++) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // all that was copied is seen, and nobody reads any more what is overwritten next
            const int free = stage ? stage - 1 : STAGES - 1;
            if (coming.group < end) copy_step(w, x, b, coming, stages + free);
            cp_async_commit();
            coming.next(w.steps());
            multiply_step<W>(stages[stage].weights + warp_panel, stages[stage].inputs + warp_token, offset, lane,
                             W::SCALED ? sums : whole);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        if (W::SCALED) end_group(whole, sums, scale);
    }
#pragma unroll
    for (int p = 0; p < WARP_PANELS; p++) {
        if (b.first + warp_panel + p >= b.panels_end) break;
#pragma unroll
        for (int i = 0; i < WARP_TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int t = b.token + warp_token + 8 * i + lane % 4 * 2 + j % 2, n = panel[p] * PANEL + W::row(lane, j / 2);
                if (t < x.tokens && n < w.n) put(partial, after, blockIdx.z, x.first, t, n, whole[p][i][j]);
            }
    }
#endif
}

}  // namespace moss_cuda
