"""What is read from a weights file in one go: a whole block, or some rows of lm_head. Where it lies in the file and in memory.

Direct I/O moves whole pages, so what starts within a page is read from that page's beginning on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..weights.layout import ALIGN, PANEL, Tensor


@dataclass(frozen=True)
class Span:
    """Neighbours in a file: ``nbytes`` from the file's data + ``offset`` (a multiple of ALIGN) on. What is before the first
    tensor, ``shift`` bytes, is read for the page's sake."""

    offset: int
    shift: int
    nbytes: int
    tensors: tuple[Tensor, ...]

    @property
    def room(self) -> int:
        """The memory it takes: whole pages."""
        return pages(self.nbytes)


@dataclass(frozen=True)
class Part:
    """Spans that are in memory together, each from a page of its own on."""

    spans: tuple[Span, ...]

    @property
    def room(self) -> int:
        return sum(span.room for span in self.spans)


def pages(nbytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-nbytes // ALIGN) * ALIGN


def whole(tensors: Sequence[Tensor]) -> Part:
    """All of a file's data."""
    return Part((Span(0, 0, sum(t.nbytes for t in tensors), tuple(tensors)),))


def rows(tensors: Sequence[Tensor], matrix: str, first: int, end: int) -> Part:
    """Rows ``first`` … ``end`` - 1 of a matrix, ``first`` a multiple of PANEL: of all tensors that belong to it."""
    spans, at = [], 0
    for t in tensors:
        if belongs(t, matrix):
            unit, together = t.nbytes // t.shape[0], _together(t, matrix)
            a, b = first // together, -(-end // together)
            start, stop = at + a * unit, at + b * unit
            taken = Tensor(t.name, t.dtype, (b - a, *t.shape[1:]))
            spans.append(Span(start - start % ALIGN, start % ALIGN, stop - (start - start % ALIGN), (taken,)))
        at += t.nbytes
    return Part(tuple(spans))


def room_for_rows(tensors: Sequence[Tensor], matrix: str, count: int) -> int:
    """Memory that holds ``count`` rows of a matrix, wherever they begin: whole pages."""
    stored = [t for t in tensors if belongs(t, matrix)]
    needed = sum(t.nbytes // t.shape[0] * -(-count // _together(t, matrix)) for t in stored)
    return (needed + _slack(stored)) // ALIGN * ALIGN


def rows_that_fit(tensors: Sequence[Tensor], matrix: str, room: int) -> int:
    """How many rows of a matrix fit ``room`` bytes, wherever they begin: whole panels where it has them."""
    stored = [t for t in tensors if belongs(t, matrix)]
    together = max(_together(t, matrix) for t in stored)
    unit = sum(t.nbytes // t.shape[0] * together // _together(t, matrix) for t in stored)
    return max(0, room - _slack(stored)) // unit * together


def _slack(stored: list[Tensor]) -> int:
    """What whole pages may add at both ends of each tensor's rows."""
    return 2 * ALIGN * len(stored)


def _together(t: Tensor, matrix: str) -> int:
    """Rows of the matrix in one of the tensor's first axis."""
    return 1 if t.name == matrix else PANEL


def belongs(t: Tensor, matrix: str) -> bool:
    """Whether it is the matrix, or one of what it is stored as in int8 and int4."""
    return t.name == matrix or t.name.startswith(matrix + ".")
