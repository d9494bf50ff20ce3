"""What carries out sweeps: new tokens through all blocks, and logits where they are wanted."""

from __future__ import annotations

import sys
from typing import Callable

from .. import cuda
from ..config import SWAPS
from ..cudart import OutOfDeviceMemory, link_bandwidth, memory_info
from ..errors import MossError
from ..ops import LowRank
from ..runtime import jittor
from ..sizes import parse_size
from ..swap import Plan, plan_for, plan_for_gpu, smallest, spare_memory
from ..swap.plan import in_mib, too_small
from ..swap.speeds import of_gpu
from ..weights import Weights
from . import check
from .gpu import SPARED, Cuda
from .host import Host
from .sweep import Sweep

__all__ = ["Cuda", "Host", "Sweep", "open_device", "wants_gpu"]


def open_device(
    weights: Weights,
    context: int,
    ram: str | int | None = None,
    kv_cache: str = "fp16",
    device: str = "auto",
    vram: str | int | None = None,
    swap: str = "auto",
    planned: Callable[[Plan], object] | None = None,
    low_rank: list[LowRank] | None = None,
) -> Cuda | Host:
    """The GPU where it is wanted and can be used, within a budget of ``vram``; else the CPU, within a budget of ``ram``.

    device: ``"auto"``, ``"cpu"`` or ``"cuda"``. vram: bytes, or a size like ``"6GiB"``, besides what CUDA itself takes; None:
    what is free less a margin. On a GPU ``ram`` is the most for what does not fit there; weights beyond come from disk. swap:
    what becomes of blocks that do not fit there, as make_plan takes it. planned: is called with the plan, before weights are
    brought anywhere. low_rank: an adapter, as Host takes it; only the CPU can compute with one.
    With auto, a line on stderr says why a GPU that is there is not used. Raises MossError, before anything is compiled where
    that can be known, for what is at fault.
    """
    if swap not in SWAPS:
        raise MossError(f"swap is {swap!r}, expected one of {', '.join(SWAPS)}")
    if (vram is not None or swap != "auto") and not wants_gpu(device):
        what = f"swap {swap}" if vram is None else "a budget of VRAM"
        raise MossError(f"{what} is given, but the CPU computes: there is no GPU, or --device is cpu")
    if low_rank and wants_gpu(device):
        if device == "cuda" or vram is not None or swap != "auto":
            raise MossError("device cuda: only the CPU computes with an adapter; moss-jt train merge puts it into the weights")
        print("moss-jt: using the CPU, as an adapter needs; moss-jt train merge puts it into the weights", file=sys.stderr)
        device = "cpu"
    plan = None if wants_gpu(device) else plan_for(weights, context, ram, kv_cache)
    if jittor(device, save_mem=swap == "jittor").has_cuda and device != "cpu":
        try:
            check.check(weights.coding, kv_cache)
            return _gpu(weights, context, ram, kv_cache, vram, swap, planned)
        except MossError as e:
            if device == "cuda" or vram is not None or swap != "auto":
                raise MossError(f"device cuda: {e}") from None
            print(f"moss-jt: using the CPU: {e}", file=sys.stderr)
    plan = plan or plan_for(weights, context, ram, kv_cache)
    if planned:
        planned(plan)
    return Host(weights, context, plan, kv_cache, low_rank)


def _gpu(
    weights: Weights,
    context: int,
    ram: str | int | None,
    kv_cache: str,
    vram: str | int | None,
    swap: str,
    planned: Callable[[Plan], object] | None,
) -> Cuda:
    model, free = (weights.config, weights.coding, context), memory_info()[0]
    budget = parse_size(vram) if vram is not None else max(0, free - SPARED)
    if budget > free:
        raise OutOfDeviceMemory(f"a budget of {in_mib(budget)} of its memory is more than the {in_mib(free)} that are free")
    pinned = parse_size(ram) if ram is not None else spare_memory()
    how = (kv_cache, True, swap, pinned)
    if vram is None and budget < smallest(*model, *how):
        raise OutOfDeviceMemory(too_small(*model, f"the {in_mib(budget)} of its memory that can be spared", *how))
    plan = plan_for_gpu(weights, context, budget, kv_cache, swap, pinned, lambda: of_gpu(weights.folder, link_bandwidth()))
    if planned:
        planned(plan)
    return Cuda(weights, plan, pinned)


def wants_gpu(device: str) -> bool:
    """Whether ``auto``, ``cpu`` or ``cuda`` stands for a GPU here, usable or not."""
    return device == "cuda" or (device == "auto" and bool(cuda.driver().devices))
