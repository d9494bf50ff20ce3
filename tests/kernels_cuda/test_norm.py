"""norm.cuh against float64, on the emulated device."""

from __future__ import annotations

import numpy as np
import pytest

from .. import reference
from ..emulation.build import build, unwritten

WRAPPERS = """
#include "norm.cuh"
void layer_norm(const float* x, const float* weight, const float* bias, float eps, half* y, int64_t T, int64_t D) {
    launch_layer_norm(x, {weight, bias, eps}, y, T, D, 0);
}
"""


@pytest.fixture(scope="module")
def kernels():
    return build(WRAPPERS)


@pytest.mark.parametrize("T, D", [(1, 8), (1, 6144), (5, 40), (7, 200), (3, 517), (2, 1)])
def test_layer_norm(kernels, rng, T, D):
    x = (rng.standard_normal((T, D)) * 3 + 100).astype(np.float32)  # a large mean: cancellation would show
    weight, bias = rng.standard_normal((2, D)).astype(np.float32)
    y = unwritten((T, D), np.float16)
    kernels.layer_norm(x, weight, bias, 1e-5, y, T, D)
    exact = reference.layer_norm(x.astype(np.float64), weight, bias, 1e-5)
    assert np.abs(y.array - exact).max() <= 6e-4 * np.abs(exact).max() + 1e-5  # a half's rounding is 4.9e-4 of it
