"""Training an adapter on a GPU that need not hold the model: frozen blocks stay there or come over the link, once forwards and
once backwards for each batch, ahead of their use."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import cuda, cudart
from ..config import MP_NUM, Config
from ..cublas import Blas
from ..devices.gpu import SPARED
from ..ops import rotary_angles
from ..sizes import parse_size
from ..swap import spare_memory
from ..swap.host import Rows
from ..swap.on_device import OnDevice
from ..swap.plan import in_mib
from ..weights import Weights
from ..weights.layout import WTE_FILE
from .gpu_block import Adapter, Frozen, Passes
from .gpu_ops import Kernels, Mask
from .gpu_plan import Space, make_plan, needs, places_of, too_small
from .lora import TARGETS, Lora, mask_seed, module, tensor_names
from .parameter import Parameter

_TF32_FROM = (8, 0)  # compute capability


class OnGpu:
    """Losses and gradients of an adapter. ``plan``: where each block is. Parameters stay where they are, in RAM: values go to
    the device, and gradients come back, for each batch. Not for use by several threads at once."""

    def __init__(
        self,
        weights: Weights,
        lora: Lora,
        parameters: dict[str, Parameter],
        tokens: int,
        seed: int,
        vram: str | int | None = None,
        ram: str | int | None = None,
    ):
        """``tokens``: of a batch, at most. ``vram``: of the device's memory, besides what CUDA itself takes; None: what is free
        less a margin. ``ram``: the most for blocks that do not fit there; those beyond come from disk for each batch. Raises
        MossError where there is too little of the device's memory, or a file cannot be read."""
        config = self._config = weights.config
        self._lora, self._parameters, self._seed = lora, parameters, seed
        space = Space(config, lora, tokens)
        self.plan = make_plan(weights, space, _budget(vram, weights, space))
        self._free = self._least_free = cudart.memory_info()[0]
        kernels = self._kernels = Kernels()
        kernels.prepare()
        self._memory = cudart.Memory(space.nbytes)
        self._at = space.places(self._memory.pointer)
        blas = Blas(tf32=cuda.driver().devices[0].capability >= _TF32_FROM)
        self._passes = Passes(config, weights.coding, space, self._memory.pointer, kernels, blas)
        pinned = parse_size(ram) if ram is not None else spare_memory()
        self.weights, self._rows = OnDevice(weights, self.plan, pinned), Rows(weights.regions[WTE_FILE])
        self._embedded = cudart.pinned(2 * config.n_embd * tokens).view(np.float16).reshape(tokens, -1)
        self._learned = _Learned(config, lora, parameters, self._at["adapter"], self._at["adapter gradient"])

    @property
    def peak(self) -> int:
        """The most of the device's memory that was taken since this was made, as the driver says, by whomever; bytes."""
        self._least_free = min(self._least_free, cudart.memory_info()[0])
        return self._free - self._least_free

    def run(
        self, ids: np.ndarray, rows: np.ndarray, targets: np.ndarray, scale: float | None, dropout: int | None
    ) -> tuple[float, int]:
        """The sum of -log p of ``targets`` (N,), which ``rows`` (N,) of the states of ids int32 (B, T) predict; how many were
        the likeliest. Adds ``scale`` times the derivative to the gradients, unless it is None. ``dropout``: which masks are
        drawn; None: nothing is dropped."""
        cudart.synchronize()  # what an exception left: it may still read what is written now
        self._upload(ids, rows, targets)
        with self._kernels.issuing():
            self._issue(ids.shape, len(rows), scale, dropout)
            found = np.empty((len(rows), 4), np.float32)
            cudart.to_host(found, self._at["found"])
        if scale is not None:
            self._learned.fetch()
        self._least_free = min(self._least_free, cudart.memory_info()[0])
        top, total, wanted, right = found.astype(np.float64).T
        return float((np.log(total) + top - wanted).sum()), int(right.sum())

    def _upload(self, ids: np.ndarray, rows: np.ndarray, targets: np.ndarray) -> None:
        embedded = self._embedded[: ids.size]
        self._rows.read_into(embedded, ids.reshape(-1))
        # Into the states of a block that is not there yet.
        cudart.to_device(self._halves, embedded)
        for name, array in (("rows", rows), ("targets", targets)):
            cudart.to_device(self._at[name], array.astype(np.int32))
        cudart.to_device(self._at["angles"], rotary_angles(ids.shape[1], self._config.rotary_dim))
        self._learned.send()

    @property
    def _halves(self) -> int:
        """Where rows of the embedding wait to become the first state."""
        return self._at["insides"]

    def _issue(self, shape: tuple[int, int], count: int, scale: float | None, dropout: int | None) -> None:
        n, d, m, gradient = self._config.n_layer, self._config.n_embd, shape[0] * shape[1], self._at["gradient"]
        states = [self._at["states"] + 4 * i * m * d for i in range(n + 1)]
        if scale is None:
            self.weights.expect(head=False)
        else:
            self.weights.expect_both_ways()
        self._kernels.embed(self._halves, states[0], m, d)
        for i in range(n):
            with self.weights.block(i) as tensors:
                self._passes.forward(self._frozen(i, tensors, dropout), states[i], states[i + 1], shape)
        for tensors, _, _ in self.weights.head():
            self._passes.head(tensors, states[n], count, scale, gradient, m)
        for i in reversed(range(n) if scale is not None else ()):
            with self.weights.block(i, again=True) as tensors:
                self._passes.backward(self._frozen(i, tensors, dropout), states[i], gradient, shape)

    def _frozen(self, i: int, tensors: dict[str, int], dropout: int | None) -> Frozen:
        sides: tuple[list, list] = ([], [])
        for number, target in enumerate(TARGETS):
            if target in self._lora.targets:
                mask = None
                if dropout is not None and self._lora.dropout:
                    mask = Mask(mask_seed(self._seed, dropout, i, number), self._lora.dropout)
                n, k, x, y = places_of(target, self._config)
                where = self._learned.places[i, target]
                sides[target in ("out_proj", "fc_out")].append(
                    Adapter(n, k, self._lora.rank, x, y, self._lora.scale, mask, *where)
                )
        return self._passes.frozen(tensors, sides)


