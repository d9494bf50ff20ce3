"""All weights in host memory: mapped from the files, read by the operating system when first used, never copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..runtime import jittor
from ..weights import Weights


class Resident:
    """Lends weights as Jittor Vars over the mapped files. A loan's Vars may be used inside its ``with`` only: other
    implementations put the next block's weights into the same memory."""

    streams = False

    def __init__(self, weights: Weights):
        # The arrays are kept because a Var made by reuse_np_array does not keep its memory alive.
        self._wte = weights.wte()["wte.weight"]
        self._blocks = [weights.block(i) for i in range(weights.config.n_layer)]
        self._head = weights.head()
        self._block_vars = [_vars(arrays) for arrays in self._blocks]
        self._head_vars = _vars(self._head)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of wte, float32 (T, D)."""
        return self._wte[ids].astype(np.float32)

    @contextmanager
    def block(self, i: int) -> Iterator[dict]:
        """Block i's weights, name -> Var."""
        yield self._block_vars[i]

    @contextmanager
    def head(self) -> Iterator[dict]:
        """The weights of ln_f and lm_head, name -> Var."""
        yield self._head_vars


def _vars(arrays: dict[str, np.ndarray]) -> dict:
    wrap = jittor().core.reuse_np_array
    return {name: wrap(np.asarray(array)) for name, array in arrays.items()}  # it takes no np.memmap
