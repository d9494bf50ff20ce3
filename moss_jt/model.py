"""The transformer, from token ids to logits, with its cache of keys and values.

One norm feeds attention and MLP side by side (GPT-J):
``x = x + out_proj(attention(h)) + fc_out(gelu_new(fc_in(h)))``, ``h = ln_1(x)``; at the end ``ln_f``, then ``lm_head``.
"""

from __future__ import annotations

import numpy as np

from . import ops
from .errors import MossError
from .ops import Weight
from .ops.attention import rotary_angles
from .runtime import jittor
from .swap import Resident
from .weights import Weights
from .weights.layout import BITS

# Tokens of a prompt that pass through all blocks together. More would read the weights less often, but the products
# of this many are already bound by arithmetic, and their activations take 0.2 MB a token.
CHUNK = 512


class Model:
    """A MOSS and the tokens it has evaluated. Not for use by several threads at once."""

    def __init__(self, weights: Weights, context: int):
        """``context``: positions to keep a cache for, in tokens."""
        c = weights.config
        self.config, self.context = c, context
        self.length = 0  # tokens whose keys and values are in the cache
        self._ids = np.zeros(context, np.int64)  # theirs
        self._jt = jittor()
        self._bits, self._head_bits = BITS[weights.dtype], BITS[weights.head_dtype]
        ops.prepare(self._bits, self._head_bits)
        self._weights = Resident(weights)
        # Zeroed pages cost nothing until they are written, so a long context is paid for as it fills.
        self._cache = np.zeros((c.n_layer, 2, c.n_head, context, c.head_size), np.float16)
        wrap = self._jt.core.reuse_np_array
        self._cache_vars = [(wrap(keys), wrap(values)) for keys, values in self._cache]
        self._angles = self._jt.array(rotary_angles(context, c.rotary_dim))

    def logits(self, ids, last: int = 1) -> np.ndarray:
        """Logits of the last ``last`` positions of a sequence (ids: list or array), float32 (last, V).

        What the sequence has in common with the one evaluated before is not computed again. Raises MossError as forward.
        """
        self.truncate(self.reusable(ids, last))
        return self.forward(ids[self.length :], last)

    def reusable(self, ids, last: int = 1) -> int:
        """How many tokens at the start of a sequence are cached and need no evaluation, if its ``last`` logits are wanted."""
        n = max(0, min(len(ids) - last, self.length))
        differ = np.flatnonzero(self._ids[:n] != np.asarray(ids[:n], np.int64))
        return int(differ[0]) if len(differ) else n

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = min(self.length, length)

    def forward(self, ids, last: int = 1) -> np.ndarray:
        """Evaluate ids after those cached. Returns the logits of the last ``last`` of them, float32 (last, V).

        Raises MossError where the context is full, or an id is not in the vocabulary. When interrupted, the tokens of
        whole chunks stay cached and nothing else has changed.
        """
        ids = np.asarray(ids, np.int64)
        self._check(ids)
        tail = np.empty((0, self.config.n_embd), np.float32)
        with self._jt.flag_scope(lazy_execution=0, no_grad=1):
            for chunk in np.split(ids, range(CHUNK, len(ids), CHUNK)):
                x = self._blocks(chunk)
                tail = np.concatenate([tail, x.numpy()])[-last:]
                self._ids[self.length : self.length + len(chunk)] = chunk
                self.length += len(chunk)
            return self._head(tail)

    def _check(self, ids: np.ndarray) -> None:
        if ids.ndim != 1 or not len(ids):
            raise MossError("nothing to evaluate: the prompt has no tokens")
        if self.length + len(ids) > self.context:
            raise MossError(f"{self.length + len(ids)} tokens do not fit the context of {self.context}")
        bad = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(bad):
            raise MossError(f"token id {bad[0]} is not in the model's vocabulary of {self.config.vocab_size}")

    def _blocks(self, ids: np.ndarray):
        """All blocks over ids at positions ``length`` …; returns the state, Var (T, D)."""
        x = self._jt.array(self._weights.rows(ids))
        for i, (keys, values) in enumerate(self._cache_vars):
            with self._weights.block(i) as w:
                h = ops.layer_norm(x, w["ln_1.weight"], w["ln_1.bias"], self.config.layer_norm_epsilon)
                y = ops.linear_in(h, Weight.of(w, "in.weight", self._bits), w["in.bias"])
                a = ops.attention(y, self._angles, keys, values, self.length)
                x = ops.linear_out(a, y, Weight.of(w, "out.weight", self._bits), w["out.bias"], x)
        return x

    def _head(self, states: np.ndarray) -> np.ndarray:
        with self._weights.head() as w:
            h = ops.layer_norm(self._jt.array(states), w["ln_f.weight"], w["ln_f.bias"], self.config.layer_norm_epsilon)
            return ops.linear_head(h, Weight.of(w, "lm_head.weight", self._head_bits), w["lm_head.bias"]).numpy()
