"""How far a block is, in the bytes that progress is counted in, where computing takes far longer than writing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from .gptq_matrix import Matrix

SEARCH = 3000  # operations of a large product that take as long as choosing a grid does for each weight


class Work:
    """Tells ``advance`` of ``nbytes`` in all, bit by bit as ``matrices`` are quantised with so many tokens."""

    def __init__(self, matrices: tuple[Matrix, ...], tokens: int, nbytes: int, advance: Callable[[int], None]):
        self._nbytes, self._advance = nbytes, advance
        self._done = self._told = 0
        self._all = 0
        for m in matrices:
            self._all += tokens * (m.to_add + m.to_multiply) + m.to_factor + m.k * m.to_solve + m.n * m.k * SEARCH

    def did(self, operations: float) -> None:
        """``operations``: floating-point operations, or what takes as long."""
        self._done = min(self._done + operations, self._all)
        now = int(self._nbytes * self._done / self._all)
        self._advance(now - self._told)
        self._told = now

    def finish(self) -> None:
        self.did(self._all)
