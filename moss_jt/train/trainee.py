"""A MOSS that learns."""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .. import cuda
from ..errors import MossError
from ..runtime import jittor
from ..weights import Weights
from . import ops
from .batch import Batch, Counted, Measured, check
from .frozen import Adapted
from .full import Full
from .lora import Lora, begin
from .parameter import Parameter

if TYPE_CHECKING:
    from .gpu import OnGpu


class Trainee:
    """A MOSS that learns: all its weights (``lora`` None), or an adapter beside its frozen ones (fp16, int8, int4).

    ``parameters``: official tensor name -> Parameter; an adapter's are named as PEFT names them
    (``base_model.model.transformer.h.0.attn.qkv_proj.lora_A.weight``). Gradients begin as zeros. Computes in float32; on a GPU
    with tensor cores factors are rounded to TF32. The same batches give the same bits on the same device. Not for use by
    several threads at once.
    """

    parameters: dict[str, Parameter]
    gpu: OnGpu | None = None  # what computes, where that is a GPU

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
        """``device``: ``auto``, ``cpu`` or ``cuda``; a GPU trains adapters only. With auto, a line on stderr says why one that
        is there is not used. ``ram``: a budget of this process's memory, in bytes or like ``"6GiB"``, for adapters: blocks
        that do not fit are read from disk for each batch, once forwards and once backwards; None: what the machine can spare.
        On a GPU it is for blocks that do not fit there. ``vram``: a budget of the GPU's memory; None: what is free, less a
        margin. ``tokens``: how many at a time a budget, or a GPU, has room for, by default the model's context; larger batches
        are divided. ``seed``: of the adapter's first values and of dropout. Raises MossError for quantised weights without
        ``lora``, where memory or a budget is too small, and where a GPU that is asked for cannot be used.
        """
        self.config, self.dropout_state = weights.config, 0
        if wants_gpu(lora, device, vram) and self._take_gpu(weights, lora, device, vram, ram, tokens, seed):
            return
        if lora is None and not weights.coding.is_fp16:
            raise MossError(f"{weights.folder}: weights in {weights.coding} cannot be trained; train an adapter (LoRA)")
        if lora is None and ram is not None:
            raise MossError("a budget of RAM is for frozen weights; without an adapter (LoRA) all weights are in memory")
        self._most = (tokens or weights.config.n_ctx) if ram is not None else None
        self._jt = jittor("cpu")
        ops.prepare()
        self.weights = Adapted(weights, lora, ram, self._most or 0, seed) if lora else Full(weights)
        self.parameters = self.weights.parameters

    def _take_gpu(self, weights: Weights, lora: Lora, device: str, vram, ram, tokens: int | None, seed: int) -> bool:
        """Whether the GPU computes from now on. Raises MossError where it cannot and was asked for."""
        from .gpu_check import opened  # here, because it trains, too

        try:
            if not jittor(device).has_cuda:
                if vram is not None:
                    raise MossError("Jittor was imported without CUDA in this process")
                return False
            ops.prepare()
            self._most = tokens or weights.config.n_ctx
            self.parameters = begin(weights.config, lora, seed)
            self.gpu = opened(weights, lora, self.parameters, self._most, seed, vram, ram)
        except MossError as e:
            if device == "cuda" or vram is not None:
                raise MossError(f"device cuda: {str(e).removeprefix('device cuda: ')}") from None
            print(f"moss-jt: using the CPU: {e}", file=sys.stderr)
            return False
        return True

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
        """Whether each batch brings weights from disk, twice; to a GPU, over the link."""
        if self.gpu:
            return self.gpu.weights.streams
        return isinstance(self.weights, Adapted) and self.weights.lender.streams

    def _sum(self, batch: Batch, scale: float | None) -> Measured:
        check(batch, self.config)
        (sequences, length), parts = batch.ids.shape, []
        if self._most is not None and length > self._most:
            raise MossError(f"a sequence of {length} tokens is longer than the {self._most} that memory was planned for")
        together = sequences if self._most is None else self._most // length
        for first in range(0, sequences, together):
            part = Batch(*(array[first : first + together] for array in batch))
            parts.append(self._run(Counted.of(part), scale))
        return Measured(*map(sum, zip(*parts)))

    def _run(self, counted: Counted, scale: float | None) -> Measured:
        if not len(counted.targets):
            return Measured(0.0, 0, 0)
        if self.gpu:
            return self._run_on_gpu(counted, scale)
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

    def _run_on_gpu(self, counted: Counted, scale: float | None) -> Measured:
        dropout = None if scale is None else self.dropout_state
        loss, right = self.gpu.run(*counted, scale, dropout)
        self.dropout_state += scale is not None
        return Measured(loss, len(counted.targets), right)


def wants_gpu(lora: Lora | None, device: str, vram: str | int | None) -> bool:
    """Whether a GPU is to train, usable or not. Raises MossError where it is asked for what it does not do."""
    there = device == "cuda" or (device == "auto" and bool(cuda.driver().devices))
    if lora is None and (device == "cuda" or vram is not None):
        raise MossError("all weights are trained on the CPU only: take --device cpu, or train an adapter (LoRA) on the GPU")
    if vram is not None and not there:
        raise MossError("a budget of VRAM is given, but the CPU computes: there is no GPU, or --device is cpu")
    if lora is None and there:
        print("moss-jt: using the CPU, where all weights are trained; a GPU trains adapters (LoRA)", file=sys.stderr)
    return lora is not None and there
