"""Keys and values of the tokens that were evaluated, and which tokens those are."""

from __future__ import annotations

import numpy as np

from .config import Config
from .runtime import jittor


class Cache:
    """Room for the keys and values of ``places`` sequences of up to ``context`` tokens, in fp16 or int8.

    ``layers``: a list of Vars for each block, keys and values (places, H, context, S), in int8 also their scales, float32
    (places, H, context) each: what the row of a token and a head is to be multiplied by.
    """

    def __init__(self, config: Config, context: int, places: int = 1, kv_cache: str = "fp16"):
        self.context = context
        shape = (config.n_layer, 2, places, config.n_head, context, config.head_size)
        # Zeroed pages cost nothing until they are written, so a long context is paid for as it fills.
        if kv_cache == "int8":
            self._memory = [np.zeros(shape, np.int8), np.zeros(shape[:-1], np.float32)]
        else:
            self._memory = [np.zeros(shape, np.float16)]
        wrap = jittor().core.reuse_np_array
        self.layers = [[wrap(part) for memory in self._memory for part in memory[i]] for i in range(config.n_layer)]
        self.sequences = [Sequence(self, place, context) for place in range(places)]


class Sequence:
    """One sequence in a Cache. ``length``: how many of its tokens have their keys and values there."""

    def __init__(self, cache: Cache, place: int, context: int):
        self.cache, self.place, self.length = cache, place, 0
        self._ids = np.zeros(context, np.int64)

    @property
    def context(self) -> int:
        return len(self._ids)

    def reusable(self, ids, last: int = 1) -> int:
        """How many tokens at the start of ids need no evaluation, if the logits of their ``last`` positions are wanted."""
        n = max(0, min(len(ids) - last, self.length))
        differ = np.flatnonzero(self._ids[:n] != np.asarray(ids[:n], np.int64))
        return int(differ[0]) if len(differ) else n

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = min(self.length, length)

    def append(self, ids: np.ndarray) -> None:
        """Say that these tokens' keys and values have been written after those there were."""
        self._ids[self.length : self.length + len(ids)] = ids
        self.length += len(ids)
