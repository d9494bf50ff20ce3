"""Sweeps on a GPU: weights that are there or come over the link, or are computed with by the CPU where they lie; rows of the
embedding go there, the likeliest tokens come back."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import groupby
from typing import TypeVar

import numpy as np

from .. import cudart, ops
from ..cache import Cache, parts_of
from ..cudart import OutOfDeviceMemory
from ..errors import MossError
from ..ops.sweep import MOST_LIKELIEST, MOST_ROWS, MOVED, Space, Sweeps, penalties, source
from ..runtime import compiling, float_environment_kept, jittor
from ..sampling import Likeliest
from ..swap import CHUNK, Plan
from ..swap.by_jittor import ByJittor
from ..swap.host import Rows
from ..swap.on_device import OnDevice
from ..swap.plan import RESIDENT, in_mib, less
from ..weights import Weights
from ..weights.layout import WTE_FILE
from .host_blocks import HostBlocks, HostCache
from .sweep import Row, Sweep

SPARED = 256 << 20  # of the device's memory, left to others where no budget is given, and where it was full
T = TypeVar("T")


class Cuda:
    """The GPU that Jittor uses. Not for use by several threads at once.

    Where it has less memory than planned, because somebody else took some, or a cache for many sequences needs more, fewer
    weights stay there, and one line on stderr says so.
    """

    def __init__(self, weights: Weights, plan: Plan, pinned: int):
        """``plan``: of the GPU's memory. ``pinned``: the most host memory for what is not on the device; weights beyond come
        from disk. Raises OutOfDeviceMemory where there is too little for any plan, MossError for what these kernels cannot
        compute."""
        config = self._config = weights.config
        self.plan, self._context, self._kv_cache = plan, plan.context, plan.kv_cache
        self._files, self._pinned = weights, pinned
        if config.head_size > (1024 if config.head_size % 8 == 0 else 128):  # as attention.cuh has it
            raise MossError(f"heads of {config.head_size} numbers are too large for the GPU's kernels")
        self._free = self._least_free = cudart.memory_info()[0]
        angles = ops.rotary_angles(plan.context, config.rotary_dim)
        self._angles = cudart.Memory(angles.nbytes)
        cudart.to_device(self._angles.pointer, angles)
        self._rows = Rows(weights.regions[WTE_FILE])
        self._others = [i for i in range(config.n_layer) if i not in plan.host_blocks]  # the device's in every sweep
        self.weights: OnDevice | ByJittor | None = None  # None: there was no room for them
        self._loads = 0
        self._with_room(lambda: None, plan.memory["KV cache"] + plan.memory["work space"])
        self._embedded = cudart.pinned(2 * config.n_embd * CHUNK).view(np.float16).reshape(CHUNK, -1)
        self._seen = cudart.Memory(4 * MOST_ROWS * plan.context)

    def _bring(self) -> None:
        """The weights to where the plan says. Raises OutOfDeviceMemory."""
        plan, weights = self.plan, self._files
        bits, part = (8 if plan.kv_cache == "int8" else 16), max(plan.part_rows, plan.head_rows)
        self._sweeps = Sweeps(self._config, weights.coding, plan.context, self._angles.pointer, bits, part)
        by_jittor = plan.swap == "jittor" and plan.streams
        self.weights = ByJittor(weights, plan, MOVED) if by_jittor else OnDevice(weights, plan, self._pinned)
        self._host = HostBlocks(weights, plan, self.weights) if plan.host_blocks else None
        self._loads += 1

    def _with_room(self, work: Callable[[], T], more: int = 0) -> T:
        """What ``work`` gives, once the weights are there: with fewer of them where they and the work do not fit. ``more``:
        what the work takes of the device's memory."""
        before = self.plan
        while True:
            try:
                if self.weights is None:
                    self._bring()
                done = work()
                if self.plan is not before:
                    _say_fewer(self.plan, before)
                return done
            except (OutOfDeviceMemory, RuntimeError) as e:  # or what the CUDA runtime told an op
                if "out of memory" not in str(e):
                    raise
            self._shrink(more)  # out here nothing that failed keeps weights any longer

    def _shrink(self, more: int) -> None:
        """Give all weights up, and plan for fewer. Raises OutOfDeviceMemory where nothing is left to give up."""
        before, held = self.plan, self.plan.lent_bytes
        self._give_up()
        free = cudart.memory_info()[0]
        room = min(free - more - SPARED, held - 1)
        smaller = less(before, min(room, held * 7 // 8)) or less(before, room)
        if not smaller:
            raise OutOfDeviceMemory(
                f"out of memory: {in_mib(free)} of the GPU's memory are free, too little to go on; end what else uses it, or "
                "take a shorter context, fewer sequences at once or a KV cache in int8"
            )
        self.plan = smaller

    def _give_up(self) -> None:
        if self.weights is not None and self.weights.streams:
            self.weights.close()
        self.weights = self._host = None
        jittor().gc()  # what its pools keep

    @property
    def streams(self) -> bool:
        """Whether a token's sweep waits for weights, so that more tokens in it cost next to nothing."""
        return self.plan.streams and not self.plan.computes_on_host(1)

    @property
    def peak(self) -> int:
        """The most of the device's memory that was taken since this was made, as the driver says, by whomever; bytes."""
        self._least_free = min(self._least_free, cudart.memory_info()[0])
        return self._free - self._least_free

    def cache(self, places: int) -> DeviceCache:
        """Room on the device, and the work space for sweeps over it. Raises OutOfDeviceMemory where giving weights up makes
        no room for it."""
        each = self._config.cache_bytes_per_token(self._kv_cache) * self._context
        return self._with_room(lambda: self._cache(places), places * each + self.plan.memory["work space"])

    def _cache(self, places: int) -> DeviceCache:
        n = len(self._others)
        shapes = parts_of(self._config, self._context, places, self._kv_cache)
        sizes = [math.prod((n, *shape[1:])) * np.dtype(dtype).itemsize for shape, dtype in shapes]
        memory = [cudart.Memory(size) for size in sizes]
        layers = {  # keys, or values, of a block are a 2n-th of all
            i: [m.pointer + (2 * k + half) * (size // (2 * n)) for m, size in zip(memory, sizes) for half in (0, 1)]
            for k, i in enumerate(self._others)
        }
        memory.append(cudart.Memory(self._space_bytes(places)))
        host = self._host and self._host.cache(places)
        return DeviceCache(self._context, places, layers, memory, Space(memory[-1].pointer, CHUNK), host)

    def _space_bytes(self, places: int) -> int:
        with float_environment_kept(), compiling(source()), jittor().flag_scope(use_cuda=1):
            return self._sweeps.space_bytes(CHUNK, places)

    def _runs(self, cache: DeviceCache) -> list[tuple[list[int], np.ndarray | None]]:
        """Which blocks are computed together, and where those are: of the weights that are there now."""
        if cache.of != self._loads:
            by_cpu = set(self.plan.host_blocks) - set(self.plan.kept)
            kinds = {i: "host" if i in by_cpu else self.weights.is_resident(i) or -i - 1 for i in range(self._config.n_layer)}
            neighbours = groupby(kinds, kinds.get)
            cache.runs, cache.of = [self._run(list(run), cache.layers) for _, run in neighbours], self._loads
        return cache.runs

    def _run(self, blocks: list[int], layers: dict) -> tuple[list[int], np.ndarray | None]:
        """Blocks that are computed together: those for the CPU, or one that is streamed, or resident ones, with their table."""
        if not self.weights.is_resident(blocks[0]):
            return blocks, None
        tensors = []
        for i in blocks:
            with self.weights.block(i) as found:
                tensors.append(found)
        return blocks, self._sweeps.table(tensors, [layers[i] for i in blocks])

    def sweep(self, cache: DeviceCache, sweep: Sweep) -> list[np.ndarray | Likeliest]:
        """For each of the rows, float32 (V,), or the likeliest where those are enough. Raises OutOfDeviceMemory."""
        return self._with_room(lambda: self._sweep(cache, sweep))

    def _sweep(self, cache: DeviceCache, sweep: Sweep) -> list[np.ndarray | Likeliest]:
        embedded, on_host = self._embedded[: len(sweep.ids)], self.plan.computes_on_host(len(sweep.ids))
        self._rows.read_into(embedded, sweep.ids)
        self.weights.expect(bool(sweep.rows), on_host)
        # Lazily: ops are issued when something needs them, and waited for when their result is read.
        with jittor().flag_scope(lazy_execution=1, no_grad=1, use_cuda=1):
            state = self._blocks(cache, sweep, on_host)
            found = []
            for first in range(0, len(sweep.rows), MOST_ROWS):
                found += self._logits(sweep.rows[first : first + MOST_ROWS], sweep.enough, cache.space, state)
            if state is not None:
                state.sync(True)
        self._least_free = min(self._least_free, cudart.memory_info()[0])
        return found

    def _blocks(self, cache: DeviceCache, sweep: Sweep, on_host: bool):
        """A Var that says no more than that all blocks were computed; None where the CPU computed the last ones."""
        state, embedded = None, self._embedded  # None once a block was computed
        if cache.host:
            cache.host.begin(sweep.table, len(self.plan.kept if on_host else self.plan.host_blocks))
        for blocks, table in self._runs(cache):
            if table is not None:
                state = self._sweeps.blocks(table, sweep.table, len(sweep.ids), embedded, cache.space, state)
            elif blocks[0] in cache.layers:
                state = self._streamed(cache, sweep, blocks[0], cache.layers[blocks[0]], embedded, state)
            elif on_host and blocks[0] not in self.plan.kept:
                self._on_host(cache, sweep, blocks, state)
                state = None
            else:
                for i in blocks:
                    with cache.host.lend(self._host.numbers[i]) as layer:
                        state, embedded = self._streamed(cache, sweep, i, layer, embedded, state), None
            embedded = None
        return state

    def _streamed(self, cache: DeviceCache, sweep: Sweep, i: int, layer: list[int], embedded: np.ndarray | None, state):
        with self.weights.block(i) as tensors:
            table = self._sweeps.table([tensors], [layer])
            given = (table, sweep.table, len(sweep.ids), embedded, cache.space, state)
            after = self._sweeps.blocks(*given, self.weights.moved(i))
            after.sync()  # issues it, and does not wait: the slot's next copy waits for what was issued
        return after

    def _on_host(self, cache: DeviceCache, sweep: Sweep, blocks: list[int], state) -> None:
        if state is not None:
            state.sync()  # issues what comes before
        embedded = self._embedded[: len(sweep.ids)]
        self._host.compute(cache.host, blocks, embedded, sweep.table, len(cache.sequences), cache.space.address)

    def _logits(self, rows: list[Row], enough: int, space: Space, state) -> list[np.ndarray | Likeliest]:
        which = np.array([row.row for row in rows], np.int32)
        if self.weights.streams:
            for part in self.weights.head():
                moved = self.weights.moved((part[1], part[1] + part[2]))
                state = self._sweeps.compute(self._sweeps.heads([part]), which, space, state, moved)
                state.sync()
            heads = self._sweeps.heads([])
        else:
            heads = self._sweeps.heads(list(self.weights.head()))
        if not 0 < enough <= min(MOST_LIKELIEST, self._config.vocab_size):
            return list(self._sweeps.logits(heads, which, space, state))
        by = [row.sampling.penalty for row in rows]
        seen = [np.unique(row.seen) if p != 1 else row.seen[:0] for row, p in zip(rows, by)]
        cudart.to_device(self._seen.pointer, np.concatenate(seen).astype(np.int32))
        table = penalties([len(ids) for ids in seen], by)
        logits, ids = self._sweeps.likeliest(heads, which, enough, table, self._seen.pointer, space, state)
        return list(map(Likeliest, ids, logits))


def _say_fewer(now: Plan, before: Plan) -> None:
    counts = [plan.blocks.count(RESIDENT) + len(plan.kept) for plan in (now, before)]
    print(f"moss-jt: the GPU's memory is short: {counts[0]} blocks stay there from now on, not {counts[1]}", file=sys.stderr)


class DeviceCache(Cache):
    """Keys and values on the device: ``layers``, for each block the addresses of its parts; or in host memory, of host blocks,
    ``host``. ``space``: what sweeps over it work in. ``runs``: which blocks an op computes together, and their table,
    where they are resident, as the weights were brought the ``of``-th time."""

    def __init__(self, context: int, places: int, layers: dict, memory: list, space: Space, host: HostCache | None):
        super().__init__(context, places, layers, memory)
        self.space, self.host = space, host
        self.runs, self.of = [], 0
