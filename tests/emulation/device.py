"""A GPU for moss_jt/devices/gpu.py: memory and streams of tests/swap/simulated_cuda.py, whose timing is random, and emulated
kernels in place of moss_jt/ops/sweep.py's op."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np

from moss_jt.devices import gpu, host_blocks
from moss_jt.ops.sweep import MOST_ROWS, MOVED, Space
from moss_jt.swap import by_jittor, on_device
from moss_jt.weights.layout import BITS, block_tensors, matrix

from ..swap.simulated_cuda import Simulated
from .build import Memory

_DTYPES = {"F16": np.float16, "F32": np.float32, "U8": np.uint8}


def install(monkeypatch, kernels, seed: int, chunk: int = 16) -> Simulated:
    """From now on ``gpu.Cuda`` runs on it, with sweeps of at most ``chunk`` tokens. ``kernels``: wrappers of sweep.cuh."""
    cuda = Simulated(seed)
    for module in (gpu, host_blocks, on_device, by_jittor):
        monkeypatch.setattr(module, "cudart", cuda)
    for name in ("moss_jt.devices.gpu", "moss_jt.devices.host_blocks", "moss_jt.model"):
        monkeypatch.setattr(f"{name}.CHUNK", chunk)
    monkeypatch.setattr(gpu, "Sweeps", lambda *given: Sweeps(cuda, kernels, *given))
    monkeypatch.setattr(gpu, "compiling", lambda *sources: nullcontext())
    jittor = SimpleNamespace(flag_scope=lambda **flags: nullcontext(), gc=lambda: None, flags=SimpleNamespace())
    jittor.array = lambda array: Var(cuda, array)
    for module in (gpu, by_jittor):
        monkeypatch.setattr(module, "jittor", lambda: jittor)
    return cuda


class Var:
    """What Jittor moves about: for every op it is somewhere else, and garbage is where it was."""

    def __init__(self, cuda, array: np.ndarray):
        self._cuda, self._bytes = cuda, array.view(np.uint8).copy()
        self._places = [cuda.Memory(self._bytes.nbytes) for _ in range(2)]

    def sync(self) -> Var:
        return self

    def address(self) -> int:
        before, now = self._places
        self._places.reverse()
        for memory, values, written in ((before, 0xEE, 0), (now, self._bytes, 1)):
            there = slice(memory.pointer, memory.pointer + memory.nbytes)
            self._cuda.memory[there], self._cuda.written[there] = values, written
        return now.pointer


def _located(tensors: dict, moved: int) -> dict:
    """As sweep.cuh has it."""
    return {name: at - MOVED + moved if at >= MOVED else at for name, at in tensors.items()}


class Sweeps:
    """As moss_jt/ops/sweep.py's: what is called is launched when it is synchronised, or something after it."""

    def __init__(self, cuda, kernels, config, coding, context, angles, cache_bits=16, head_part=None):
        self._cuda, self._kernels, self._config, self._coding, self._pending = cuda, kernels, config, coding, []
        self._tensors = {t.name: t for t in block_tensors(config, coding)}
        c = config
        self._angles = lambda: self._array(angles, (2, context, c.rotary_dim // 2), np.float32)
        sizes = (c.n_embd, c.n_inner, c.vocab_size, c.n_head, c.rotary_dim, context)
        kernels.model(*sizes, BITS[coding.dtype], BITS[coding.head_dtype], cache_bits)
        self._cache = [(c.n_head, context, c.head_size), np.float16]
        if cache_bits == 8:
            self._cache = [(c.n_head, context, c.head_size), np.int8]
        self._scales = (c.n_head, context) if cache_bits == 8 else None

    def space_bytes(self, tokens: int, places: int) -> int:
        self._cuda.places = places
        return self._kernels.bytes(tokens, MOST_ROWS, places)

    def table(self, blocks: list[dict], cache: list[list[int]]) -> list:
        return list(zip(blocks, cache))

    def heads(self, parts: list) -> list:
        return list(parts)

    def blocks(self, table, sequences, tokens, embedded, space, after=None, moved=None):
        def run() -> None:
            given, at = embedded, moved.address() if moved else 0
            for tensors, layer in table:
                self._block(_located(tensors, at), layer, sequences, tokens, given, space)
                given = None

        return self._later(run)

    def compute(self, heads, rows, space, after, moved=None):
        def run() -> None:
            at = moved.address() if moved else 0
            for tensors, *those in heads:
                self._head((_located(tensors, at), *those), rows, space)

        return self._later(run)

    def logits(self, heads, rows, space, after) -> np.ndarray:
        self.compute(heads, rows, space, after).sync()
        self._cuda.until_default_is_idle()
        at, count = space.address + self._kernels.logits(space.tokens), len(rows) * self._config.vocab_size
        return self._array(at, (count,), np.float32).reshape(len(rows), -1).copy()

    def _later(self, run) -> SimpleNamespace:
        self._pending.append(run)
        return SimpleNamespace(sync=self._sync)

    def _sync(self, wait: bool = False) -> None:
        for run in self._pending:
            self._cuda.launch(run)
        self._pending = []
        if wait:
            self._cuda.synchronize()

    def _block(self, tensors, layer, sequences, tokens, embedded, space: Space) -> None:
        vectors = [self._tensor(tensors, name) for name in ("ln_1.weight", "ln_1.bias", "in.bias", "out.bias")]
        matrices = [part for name in ("in.weight", "out.weight") for part in self._parts(tensors, name)]
        shape, dtype = self._cache
        keys = [self._memory(at, (self._cuda.places, *shape), dtype) for at in layer[:2]]
        scales = [self._memory(at, (self._cuda.places, *self._scales), np.float32) for at in layer[2:]] or [None, None]
        given = embedded if embedded is None else embedded[:tokens]
        args = (given, self._angles(), *vectors, *matrices, *keys, *scales, sequences.ctypes.data, len(sequences), tokens)
        self._kernels.block(*args, self._space(space), space.tokens)

    def _head(self, part: tuple, rows: np.ndarray, space: Space) -> None:
        tensors, first, count = part
        c, dtype = self._config, self._coding.head_dtype
        shapes = {t.name: t for t in matrix("lm_head.weight", count, c.n_embd, dtype)}
        parts = [self._array(tensors[name], t.shape, _DTYPES[t.dtype]) for name, t in shapes.items()]
        norm = [self._array(tensors[name], (c.n_embd,), np.float32) for name in ("ln_f.weight", "ln_f.bias")]
        bias = self._array(tensors["lm_head.bias"], (count,), np.float32)
        given = (*norm, bias, *parts, *[None] * (3 - len(parts)), first, count, rows.ctypes.data, len(rows))
        self._kernels.head(*given, self._space(space), space.tokens)

    def _parts(self, tensors: dict, name: str) -> list:
        if name in tensors:
            return [self._tensor(tensors, name), None, None]
        return [self._tensor(tensors, f"{name}.{part}") for part in ("q", "scale", "zero")]

    def _tensor(self, tensors: dict, name: str) -> np.ndarray:
        t = self._tensors[name]
        return self._array(tensors[name], t.shape, _DTYPES[t.dtype])

    def _array(self, address: int, shape: tuple, dtype) -> np.ndarray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return self._cuda.memory[address : address + nbytes].view(dtype).reshape(shape)

    def _memory(self, address: int, shape: tuple, dtype) -> Memory:
        array = self._array(address, shape, dtype)
        return Memory(array, self._cuda.written[address : address + array.nbytes])

    def _space(self, space: Space) -> Memory:
        return self._memory(space.address, (self._kernels.bytes(space.tokens, MOST_ROWS, self._cuda.places),), np.uint8)
