"""Sweeps on a GPU: weights and caches on the device; rows of the embedding go there, the likeliest tokens come back."""

from __future__ import annotations

import math

import numpy as np

from .. import cudart, ops
from ..cache import Cache, parts_of
from ..ops.sweep import MOST_LIKELIEST, MOST_ROWS, Space, Sweeps
from ..runtime import jittor
from ..sampling import Likeliest
from ..swap import CHUNK
from ..swap.host import Rows
from ..swap.parts import pages
from ..swap.reader import File
from ..weights import Weights
from ..weights.layout import HEAD_FILE, WTE_FILE, Tensor, block_file
from ..weights.store import Region
from .sweep import Row, Sweep

_PART = 64 << 20  # bytes of weights that are read while as many are on their way to the device


class Cuda:
    """The GPU that Jittor uses. Not for use by several threads at once."""

    streams = False

    def __init__(self, weights: Weights, context: int, kv_cache: str = "fp16"):
        """``context``: tokens to keep caches for. Raises OutOfDeviceMemory where the weights do not fit."""
        self._config, self._context, self._kv_cache = weights.config, context, kv_cache
        angles = ops.rotary_angles(context, weights.config.rotary_dim)
        self._angles = cudart.Memory(angles.nbytes)
        cudart.to_device(self._angles.pointer, angles)
        self._sweeps = Sweeps(weights.config, weights.coding, context, self._angles.pointer, 8 if kv_cache == "int8" else 16)
        self._rows = Rows(weights.regions[WTE_FILE])
        loader = _Loader()
        files = [*map(block_file, range(weights.config.n_layer)), HEAD_FILE]
        self._memory = [loader.load(weights.regions[name]) for name in files]  # freed with this
        *blocks, head = (addresses(weights.regions[n].tensors, m.pointer) for n, m in zip(files, self._memory))
        self._blocks = blocks
        self._head = self._sweeps.head(head, weights.config.vocab_size)
        rows = 2 * weights.config.n_embd * CHUNK
        self._embedded = [(cudart.pinned(rows).view(np.float16).reshape(CHUNK, -1), cudart.Event()) for _ in range(2)]

    def cache(self, places: int) -> DeviceCache:
        """Room on the device, and the work space for sweeps over it. Raises OutOfDeviceMemory."""
        parts = [
            (np.zeros(shape[2:], dtype).nbytes, cudart.Memory(math.prod(shape) * np.dtype(dtype).itemsize))
            for shape, dtype in parts_of(self._config, self._context, places, self._kv_cache)
        ]
        layers = [[m.pointer + (2 * i + half) * size for size, m in parts for half in (0, 1)] for i in range(len(self._blocks))]
        memory = cudart.Memory(self._sweeps.space_bytes(CHUNK, places))
        table = self._sweeps.table(self._blocks, layers)
        return DeviceCache(self._context, places, table, [memory, *parts], Space.of(memory.pointer, CHUNK, places))

    def sweep(self, cache: DeviceCache, sweep: Sweep) -> list[np.ndarray | Likeliest]:
        """For each of the rows, float32 (V,), or the likeliest where those are enough."""
        with jittor().flag_scope(lazy_execution=0, no_grad=1, use_cuda=1):
            embedded, used = self._embedded[0]
            self._embedded.reverse()
            used.synchronize()
            self._rows.read_into(embedded[: len(sweep.ids)], sweep.ids)
            self._sweeps.blocks(cache.layers, sweep.table, len(sweep.ids), embedded, cache.space)
            used.record()
            found = []
            for first in range(0, len(sweep.rows), MOST_ROWS):
                found += self._logits(sweep.rows[first : first + MOST_ROWS], sweep.enough, cache.space)
            return found

    def _logits(self, rows: list[Row], enough: int, space: Space) -> list[np.ndarray | Likeliest]:
        numbers = [row.row for row in rows]
        if not 0 < enough <= min(MOST_LIKELIEST, self._config.vocab_size):
            return list(self._sweeps.logits(self._head, numbers, space).numpy())
        penalties = [row.sampling.penalty for row in rows]
        seen = [np.unique(row.seen) if p != 1 else row.seen[:0] for row, p in zip(rows, penalties)]
        logits, ids = self._sweeps.likeliest(self._head, numbers, enough, seen, penalties, space).numpy()
        return [Likeliest(i, x) for i, x in zip(ids.view(np.int32), logits)]


class DeviceCache(Cache):
    """Keys and values on the device. ``layers``: the table of blocks that sweeps over it take; ``space``: theirs to work in."""

    def __init__(self, context: int, places: int, layers: np.ndarray, memory: list, space: Space):
        super().__init__(context, places, layers, memory)
        self.space = space


class _Loader:
    """Brings files to the device: a part is read while the one before is copied."""

    def __init__(self):
        self._halves = [(cudart.pinned(_PART), cudart.Event()) for _ in range(2)]

    def load(self, region: Region) -> cudart.Memory:
        """A region's bytes. Raises MossError where the file cannot be read, OutOfDeviceMemory where they do not fit."""
        memory, file = cudart.Memory(pages(region.nbytes)), File(region.path)
        for at in range(0, region.nbytes, _PART):
            part, copied = self._halves[0]
            self._halves.reverse()
            copied.synchronize()
            count = min(_PART, region.nbytes - at)
            file.read(region.start + at, part, count)
            cudart.to_device(memory.pointer + at, part[:count])
            copied.record()
        file.close()
        return memory


def addresses(tensors: tuple[Tensor, ...], base: int) -> dict[str, int]:
    """Where tensors are that lie one after the other from ``base`` on."""
    found = {}
    for t in tensors:
        found[t.name] = base
        base += t.nbytes
    return found
