"""A tensor that is learned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parameter:
    """``value`` and ``gradient``: float32, contiguous, of one shape. Both are read and written where they lie, by training and
    by whoever saves or restores them: fill them (``p.value[...] = x``), do not replace them."""

    name: str  # the official tensor's; an adapter's as PEFT names it
    value: np.ndarray
    gradient: np.ndarray

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to biases and norms."""
        return self.value.ndim > 1
