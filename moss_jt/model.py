"""The transformer, from token ids to logits: which tokens a sweep takes, and what is remembered of them.

One norm feeds attention and MLP side by side (GPT-J):
``x = x + out_proj(attention(h)) + fc_out(gelu_new(fc_in(h)))``, ``h = ln_1(x)``; at the end ``ln_f``, then ``lm_head``.
A device carries that out.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from .cache import Cache, Sequence
from .devices import Cuda, Host, Sweep
from .devices.sweep import Row
from .errors import MossError
from .sampling import Likeliest, Sampling
from .swap import CHUNK, Plan
from .weights import Weights


class Request(NamedTuple):
    """The logits of the ``last`` positions of a sequence: where it is cached, and all its ids. ``sampling``: how the tokens
    after them will be chosen, where not all logits may be needed for that."""

    sequence: Sequence
    ids: Any
    last: int = 1
    sampling: Sampling | None = None


class Model:
    """A MOSS, and the sequence it evaluated last. Not for use by several threads at once."""

    def __init__(
        self,
        weights: Weights,
        context: int,
        plan: Plan | None = None,
        kv_cache: str = "fp16",
        device: Host | Cuda | None = None,
    ):
        """``context``: tokens to keep a cache for, and ``kv_cache``: in what, fp16 or int8. ``device``: made for the same; by
        default the CPU, and then ``plan`` says which weights are in memory; without one, all are mapped."""
        self.config, self.context, self.kv_cache = weights.config, context, kv_cache
        self.device = device or Host(weights, context, plan, kv_cache)
        self.sequence = self.cache().sequences[0]

    @property
    def on_gpu(self) -> bool:
        return isinstance(self.device, Cuda)

    @property
    def streams(self) -> bool:
        """Whether a sweep brings weights from elsewhere, so that more tokens in it cost next to nothing."""
        return self.device.streams

    def cache(self, places: int = 1) -> Cache:
        """An empty one for so many sequences."""
        return self.device.cache(places)

    def logits(self, ids, last: int = 1) -> np.ndarray:
        """Logits of the last ``last`` positions of a sequence (list or array of ids), float32 (last, V).

        What it has in common with the sequence evaluated before is not computed again. Raises MossError as evaluate does.
        """
        return np.stack(self.evaluate([Request(self.sequence, ids, last)])[0])

    def evaluate(self, requests: list[Request]) -> list[list[np.ndarray | Likeliest]]:
        """Logits of the last positions of several sequences of one Cache, which share each sweep over the weights.

        Returns for each request, and each of its positions, float32 (V,), or what is enough of it for its sampling.
        Raises MossError, before anything is computed, where a sequence is empty or does not fit, or an id is not in
        the vocabulary. When interrupted, the tokens of whole sweeps stay cached and nothing else has changed.
        """
        wanted = [request._replace(ids=np.asarray(request.ids, np.int64)) for request in requests]
        for request in wanted:
            self._check(request.ids)
        for sequence, ids, last, _ in wanted:
            sequence.truncate(sequence.reusable(ids, last))
        found = [[] for _ in wanted]
        while parts := _next_sweep(wanted):
            cache, sweep, owners = parts[0].sequence.cache, *_sweep(wanted, parts)
            for owner, logits in zip(owners, self.device.sweep(cache, sweep)):
                found[owner].append(logits)
            for part in parts:
                part.sequence.append(part.ids)
        return found

    def _check(self, ids: np.ndarray) -> None:
        if ids.ndim != 1 or not len(ids):
            raise MossError("nothing to evaluate: the prompt has no tokens")
        if len(ids) > self.context:
            raise MossError(f"{len(ids)} tokens do not fit the context of {self.context}")
        bad = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(bad):
            raise MossError(f"token id {bad[0]} is not in the model's vocabulary of {self.config.vocab_size}")


class _Part(NamedTuple):
    """What a sweep takes of request number ``owner``: its next ids."""

    owner: int
    sequence: Sequence
    ids: np.ndarray


def _next_sweep(wanted: list[Request]) -> list[_Part]:
    """Up to CHUNK tokens together, for all that has not been evaluated yet."""
    parts, room = [], CHUNK
    for i, request in enumerate(wanted):
        start = request.sequence.length
        new = request.ids[start : start + room]
        if len(new):
            parts.append(_Part(i, request.sequence, new))
            room -= len(new)
    return parts


def _sweep(wanted: list[Request], parts: list[_Part]) -> tuple[Sweep, list[int]]:
    """The parts as a device takes them, and which request each of the rows belongs to."""
    counts = [len(part.ids) for part in parts]
    firsts = [0, *accumulate(counts)]
    table = [(p.sequence.place, p.sequence.length, first, count) for p, first, count in zip(parts, firsts, counts)]
    rows, owners = [], []
    for part, first in zip(parts, firsts):
        _, ids, last, sampling = wanted[part.owner]
        start = part.sequence.length
        for position in range(max(start, len(ids) - last), start + len(part.ids)):
            rows.append(Row(first + position - start, ids[: position + 1], sampling))
            owners.append(part.owner)
    return Sweep(np.concatenate([part.ids for part in parts]), np.array(table, np.int32), rows), owners
