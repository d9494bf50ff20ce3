"""All weights of a model as parameters, and the tables that describe them to the ops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np

from ..convert.mapping import official_bands, official_shapes, pieces
from ..convert.view import of_region
from ..errors import MossError
from ..machine import memory
from ..sizes import gib
from ..weights import Weights
from . import ops
from .parameter import Parameter

_BLOCK = {"norm_weight": "ln_1.weight", "norm_bias": "ln_1.bias", "in_bias": "mlp.fc_in.bias", "out_bias": "mlp.fc_out.bias"}
_HEAD = {"norm_weight": "transformer.ln_f.weight", "norm_bias": "transformer.ln_f.bias", "bias": "lm_head.bias"}


class Full:
    """The weights of an fp16 checkpoint, float32 and in the official layout, each with its gradient."""

    official = True

    def __init__(self, weights: Weights):
        self.config = weights.config
        self.parameters = _read(weights)
        self.wte = self.parameters["transformer.wte.weight"]

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """float32 (M, D)."""
        return self.wte.value[ids]

    def embed_backward(self, ids: np.ndarray, dx) -> None:
        ops.embed_backward(ids, dx, self.wte.gradient)

    def begin(self, backward: bool, dropout: int | None) -> None:
        """All is in memory."""

    @contextmanager
    def block(self, i: int, backward: bool) -> Iterator[np.ndarray]:
        """The table of block i."""
        yield self._blocks[i]

    @cached_property
    def _blocks(self) -> list[np.ndarray]:
        return [self._block(f"transformer.h.{i}.") for i in range(self.config.n_layer)]

    def _block(self, name: str) -> np.ndarray:
        table, d = np.zeros(1, ops.BLOCK), self.config.n_embd
        row = table[0]
        for field, tensor in _BLOCK.items():
            row[field] = _learned(self.parameters[name + tensor])
        row["n_in"], row["n_out"] = 2, 2
        for place, tensor, x, y in (
            (row["in"][0], "attn.qkv_proj", 0, 0),
            (row["in"][1], "mlp.fc_in", 0, 3 * d),
            (row["out"][0], "attn.out_proj", 0, 0),
            (row["out"][1], "mlp.fc_out", d, 0),
        ):
            _fill(place, self.parameters[f"{name}{tensor}.weight"], x, y)
        return table

    @cached_property
    def head(self) -> np.ndarray:
        table = np.zeros(1, ops.HEAD)
        for field, tensor in _HEAD.items():
            table[0][field] = _learned(self.parameters[tensor])
        _fill(table[0]["lm_head"], self.parameters["lm_head.weight"], 0, 0)
        return table


def check_memory(weights: Weights, processes: int = 1) -> None:
    """Raises MossError where so many that train all weights would not fit this machine."""
    needed = 16 * sum(math.prod(shape) for shape in official_shapes(weights.config).values())
    if processes * needed > (available := memory().available):
        each = f"in each of {processes} processes, " if processes > 1 else ""
        raise MossError(
            f"{weights.folder}: to train all its weights takes {gib(needed)}, for them, their gradients and two moments each, "
            f"{each}and {gib(available)} are available: train an adapter (LoRA)"
        )


def _read(weights: Weights) -> dict[str, Parameter]:
    check_memory(weights)
    found = {}
    for file, those in pieces(weights.config).items():
        ours = of_region(weights.regions[file])
        for name in dict.fromkeys(piece.official for piece in those):
            found[name] = np.concatenate(
                [v.read().astype(np.float32) for b in official_bands(those, name, ours) for v in b.views]
            )
    return {name: Parameter(name, found[name], np.zeros_like(found[name])) for name in official_shapes(weights.config)}


def _learned(p: Parameter) -> tuple[int, int]:
    return ops.address(p.value), ops.address(p.gradient)


def _fill(row: np.void, p: Parameter, x: int, y: int) -> None:
    row["N"], row["K"] = p.value.shape
    row["x"], row["y"], row["bits"] = x, y, 32
    row["q"], row["gradient"] = _learned(p)
