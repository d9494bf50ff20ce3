"""An adapter as what it adds to the matrices of our files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..config import Config
from ..convert.mapping import pieces
from ..ops import LowRank
from ..weights.layout import block_file
from .lora import load_adapter, tensor_names


class LowRankTerms:
    """What an adapter adds to ``in.weight`` and ``out.weight`` of each block: ``up @ down``. Each of them holds two official
    modules, side by side: R is the sum of their ranks, and what of ``up`` or ``down`` belongs to the other module is zeros."""

    def __init__(self, config: Config, adapter: Path):
        """Raises MossError where it cannot be read, or does not suit the model."""
        self.lora, self._tensors = load_adapter(adapter, config)
        self._config, self._pieces = config, pieces(config)

    def of(self, block: int, tensor: str) -> tuple[np.ndarray, np.ndarray]:
        """``down`` (R, K) and ``up`` (N, R), float32, alpha / rank in the latter; R is 0 where the adapter leaves it alone."""
        its = [p for p in self._pieces[block_file(block)] if p.ours == tensor]
        modules = [name for name in dict.fromkeys(p.official for p in its) if self._names(name)[0] in self._tensors]
        n, k = (max(p.our_row + p.rows for p in its), max(p.our_column + p.columns for p in its))
        down = np.zeros((self.lora.rank * len(modules), k), np.float32)
        up = np.zeros((n, len(down)), np.float32)
        for i, module in enumerate(modules):
            a, b = (self._tensors[name] for name in self._names(module))
            here = slice(i * self.lora.rank, (i + 1) * self.lora.rank)
            for p in (p for p in its if p.official == module):
                ours, columns = slice(p.our_row, p.our_row + p.rows), slice(p.our_column, p.our_column + p.columns)
                down[here, columns] = a
                up[ours, here] = b[p.official_row : p.official_row + p.rows] * np.float32(self.lora.scale)
        return down, up

    def blocks(self) -> list[LowRank]:
        """What a device takes: of each block the terms of ``in.weight`` and ``out.weight``."""
        names = ("in.weight", "out.weight")
        found = [[self.of(i, name) for name in names] for i in range(self._config.n_layer)]
        return [LowRank(*(both if len(both[0]) else () for both in block)) for block in found]

    @staticmethod
    def _names(official: str) -> tuple[str, str]:
        return tensor_names(official.removesuffix(".weight"))
