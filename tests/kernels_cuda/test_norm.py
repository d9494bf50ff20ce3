"""norm.cuh against float64, on the emulated device."""

from __future__ import annotations

import numpy as np
import pytest

from .. import reference
from ..emulation.build import build, unwritten

WRAPPERS = """
#include "norm.cuh"
void layer_norm(const float* x, const float* w, const float* b, const int32_t* o, int orders, half* y, int T, int D, int to) {
    launch_layer_norm(x, {w, b, 1e-5f}, o, orders, y, T, D, to, 0);
}
"""


@pytest.fixture(scope="module")
def kernels():
    return build(WRAPPERS)


@pytest.mark.parametrize("orders", [0, 1, 2])
@pytest.mark.parametrize("T, D, stride", [(1, 8, 8), (1, 6144, 6144), (5, 40, 40), (7, 200, 208), (3, 517, 520), (2, 1, 8)])
def test_layer_norm(kernels, rng, orders, T, D, stride):
    x = (rng.standard_normal((T, D)) * 3 + 100).astype(np.float32)  # a large mean: cancellation would show
    weight, bias = rng.standard_normal((2, D)).astype(np.float32)
    order = np.array([rng.permutation(D) for _ in range(orders)], np.int32) if orders else None
    y = unwritten((max(orders, 1), T, stride), np.float16)
    kernels.layer_norm(x, weight, bias, order, orders, y, T, D, stride)
    exact = reference.layer_norm(x.astype(np.float64), weight, bias, 1e-5)
    exact = exact[None] if order is None else np.stack([exact[:, o] for o in order])
    assert np.abs(y.array[:, :, :D] - exact).max() <= 6e-4 * np.abs(exact).max() + 1e-5  # a half's rounding is 4.9e-4 of it
    assert (y.array[:, :, D:] == 0).all()
