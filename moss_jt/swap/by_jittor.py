"""Weights that Jittor itself moves between a GPU's memory and RAM: what others are compared with.

Compiled with JT_SAVE_MEM, it keeps a limit of the device's memory by moving Vars that the op at hand does not use to the host.
So each part is a Var and an input of its op, which finds it there. docs/memory.md says what Jittor does, and what it does not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import numpy as np

from .. import cudart
from ..runtime import jittor
from ..weights import Weights
from .on_device import addresses, small
from .plan import Plan
from .sources import Source, sources

_BESIDE = 16 << 20  # of the device's memory for other Vars: what ops give


class ByJittor:
    """Lends addresses as OnDevice does, but relative to Vars: ``moved``. The plan's slots are Jittor's limit."""

    streams, from_disk = True, ()

    def __init__(self, weights: Weights, plan: Plan, start: int):
        """``start``: the address that stands for a Var's beginning. Raises MossError where a file cannot be read."""
        self._start = start
        self._ranges = plan.head_ranges()
        self._sources = sources(weights, self._ranges)
        self._norm, self._bias, self._memory = small(weights)
        staged = cudart.pinned(max(s.part.room for s in self._sources.values()))
        with jittor().flag_scope(use_cuda=0):
            self._vars = {item: _var(source, staged) for item, source in self._sources.items()}
        jittor().flags.device_mem_limit = plan.memory["slots"] + _BESIDE

    def expect(self, head: bool, on_host: bool = False) -> None:
        """Jittor brings nothing ahead of its use."""

    def is_resident(self, i: int) -> bool:
        return False

    def moved(self, item: Hashable):
        """The Var of a block, or of rows (first, end) of lm_head: float32, in one dimension."""
        return self._vars[item]

    @contextmanager
    def block(self, i: int) -> Iterator[dict[str, int]]:
        yield addresses(self._sources[i].part, self._start)

    def head(self) -> Iterator[tuple[dict[str, int], int, int]]:
        for first, end in self._ranges:
            bias = {"lm_head.bias": self._bias + 4 * first}
            yield {**self._norm, **bias, **addresses(self._sources[first, end].part, self._start)}, first, end - first

    def close(self) -> None:
        jittor().flags.device_mem_limit = -1


def _var(source: Source, staged: np.ndarray):
    source.fetch(staged)
    return jittor().array(staged[: source.part.room].view(np.float32)).sync()
