"""A MOSS that learns."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np

from ..errors import MossError
from ..runtime import jittor
from ..weights import Weights
from . import ops
from .batch import NO_LOSS, Batch, Measured, check
from .frozen import Adapted
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
        tokens: int | None = None,
    ):
        """``ram``: a budget of this process's memory, in bytes or like ``"6GiB"``, for adapters: frozen blocks that do not fit
        are read from disk for each batch, once forwards and once backwards; None: what the machine can spare. ``tokens``: how
        many at a time the budget has room for, by default the model's context; larger batches are divided. ``seed``: of the
        adapter's first values and of dropout. Raises MossError for quantised weights without ``lora``, where memory or the
        budget is too small, and for a GPU, which nothing here can use.
        """
        if device == "cuda" or vram is not None:
            raise MossError("training runs on the CPU only; leave the GPU out")
        if lora is None and not weights.coding.is_fp16:
            raise MossError(f"{weights.folder}: weights in {weights.coding} cannot be trained; train an adapter (LoRA)")
        if lora is None and ram is not None:
            raise MossError("a budget of RAM is for frozen weights; without an adapter (LoRA) all weights are in memory")
        self.config = weights.config
        self._most = (tokens or weights.config.n_ctx) if ram is not None else None
        self._jt = jittor("cpu")
        ops.prepare()
        self.weights = Adapted(weights, lora, ram, self._most or 0, seed) if lora else Full(weights)
        self.parameters = self.weights.parameters
        self.dropout_state = 0

    def train(self, batch: Batch, scale: float = 1.0) -> Measured:
        """Forward and backward: adds ``scale`` times the derivative of the sum of losses to the gradients."""
        return self._sum(batch, scale)

    def measure(self, batch: Batch) -> Measured:
        """The same without gradients, and without dropout."""
        return self._sum(batch, None)

    def zero_gradients(self) -> None:
        for p in self.parameters.values():
            p.gradient.fill(0)

    def gradient_norm(self) -> float:
        """Of all gradients as one vector."""
        return math.sqrt(sum(ops.sum_of_squares(p.gradient) for p in self.parameters.values()))

    def scale_gradients(self, factor: float) -> None:
        for p in self.parameters.values():
            np.multiply(p.gradient, np.float32(factor), out=p.gradient)

    @property
    def streams(self) -> bool:
        """Whether each batch brings weights from disk, twice."""
        return isinstance(self.weights, Adapted) and self.weights.lender.streams

    def _sum(self, batch: Batch, scale: float | None) -> Measured:
        check(batch, self.config)
        (sequences, length), parts = batch.ids.shape, []
        if self._most is not None and length > self._most:
            raise MossError(f"a sequence of {length} tokens is longer than the {self._most} that memory was planned for")
        together = sequences if self._most is None else self._most // length
        for first in range(0, sequences, together):
            part = Batch(*(array[first : first + together] for array in batch))
            parts.append(self._run(_Counted.of(part), scale))
        return Measured(*map(sum, zip(*parts)))

    def _run(self, counted: _Counted, scale: float | None) -> Measured:
        if not len(counted.targets):
            return Measured(0.0, 0, 0)
        weights, ids = self.weights, counted.ids.reshape(-1)
        sizes = ops.Sizes(self.config, *counted.ids.shape, weights.official)
        weights.begin(scale is not None, None if scale is None else self.dropout_state)
        with self._jt.flag_scope(lazy_execution=0, no_grad=1):
            x, done = self._jt.array(weights.embed(ids)), []
            for i in range(self.config.n_layer):
                block = ops.Block(partial(weights.block, i), sizes)
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
                self.dropout_state += 1
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
