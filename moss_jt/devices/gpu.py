"""Sweeps on a GPU: weights and caches on the device; rows of the embedding go there, the likeliest tokens come back."""

from __future__ import annotations

import math

import numpy as np

from .. import cudart, ops
from ..cache import Cache, parts_of
from ..errors import MossError
from ..ops.sweep import MOST_LIKELIEST, MOST_ROWS, Space, Sweeps, penalties, source
from ..runtime import compiling, jittor
from ..sampling import Likeliest
from ..swap import CHUNK
from ..swap.host import Rows
from ..swap.parts import pages
from ..swap.plan import in_mib
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
        """``context``: tokens to keep caches for, and ``kv_cache``: in what. Raises OutOfDeviceMemory where the weights and the
        cache of a sequence do not fit, MossError where these kernels cannot compute the model."""
        self._config, self._context, self._kv_cache = weights.config, context, kv_cache
        size = weights.config.head_size
        if size > (1024 if size % 8 == 0 else 128):  # as attention.cuh has it
            raise MossError(f"heads of {size} numbers are too large for the GPU's kernels")
        self._check_room(weights)
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
        self._embedded = cudart.pinned(2 * weights.config.n_embd * CHUNK).view(np.float16).reshape(CHUNK, -1)
        self._seen = cudart.Memory(4 * MOST_ROWS * context)

    def _check_room(self, weights: Weights) -> None:
        held = sum(region.nbytes for name, region in weights.regions.items() if name != WTE_FILE)
        cache, (free, _) = self._config.cache_bytes_per_token(self._kv_cache) * self._context, cudart.memory_info()
        if held + cache > free:
            needs = f"the model needs {in_mib(held)} of the device's memory, and its KV cache {in_mib(cache)}"
            raise cudart.OutOfDeviceMemory(f"{needs}, and {in_mib(free)} are free")

    def cache(self, places: int) -> DeviceCache:
        """Room on the device, and the work space for sweeps over it. Raises OutOfDeviceMemory."""
        shapes = parts_of(self._config, self._context, places, self._kv_cache)
        sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes]
        memory = [cudart.Memory(size) for size in sizes]
        n = len(self._blocks)  # then keys, or values, of a block are a 2n-th
        layers = [
            [m.pointer + (2 * i + half) * (size // (2 * n)) for m, size in zip(memory, sizes) for half in (0, 1)]
            for i in range(n)
        ]
        memory.append(cudart.Memory(self._space_bytes(places)))
        table = self._sweeps.table(self._blocks, layers)
        return DeviceCache(self._context, places, table, memory, Space(memory[-1].pointer, CHUNK))

    def _space_bytes(self, places: int) -> int:
        with compiling(source()), jittor().flag_scope(use_cuda=1):
            return self._sweeps.space_bytes(CHUNK, places)

    def sweep(self, cache: DeviceCache, sweep: Sweep) -> list[np.ndarray | Likeliest]:
        """For each of the rows, float32 (V,), or the likeliest where those are enough."""
        tokens = len(sweep.ids)
        self._rows.read_into(self._embedded[:tokens], sweep.ids)
        # Lazily: all that is asked for is issued at once, and waited for once.
        with jittor().flag_scope(lazy_execution=1, no_grad=1, use_cuda=1):
            state = self._sweeps.blocks(cache.layers, sweep.table, tokens, self._embedded, cache.space)
            found = []
            for first in range(0, len(sweep.rows), MOST_ROWS):
                found += self._logits(sweep.rows[first : first + MOST_ROWS], sweep.enough, cache.space, state)
            state.sync(True)
        return found

    def _logits(self, rows: list[Row], enough: int, space: Space, state) -> list[np.ndarray | Likeliest]:
        which = np.array([row.row for row in rows], np.int32)
        if not 0 < enough <= min(MOST_LIKELIEST, self._config.vocab_size):
            return list(self._sweeps.logits(self._head, which, space, state))
        by = [row.sampling.penalty for row in rows]
        seen = [np.unique(row.seen) if p != 1 else row.seen[:0] for row, p in zip(rows, by)]
        cudart.to_device(self._seen.pointer, np.concatenate(seen).astype(np.int32))
        table = penalties([len(ids) for ids in seen], by)
        logits, ids = self._sweeps.likeliest(self._head, which, enough, table, self._seen.pointer, space, state)
        return list(map(Likeliest, ids, logits))


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
