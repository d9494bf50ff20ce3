"""Rows of the matrices in our files, as float32, however they are stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

import numpy as np

from ..weights.layout import PANEL
from .panels import dequantised, from_panels
from .view import View, cast, cast_to_quantise


class Matrix:
    """A matrix of N outputs and K inputs, in fp16 or quantised. Only the rows that are asked for are read."""

    def __init__(self, views: dict[str, View], name: str, shape: tuple[int, int], bits: int, second: int = 0):
        """``views``: the file's tensors. ``bits``: of a weight. ``second``: where the inputs are not in order, the row from
        which on they are in the second of two orders; 0: there is one."""
        self.shape, self._bits = shape, bits
        self._stored = [views[f"{name}.{part}"] for part in ("q", "scale", "zero")] if bits < 16 else [views[name]]
        self._named = replace(self._stored[0], name=name)
        order = views.get(f"{name}.order")
        self._orders = [] if order is None else np.argsort(order.read(), axis=1)
        self._second = second

    def rows(self, first: int, count: int) -> np.ndarray:
        """``count`` rows from ``first`` on, float32 (count, K), inputs in order. Raises MossError where they cannot be read, or
        F16 could not hold them."""
        if self._bits == 16:
            return cast_to_quantise(self._stored[0].rows(first, count).read(), self._named)
        panel, end = first // PANEL, -(-(first + count) // PANEL)
        parts = (view.rows(panel, end - panel).read() for view in self._stored)
        with np.errstate(invalid="ignore"):  # a damaged scale
            found = dequantised(from_panels(*parts, self._bits))
        found = found[first - panel * PANEL :][:count, : self.shape[1]]
        return self._in_order(cast_to_quantise(found, self._named), first)

    def _in_order(self, found: np.ndarray, first: int) -> np.ndarray:
        """Input order[k] is stored at k; so input j is found where argsort says."""
        if not len(self._orders):
            return found
        if not self._second:
            return found[:, self._orders[0]]
        cut = min(max(self._second - first, 0), len(found))
        return np.concatenate([found[:cut, self._orders[0]], found[cut:, self._orders[1]]])


def vector(view: View) -> Callable[[int, int], np.ndarray]:
    """What reads elements of a vector, (first, count) -> float32. It raises MossError where they are not finite."""
    return lambda first, count: cast(view.rows(first, count).read(), view, "F32")
