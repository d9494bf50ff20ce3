"""Sweeps on the CPU: weights in host memory, or brought there from disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import ops
from ..cache import Cache, parts_of
from ..runtime import jittor
from ..swap import Plan, lender
from ..weights import Weights
from ..weights.layout import BITS
from .sweep import Sweep


class Host:
    """The CPU. Not for use by several threads at once."""

    def __init__(self, weights: Weights, context: int, plan: Plan | None = None, kv_cache: str = "fp16"):
        """``context``: tokens to keep caches for, and ``kv_cache``: in what. ``plan``: which weights are in memory; without
        one, all are mapped."""
        self._config, self._context, self._kv_cache, self._jt = weights.config, context, kv_cache, jittor()
        coding, eps = weights.coding, weights.config.layer_norm_epsilon
        ops.prepare(coding, kv_cache)
        self.weights = lender(weights, plan)
        self._block = _Once(lambda tensors: ops.Block(tensors, BITS[coding.dtype], eps))
        self._head = _Once(lambda tensors: ops.Head(tensors, BITS[coding.head_dtype], eps))
        self._angles = self._jt.array(ops.rotary_angles(context, weights.config.rotary_dim))

    @property
    def streams(self) -> bool:
        return self.weights.streams

    def cache(self, places: int) -> Cache:
        """Room for so many sequences. Each block's layer is a list of Vars: keys and values (places, H, context, S), float16 or
        int8; in int8 also their scales, float32 (places, H, context) each."""
        c, kv_cache = self._config, self._kv_cache
        # Zeroed pages cost nothing until they are written, so a long context is paid for as it fills.
        memory = [np.zeros(shape, dtype) for shape, dtype in parts_of(c, self._context, places, kv_cache)]
        wrap = self._jt.core.reuse_np_array
        layers = [[wrap(half) for part in memory for half in part[i]] for i in range(c.n_layer)]
        return Cache(self._context, places, layers, memory)

    def sweep(self, cache: Cache, sweep: Sweep) -> list[np.ndarray]:
        """Float32 (V,) for each of the rows."""
        self.weights.expect(head=bool(sweep.rows))
        with self._jt.flag_scope(lazy_execution=0, no_grad=1):
            x = self._jt.array(self.weights.rows(sweep.ids))
            rows = ops.sequences(sweep.table, len(sweep.ids), len(cache.sequences), cache.context)
            for i, layer in enumerate(cache.layers):
                with self.weights.block(i) as tensors:
                    x = self._block(tensors)(x, self._angles, layer, rows)
            states = x.numpy()
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
