"""From opening a checkpoint to its first logits, with its files in the page cache and without."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from ..model import Model
from ..weights import Weights, open_weights
from . import limits, page_cache
from .pairs import Limit, compared, in_turn
from .shape import Shape


@dataclass(frozen=True)
class Load:
    """Jittor is imported before: that takes as long, however large the model."""

    def check(self, shape: Shape, folder: Path) -> None:
        """Raises MossError where the weights in ``folder`` do not fit in memory."""
        page_cache.check_room(shape, folder)

    def run(self, weights: Weights, threads: int, repeat: int) -> dict:
        """``cold`` is None where the page cache keeps the files all the same."""
        page_cache.fill(weights)
        count = Shape.of(weights).token_bytes
        _load(weights)  # compiles, the first time

        def measured(limit: Limit, load: Callable[[], float]) -> dict:
            seconds, limits = in_turn(limit, load, repeat)
            return {"seconds": seconds, **compared(limit, [count / s for s in seconds], limits)}

        warm = measured(limits.memory_read(threads), lambda: _load(weights))
        can_be_cold = _from_disk(lambda: _load_cold(weights)) > count / 2
        cold = measured(limits.disk_read(weights.folder), lambda: _load_cold(weights)) if can_be_cold else None
        return {"bytes": count, "warm": warm, "cold": cold}


def _load_cold(weights: Weights) -> float:
    page_cache.drop(weights)
    return _load(weights)


def _load(weights: Weights) -> float:
    """Seconds."""
    start = time.perf_counter()
    model = Model(open_weights(weights.folder), weights.config.n_ctx)
    model.logits([0])
    seconds = time.perf_counter() - start
    del model
    gc.collect()  # what maps the files must be gone before they are dropped
    return seconds


def _from_disk(work: Callable[[], object]) -> int:
    """Bytes that come from a disk meanwhile; 0 where Linux does not say."""
    before = page_cache.disk_bytes()
    work()
    after = page_cache.disk_bytes()
    return 0 if before is None or after is None else after - before
