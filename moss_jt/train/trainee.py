"""A MOSS that learns."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..errors import MossError
from ..runtime import jittor
from ..weights import Weights
from . import ops
from .batch import NO_LOSS, Batch, Measured, check
from .full import Full
from .lora import Lora
from .parameter import Parameter


class Trainee:
    """A MOSS that learns: all its weights (``lora`` None), or an adapter beside its frozen ones (fp16, int8, int4).

    ``parameters``: official tensor name -> Parameter; an adapter's are named as PEFT names them
    (``base_model.model.transformer.h.0.attn.qkv_proj.lora_A.weight``). Gradients begin as zeros. Computes in float32. The same
    batches give the same bits. Not for use by several threads at once.
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
        if device == "cuda" or vram is not None:
            raise MossError("training runs on the CPU only; leave the GPU out")
        if lora is None and not weights.coding.is_fp16:
            raise MossError(f"{weights.folder}: weights in {weights.coding} cannot be trained themselves; train an adapter (LoRA)")
        self.config = weights.config
        self._jt = jittor("cpu" if device == "cpu" else "auto")
        ops.prepare()
        self._weights = Full(weights)
        self.parameters = self._weights.parameters
        self.dropout_state = 0

    def train(self, batch: Batch, scale: float = 1.0) -> Measured:
        """Forward and backward: adds ``scale`` times the derivative of the sum of losses to the gradients."""
        check(batch, self.config)
        return self._run(_Counted.of(batch), scale)

    def measure(self, batch: Batch) -> Measured:
        """The same without gradients, and without dropout."""
        check(batch, self.config)
        return self._run(_Counted.of(batch), None)

    def zero_gradients(self) -> None:
        for p in self.parameters.values():
            p.gradient.fill(0)

    def gradient_norm(self) -> float:
        """Of all gradients as one vector."""
        return math.sqrt(sum(ops.sum_of_squares(p.gradient) for p in self.parameters.values()))

    def scale_gradients(self, factor: float) -> None:
        for p in self.parameters.values():
            np.multiply(p.gradient, np.float32(factor), out=p.gradient)

    def _run(self, counted: _Counted, scale: float | None) -> Measured:
        if not len(counted.targets):
            return Measured(0.0, 0, 0)
        weights, ids = self._weights, counted.ids.reshape(-1)
        sizes = ops.Sizes(ops.Shape(self.config, *counted.ids.shape, weights.official))
        with self._jt.flag_scope(lazy_execution=0, no_grad=1):
            x, done = self._jt.array(weights.embed(ids)), []
            for table in weights.blocks:
                block = ops.Block(table, sizes)
                x = block.forward(x)
                if scale is not None:
                    done.append(block)
            head = ops.Head(weights.head, counted.rows, counted.targets, self.config.layer_norm_epsilon)
            if scale is None:
                loss, right = head.measure(x)
            else:
                loss, right, x = head.derive(x, scale)
                while done:
                    x = done.pop().backward(x)
                weights.embed_backward(ids, x)
        return Measured(loss, len(counted.targets), right)


class _Counted(NamedTuple):
    """What of a batch matters: ids int32 (B, T), up to the last one from which something is predicted; the rows of the state,
    M = B T of them, that predict, and what."""

    ids: np.ndarray
    rows: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, batch: Batch) -> _Counted:
        sequence, at = np.nonzero(batch.labels[:, 1:] != NO_LOSS)
        length = int(at.max(initial=-1)) + 1
        ids = np.ascontiguousarray(batch.ids[:, :length], np.int32)
        return cls(ids, sequence * length + at, batch.labels[sequence, at + 1])
