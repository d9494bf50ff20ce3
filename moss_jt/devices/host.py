"""Sweeps on the CPU: weights in host memory, or brought there from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .. import ops
from ..cache import Cache, parts_of
from ..config import Config
from ..runtime import jittor
from ..swap import Plan, lender
from ..weights import Weights
from ..weights.layout import BITS, Coding
from .sweep import Sweep


class Blocks:
    """Blocks as the CPU computes them, for a model of these sizes."""

    def __init__(self, config: Config, coding: Coding, context: int, kv_cache: str, low_rank: list[ops.LowRank] | None = None):
        """``low_rank``: what is added to the weights of each block, numpy arrays in place of Vars."""
        self._arrays = low_rank or [ops.LowRank()] * config.n_layer  # kept, because Vars do not keep their memory alive
        ops.prepare(coding, kv_cache, tuple(map(bool, self._arrays[0])))
        wrap = jittor().core.reuse_np_array
        self._low_rank = [ops.LowRank(*(tuple(map(wrap, those)) for those in each)) for each in self._arrays]
        self._block = _Once(lambda tensors: ops.Block(tensors, BITS[coding.dtype], config.layer_norm_epsilon))
        self._angles, self._context = jittor().array(ops.rotary_angles(context, config.rotary_dim)), context

    def __call__(self, x: np.ndarray, table: np.ndarray, places: int, blocks: Iterable[tuple]) -> np.ndarray:
        """The state float32 (T, D) after the first blocks, of each of which come a loan of its weights and its layer of a cache
        of so many ``places``. table: as ops.sequences takes it."""
        state, rows = jittor().array(x), ops.sequences(table, len(x), places, self._context)
        for (loan, layer), more in zip(blocks, self._low_rank):
            with loan as tensors:
                state = self._block(tensors)(state, self._angles, layer, rows, more)
        return state.numpy()


def layers_of(memory: list[np.ndarray]) -> list[list]:
    """Of each block, the Vars that Blocks takes, over memory in the shapes of parts_of: keys and values, float16 or int8
    (places, H, context, S); in int8 also their scales, float32 (places, H, context) each."""
    wrap = jittor().core.reuse_np_array
    return [[wrap(half) for part in parts for half in part] for parts in zip(*memory)]


class Host:
    """The CPU. Not for use by several threads at once."""

    def __init__(
        self,
        weights: Weights,
        context: int,
        plan: Plan | None = None,
        kv_cache: str = "fp16",
        low_rank: list[ops.LowRank] | None = None,
    ):
        """``context``: tokens to keep caches for, and ``kv_cache``: in what. ``plan``: which weights are in memory; without
        one, all are mapped. ``low_rank``: an adapter, as Blocks takes it."""
        self._config, self._context, self._kv_cache, self._jt = weights.config, context, kv_cache, jittor()
        self.plan = plan
        bits, eps = BITS[weights.coding.head_dtype], weights.config.layer_norm_epsilon
        self._blocks = Blocks(weights.config, weights.coding, context, kv_cache, low_rank)
        self._head = _Once(lambda tensors: ops.Head(tensors, bits, eps))
        self.weights = lender(weights, plan)

    @property
    def streams(self) -> bool:
        return self.weights.streams

    def cache(self, places: int) -> Cache:
        """Room for so many sequences. Zeroed pages cost nothing until they are written, so a long context is paid for as it
        fills."""
        shapes = parts_of(self._config, self._context, places, self._kv_cache)
        memory = [np.zeros(shape, dtype) for shape, dtype in shapes]
        return Cache(self._context, places, layers_of(memory), memory)

    def sweep(self, cache: Cache, sweep: Sweep) -> list[np.ndarray]:
        """Float32 (V,) for each of the rows."""
        self.weights.expect(head=bool(sweep.rows))
        with self._jt.flag_scope(lazy_execution=0, no_grad=1):
            lent = ((self.weights.block(i), layer) for i, layer in enumerate(cache.layers))
            states = self._blocks(self.weights.rows(sweep.ids), sweep.table, len(cache.sequences), lent)
            return self._logits(states[[row.row for row in sweep.rows]]) if sweep.rows else []

    def _logits(self, states: np.ndarray) -> list[np.ndarray]:
        x = self._jt.array(states)
        some = [self._head(tensors)(x).numpy() for tensors in self.weights.head()]
        return list(some[0] if len(some) == 1 else np.concatenate(some, axis=1))


class _Once:
    """What ``make`` makes of tensors, for each dict of them that is ever lent: checked and put together once."""

    def __init__(self, make: Callable[[dict], Any]):
        self._make, self._made = make, {}

    def __call__(self, tensors: dict) -> Any:
        if id(tensors) not in self._made:
            self._made[id(tensors)] = (tensors, self._make(tensors))  # kept, so that no other gets its id
        return self._made[id(tensors)][1]
