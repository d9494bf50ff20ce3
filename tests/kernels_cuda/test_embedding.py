"""embedding.cuh: rows of halves, exactly, on the emulated device."""

from __future__ import annotations

import numpy as np
import pytest

from ..emulation.build import build, unwritten

WRAPPERS = """
#include "embedding.cuh"
void embedding(const int32_t* ids, const half* wte, float* x, int64_t T, int64_t D) { launch_embedding(ids, wte, x, T, D, 0); }
"""


@pytest.fixture(scope="module")
def kernels():
    return build(WRAPPERS)


@pytest.mark.parametrize("T, V, D", [(1, 3, 8), (5, 9, 1024), (3, 4, 1032), (4, 7, 1037), (2, 5, 1), (1, 2, 6144)])
def test_embedding(kernels, rng, T, V, D):
    wte, ids = rng.standard_normal((V, D)).astype(np.float16), rng.integers(0, V, T, dtype=np.int32)
    ids[0], ids[-1] = V - 1, 0
    x = unwritten((T, D), np.float32)
    kernels.embedding(ids, wte, x, T, D)
    assert np.array_equal(x.array, wte[ids].astype(np.float32))
