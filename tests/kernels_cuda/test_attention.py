"""attention.cuh against float64, on the emulated device: decode, drafts and prompts, with both codings of the cache."""

from __future__ import annotations

import numpy as np
import pytest

from moss_jt.ops.rotary import rotary_angles

from .. import reference
from ..emulation.build import build, inout, unwritten

WRAPPERS = """
#include <vector>

#include "attention.cuh"
static std::vector<moss_cuda::Sequence> sequences;  // in the host's memory, as launch_attention wants them

void begin(int n) { sequences.clear(), sequences.reserve(n); }
void add(int place, int start, int first, int count) { sequences.push_back({place, start, first, count}); }

int64_t workspace(int64_t H, int64_t S, int64_t C, int64_t T, int64_t n) { return attention_workspace({H, S, 0, C}, T, n); }

void attention(const half* qkv, const float* angles, half* keys, half* values, int64_t H, int64_t S, int64_t rotary, int64_t C,
               half* both, int64_t I, void* workspace) {
    launch_attention(qkv, angles, {16, keys, values, nullptr, nullptr}, {H, S, rotary, C}, sequences.data(), sequences.size(),
                     both, I, workspace, 0);
}
void attention_int8(const half* qkv, const float* angles, int8_t* keys, int8_t* values, float* key_scale, float* value_scale,
                    int64_t H, int64_t S, int64_t rotary, int64_t C, half* both, int64_t I, void* workspace) {
    launch_attention(qkv, angles, {8, keys, values, key_scale, value_scale}, {H, S, rotary, C}, sequences.data(),
                     sequences.size(), both, I, workspace, 0);
}
"""


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
        known = self.known[..., None]
        if bits == 16:
            arrays = [np.where(known, rng.standard_normal(shape), np.nan).astype(np.float16) for _ in range(2)]
        else:
            arrays = [rng.integers(-127, 128, shape).astype(np.int8) for _ in range(2)]
            arrays += [np.where(known, rng.uniform(0.01, 0.03, (*shape[:3], 1)), np.nan).astype(np.float32) for _ in range(2)]
        self.arrays = [inout(array, np.broadcast_to(known, array.shape)) for array in arrays]
        self.before = [array.copy() for array in arrays]

    def exact(self, side: int, place: int, seen: int) -> np.ndarray:
        """Keys (0) or values (1) of the first tokens at a place, as float64 (H, seen, S)."""
        entries, *scale = (memory.array[place, :, :seen].astype(np.float64) for memory in self.arrays[side::2])
        return entries * scale[0] if scale else entries

    def check_written(self, table: np.ndarray) -> None:
        """The new tokens' entries are written, all of them and nothing else."""
        after = self.known.copy()
        for place, start, _, count in table:
            after[place, :, start : start + count] = True
        for memory, before in zip(self.arrays, self.before):
            assert np.array_equal(memory.array[self.known], before[self.known])
            written = memory.written.reshape(*after.shape, -1)
            assert np.array_equal(written, np.broadcast_to(after[..., None], written.shape))


