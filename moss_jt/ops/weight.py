"""A matrix of weights as an op takes it: halves, or whole numbers of 8 or 4 bits with a scale and a zero for each group of
inputs (docs/formats.md)."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..weights.layout import PANEL
from .kernel import check


class Weight(NamedTuple):
    """A matrix as it is stored: bits 16 and ``q`` float16 (N, K); or bits 8 or 4, P panels of 16 rows, G groups of S inputs:
    ``q`` uint8 (P, G, S·bits/32, 64), ``scale`` float16 (P, G, 16), ``zero`` uint8 (P, G, 16), and, where inputs are not in
    order, ``order`` int32 (1 or 2, K): one for all rows, or one for those of q, k and v and one for the rest."""

    bits: int
    q: Any
    scale: Any = None
    zero: Any = None
    order: Any = None

    @classmethod
    def of(cls, tensors: dict, name: str, bits: int) -> Weight:
        """From a file's tensors: NAME itself, or NAME.q, NAME.scale, NAME.zero and, if there is one, NAME.order."""
        if bits == 16:
            return cls(bits, tensors[name])
        return cls(bits, *(tensors[f"{name}.{part}"] for part in ("q", "scale", "zero")), tensors.get(f"{name}.order"))

    @property
    def parts(self) -> list:
        return [part for part in self[1:] if part is not None]

    def expected(self, n: int, k: int) -> dict[str, tuple]:
        """Names, dtypes and shapes of the parts."""
        if self.bits == 16:
            return {"weight": ("float16", (n, k))}
        chunks = self.q.shape[2]
        panels, groups = -(-n // PANEL), -(-k // (32 * chunks // self.bits))
        found = {
            "weight": ("uint8", (panels, groups, chunks, 4 * PANEL)),
            "scale": ("float16", (panels, groups, PANEL)),
            "zero": ("uint8", (panels, groups, PANEL)),
        }
        return found if self.order is None else {**found, "order": ("int32", (self.order.shape[0], k))}

    def code(self, first: int, n: str, k: str) -> str:
        """C++ for the kernels' object over these parts, which are the op's inputs from number ``first`` on."""
        q, scale, zero, order = (f"in{first + i}" for i in range(4))
        if self.bits == 16:
            return f"moss::WeightsF16{{(const moss::f16*){q}_p, {n}, {k}}}"
        group = f"{q}_shape2 * 32 / {self.bits}"
        orders = "nullptr, 0" if self.order is None else f"{order}_p, {order}_shape0"
        parts = f"{q}_p, (const moss::f16*){scale}_p, {zero}_p, {q}_shape0, {k}, {group}, {orders}"
        return f"moss::WeightsGrouped<{self.bits}>{{{parts}}}"

    def check(self, what: str, n: int, k: int) -> None:
        """Raises ValueError unless it is N x K."""
        expected = self.expected(n, k)
        check(what, expected, **dict(zip(expected, self.parts)))
