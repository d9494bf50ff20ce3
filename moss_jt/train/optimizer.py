"""AdamW (Loshchilov and Hutter, 2019), as torch computes it."""

from __future__ import annotations

import numpy as np

from .parameter import Parameter


class AdamW:
    """Decoupled weight decay, on matrices and not on biases and norms; moments in float32."""

    def __init__(
        self,
        parameters: dict[str, Parameter],
        lr: float,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        self.lr, self.steps = lr, 0

    def step(self, lr: float | None = None) -> None:
        """One step along the gradients, which stay as they are. ``lr``: for this step; by default the one given at first."""

    def state(self) -> dict[str, np.ndarray]:
        """What goes on from here: ``steps`` int64 (), and NAME.m and NAME.v for each parameter; not copies."""

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Raises MossError where a tensor is missing or has another shape."""
