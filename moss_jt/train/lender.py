"""Lends a Trainee the frozen blocks, once forwards and once backwards for each batch: mapped from their files where they fit
the budget, else read from disk ahead of their use."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from ..config import Config
from ..errors import MossError
from ..swap import spare_memory
from ..swap.disk import Disk
from ..swap.parts import whole
from ..swap.plan import in_mib
from ..swap.reader import allocate
from ..swap.ring import Ring
from ..swap.sources import sources
from ..weights import Weights
from ..weights.layout import HEAD_FILE, block_file
from ..weights.store import arrays

_SLOTS = 2
_PROGRAM = 192 << 20  # Python, numpy, Jittor and its ops, and what products are packed into
_LOGITS = 4 * (16 << 20)  # that train_block.h holds at a time


class Lender:
    """The blocks of a checkpoint, arrays by their names in its files. The first ones stay in memory."""

    def __init__(self, weights: Weights, room: int | None):
        """``room``: bytes for blocks; None: what this machine can spare. Raises MossError where a file cannot be read."""
        size = max(whole(weights.regions[block_file(i)].tensors).room for i in range(weights.config.n_layer))
        room, n = spare_memory() if room is None else room, weights.config.n_layer
        resident = n if room >= n * size else max(0, room // size - _SLOTS)
        self._mapped = [weights.block(i) for i in range(resident)]
        self._streamed = list(range(resident, n))
        if self._streamed:
            self._sources = sources(weights, [])
            disk = Disk({(backward, i): self._sources[i] for backward in (False, True) for i in self._streamed})
            self.close = weakref.finalize(self, disk.close)
            self._ring = Ring([_Slot(allocate(size)) for _ in range(_SLOTS)], disk)

    @property
    def streams(self) -> bool:
        return bool(self._streamed)

    def begin(self, backward: bool) -> None:
        """All blocks are lent next, in order, and then, if ``backward``, in reverse."""
        if self._streamed:
            again = [(True, i) for i in reversed(self._streamed)] if backward else []
            self._ring.follow([(False, i) for i in self._streamed] + again)

    @contextmanager
    def block(self, i: int, backward: bool) -> Iterator[dict[str, np.ndarray]]:
        """Block i, which may be used until the loan ends. Raises MossError for a disk's error; the next batch tries again."""
        if i < len(self._mapped):
            yield self._mapped[i]
        else:
            with self._ring.lend((backward, i)) as slot:
                yield arrays(slot.bytes, self._sources[i].part.spans[0].tensors)


class _Slot(NamedTuple):
    bytes: np.ndarray


def room_for_blocks(weights: Weights, budget: int, learned: int, tokens: int) -> int:
    """What a budget leaves for blocks. ``learned``: numbers in the adapter; ``tokens``: of a batch, at most. Raises MossError
    where that is less than streaming takes."""
    fixed = _PROGRAM + 16 * learned + weights.regions[HEAD_FILE].nbytes + work_bytes(weights.config, tokens)
    least = _SLOTS * whole(weights.regions[block_file(0)].tensors).room
    if budget < fixed + least:
        raise MossError(
            f"a budget of {in_mib(budget)} is too small for training on {tokens} tokens at a time: "
            f"{in_mib(fixed + least)} is the smallest that works"
        )
    return budget - fixed


def work_bytes(c: Config, tokens: int) -> int:
    """Work space for batches of so many tokens: a block's insides and their derivatives (train_block.h), inputs in another
    order, one state a block, and logits."""
    d, inner = c.n_embd, c.n_inner
    inside = (d + 2) + (3 * d + inner) + (d + inner)
    attention = 4 * 128 * min(tokens, c.n_ctx)
    return 4 * (tokens * (2 * inside + (d + inner) + (c.n_layer + 4) * d) + attention) + _LOGITS + 4 * 512 * 4 * d
