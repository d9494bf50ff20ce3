"""What a checkpoint's speed depends on."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config
from ..weights import Weights
from ..weights.layout import WTE_FILE, Coding, Tensor, files_of


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, and how its large matrices are stored."""

    config: Config
    coding: Coding

    @classmethod
    def of(cls, weights: Weights) -> Shape:
        return cls(weights.config, weights.coding)

    @property
    def files(self) -> dict[str, list[Tensor]]:
        return files_of(self.config, self.coding)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for tensors in self.files.values() for t in tensors)

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that a token reads: all but the embedding, of which it reads one row."""
        return self.nbytes - sum(t.nbytes for t in self.files[WTE_FILE])

    def prompt_operations(self, tokens: int) -> int:
        """Multiplications and additions of a prompt: each block's two products, attention over what came before, and the
        logits of the last position."""
        c = self.config
        products = c.n_embd * (3 * c.n_embd + c.n_inner) + c.n_embd * (c.n_embd + c.n_inner)
        seen = tokens * (tokens + 1) // 2  # by all tokens together
        return 2 * (c.n_layer * (tokens * products + 2 * c.n_embd * seen) + c.vocab_size * c.n_embd)
