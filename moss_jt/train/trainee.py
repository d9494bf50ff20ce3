"""A MOSS that learns."""

from __future__ import annotations

from ..weights import Weights
from .batch import Batch, Measured
from .lora import Lora
from .parameter import Parameter


class Trainee:
    """A MOSS that learns: all its weights (``lora`` None), or an adapter beside its frozen ones (fp16, int8, int4).

    ``parameters``: official tensor name -> Parameter; an adapter's are named as PEFT names them
    (``base_model.model.transformer.h.0.attn.qkv_proj.lora_A.weight``). Gradients begin as zeros.
    """

    parameters: dict[str, Parameter]

    def __init__(
        self,
        weights: Weights,
        lora: Lora | None = None,
        device: str = "auto",
        ram: str | int | None = None,
        vram: str | int | None = None,
        seed: int = 0,
    ):
        """``ram``: a budget for frozen weights, which are streamed where they do not fit. ``seed``: of the adapter's first values
        and of dropout. Raises MossError for quantised weights without ``lora``, and where the budget is too small."""

    def train(self, batch: Batch, scale: float = 1.0) -> Measured:
        """Forward and backward: adds ``scale`` times the derivative of the sum of losses to the gradients."""

    def measure(self, batch: Batch) -> Measured:
        """The same without gradients, and without dropout."""

    def zero_gradients(self) -> None: ...

    def gradient_norm(self) -> float:
        """Of all gradients as one vector."""

    def scale_gradients(self, factor: float) -> None: ...

    @property
    def dropout_state(self) -> int:
        """How often ``train`` has drawn dropout masks; set it to go on as if from there."""
