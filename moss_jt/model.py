"""The transformer, from token ids to logits, with its cache of keys and values.

One norm feeds attention and MLP side by side (GPT-J):
``x = x + out_proj(attention(h)) + fc_out(gelu_new(fc_in(h)))``, ``h = ln_1(x)``; at the end ``ln_f``, then ``lm_head``.
"""

from __future__ import annotations

import numpy as np

from . import ops
from .errors import MossError
from .ops.attention import rotary_angles
from .runtime import jittor
from .swap import Resident
from .weights import Weights

# Tokens of a prompt that pass through all blocks together. More would read the weights less often, but the products
# of this many are already bound by arithmetic, and their activations take 0.2 MB a token.
CHUNK = 512


class Model:
    """A MOSS and the tokens it has evaluated. Not for use by several threads at once."""

    def __init__(self, weights: Weights, context: int):
        """``context``: positions to keep a cache for, in tokens."""
        c = weights.config
        self.config, self.context = c, context
        self.cached: list[int] = []  # the ids whose keys and values are in the cache, in order
        self._jt = jittor()
        self._weights = Resident(weights)
        # Zeroed pages cost nothing until they are written, so a long context is paid for as it fills.
        self._cache = np.zeros((c.n_layer, 2, c.n_head, context, c.head_size), np.float16)
        wrap = self._jt.core.reuse_np_array
        self._cache_vars = [(wrap(keys), wrap(values)) for keys, values in self._cache]
        self._angles = self._jt.array(rotary_angles(context, c.rotary_dim))

    def logits(self, ids: list[int], last: int = 1) -> np.ndarray:
        """Logits of the last ``last`` positions of a sequence, float32 (last, V).

        What the sequence has in common with the one evaluated before is not computed again.
        """
        last = min(last, len(ids))
        common = 0
        for a, b in zip(ids[: len(ids) - last], self.cached):
            if a != b:
                break
            common += 1
        self.truncate(common)
        return self.forward(ids[common:], last)

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        del self.cached[length:]

    def forward(self, ids: list[int], last: int = 1) -> np.ndarray:
        """Evaluate ids after those cached. Returns the logits of the last ``last`` of them, float32 (last, V).

        Raises MossError where the context is full, or an id is not in the vocabulary. When interrupted, the tokens of
        whole chunks stay cached and nothing else has changed.
        """
        self._check(ids)
        states = []
        with self._jt.flag_scope(lazy_execution=0, no_grad=1):
            for at in range(0, len(ids), CHUNK):
                chunk = ids[at : at + CHUNK]
                x = self._blocks(chunk)
                wanted = min(last - (len(ids) - at - len(chunk)), len(chunk))  # of this chunk's positions
                if wanted > 0:
                    states.append(x.numpy()[len(chunk) - wanted :])
                self.cached += chunk
            return self._head(np.concatenate(states))

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise MossError("nothing to evaluate: the prompt has no tokens")
        if len(self.cached) + len(ids) > self.context:
            raise MossError(f"{len(self.cached) + len(ids)} tokens do not fit the context of {self.context}")
        bad = next((i for i in ids if not 0 <= i < self.config.vocab_size), None)
        if bad is not None:
            raise MossError(f"token id {bad} is not in the model's vocabulary of {self.config.vocab_size}")

    def _blocks(self, ids: list[int]):
        """All blocks over ids at positions len(cached) …; returns the state, Var (T, D)."""
        start = len(self.cached)
        x = self._jt.array(self._weights.rows(ids))
        for i, (keys, values) in enumerate(self._cache_vars):
            with self._weights.block(i) as w:
                h = ops.layer_norm(x, w["ln_1.weight"], w["ln_1.bias"], self.config.layer_norm_epsilon)
                y = ops.linear_in(h, w["in.weight"], w["in.bias"])
                a = ops.attention(y, self._angles, keys, values, start)
                x = ops.linear_out(a, y, w["out.weight"], w["out.bias"], x)
        return x

    def _head(self, states: np.ndarray) -> np.ndarray:
        with self._weights.head() as w:
            h = ops.layer_norm(self._jt.array(states), w["ln_f.weight"], w["ln_f.bias"], self.config.layer_norm_epsilon)
            return ops.linear_head(h, w["lm_head.weight"], w["lm_head.bias"]).numpy()
