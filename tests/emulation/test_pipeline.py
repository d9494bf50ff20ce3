"""A matrix product as kernels write it: copies ahead of their use, fragments from shared memory; and with a step left out."""

from __future__ import annotations

import numpy as np
import pytest

from .build import KernelError, build, unwritten

KERNELS = r"""
constexpr int TILE_M = 16, TILE_N = 32, TILE_K = 32, STAGES = 3, WARPS = TILE_N / 8, ROW = TILE_K + 8;  // 8: no bank twice

// y (M, N) = x (M, K) w (N, K)^T.
// MISTAKE 1: waits for too few copies, 2: no barrier after the wait, 3: none before a stage is filled again.
template <int MISTAKE>
__global__ void __launch_bounds__(32 * WARPS)
    product(const half* __restrict__ x, const half* __restrict__ w, float* __restrict__ y, int M, int N, int K) {
    MOSS_DYNAMIC_SHARED(half, tiles);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m0 = blockIdx.x * TILE_M, n0 = blockIdx.y * TILE_N;
    constexpr int STAGE = (TILE_M + TILE_N) * ROW;
    auto copy = [&](int step) {
        half* stage = tiles + step % STAGES * STAGE;
        for (int i = threadIdx.x; i < (TILE_M + TILE_N) * TILE_K / 8; i += 32 * WARPS) {
            const int row = i / (TILE_K / 8), k = i % (TILE_K / 8) * 8 + step * TILE_K;
            const bool of_x = row < TILE_M;
            const int at = of_x ? m0 + row : n0 + row - TILE_M;
            const bool there = at < (of_x ? M : N) && k < K;
            cp_async16(stage + row * ROW + k % TILE_K, (of_x ? x : w) + (there ? (int64_t)at * K + k : 0), there ? 16 : 0);
        }
    };
    const int steps = (K + TILE_K - 1) / TILE_K;
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) copy(s);
        cp_async_commit();
    }
    float sum[4] = {};
    for (int s = 0; s < steps; s++) {
        cp_async_wait<MISTAKE == 1 ? STAGES - 1 : STAGES - 2>();
        if (MISTAKE != 2 && MISTAKE != 3) __syncthreads();
        if (MISTAKE == 3 && s < 2) __syncthreads();
        if (s + STAGES - 1 < steps) copy(s + STAGES - 1);
        cp_async_commit();
        const half* stage = tiles + s % STAGES * STAGE;
        for (int k = 0; k < TILE_K; k += 16) {
            uint32_t a[4], b[2];
            ldmatrix_x4(a, stage + lane % 16 * ROW + k + lane / 16 * 8);
            ldmatrix_x2(b, stage + (TILE_M + warp * 8 + lane % 8) * ROW + k + lane / 8 % 2 * 8);
            mma_16816(sum, a, b);
        }
    }
    for (int i = 0; i < 4; i++) {
        const int m = m0 + lane / 4 + i / 2 * 8, n = n0 + warp * 8 + lane % 4 * 2 + i % 2;
        if (m < M && n < N) y[m * N + n] = sum[i];
    }
}

#define LAUNCH(mistake) \
    if (m == mistake) MOSS_LAUNCH(product<mistake>, grid, 32 * WARPS, STAGES * (TILE_M + TILE_N) * ROW * 2, 0, x, w, y, M, N, K)
void c_product(int m, const half* x, const half* w, float* y, int M, int N, int K) {
    const dim3 grid((M + TILE_M - 1) / TILE_M, (N + TILE_N - 1) / TILE_N);
    LAUNCH(0);
    LAUNCH(1);
    LAUNCH(2);
    LAUNCH(3);
}
"""


@pytest.fixture(scope="module")
def kernels():
    return build(KERNELS)


def inputs(M, N, K):
    rng = np.random.default_rng()
    return rng.standard_normal((M, K)).astype(np.float16), rng.standard_normal((N, K)).astype(np.float16)


@pytest.mark.parametrize("M, N, K", [(16, 32, 128), (5, 40, 200), (33, 7, 24), (1, 1, 8)])
def test_it_multiplies(kernels, M, N, K):
    x, w = inputs(M, N, K)
    y = unwritten((M, N), np.float32)
    kernels.c_product(0, x, w, y, M, N, K)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.abs(y.array - exact).max() < 1e-5 * np.sqrt(K)


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (1, r"cp.async to it has not been waited for"),
        (2, r"cp.async to it has not|race: |never written"),
        (3, r"race: |cp.async to it"),
    ],
)
def test_it_with_a_step_left_out(kernels, mistake, says):
    M, N, K = 16, 32, 256
    with pytest.raises(KernelError, match=says):
        kernels.c_product(mistake, *inputs(M, N, K), unwritten((M, N), np.float32), M, N, K)
