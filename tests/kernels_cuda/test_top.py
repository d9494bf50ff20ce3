"""top.cuh against a stable sort, on the emulated device."""

from __future__ import annotations

import numpy as np
import pytest

from ..emulation.build import build, unwritten

WRAPPERS = """
#include "top.cuh"
int64_t workspace(int64_t T, int64_t V, int64_t k) { return top_k_workspace(T, V, k); }
void top_k(const float* logits, float* values, int32_t* ids, int64_t T, int64_t V, int64_t k, void* workspace) {
    launch_top_k(logits, values, ids, T, V, k, workspace, 0);
}
"""


@pytest.fixture(scope="module")
def kernels():
    return build(WRAPPERS)


def check(kernels, logits: np.ndarray, k: int) -> None:
    T, V = logits.shape
    values, ids = unwritten((T, k), np.float32), unwritten((T, k), np.int32)
    kernels.top_k(logits, values, ids, T, V, k, unwritten(kernels.workspace(T, V, k), np.uint8))
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert np.array_equal(ids.array, expected)
    assert np.array_equal(values.array, np.take_along_axis(logits, expected, 1))


@pytest.mark.parametrize(
    "T, V, k", [(1, 1, 1), (2, 100, 1), (3, 513, 1), (1, 64, 64), (2, 700, 40), (1, 5000, 64), (1, 9000, 5)]
)
def test_top_k(kernels, rng, T, V, k):
    check(kernels, rng.standard_normal((T, V)).astype(np.float32), k)


@pytest.mark.parametrize("k", [1, 17])
def test_of_equal_logits_the_lower_id_comes_first(kernels, rng, k):
    logits = rng.integers(-3, 2, (3, 1500)).astype(np.float32)
    logits[1] = np.where(rng.random(1500) < 0.5, 0.0, -0.0)
    logits[2] = -np.inf
    check(kernels, logits, k)


def test_extreme_logits(kernels, rng):
    logits = rng.permutation(np.float32([-np.inf, np.inf, 3e38, -3e38, 1e-38, -1e-38, 0, 1, -1])).reshape(1, 9)
    check(kernels, logits, 9)
