"""Keys and values of the tokens that were evaluated, and which tokens those are."""

from __future__ import annotations

from typing import Any

import numpy as np

from .config import Config


class Cache:
    """Room for the keys and values of some sequences, wherever a device has it.

    ``layers``: of each block, what that device's ops take. ``sequences``: one for each place.
    """

    def __init__(self, context: int, places: int, layers: Any, memory: Any):
        """``context``: tokens that each sequence has room for. ``memory``: kept as long as this is."""
        self.context, self.layers, self._memory = context, layers, memory
        self.sequences = [Sequence(self, place, context) for place in range(places)]


def parts_of(config: Config, context: int, places: int, kv_cache: str) -> list[tuple[tuple[int, ...], type]]:
    """Shapes and dtypes of a cache's arrays: keys and values of all blocks, (blocks, 2, places, H, context, S) in fp16 or int8;
    and in int8 a scale for each row, which is what it is to be multiplied by."""
    rows = (config.n_layer, 2, places, config.n_head, context)
    if kv_cache == "int8":
        return [((*rows, config.head_size), np.int8), (rows, np.float32)]
    return [((*rows, config.head_size), np.float16)]


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
