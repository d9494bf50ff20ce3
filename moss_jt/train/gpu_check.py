"""Whether the GPU here finds the gradients that it should: those of a small model of random weights, beside the CPU's.

Done once for each coding, kind of device and version of the kernels, in about a second, as devices/check.py does it for logits.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np

from .. import cuda
from ..config import Config
from ..errors import MossError
from ..runtime import jittor
from ..weights import Weights, open_weights
from ..weights.layout import Coding
from .batch import Batch, Counted
from .gpu import OnGpu
from .gpu_ops import source
from .lora import Lora
from .parameter import Parameter

_SMALL = Config(2, 256, 4, 1024, 32, 80, 600)
_TOKENS = 80
_MOST = 3e-2  # relative error of all gradients: TF32 makes a thousandth, a wrong kernel about 1


def opened(weights: Weights, lora: Lora, parameters: dict[str, Parameter], tokens: int, seed: int, vram, ram) -> OnGpu:
    """What trains on the GPU, once it is known to be right. Raises MossError, where it is not, too."""
    check(weights.coding)
    return OnGpu(weights, lora, parameters, tokens, seed, vram, ram)


def check(coding: Coding) -> None:
    """Raises MossError where gradients are wrong. Says nothing where that has been found out before."""
    stamp = _stamp(coding)
    if stamp.exists():
        return
    from ..bench import Shape, random_checkpoint  # here, because what it measures with is made of trainees, too

    plain = Coding(coding.dtype, coding.head_dtype, coding.group)  # without act-order, in which random inputs have none
    with random_checkpoint(Shape(_SMALL, plain), Path(tempfile.gettempdir())) as folder:
        error = _error(open_weights(folder))
    if not error < _MOST:
        raise MossError(
            f"the GPU finds gradients that are wrong by {error:.2g} of their size, on a model for testing: this is a defect of "
            "moss-jt, or of the driver; --device cpu does without"
        )
    stamp.touch()


def _stamp(coding: Coding) -> Path:
    devices = [(device.name, device.capability) for device in cuda.driver().devices]
    key = hashlib.md5(repr((source(), coding.to_dict(), devices, cuda.driver().version)).encode())
    return Path(jittor().flags.cache_path) / f"moss-jt-{key.hexdigest()[:16]}.trained"


def _error(weights: Weights) -> float:
    """Of all gradients as one vector, with dropout."""
    from .trainee import Trainee

    lora, rng = Lora(4, 8, dropout=0.1), np.random.default_rng(0)
    cpu = Trainee(weights, lora, device="cpu")
    for p in cpu.parameters.values():
        p.value[...] = rng.standard_normal(p.value.shape) * p.value.shape[1] ** -0.5
    ours = {name: Parameter(name, p.value, np.zeros_like(p.value)) for name, p in cpu.parameters.items()}
    ids = rng.integers(0, weights.config.vocab_size, (2, _TOKENS // 2)).astype(np.int32)
    batch = Batch(ids, ids)
    cpu.train(batch)
    OnGpu(weights, lora, ours, _TOKENS, 0).run(*Counted.of(batch), 1.0, 0)
    found, exact = (np.concatenate([p.gradient.reshape(-1) for p in of.values()]) for of in (ours, cpu.parameters))
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
