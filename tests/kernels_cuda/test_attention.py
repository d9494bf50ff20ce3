"""Attention of CUDA's kernels against float64: decode in runs, prompts by tensor cores and without, both codings of the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moss_jt.ops.rotary import rotary_angles

from .. import reference
from ..emulation.build import build, inout, unwritten

WRAPPERS = Path(__file__).with_name("attention.cu").read_text()


@pytest.fixture(scope="module", params=[600, 750, 800])
def kernels(request):
    return build(WRAPPERS, request.param)


def close(ours: np.ndarray, exact: np.ndarray, tolerance: float) -> None:
    error = np.linalg.norm(ours.astype(np.float64) - exact) / np.linalg.norm(exact)
    assert np.isfinite(ours).all() and error < tolerance, f"relative error {error:.2e}"


class Caches:
    """Keys and values of B sequences: of the tokens they have random numbers, elsewhere what may not be read."""

    def __init__(self, rng, bits: int, shape: tuple, table: np.ndarray):
        self.bits, self.known = bits, np.zeros(shape[:3], bool)
        for place, start, _, _ in table:
            self.known[place, :, :start] = True
        self.entries, self.scales = [], []
        for _ in range(2):
            if bits == 16:
                entries = np.where(self.known[..., None], rng.standard_normal(shape), np.nan).astype(np.float16)
            else:
                entries = rng.integers(-127, 128, shape).astype(np.int8)
                scales = np.where(self.known, rng.uniform(0.01, 0.03, shape[:3]), np.nan).astype(np.float32)
                self.scales.append(inout(scales, self.known))
            self.entries.append(inout(entries, np.broadcast_to(self.known[..., None], shape)))
        self.before = self.copies()

    def arrays(self) -> list:
        return [*self.entries, *self.scales]

    def copies(self) -> list[np.ndarray]:
        return [memory.array.copy() for memory in self.arrays()]

    def exact(self, side: int, place: int, seen: int) -> np.ndarray:
        """Keys (0) or values (1) of the first tokens at a place, as float64 (H, seen, S)."""
        entries = self.entries[side].array[place, :, :seen].astype(np.float64)
        return entries if self.bits == 16 else entries * self.scales[side].array[place, :, :seen, None].astype(np.float64)

    def only_written(self, table: np.ndarray) -> bool:
        """Whether the new tokens' entries are written, all of them and nothing else."""
        new = np.zeros_like(self.known)
        for place, start, _, count in table:
            new[place, :, start : start + count] = True
        for memory, before in zip(self.arrays(), self.before):
            if not np.array_equal(memory.array[self.known], before[self.known]):
                return False
            written = memory.written.reshape(*self.known.shape, -1).all(-1)
            if not np.array_equal(written, self.known | new):
                return False
        return True


def evaluate(kernels, rng, bits, H, S, rotary, C, sequences, seed=None):
    """One call for sequences (start, count), on places of a cache that are not in order. Returns all that goes in and comes out."""
    D, I, B = H * S, 2 * int(rng.integers(1, 9)), len(sequences) + 1  # noqa: E741
    places = rng.permutation(B)[:-1]  # one place stays untouched
    first = np.cumsum([0, *(count for _, count in sequences)])
    T = first[-1]
    table = np.array([(place, start, f, n) for place, f, (start, n) in zip(places, first, sequences)], np.int32)
    qkv = (rng.standard_normal((T, 3 * D)) * 2).astype(np.float16)
    caches = Caches(rng, bits, (B, H, C, S), table)
    both = unwritten((T, D + I), np.float16)
    workspace = unwritten(kernels.workspace(H, S, C, T, len(table)), np.uint8)
    kernels.begin(len(table))
    for row in table.tolist():
        kernels.add(*row)
    call = kernels.attention if bits == 16 else kernels.attention_int8
    angles = rotary_angles(C, rotary)
    call(qkv, angles, *caches.arrays(), H, S, rotary, C, both, I, workspace, seed=seed)
    return qkv, table, caches, both, D


# H, S, rotary, C, (tokens before, new tokens) of each sequence
CASES = [
    (1, 256, 64, 3, [(0, 1)]),
    (2, 256, 64, 200, [(150, 1)]),  # three runs, the last not whole
    (1, 256, 64, 131, [(63, 1), (64, 1), (127, 4), (0, 2)]),  # around the ends of runs
    (1, 256, 64, 81, [(60, 8), (3, 5)]),  # new tokens in two runs
    (2, 64, 32, 97, [(89, 3), (0, 7)]),
    (2, 32, 32, 70, [(65, 1), (10, 6)]),
    (3, 4, 2, 150, [(140, 8), (0, 1), (64, 2)]),
    (1, 5, 4, 71, [(66, 1), (2, 3)]),  # a size that no vector divides
    (1, 80, 0, 67, [(62, 5)]),
    (1, 64, 64, 2200, [(2170, 2)]),  # runs of more than one tile
    (1, 256, 64, 77, [(0, 20)]),
    (1, 256, 64, 111, [(37, 70), (5, 2)]),  # two tiles of tokens, and decode beside
    (2, 64, 32, 101, [(1, 64), (33, 65), (0, 9)]),
    (2, 32, 16, 50, [(3, 21), (0, 33)]),
    (3, 4, 4, 41, [(0, 41), (7, 1)]),
]


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(kernels, rng, case, bits):
    H, S, rotary, C, _ = case
    qkv, table, caches, both, D = evaluate(kernels, rng, bits, *case)
    assert caches.only_written(table)
    for place, start, row, n in table:
        seen, rows = start + n, slice(row, row + n)
        q, k, v = (reference.heads(part, H) for part in np.split(qkv[rows].astype(np.float64), 3, axis=1))
        q, k = (reference.rotary(a, np.arange(start, seen), rotary) for a in (q, k))
        keys, values = (caches.exact(side, place, seen) for side in (0, 1))
        for new, cache in ((k, keys), (v, values)):
            close(cache[:, start:], new, 5e-4 if bits == 16 else 2e-2)
        exact = reference.attention(q, keys, values).transpose(1, 0, 2).reshape(n, D)
        # Few tokens: the result's rounding alone. Many: also queries, weights and int8's products as halves.
        close(both.array[rows, :D], exact, 4e-4 if n <= 8 else 1.5e-3)
    assert np.isnan(both.array[:, D:]).all() and not both.written.reshape(len(qkv), -1)[:, 2 * D :].any()
