"""LoRA: a low-rank adapter beside frozen matrices (Hu et al., 2021), and its files, as PEFT has them."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import MossError

TARGETS = {"qkv_proj": "attn", "out_proj": "attn", "fc_in": "mlp", "fc_out": "mlp"}  # the official modules, and where they are


@dataclass(frozen=True)
class Lora:
    """y = W x + alpha / rank · B A dropout(x), for the matrices of the official modules ``targets``."""

    rank: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = tuple(TARGETS)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raises MossError for what makes no adapter."""
        if type(self.rank) is not int or not 1 <= self.rank <= 1024:
            raise MossError(f"LoRA's rank is {self.rank!r}, expected a whole number from 1 to 1024")
        if not self.alpha > 0:
            raise MossError(f"LoRA's alpha is {self.alpha!r}, expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise MossError(f"LoRA's dropout is {self.dropout!r}, expected a number from 0 to below 1")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise MossError(f"LoRA's targets are {', '.join(self.targets)!r}, expected some of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def module(i: int, target: str) -> str:
    """The official name of a target in block i."""
    return f"transformer.h.{i}.{TARGETS[target]}.{target}"