class Tokens:
    """Random new tokens of sequences (tokens before, new ones), whose places in the caches are in no order."""

    def __init__(self, rng, H, S, rotary, C, sequences):
        self.H, self.S, self.rotary, self.C, self.D = H, S, rotary, C, H * S
        self.I = 2 * int(rng.integers(1, 9))
        places = rng.permutation(len(sequences) + 1)[:-1]  # one place stays untouched
        first = np.cumsum([0, *(count for _, count in sequences)])
        rows = [(place, start, f, n) for place, f, (start, n) in zip(places, first, sequences)]
        self.table = np.array(rows, np.int32)
        self.qkv = (rng.standard_normal((first[-1], 3 * self.D)) * 2).astype(np.float16)

    def caches(self, rng, bits: int) -> Caches:
        return Caches(rng, bits, (len(self.table) + 1, self.H, self.C, self.S), self.table)

    def attention(self, kernels, caches: Caches, table: np.ndarray):
        """Attention of the table's sequences, as what is written of ``both``."""
        T, n = len(self.qkv), len(table)
        both = unwritten((T, self.D + self.I), np.float16)
        workspace = unwritten(kernels.workspace(self.H, self.S, self.C, T, n), np.uint8)
        kernels.begin(n)
        for row in table.tolist():
            kernels.add(*row)
        call = kernels.attention if caches.bits == 16 else kernels.attention_int8
        angles = rotary_angles(self.C, self.rotary)
        call(self.qkv, angles, *caches.arrays, self.H, self.S, self.rotary, self.C, both, self.I, workspace)
        written = both.written.reshape(T, -1)[:, ::2] != 0
        expected = np.zeros_like(written)
        for _, _, row, n in table:
            expected[row : row + n, : self.D] = True
        assert np.array_equal(written, expected)
        return both.array[:, : self.D]

    def check(self, kernels, caches: Caches) -> None:
        """Against float64, from keys and values as the cache has them afterwards."""
        out = self.attention(kernels, caches, self.table)
        caches.check_written(self.table)
        for place, start, row, n in self.table:
            seen, rows = start + n, slice(row, row + n)
            parts = np.split(self.qkv[rows].astype(np.float64), 3, axis=1)
            q, k, v = (reference.heads(part, self.H) for part in parts)
            q, k = (reference.rotary(a, np.arange(start, seen), self.rotary) for a in (q, k))
            keys, values = (caches.exact(side, place, seen) for side in (0, 1))
            for new, cache in ((k, keys), (v, values)):
                close(cache[:, start:], new, 5e-4 if caches.bits == 16 else 2e-2)
            exact = reference.attention(q, keys, values).transpose(1, 0, 2).reshape(n, self.D)
            # Few tokens: the result's rounding alone. Many: also queries, weights and int8's products as halves.
            close(out[rows], exact, 5e-4 if n <= 8 else 1.5e-3)


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
    tokens = Tokens(rng, *case)
    tokens.check(kernels, tokens.caches(rng, bits))


def test_more_sequences_than_travel_at_once(kernels, rng):
    counts = [(int(rng.integers(0, 4)), 9 if i % 3 == 1 else 1) for i in range(135)]
    tokens = Tokens(rng, 1, 4, 4, 16, counts)
    tokens.check(kernels, tokens.caches(rng, 16))


def test_large_scores(kernels, rng):
    tokens = Tokens(rng, 1, 64, 32, 140, [(130, 3), (0, 4)])
    tokens.qkv[:, : 2 * tokens.D] *= 12  # of hundreds: all weight on one position, here in one run and there in another
    tokens.check(kernels, tokens.caches(rng, 16))


@pytest.mark.parametrize("bits", [16, 8])
def test_results_depend_on_a_sequence_alone(kernels, rng, bits):
    tokens = Tokens(rng, 1, 64, 32, 150, [(140, 1), (70, 5), (5, 30), (0, 70)])
    seed = int(rng.integers(2**32))
    together = tokens.attention(kernels, tokens.caches(np.random.default_rng(seed), bits), tokens.table)
    for i, (_, _, row, n) in enumerate(tokens.table):
        # The order of the emulated threads is another each time.
        alone = tokens.attention(kernels, tokens.caches(np.random.default_rng(seed), bits), tokens.table[i : i + 1])
        assert np.array_equal(alone[row : row + n], together[row : row + n])


@pytest.mark.parametrize("S, count", [(5, 3), (64, 3), (64, 12)])
def test_int8_rows_are_rounded_as_on_the_cpu(kernels, rng, S, count):
    tokens = Tokens(rng, 2, S, 4, 20, [(2, count)])
    values = tokens.qkv[:, 2 * tokens.D :].reshape(count, 2, S)
    values[1, 0] = 0
    values[2, 1] = [127] + [1.5, 2.5, -2.5] + [0] * (S - 4)  # ties go to the even
    caches = tokens.caches(rng, 8)
    tokens.attention(kernels, caches, tokens.table)
    place = tokens.table[0, 0]
    entries, scales = (caches.arrays[i].array[place, :, 2 : 2 + count] for i in (1, 3))
    most = np.abs(values).max(2, keepdims=True).astype(np.float32)
    by = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    assert np.array_equal(entries, np.rint(values.astype(np.float32) * by).transpose(1, 0, 2))
    assert np.array_equal(scales, (most / np.float32(127)).transpose(1, 0, 2))
