"""What a GPU can do at most: the device's own copy, and cuBLAS."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import cudart
from ..machine import GIB, MIB
from ..runtime import jittor
from ..swap.reader import File
from .pairs import Limit, rate

_SECONDS = 0.1  # a measurement lasts
_SIDE = 8192  # of the matrices


def copy() -> Limit:
    """Bytes a second that a copy within the device's memory reads and writes, of 1 GiB, less where that is not free."""
    size = max(MIB, min(GIB, cudart.memory_info()[0] // 4) // MIB * MIB)
    memory = cudart.Memory(2 * size)
    times = 8  # in a row, so that what it takes to begin does not count

    def work() -> None:
        for _ in range(times):
            cudart.on_device(memory.pointer, memory.pointer + size, size)
        cudart.synchronize()

    work()
    return Limit(f"copy on the device, {size / 1e9:.2f} GB", "GB_s", lambda: rate(work, times * 2 * size, _SECONDS))


def multiply() -> Limit:
    """Floating-point operations a second of cuBLAS's product of large square matrices in fp16."""
    jt = jittor()
    with jt.flag_scope(use_cuda=1):
        a, b = (jt.array(np.ones((_SIDE, _SIDE), np.float16)) for _ in range(2))

    def work() -> None:
        with jt.flag_scope(use_cuda=1, no_grad=1):
            jt.matmul(a, b).sync(True)

    work()  # compiles, the first time
    return Limit(f"cuBLAS in fp16, {_SIDE} square", "GFLOP_s", lambda: rate(work, 2 * _SIDE**3, _SECONDS))


def to_device(file: Path | None = None) -> Limit:
    """Bytes a second from pinned host memory to the device, in copies of 256 MiB; or from the pages of a ``file`` that is as
    large, pinned where they are. Raises MossError where the driver cannot."""
    source = cudart.registered(File(file).mapped(0, 256 * MIB)) if file else cudart.pinned(256 * MIB)
    memory = cudart.Memory(len(source))

    def work() -> None:
        cudart.to_device(memory.pointer, source)
        cudart.synchronize()

    work()
    return Limit(
        f"{'a file' if file else 'pinned host memory'} to the device", "GB_s", lambda: rate(work, len(source), _SECONDS)
    )
