"""The transformer, from token ids to logits.

One norm feeds attention and MLP side by side (GPT-J):
``x = x + out_proj(attention(h)) + fc_out(gelu_new(fc_in(h)))``, ``h = ln_1(x)``; at the end ``ln_f``, then ``lm_head``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import ops
from .cache import Cache, Sequence
from .errors import MossError
from .ops import Weight
from .ops.attention import rotary_angles
from .runtime import jittor
from .swap import CHUNK, Plan, lender
from .weights import Weights
from .weights.layout import BITS


class Model:
    """A MOSS, and the sequence it evaluated last. Not for use by several threads at once."""

    def __init__(self, weights: Weights, context: int, plan: Plan | None = None):
        """``context``: tokens to keep a cache for. ``plan``: which weights are in memory; without one, all are mapped."""
        self.config, self.context = weights.config, context
        self._jt = jittor()
        self._bits, self._head_bits = BITS[weights.dtype], BITS[weights.head_dtype]
        ops.prepare(self._bits, self._head_bits)
        self._weights = lender(weights, plan)
        self._angles = self._jt.array(rotary_angles(context, self.config.rotary_dim))
        self.sequence = Cache(self.config, context).sequences[0]

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
            logits = self._head(np.concatenate(tails))
        return _split(logits, map(len, tails))

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
        counts = [len(ids) for _, ids in parts]
        first = np.cumsum([0, *counts])
        table = np.array([(s.place, s.length, f, n) for (s, _), f, n in zip(parts, first, counts)], np.int32)
        x = self._jt.array(self._weights.rows(np.concatenate([ids for _, ids in parts])))
        for i, (keys, values) in enumerate(parts[0][0].cache.layers):
            with self._weights.block(i) as w:
                h = ops.layer_norm(x, w["ln_1.weight"], w["ln_1.bias"], self.config.layer_norm_epsilon)
                y = ops.linear_in(h, Weight.of(w, "in.weight", self._bits), w["in.bias"])
                a = ops.attention(y, self._angles, keys, values, table)
                x = ops.linear_out(a, y, Weight.of(w, "out.weight", self._bits), w["out.bias"], x)
        return _split(x.numpy(), counts)

    def _head(self, states: np.ndarray) -> np.ndarray:
        norm, bits = self._weights.final_norm, self._head_bits
        h = ops.layer_norm(self._jt.array(states), norm["ln_f.weight"], norm["ln_f.bias"], self.config.layer_norm_epsilon)
        some = [
            ops.linear_head(h, Weight.of(w, "lm_head.weight", bits), w["lm_head.bias"]).numpy() for w in self._weights.head()
        ]
        return some[0] if len(some) == 1 else np.concatenate(some, axis=1)


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


def _split(rows: np.ndarray, counts) -> list[np.ndarray]:
    return np.split(rows, np.cumsum(list(counts))[:-1])
