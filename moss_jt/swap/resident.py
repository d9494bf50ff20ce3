"""All weights in host memory: mapped from the files, read by the operating system when first used, never copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..weights import Weights
from ..weights.layout import WTE_FILE
from .host import Rows, as_vars


class Resident:
    """Lends weights as Jittor Vars over the mapped files. What is lent may be used until the loan ends and no longer: other
    implementations put the next block's weights into the same memory."""

    streams = False

    def __init__(self, weights: Weights):
        self._rows = Rows(weights.regions[WTE_FILE])
        # The arrays are kept because Vars do not keep their memory alive.
        self._blocks = [weights.block(i) for i in range(weights.config.n_layer)]
        self._head = weights.head()
        self._block_vars = [as_vars(arrays) for arrays in self._blocks]
        self._head_vars = as_vars(self._head)

    def expect(self, head: bool) -> None:
        """A sweep begins: all blocks are lent next, each once and in order, and then, if ``head``, lm_head."""

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of wte, float32 (T, D)."""
        return self._rows.read(ids)

    @contextmanager
    def block(self, i: int) -> Iterator[dict]:
        """Block i's weights, name -> Var."""
        yield self._block_vars[i]

    def head(self) -> Iterator[dict]:
        """ln_f's and lm_head's weights, name -> Var: some of lm_head's rows at a time, in order. Each loan ends where the next
        one begins."""
        yield self._head_vars