class _Place(NamedTuple):
    """Addresses of A, B, and their gradients."""

    a: int
    b: int
    da: int
    db: int


class _Learned:
    """An adapter on the device, B's rows in the order of our outputs. ``places``: by block and target."""

    def __init__(self, config: Config, lora: Lora, parameters: dict[str, Parameter], values: int, gradients: int):
        self.places, self._values, self._gradients = {}, values, gradients
        self._staged = cudart.pinned(4 * sum(p.value.size for p in parameters.values())).view(np.float32)
        self._views, at, rows = [], 0, _official_rows(config.n_embd)
        for i in range(config.n_layer):
            for target in (target for target in TARGETS if target in lora.targets):
                found = []
                for part, name in enumerate(tensor_names(module(i, target))):
                    p = parameters[name]
                    order = rows if part and target == "qkv_proj" else slice(None)
                    self._views.append((p, self._staged[at : at + p.value.size].reshape(p.value.shape), order))
                    found.append(4 * at)
                    at += p.value.size
                self.places[i, target] = _Place(*(values + x for x in found), *(gradients + x for x in found))

    def send(self) -> None:
        """The values as they are now."""
        for p, staged, order in self._views:
            staged[...] = p.value[order]
        cudart.to_device(self._values, self._staged)

    def fetch(self) -> None:
        """Add the gradients that the device has found. Waits for them."""
        cudart.to_host(self._staged, self._gradients)
        for p, staged, order in self._views:
            p.gradient[order] += staged


def _official_rows(d: int) -> np.ndarray:
    """Which row of the official qkv_proj each of our q, k and v is: there they lie in MP_NUM parts of [q v k]."""
    n = d // MP_NUM
    rows = np.arange(3 * d).reshape(MP_NUM, 3, n)
    return np.ascontiguousarray(rows[:, [0, 2, 1]].transpose(1, 0, 2)).reshape(-1)


def _budget(vram: str | int | None, weights: Weights, space: Space) -> int:
    """Raises MossError for more than is free, or where that is too little."""
    free, needed = cudart.memory_info()[0], needs(weights, space)
    budget = parse_size(vram) if vram is not None else max(0, free - SPARED)
    if budget > free:
        raise cudart.OutOfDeviceMemory(
            f"a budget of {in_mib(budget)} of its memory is more than the {in_mib(free)} that are free"
        )
    if vram is None and budget < needed.smallest:
        raise cudart.OutOfDeviceMemory(too_small(f"the {in_mib(budget)} of its memory that can be spared", needed, space))
    return budget
