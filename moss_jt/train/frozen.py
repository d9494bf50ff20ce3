"""Frozen weights with an adapter beside them, and the tables that describe both to the ops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..config import MP_NUM
from ..sizes import parse_size
from ..swap.host import Rows
from ..weights import Weights
from ..weights.layout import BITS, GROUP, PANEL, WTE_FILE
from . import ops
from .lender import Lender, room_for_blocks
from .lora import TARGETS, Lora, begin, mask_seed, module, tensor_names

_VECTORS = {"norm_weight": "ln_1.weight", "norm_bias": "ln_1.bias", "in_bias": "in.bias", "out_bias": "out.bias"}


class Adapted:
    """A checkpoint as it is stored, whose blocks have an adapter."""

    official = False

    def __init__(self, weights: Weights, lora: Lora, ram: str | int | None, tokens: int, seed: int):
        self.config, self._lora, self._seed, self._dropout = weights.config, lora, seed, None
        self.parameters = begin(weights.config, lora, seed)
        learned = sum(p.value.size for p in self.parameters.values())
        room = None if ram is None else room_for_blocks(weights, parse_size(ram), learned, tokens)
        self._coding, self.lender = weights.coding, Lender(weights, room)
        self._rows, self._head = Rows(weights.regions[WTE_FILE]), weights.head()
        self.head = self._head_table()

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """float32 (M, D)."""
        return self._rows.read(ids)

    def embed_backward(self, ids: np.ndarray, dx) -> None:
        """The embedding is frozen."""

    def begin(self, backward: bool, dropout: int | None) -> None:
        """A batch begins. ``dropout``: which masks are drawn; None: nothing is dropped."""
        self._dropout = dropout
        self.lender.begin(backward)

    @contextmanager
    def block(self, i: int, backward: bool) -> Iterator[np.ndarray]:
        """The table of block i, while it is lent."""
        with self.lender.block(i, backward) as tensors:
            yield self._table(i, tensors)

    def _table(self, i: int, tensors: dict[str, np.ndarray]) -> np.ndarray:
        table, (d, inner) = np.zeros(1, ops.BLOCK), (self.config.n_embd, self.config.n_inner)
        row = table[0]
        for field, name in _VECTORS.items():
            row[field]["value"] = ops.address(tensors[name])
        code = (BITS[self._coding.dtype], self._coding.group)
        row["n_in"], row["n_out"] = 1, 1
        if self._coding.ordered:  # q, k and v have one order, fc_in another
            row["n_in"] = 2
            _fill(row["in"][0], tensors, "in.weight", (3 * d, d), code)
            _fill(row["in"][1], tensors, "in.weight", (inner, d), code, first=3 * d, order=1)
            row["in"][1]["y"] = 3 * d
        else:
            _fill(row["in"][0], tensors, "in.weight", (3 * d + inner, d), code)
        _fill(row["out"][0], tensors, "out.weight", (d, d + inner), code)
        self._fill_adapters(row, i)
        return table

    def _fill_adapters(self, row: np.void, i: int) -> None:
        d = self.config.n_embd
        # The first columns of inputs and outputs, as train_block.h lays them side by side.
        places = {"qkv_proj": ("in", 0, 0), "fc_in": ("in", 0, 3 * d), "out_proj": ("out", 0, 0), "fc_out": ("out", d, 0)}
        for number, target in enumerate(TARGETS):
            if target not in self._lora.targets:
                continue
            side, x, y = places[target]
            a, b = (self.parameters[name] for name in tensor_names(module(i, target)))
            to = row[f"adapters_{side}"][row[f"n_adapters_{side}"]]
            row[f"n_adapters_{side}"] += 1
            to["N"], to["K"], to["rank"] = len(b.value), a.value.shape[1], self._lora.rank
            to["x"], to["y"], to["parts"], to["scale"] = x, y, MP_NUM * (target == "qkv_proj"), self._lora.scale
            if self._dropout is not None and self._lora.dropout:
                to["dropout"] = self._lora.dropout
                to["seed"] = mask_seed(self._seed, self._dropout, i, number)
            for field, array in (("a", a.value), ("b", b.value), ("da", a.gradient), ("db", b.gradient)):
                to[field] = ops.address(array)

    def _head_table(self) -> np.ndarray:
        table = np.zeros(1, ops.HEAD)
        row = table[0]
        for field, name in (("norm_weight", "ln_f.weight"), ("norm_bias", "ln_f.bias"), ("bias", "lm_head.bias")):
            row[field]["value"] = ops.address(self._head[name])
        shape = (self.config.vocab_size, self.config.n_embd)
        _fill(row["lm_head"], self._head, "lm_head.weight", shape, (BITS[self._coding.head_dtype], GROUP))
        return table


def _fill(
    row: np.void, tensors: dict, name: str, shape: tuple[int, int], code: tuple[int, int], first: int = 0, order: int = 0
) -> None:
    """Describe rows of a stored matrix from ``first``, the beginning of a panel, on; with the order of that number."""
    row["N"], row["K"] = shape
    row["bits"], row["group"] = code
    if name in tensors:
        row["q"] = ops.address(tensors[name])
        return
    for field, part in (("q", "q"), ("scale", "scale"), ("zero", "zero")):
        row[field] = ops.address(tensors[f"{name}.{part}"][first // PANEL :])
    if f"{name}.order" in tensors:
        row["order"] = ops.address(tensors[f"{name}.order"][order])
