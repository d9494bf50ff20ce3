"""What is read from a weights file in one go: a whole block, or some rows of lm_head. Where it lies in the file and in memory.

Direct I/O moves whole pages, so what starts within a page is read from that page's beginning on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..weights.layout import ALIGN, Tensor


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
    """Rows ``first`` … ``end`` - 1 of a matrix: of the tensor of that name, or of NAME.q, NAME.scale and NAME.zero."""
    spans, at = [], 0
    for t in tensors:
        if belongs(t, matrix):
            row = t.nbytes // t.shape[0]
            start, stop = at + first * row, at + end * row
            taken = Tensor(t.name, t.dtype, (end - first, *t.shape[1:]))
            spans.append(Span(start - start % ALIGN, start % ALIGN, stop - (start - start % ALIGN), (taken,)))
        at += t.nbytes
    return Part(tuple(spans))


def rows_that_fit(tensors: Sequence[Tensor], matrix: str, room: int, multiple: int) -> int:
    """How many rows of a matrix, wherever they begin, surely fit ``room`` bytes: a multiple of ``multiple``, or none."""
    stored = [t for t in tensors if belongs(t, matrix)]
    row = sum(t.nbytes for t in stored) // stored[0].shape[0]
    slack = 2 * ALIGN * len(stored)  # a page at either end
    return max(0, (room - slack) // row // multiple * multiple)


def room_for_rows(tensors: Sequence[Tensor], matrix: str, count: int) -> int:
    """Memory that surely holds ``count`` rows of a matrix, wherever they begin."""
    stored = [t for t in tensors if belongs(t, matrix)]
    return pages(sum(t.nbytes // t.shape[0] * count for t in stored)) + 2 * ALIGN * len(stored)


def belongs(t: Tensor, matrix: str) -> bool:
    return t.name == matrix or t.name.startswith(matrix + ".")
