"""rows.cuh against numpy, on the emulated device."""

from __future__ import annotations

import numpy as np
import pytest

from moss_jt.sampling import penalised

from ..emulation.build import build, inout, unwritten

WRAPPERS = """
#include "rows.cuh"
// Addresses as numbers are of the host's memory.
void rows(const float* x, int64_t at, float* to, int64_t R, int64_t D) { launch_rows(x, (const int32_t*)at, to, R, D, 0); }
void penalise(float* logits, int64_t starts, int64_t by, const int32_t* ids, int64_t R, int64_t V) {
    Penalties p = {};
    for (int64_t r = 0; r < R; r++) p.start[r + 1] = ((int32_t*)starts)[r + 1], p.by[r] = ((float*)by)[r];
    launch_penalise(logits, p, ids, R, V, 0);
}
"""


@pytest.fixture(scope="module")
def kernels():
    return build(WRAPPERS)


@pytest.mark.parametrize("rows, D", [([0], 1), ([4, 0, 4], 6144), (list(range(16)), 300)])
def test_rows(kernels, rng, rows, D):
    x = rng.standard_normal((17, D)).astype(np.float32)
    to = unwritten((len(rows), D), np.float32)
    which = np.array(rows, np.int32)
    kernels.rows(x, which.ctypes.data, to, len(rows), D)
    assert np.array_equal(to.array, x[rows])


@pytest.mark.parametrize("counts", [[1], [0, 700, 3], [0]])
def test_penalty_gives_the_very_numbers_of_the_sampler(kernels, rng, counts):
    R, V = len(counts), 1000
    logits, by = rng.standard_normal((R, V)).astype(np.float32), rng.uniform(0.5, 2, R).astype(np.float32)
    ids = [rng.permutation(V)[:n].astype(np.int32) for n in counts]
    starts = np.cumsum([0, *counts]).astype(np.int32)
    given = inout(logits.copy())
    listed = np.concatenate([*ids, [0]]).astype(np.int32)
    kernels.penalise(given, starts.ctypes.data, by.ctypes.data, listed, R, V)
    for row, before, seen, p in zip(given.array, logits, ids, by):
        assert np.array_equal(row, penalised(before, seen, p))
