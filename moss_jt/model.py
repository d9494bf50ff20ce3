"""The transformer, from token ids to logits.

One norm feeds attention and MLP side by side (GPT-J):
``x = x + out_proj(attention(h)) + fc_out(gelu_new(fc_in(h)))``, ``h = ln_1(x)``; at the end ``ln_f``, then ``lm_head``.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Callable

import numpy as np

from . import ops
from .cache import Cache, Sequence
from .errors import MossError
from .runtime import jittor
from .swap import CHUNK, Plan, lender
from .weights import Weights
from .weights.layout import BITS


class Model:
    """A MOSS, and the sequence it evaluated last. Not for use by several threads at once."""

    def __init__(self, weights: Weights, context: int, plan: Plan | None = None, kv_cache: str = "fp16"):
        """``context``: tokens to keep a cache for, and ``kv_cache``: in what. ``plan``: which weights are in memory; without
        one, all are mapped."""
        self.config, self.context, self.kv_cache = weights.config, context, kv_cache
        self._jt = jittor()
        coding, eps = weights.coding, self.config.layer_norm_epsilon
        ops.prepare(coding, kv_cache)
        self._weights = lender(weights, plan)
        self._block = _Once(lambda tensors: ops.Block(tensors, BITS[coding.dtype], eps))
        self._head = _Once(lambda tensors: ops.Head(tensors, BITS[coding.head_dtype], eps))
        self._angles = self._jt.array(ops.rotary_angles(context, self.config.rotary_dim))
        self.sequence = self.cache().sequences[0]

    def cache(self, places: int = 1) -> Cache:
        """An empty one for so many sequences."""
        return Cache(self.config, self.context, places, self.kv_cache)

    @property
    def streams(self) -> bool:
        """Whether a sweep brings weights from elsewhere, so that more tokens in it cost next to nothing."""
        return self._weights.streams

    def logits(self, ids, last: int = 1) -> np.ndarray:
        """Logits of the last ``last`` positions of a sequence (list or array of ids), float32 (last, V).

        What it has in common with the sequence evaluated before is not computed again. Raises MossError as evaluate does.
        """
        return self.evaluate([(self.sequence, ids, last)])[0]

    def evaluate(self, requests: list[tuple[Sequence, Any, int]]) -> list[np.ndarray]:
        """Logits of the last positions of several sequences of one Cache, which share each sweep over the weights.

        A request is (where the sequence is cached, all its ids, how many positions' logits). Returns float32 (last, V) for
        each. Raises MossError, before anything is computed, where a sequence is empty or does not fit, or an id is not in
        the vocabulary. When interrupted, the tokens of whole sweeps stay cached and nothing else has changed.
        """
        wanted = [(sequence, np.asarray(ids, np.int64), last) for sequence, ids, last in requests]
        for _, ids, _ in wanted:
            self._check(ids)
        for sequence, ids, last in wanted:
            sequence.truncate(sequence.reusable(ids, last))
        tails = [np.empty((0, self.config.n_embd), np.float32) for _ in wanted]
        with self._jt.flag_scope(lazy_execution=0, no_grad=1):
            while parts := _next_sweep(wanted):
                self._weights.expect(head=_left(wanted) <= CHUNK)
                states = self._sweep([(sequence, ids) for _, sequence, ids in parts])
                for (i, sequence, ids), state in zip(parts, states):
                    tails[i] = np.concatenate([tails[i], state])[-wanted[i][2] :]
                    sequence.append(ids)
            logits = self._logits(np.concatenate(tails))
        return _split(logits, [len(tail) for tail in tails])

    def _check(self, ids: np.ndarray) -> None:
        if ids.ndim != 1 or not len(ids):
            raise MossError("nothing to evaluate: the prompt has no tokens")
        if len(ids) > self.context:
            raise MossError(f"{len(ids)} tokens do not fit the context of {self.context}")
        bad = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(bad):
            raise MossError(f"token id {bad[0]} is not in the model's vocabulary of {self.config.vocab_size}")

    def _sweep(self, parts: list[tuple[Sequence, np.ndarray]]) -> list[np.ndarray]:
        """All blocks over new ids of each sequence; returns their states, float32 (T, D)."""
        cache, counts = parts[0][0].cache, [len(ids) for _, ids in parts]
        first = [0, *accumulate(counts)]
        table = np.array([(s.place, s.length, f, n) for (s, _), f, n in zip(parts, first, counts)], np.int32)
        rows = ops.sequences(table, first[-1], len(cache.sequences), cache.context)
        x = self._jt.array(self._weights.rows(np.concatenate([ids for _, ids in parts])))
        for i, layer in enumerate(cache.layers):
            with self._weights.block(i) as tensors:
                x = self._block(tensors)(x, self._angles, layer, rows)
        return _split(x.numpy(), counts)

    def _logits(self, states: np.ndarray) -> np.ndarray:
        x = self._jt.array(states)
        some = [self._head(tensors)(x).numpy() for tensors in self._weights.head()]
        return some[0] if len(some) == 1 else np.concatenate(some, axis=1)


class _Once:
    """What ``make`` makes of tensors, for each dict of them that is ever lent: checked and put together once."""

    def __init__(self, make: Callable[[dict], Any]):
        self._make, self._made = make, {}

    def __call__(self, tensors: dict) -> Any:
        if id(tensors) not in self._made:
            self._made[id(tensors)] = (tensors, self._make(tensors))  # kept, so that no other gets its id
        return self._made[id(tensors)][1]


def _left(wanted: list[tuple[Sequence, np.ndarray, int]]) -> int:
    """Tokens that have not been evaluated yet."""
    return sum(len(ids) - sequence.length for sequence, ids, _ in wanted)


def _next_sweep(wanted: list[tuple[Sequence, np.ndarray, int]]) -> list[tuple[int, Sequence, np.ndarray]]:
    """(index, sequence, its next ids), of up to CHUNK tokens together, for all that has not been evaluated yet."""
    parts, room = [], CHUNK
    for i, (sequence, ids, _) in enumerate(wanted):
        new = ids[sequence.length : sequence.length + room]
        if len(new):
            parts.append((i, sequence, new))
            room -= len(new)
    return parts


def _split(rows: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    ends = list(accumulate(counts))
    return [rows[end - count : end] for count, end in zip(counts, ends)]
