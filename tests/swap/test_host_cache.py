"""Keys and values in host memory, on a simulated GPU: whatever its timing, a sweep finds what those before it wrote."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jt.devices import host_blocks
from moss_jt.devices.host_blocks import HostCache

from .simulated_cuda import Simulated

BLOCKS, PLACES, HEADS, CONTEXT, SIZE = 3, 2, 2, 24, 4
ROWS = (BLOCKS, 2, PLACES, HEADS, CONTEXT)
SHAPES = {
    "fp16": [((*ROWS, SIZE), np.dtype(np.float16))],
    "int8": [((*ROWS, SIZE), np.dtype(np.int8)), (ROWS, np.dtype(np.float32))],
}


class Model:
    """Kernels, and a CPU, that write random rows; ``true``: what should be there, ``wrong``: where it was not."""

    def __init__(self, seed: int, kv_cache: str):
        self.cuda, self.wrong, self.lengths = Simulated(seed), [], [0] * PLACES
        host_blocks.cudart = self.cuda
        self.cache = HostCache(SHAPES[kv_cache], brought=True)
        self.true = [np.zeros(shape, dtype) for shape, dtype in SHAPES[kv_cache]]
        self.rng = np.random.default_rng(seed)

    def sweep(self, counts: list[int], lent: int, stop: int | None, length: int = CONTEXT) -> None:
        """New tokens of each sequence, after the first ``length`` of it; up to block ``stop``. ``lent``: how many blocks the
        device computes, before the CPU the others."""
        self.lengths = [min(length, n) for n in self.lengths]
        table = [(place, self.lengths[place], 0, n) for place, n in enumerate(counts) if n]
        new = [self.rng.integers(-100, 100, part.shape).astype(part.dtype) for part in self.true]
        self.cache.begin(np.array(table, np.int32), lent)
        for i in range(BLOCKS):
            if i >= lent:
                self.cache.on_host([i])
                self._kernel([half for part in self.cache._parts for half in part[i]], i, table, new)
                continue
            with self.cache.lend(i) as addresses:
                self._launch(addresses, i, table, new)
                if i == stop:
                    raise KeyError
        for place, start, _, count in table:
            for part, rows in zip(self.true, new):
                part[:, :, place, :, start : start + count] = rows[:, :, place, :, start : start + count]
            self.lengths[place] += count

    def _launch(self, addresses: list[int], i: int, table: list, new: list) -> None:
        shapes = [part.shape[2:] for part in self.true for _ in range(2)]
        dtypes = [part.dtype for part in self.true for _ in range(2)]
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in zip(shapes, dtypes)]
        there = [
            self.cuda.memory[at : at + n].view(dtype).reshape(shape)
            for at, n, shape, dtype in zip(addresses, sizes, shapes, dtypes)
        ]
        true = [half.copy() for part in self.true for half in part[i]]
        self.cuda.launch(lambda: self._kernel(there, i, table, new, true))
        self.cuda.launch(lambda: None)

    def _kernel(self, there: list, i: int, table: list, new: list, true: list | None = None) -> None:
        true = true or [half for part in self.true for half in part[i]]
        for half, exact, rows in zip(there, true, [half for part in new for half in part[i]]):
            for place, start, _, count in table:
                if not np.array_equal(half[place, :, :start], exact[place, :, :start]):
                    self.wrong.append((i, place))
                half[place, :, start : start + count] = rows[place, :, start : start + count]

    def check(self) -> list:
        """Where anything was wrong, also now in host memory."""
        self.cache.on_host([])
        for place, length in enumerate(self.lengths):
            for part, exact in zip(self.cache._parts, self.true):
                if not np.array_equal(part[:, :, place, :, :length], exact[:, :, place, :, :length]):
                    self.wrong.append(place)
        return self.wrong


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    monkeypatch.setattr(host_blocks, "cudart", host_blocks.cudart)


sweeps = st.tuples(
    st.lists(st.integers(0, 5), min_size=PLACES, max_size=PLACES).filter(any),
    st.integers(0, BLOCKS),
    st.none() | st.integers(0, 2),
    st.sampled_from([CONTEXT, 3, 0]),
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), kv_cache=st.sampled_from(list(SHAPES)), those=st.lists(sweeps, max_size=4))
def test_whatever_the_timing(seed, kv_cache, those):
    model = Model(seed, kv_cache)
    taken = model.cuda.taken
    for sweep in those:
        with suppress(KeyError):
            model.sweep(*sweep)
    assert not model.check() and model.cuda.taken == taken


def test_only_rows_that_are_needed_cross(monkeypatch):
    model, crossed = Model(0, "fp16"), []
    monkeypatch.setattr(model.cuda, "rows_to_device", lambda to, pitch, rows, stream: crossed.append(("up", rows.nbytes)))
    monkeypatch.setattr(model.cuda, "rows_to_host", lambda rows, *there: crossed.append(("down", rows.nbytes)))
    row = HEADS * SIZE * 2
    for counts, lengths in (([5, 0], [0, 0]), ([1, 3], [5, 0])):
        model.lengths, crossed[:] = lengths, []
        model.cache.begin(np.array([(p, lengths[p], 0, n) for p, n in enumerate(counts) if n], np.int32), BLOCKS)
        for i in range(BLOCKS):
            with model.cache.lend(i):
                pass
        up, down = (sum(n for name, n in crossed if name == way) for way in ("up", "down"))
        # Of three blocks that take two turns, the middle one is still there.
        assert up == 2 * (BLOCKS - 1) * row * sum(lengths[p] for p, n in enumerate(counts) if n)
        assert down == 2 * BLOCKS * row * sum(counts)


def test_what_the_device_always_computes_stays_there(monkeypatch):
    """Rows of the first two of three blocks come once, after a sweep that lends all of them: those of the first, since the
    second's turn was nobody else's."""
    model, brought = Model(1, "int8"), []
    rows_to_device = model.cuda.rows_to_device
    monkeypatch.setattr(
        model.cuda, "rows_to_device", lambda *given: (brought.append(given[2].nbytes), rows_to_device(*given))[1]
    )
    model.sweep([7, 3], BLOCKS, None)
    found = []
    for lent in (2, 2, 2, BLOCKS, 2, 2):
        brought.clear()
        model.sweep([1, 0], lent, None)
        found.append(sum(brought))
    row = 2 * HEADS * (SIZE + 4)  # of keys and values, with their scales
    assert found == [7 * row, 0, 0, 10 * row, 11 * row, 0] and not model.check()


MISTAKES = {
    "kernels do not wait for what comes": ("there", "wait_on_default"),
    "what goes back does not wait for the kernels": ("used", "record"),
}


@pytest.mark.parametrize("mistake", [*MISTAKES, "the CPU does not wait", "nothing waits for an interrupted sweep"])
def test_a_mistake_would_be_seen(mistake):
    """The same without one of the waits: the simulated device finds it."""
    found = 0
    for seed in range(40):
        model = Model(seed, "fp16")
        on_host = model.cache.on_host
        if mistake in MISTAKES:
            event, call = MISTAKES[mistake]
            for turn in model.cache._turns:
                setattr(getattr(turn, event), call, lambda: None)
        elif mistake == "the CPU does not wait":
            model.cache.on_host = lambda blocks: None
        sweeps = [([5, 2], BLOCKS, None), ([1, 3], BLOCKS, None), ([1, 1], 0, None)]
        if mistake == "nothing waits for an interrupted sweep":
            sweeps = [([5, 2], BLOCKS, None), ([1, 3], BLOCKS, 2), ([1, 1], BLOCKS, None)]
            model.cache.begin = partial(begin_at_once, model.cache)
        for sweep in sweeps:
            with suppress(KeyError):
                model.sweep(*sweep)
        model.cache.on_host = on_host
        found += bool(model.check())
    assert found


def begin_at_once(cache: HostCache, table: np.ndarray, count: int) -> None:
    cache._table, cache._count = table.tolist(), count
    cache._bring(0)
