"""The ring's carrier from disk into host memory."""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from .reader import Worker
from .sources import Source


class Slot(Protocol):
    bytes: np.ndarray  # uint8, room for any part


class Disk:
    """Reads parts in a thread of its own, which ``close`` ends."""

    def __init__(self, sources: dict[Hashable, Source]):
        self._sources, self._worker = sources, Worker("moss-jt reads weights")
        self.close = self._worker.close

    def start(self, slot: Slot, item: Hashable) -> Future:
        return self._worker.start(self._sources[item].fetch, slot.bytes)

    def release(self, slot: Slot) -> None:
        """Ops have run when a loan ends."""
