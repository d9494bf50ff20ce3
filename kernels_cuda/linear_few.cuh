// Products of few tokens, up to 8 TILES, 32 at most: every byte of the weights is read once, and the goal is memory's speed.
//
// A warp has a panel of 16 rows, a block FEW_PANELS panels and a slice of the inputs, which all its warps use from shared memory.
// Where the panels alone do not fill the card, slices are blocks of their own, whose sums are added afterwards, in order.
// A lane starts the loads of its next 64 bytes before it computes with the last ones, so three blocks of a multiprocessor have
// 48 KB on their way: more than latency times bandwidth asks for (an H100: 3.35 TB/s x 0.7 us / 132 = 18 KB).
// A step of a panel then costs a lane, in int4, one load of weights, 24 instructions that unpack 16 of them, and for every 8
// tokens a load of inputs and two matrix instructions.
#pragma once
#include "inputs.cuh"
#include "linear_after.cuh"
#include "weights_f16.cuh"
#include "weights_grouped.cuh"

namespace moss_cuda {

const int FEW_PANELS = 8;             // of a block, a warp each
const int FEW_INPUTS_BYTES = 32768;  // in shared memory at a time

// Blocks of a multiprocessor, as far as registers reach.
constexpr int few_resident(int tiles) { return tiles == 1 ? 3 : 2; }

// Panels [0, split) have the first order of the inputs, those from split on the second one. No block has both.
struct Panels {
    int all, split;

    __host__ __device__ int blocks(int each) const { return (split + each - 1) / each + (all - split + each - 1) / each; }
    // The order, the first panel and the end of the panels of a block of `each`.
    __device__ int of(int block, int each, int* first, int* end) const {
        const int before = (split + each - 1) / each, order = block >= before;
        *first = order ? split + (block - before) * each : block * each;
        *end = order ? all : split;
        return order;
    }
};

// Groups whose loads are started together, as they are stored.
template <class W>
struct Batch {
    typename W::Raw raw[W::BATCH][W::STEPS];
    typename W::Scales scales[W::BATCH];

    // `count` of them from the cursor on, as far as there are as many.
    __device__ void load(const W& w, const typename W::Cursor& from, int count, int lane) {
#pragma unroll
        for (int b = 0; b < W::BATCH; b++)
            if (b < count) {
                scales[b] = W::scales(from, b);
#pragma unroll
                for (int j = 0; j < W::STEPS; j++)
                    if (j < w.steps()) raw[b][j] = w.load(from, b, j, lane);
            }
    }
};

// The inputs of groups [g, end) into shared memory: [group][step][token][STEP].
template <class W>
__device__ inline void copy_inputs(const W& w, const Inputs& x, int order, int g, int end, half* to) {
    const int pieces = (end - g) * w.steps() * (STEP / 8);
    for (int i = threadIdx.x; i < pieces; i += 32 * FEW_PANELS) {
        const int step = i / 4, k = step % w.steps() * STEP + i % 4 * 8;
        for (int t = 0; t < x.tokens; t++)
            x.copy(to + (step * x.tokens + t) * STEP + i % 4 * 8, order, t, (g + step / w.steps()) * w.group() + k, k < w.group());
    }
    cp_async_commit();
    cp_async_wait<0>();
}

template <int TILES, class W>
__device__ inline void multiply_batch(const W& w, const Batch<W>& batch, int count, const half* x, int T,
                                      const Columns<TILES>& columns, Sums<TILES>& sums) {
#pragma unroll
    for (int b = 0; b < W::BATCH; b++)
        if (b < count) {
            Sums<TILES> of_group;
            Sums<TILES>& to = W::SCALED ? of_group : sums;
            half2 offset[2];
            W::offsets(batch.scales[b], offset);
#pragma unroll
            for (int j = 0; j < W::STEPS; j++)
                if (j < w.steps()) {
                    uint4 rows[2];
                    W::unpack(batch.raw[b][j], offset, rows);
                    to.add(rows, x + (b * w.steps() + j) * T * STEP, columns);
                }
            if (W::SCALED) sums.add_scaled(of_group, W::scale_of(batch.scales[b]));
        }
}

// Grid: blocks of panels, slices. slice, stage: groups of a slice, and those whose inputs are in shared memory at a time, a
// multiple of BATCH.
template <int TILES, class W>
__global__ void __launch_bounds__(32 * FEW_PANELS, few_resident(TILES))
    linear_few(W w, Inputs x, Panels panels, int slice, int stage, Partial partial, After after) {
    MOSS_DYNAMIC_SHARED(half, inputs);
    const int lane = threadIdx.x % 32, T = x.tokens;
    int first, panels_end;
    const int order = panels.of(blockIdx.x, FEW_PANELS, &first, &panels_end);
    const int own = first + threadIdx.x / 32, panel = min(own, panels_end - 1);  // a warp without a panel computes another's
    const int begin = blockIdx.y * slice, end = min(begin + slice, w.groups);
    const Columns<TILES> columns(T, lane);
    Sums<TILES> sums;
    typename W::Cursor cursor = w.cursor(panel, begin, lane);
    Batch<W> next;
    next.load(w, cursor, end - begin, lane);
    for (int there = begin; there < end; there += stage) {
        const int stage_end = min(there + stage, end);
        if (there > begin) __syncthreads();
        copy_inputs(w, x, order, there, stage_end, inputs);
        __syncthreads();
        const half* at = inputs;
        for (int g = there; g < stage_end; g += W::BATCH, at += W::BATCH * w.steps() * T * STEP) {
            const Batch<W> batch = next;
            w.advance(cursor, W::BATCH);
            next.load(w, cursor, end - g - W::BATCH, lane);
            multiply_batch(w, batch, stage_end - g, at, T, columns, sums);
        }
    }
    if (own >= panels_end) return;
    sums.each(T, lane, [&](int t, int row, float v) {
        const int n = panel * PANEL + W::row(lane, row);
        if (n < w.n) put(partial, after, blockIdx.y, x.first, t, n, v);
    });
}

}  // namespace moss_cuda
