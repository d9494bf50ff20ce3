"""Groups of inputs as GPTQ has them, of any size and in any order, as groups of one size that lie together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ..weights.layout import GROUP


class Arrangement(NamedTuple):
    """``order`` int64 (K): where each stored input comes from. ``groups`` int64 (G): each stored group's scale and zero are
    those of this group of the source."""

    order: np.ndarray
    groups: np.ndarray


def arrange(groups: np.ndarray, size: int, ordered: bool) -> Arrangement | None:
    """Cut the inputs, whose groups are ``groups`` (K), into pieces of ``size``, of which only the last one may be shorter.

    As they are, or (``ordered``) brought together by group: a group that ``size`` does not divide comes last. None where a
    piece would have inputs of two groups.
    """
    order = np.arange(len(groups))
    if ordered:
        cut_short = np.bincount(groups) % size > 0
        order = np.lexsort((order, groups, cut_short[groups]))
    stored = groups[order]
    firsts = stored[::size]
    return Arrangement(order, firsts) if (np.repeat(firsts, size)[: len(stored)] == stored).all() else None


def choose(products: Iterable[np.ndarray]) -> tuple[int, bool] | None:
    """The size of groups and whether inputs must be ordered, for all ``products`` (groups of their inputs, each (K)): in order
    if possible, then the largest size. None where no multiple of 8 will do."""
    products = list(products)
    for ordered in (False, True):
        for size in range(GROUP, 0, -8):
            if all(arrange(groups, size, ordered) for groups in products):
                return size, ordered
    return None
