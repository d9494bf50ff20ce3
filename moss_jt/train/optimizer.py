"""AdamW (Loshchilov and Hutter, 2019), as torch computes it."""

from __future__ import annotations

import math

import numpy as np

from ..errors import MossError
from . import ops
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
        """Raises MossError for numbers with which no step can be taken."""
        if not (lr >= 0 and weight_decay >= 0 and eps > 0 and all(0 <= beta < 1 for beta in betas)):
            raise MossError(f"AdamW cannot use lr {lr}, weight decay {weight_decay}, betas {betas} and eps {eps}")
        self.lr, self.weight_decay, self.betas, self.eps, self.steps = lr, weight_decay, betas, eps, 0
        self._parameters = parameters
        self._moments = {p.name: (np.zeros_like(p.value), np.zeros_like(p.value)) for p in parameters.values()}

    def step(self, lr: float | None = None) -> None:
        """One step along the gradients, which stay as they are. ``lr``: for this step; by default the one given at first."""
        self.steps += 1
        lr, (beta1, beta2) = self.lr if lr is None else lr, self.betas
        rate, root = lr / (1 - beta1**self.steps), math.sqrt(1 - beta2**self.steps)
        for p in self._parameters.values():
            shrink = 1 - lr * self.weight_decay * p.decays
            m, v = self._moments[p.name]
            ops.adamw(p, m, v, shrink=shrink, rate=rate, root=root, beta1=beta1, beta2=beta2, eps=self.eps)

    def state(self) -> dict[str, np.ndarray]:
        """What goes on from here: ``steps`` int64 (), and NAME.m and NAME.v for each parameter; not copies."""
        moments = {f"{name}.{part}": x for name, both in self._moments.items() for part, x in zip("mv", both)}
        return {"steps": np.array(self.steps), **moments}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on from a ``state``. Raises MossError, and changes nothing, where a tensor is missing or has another shape."""
        mine = self.state()
        for name, x in mine.items():
            if name not in state:
                raise MossError(f"the optimizer's state lacks {name}")
            if state[name].shape != x.shape:
                raise MossError(f"the optimizer's {name} has shape {list(state[name].shape)}, expected {list(x.shape)}")
        self.steps = int(state["steps"])
        for name, x in mine.items():
            if name != "steps":
                x[...] = state[name]
