"""What a device is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..sampling import Sampling


@dataclass(frozen=True)
class Row:
    """A token whose logits are wanted: its row among a sweep's tokens, all ids of its sequence up to it, and how the next one
    will be chosen, if that is known."""

    row: int
    seen: np.ndarray
    sampling: Sampling | None


@dataclass(frozen=True)
class Sweep:
    """T new tokens of some sequences of one cache."""

    ids: np.ndarray  # int64 (T,)
    table: np.ndarray  # int32 (n, 4), as ops.sequences takes it
    rows: list[Row]

    @property
    def enough(self) -> int:
        """How many of the likeliest tokens are all that matters after any of the rows; 0: every token may."""
        counts = [row.sampling.enough if row.sampling else 0 for row in self.rows]
        return max(counts) if all(counts) else 0
