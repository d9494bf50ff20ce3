"""What carries out sweeps: new tokens through all blocks, and logits where they are wanted."""

from __future__ import annotations

import sys

from .. import cuda
from ..cudart import OutOfDeviceMemory
from ..errors import MossError
from ..runtime import jittor
from ..swap import plan_for
from ..weights import Weights
from .gpu import Cuda
from .host import Host
from .sweep import Sweep

__all__ = ["Cuda", "Host", "Sweep", "open_device", "wants_gpu"]


def open_device(
    weights: Weights, context: int, ram: str | int | None = None, kv_cache: str = "fp16", device: str = "auto"
) -> Cuda | Host:
    """The GPU where it is wanted, can be used and has room for the model; else the CPU, within a budget of ``ram``.

    device: ``"auto"``, ``"cpu"`` or ``"cuda"``. With auto, a line on stderr says why a GPU that is there is not used. Raises
    MossError, before anything is compiled where that can be known, for what is at fault.
    """
    plan = None if wants_gpu(device) else plan_for(weights, context, ram, kv_cache)
    if jittor(device).has_cuda and device != "cpu":
        try:
            return Cuda(weights, context, kv_cache)
        except OutOfDeviceMemory as e:
            if device == "cuda":
                raise MossError(f"device cuda: {e}") from None
            print(f"moss-jt: using the CPU: {e}", file=sys.stderr)
    return Host(weights, context, plan or plan_for(weights, context, ram, kv_cache), kv_cache)


def wants_gpu(device: str) -> bool:
    """Whether ``auto``, ``cpu`` or ``cuda`` stands for a GPU here, usable or not."""
    return device == "cuda" or (device == "auto" and bool(cuda.driver().devices))
