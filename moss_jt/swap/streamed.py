"""Weights under a budget: some in memory, the others read from disk for every sweep, ahead of their use."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import numpy as np

from ..weights import Weights
from ..weights.layout import WTE_FILE
from ..weights.store import arrays
from .disk import Disk
from .host import Rows, as_vars
from .parts import Part
from .plan import Plan
from .reader import allocate
from .ring import Ring
from .sources import sources


class Streamed:
    """Lends weights as Resident does; the plan says what stays in memory.

    Parts are known by their block's number, or by their rows (first, end) of lm_head. An error of the disk is a MossError
    where its part was to be lent; the next sweep tries again.
    """

    streams = True

    def __init__(self, weights: Weights, plan: Plan):
        """Reads what is resident. Raises MossError where a file cannot be read."""
        self._blocks, self._ranges = plan.streamed_blocks, plan.head_ranges()
        self._head = [(0, plan.head_rows), *self._ranges] if plan.head_rows else self._ranges
        self._rows = Rows(weights.regions[WTE_FILE])
        self._small = {name: np.array(a) for name, a in weights.head().items() if not name.startswith("lm_head.weight")}
        norm = as_vars({name: a for name, a in self._small.items() if name.startswith("ln_f.")})
        bias = self._small["lm_head.bias"]
        beside = {(a, b): {**norm, **as_vars({"lm_head.bias": bias[a:b]})} for a, b in self._head}

        found = sources(weights, self._head)
        streamed = {item: found.pop(item) for item in (*self._blocks, *self._ranges)}
        slots = [_Memory(plan.slot, {item: s.part for item, s in streamed.items()}, beside) for _ in range(plan.slots)]
        disk = Disk(streamed)
        self.close = weakref.finalize(self, disk.close)  # when called, or when this is no longer used, or at the end
        self._ring = Ring(slots, disk)
        self.expect(head=True)
        self._resident = {item: _Memory(s.part.room, {item: s.part}, beside) for item, s in found.items()}
        for item, source in found.items():
            source.fetch(self._resident[item].bytes)

    def expect(self, head: bool) -> None:
        """As Resident's. What comes at the beginning of the next sweep is read during the end of this one."""
        if items := [*self._blocks, *(self._ranges if head else ())]:
            self._ring.follow(items)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return self._rows.read(ids)

    def block(self, i: int):
        return self._lend(i)

    def head(self) -> Iterator[dict]:
        for rows in self._head:
            with self._lend(rows) as tensors:
                yield tensors

    @contextmanager
    def _lend(self, item: Hashable) -> Iterator[dict]:
        if item in self._resident:
            yield self._resident[item].vars[item]
        else:
            with self._ring.lend(item) as slot:
                yield slot.vars[item]


class _Memory:
    """Memory of ``nbytes`` for any one of some parts, and each one's Vars over it, for when it is there, with those that lie
    ``beside`` it."""

    def __init__(self, nbytes: int, those: dict[Hashable, Part], beside: dict[Hashable, dict]):
        self.bytes = allocate(nbytes)
        self.vars = {item: {**as_vars(self._arrays(part)), **beside.get(item, {})} for item, part in those.items()}

    def _arrays(self, part: Part) -> dict[str, np.ndarray]:
        found, at = {}, 0
        for span in part.spans:
            found.update(arrays(self.bytes[at + span.shift :], span.tensors))
            at += span.room
        return found
