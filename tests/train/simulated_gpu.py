"""A GPU for moss_jt/train/gpu.py: memory and streams of tests/swap/simulated_cuda.py, whose timing is random, emulated kernels
in place of its op, and numpy in cuBLAS' place."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import numpy as np

from moss_jt.cublas import Matrix
from moss_jt.swap import on_device
from moss_jt.swap.reader import Worker
from moss_jt.train import gpu, gpu_ops

from ..emulation.build import Memory, build
from ..swap.simulated_cuda import Simulated

WRAPPERS = """
#include "train.cuh"
void train(int64_t call, uint8_t* memory) {
    TrainCall c;
    memcpy(&c, (const void*)call, sizeof c);
    for (void*& p : c.p) p = p ? memory + (uintptr_t)p : nullptr;
    run_train(c, 0);
}
"""


class Device(Simulated):
    """With what else training calls. ``calls``: kernels and products that were launched."""

    def __init__(self, seed: int, size: int):
        super().__init__(seed, size)
        self.calls: list = []

    def to_host(self, target: np.ndarray, pointer: int) -> None:
        self.until_default_is_idle()
        assert self.written[pointer : pointer + target.nbytes].all()
        target.reshape(-1).view(np.uint8)[:] = self.memory[pointer : pointer + target.nbytes]


def install(monkeypatch, seed: int, size: int = 5 << 18) -> Device:
    """From now on ``OnGpu`` runs on it, whose memory is all that a budget counts."""
    device, kernels = Device(seed, size), build(WRAPPERS)
    for module in (gpu, on_device):
        monkeypatch.setattr(module, "cudart", device)
    monkeypatch.setattr(gpu, "Kernels", lambda: Kernels(device, kernels))
    monkeypatch.setattr(gpu, "Blas", lambda tf32: Blas(device))
    monkeypatch.setattr(
        gpu, "cuda", SimpleNamespace(driver=lambda: SimpleNamespace(devices=[SimpleNamespace(capability=(9, 0))]))
    )
    monkeypatch.setattr(gpu, "SPARED", 0)
    for name in ("_JITTOR", "_CUBLAS"):
        monkeypatch.setattr(f"moss_jt.train.gpu_plan.{name}", 0)
    return device


class Kernels(gpu_ops.Kernels):
    def __init__(self, device: Device, kernels):
        self._device, self._kernels = device, kernels

    def prepare(self) -> None: ...

    @contextmanager
    def issuing(self):
        yield

    def _launch(self, call: np.ndarray) -> None:
        device = self._device

        def run() -> None:
            _thread().start(self._kernels.train, call.ctypes.data, Memory(device.memory, device.written)).result()

        device.calls.append(int(call["what"][0]))
        device.launch(run)


@cache
def _thread() -> Worker:
    """Of the host, which is that of all kernels: what they share is its own."""
    return Worker("emulated kernels")


class Blas:
    """Products of what was written, into what may be written."""

    def __init__(self, device: Device):
        self._device = device

    def multiply(self, a, b, c, size, *, scale=1, add=False, exact=False, many=1, steps=(0, 0, 0)) -> None:
        m, n, k = size

        def run() -> None:
            for i in range(many):
                x, y, to = (
                    self._view(of, shape, step * i, read)
                    for of, shape, step, read in zip((a, b, c), ((m, k), (k, n), (m, n)), steps, (True, True, add))
                )
                to[...] = np.float32(scale) * (x @ y) + (to if add else 0)

        self._device.calls.append("multiply")
        self._device.launch(run)

    def _view(self, of: Matrix, shape: tuple[int, int], step: int, read: bool) -> np.ndarray:
        """Rows and columns as the product has them. ``read``: all of it must have been written; else it is now."""
        rows, columns = shape[::-1] if of.turned else shape
        assert of.stride >= columns and of.address % 4 == 0 and of.address > 0
        at, strided = of.address + 4 * step, np.lib.stride_tricks.as_strided
        written = strided(self._device.written[at:], (rows, 4 * columns), (4 * of.stride, 1))
        assert at + 4 * ((rows - 1) * of.stride + columns) <= len(self._device.memory)
        if read:
            assert written.all()
        else:
            written[...] = 1
        found = strided(self._device.memory[at:].view(np.float32), (rows, columns), (4 * of.stride, 4))
        return found.T if of.turned else found
