// What is done with the few rows whose logits are wanted: taking them from the state, and the repetition penalty.
#pragma once
#include "device.cuh"

namespace moss_cuda {

constexpr int MOST_ROWS = 16;  // in one launch: what says which comes with its arguments
constexpr int ROWS_THREADS = 256;

struct RowList {
    int32_t at[MOST_ROWS];
};

__global__ void __launch_bounds__(ROWS_THREADS) rows_kernel(const float* __restrict__ x, RowList rows, float* __restrict__ to, int64_t D) {
    const int64_t i = (int64_t)blockIdx.y * ROWS_THREADS + threadIdx.x;
    if (i < D) to[blockIdx.x * D + i] = x[rows.at[blockIdx.x] * D + i];
}

// to (R, D) = x[rows[r]], x (T, D); R up to MOST_ROWS, rows in the host's memory.
inline void launch_rows(const float* x, const int32_t* rows, float* to, int64_t R, int64_t D, cudaStream_t stream) {
    RowList list = {};
    for (int64_t r = 0; r < R; r++) list.at[r] = rows[r];
    MOSS_LAUNCH(rows_kernel, dim3(R, (D + ROWS_THREADS - 1) / ROWS_THREADS), dim3(ROWS_THREADS), 0, stream, x, list, to, D);
}

// Of each row, the ids [start[r], start[r + 1]) of a list, and by how much they are penalised.
struct Penalties {
    int32_t start[MOST_ROWS + 1];
    float by[MOST_ROWS];
};

// The division is an exact one, whatever the compiler's flags, so that the host would choose the same tokens.
__global__ void __launch_bounds__(ROWS_THREADS) penalise_kernel(float* logits, Penalties p, const int32_t* __restrict__ ids, int64_t V) {
    const int r = blockIdx.x, i = p.start[r] + blockIdx.y * ROWS_THREADS + threadIdx.x;
    if (i >= p.start[r + 1]) return;
    float* const at = logits + r * V + ids[i];
    *at = *at < 0 ? *at * p.by[r] : __fdiv_rn(*at, p.by[r]);
}

// Logits (R, V) of the ids, all different for one row: divided by the penalty where positive, multiplied where negative (Keskar et
// al., CTRL, 2019). R up to MOST_ROWS.
inline void launch_penalise(float* logits, const Penalties& p, const int32_t* ids, int64_t R, int64_t V, cudaStream_t stream) {
    int most = 0;
    for (int64_t r = 0; r < R; r++) most = p.start[r + 1] - p.start[r] > most ? p.start[r + 1] - p.start[r] : most;
    if (!most) return;
    MOSS_LAUNCH(penalise_kernel, dim3(R, (most + ROWS_THREADS - 1) / ROWS_THREADS), dim3(ROWS_THREADS), 0, stream, logits, p, ids, V);
}

}  // namespace moss_cuda
