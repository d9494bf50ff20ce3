"""Blocks that do not fit the device: computed by the CPU where they lie, or brought, sweep by sweep.

Their keys and values are in pinned host memory. When the CPU computes, nothing crosses but the state. When the blocks are
streamed, the rows that a block needs are copied to the device beside its weights, and the new ones back after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np

from .. import cudart
from ..cache import parts_of
from ..runtime import jittor
from ..swap import CHUNK, Plan
from ..swap.on_device import OnDevice
from ..swap.room import SLOTS
from ..weights import Weights
from .host import Blocks, layers_of


class HostBlocks:
    """Those of a plan, of weights that a device was lent. ``numbers``: each one's place among them."""

    def __init__(self, weights: Weights, plan: Plan, lent: OnDevice):
        self._config, self._context, self._kv_cache = weights.config, plan.context, plan.kv_cache
        self.numbers, self._lent = {i: k for k, i in enumerate(plan.host_blocks)}, lent
        self._brought = bool(set(plan.host_blocks) & set(plan.streamed_blocks))
        self._blocks = Blocks(weights.config, weights.coding, plan.context, plan.kv_cache)
        self._state = cudart.pinned(4 * weights.config.n_embd * CHUNK).view(np.float32).reshape(CHUNK, -1)

    def cache(self, places: int) -> HostCache:
        """Raises OutOfDeviceMemory."""
        shapes = parts_of(self._config, self._context, places, self._kv_cache)
        return HostCache([((len(self.numbers), *shape[1:]), np.dtype(dtype)) for shape, dtype in shapes], self._brought)

    def compute(
        self, cache: HostCache, blocks: list[int], embedded: np.ndarray, table: np.ndarray, places: int, state: int
    ) -> None:
        """By the CPU: neighbouring blocks, from float16 (T, D), or, where others come before them, from the state at an address
        on the device, float32 (T, D), once all launches are over. What is launched from now on finds the result there."""
        layers = cache.on_host([self.numbers[i] for i in blocks])
        there = self._state[: len(embedded)]
        if blocks[0]:
            cudart.to_host(there, state)
        lent = ((nullcontext(self._lent.on_host(i)), layer) for i, layer in zip(blocks, layers))
        with jittor().flag_scope(lazy_execution=0, no_grad=1, use_cuda=0):
            there[:] = self._blocks(there if blocks[0] else embedded.astype(np.float32), table, places, lent)
        cudart.to_device(state, there)


class HostCache:
    """Keys and values of host blocks, one after the other, in host memory. ``layers``: as the CPU takes them.

    On the device there is room for those of two blocks, which take turns. All copies go through one stream, so that a block's
    rows come only when those of the one before the last have gone back, and what a sweep reads is what those before it wrote.
    Rows that are there still do not come again, so that blocks which the device computes in every sweep cost next to nothing.
    """

    def __init__(self, shapes: list[tuple], brought: bool):
        """``shapes``: as parts_of has them, with dtypes. ``brought``: whether they ever go to the device."""
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
        self._parts = [cudart.pinned(n).view(dtype).reshape(shape) for n, (shape, dtype) in zip(sizes, shapes)]
        self.layers = layers_of(self._parts)
        self._turns, self._stream = [], cudart.Stream()
        if brought:
            self._turns = [_Turn([part[0].nbytes for part in self._parts]) for _ in range(SLOTS)]

    def begin(self, table: np.ndarray, count: int) -> None:
        """A sweep begins, with these sequences, whose first ``count`` blocks are lent. What an interrupted one still computes
        comes first."""
        self._table, self._count = table.tolist(), count
        if count:
            self._wait_for_kernels(self._turns[0])
            self._bring(0)

    @contextmanager
    def lend(self, i: int) -> Iterator[list[int]]:
        """Those of the i-th, one after the other from the first on: addresses on the device for what Jittor launches until the
        loan ends. The next one's are brought meanwhile."""
        turn = self._turns[i % SLOTS]
        if i + 1 < self._count:
            self._bring(i + 1)
        turn.there.wait_on_default()
        yield turn.addresses
        self._wait_for_kernels(turn)
        for place, start, _, count in self._table:
            for rows, address, pitch in self._rows(i, place, start, start + count):
                cudart.rows_to_host(rows, address, pitch, self._stream)
            turn.rows[place] = start + count

    def on_host(self, blocks: list[int]) -> list[list]:
        """The layers of those that the CPU computes now, once all is in host memory."""
        self._stream.synchronize()
        for turn in self._turns:
            if turn.block in blocks:
                turn.block = None
        return [self.layers[i] for i in blocks]

    def _wait_for_kernels(self, turn: _Turn) -> None:
        turn.used.record()
        self._stream.wait(turn.used)

    def _bring(self, i: int) -> None:
        """Only rows of tokens that were there before the sweep, and have not stayed."""
        turn = self._turns[i % SLOTS]
        if turn.block != i:
            turn.block, turn.rows = i, {}
        for place, start, _, _ in self._table:
            first = turn.rows[place] = min(start, turn.rows.get(place, 0))  # those behind are about to be written
            for rows, address, pitch in self._rows(i, place, first, start) if first < start else ():
                cudart.rows_to_device(address, pitch, rows, self._stream)
        turn.there.record(self._stream)

    def _rows(self, i: int, place: int, first: int, end: int) -> Iterator[tuple[np.ndarray, int, int]]:
        """Of each of a block's parts, tokens ``first`` … ``end`` - 1 of every head of a sequence: uint8 (H, bytes), the address
        of the same on the device, and how far apart heads are there."""
        halves = (half[place] for part in self._parts for half in part[i])
        for half, address in zip(halves, self._turns[i % SLOTS].addresses):
            heads = half.reshape(len(half), -1).view(np.uint8)
            row = heads.shape[1] // half.shape[1]
            yield heads[:, first * row : end * row], address + place * heads.size + first * row, heads.shape[1]


class _Turn:
    """Room on the device for one block's keys and values: ``there`` when they have come, ``used`` when kernels are past.
    ``block``: whose they are; ``rows``: of how many tokens of each place they are what host memory has, or will have."""

    def __init__(self, sizes: list[int]):
        self._memory = [cudart.Memory(size) for size in sizes]
        self.addresses = [m.pointer + half for m in self._memory for half in (0, m.nbytes // 2)]
        self.there, self.used = cudart.Event(), cudart.Event()
        self.block: int | None = None
        self.rows: dict[int, int] = {}
