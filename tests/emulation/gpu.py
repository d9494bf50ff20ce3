"""The same wrappers on a real GPU: ``MOSS_JT_KERNELS=gpu pytest tests/kernels_cuda`` runs the kernels' tests there.

Nothing watches accesses there, but what a kernel may write has guards around it, and every call is made twice, each time with
other bytes in what was never written: results that differ depend on them, or on the order of threads.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from moss_jt import cuda, cudart, toolkit

from .build import FUNCTION, KERNELS, NUMBERS, KernelError, Memory, _Parameter, _source

_GUARD = 4096  # bytes before and after
_FILLS = (0xFF, 0x5A)  # of what was never written: halves and floats that no kernel should give, NaN and a large one


@cache
def build(wrappers: str) -> Kernels:
    """Compile wrappers for the GPU here."""
    found = cuda.driver()
    choice = cuda.choose(found)
    assert choice.kit and not choice.why, f"no GPU to run the kernels on: {choice.reason or found.problem}"
    nvcc = str(toolkit.assemble(choice.kit, [device.capability for device in found.devices]))
    where = Path(tempfile.mkdtemp(prefix="moss-jt-kernels-"))
    text = re.sub(r"#pragma GCC visibility push\(default\)\n", "", _source(wrappers))
    (where / "wrappers.cu").write_text(text)
    flags = ["-std=c++14", "--use_fast_math", "-O2", "-shared", "-cudart", "shared", "-Xcompiler", "-fPIC", f"-I{KERNELS}"]
    # Any architecture: the script replaces it by those of the devices.
    command = [nvcc, *flags, "-arch=compute_75", "-code=sm_75", str(where / "wrappers.cu"), "-o", str(where / "wrappers.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Kernels(where / "wrappers.so", wrappers)


class Kernels:
    """The wrappers of a library, each a method, as build.Kernels has them."""

    def __init__(self, path: Path, wrappers: str):
        self._library = ctypes.CDLL(str(path))
        found = re.findall(FUNCTION, wrappers, re.M)
        self._functions = {name: [_Parameter(p) for p in parameters.split(",")] for _, name, parameters in found}
        for returned, name, _ in found:
            getattr(self._library, name).restype = NUMBERS.get(returned)

    def __getattr__(self, name: str):
        if name.startswith("_") or name not in self._functions:
            raise AttributeError(name)
        return lambda *given, seed=None: self._call(name, given)

    def _call(self, name: str, given: tuple):
        """Twice, on copies; then takes over what both gave."""
        parameters = self._functions[name]
        assert len(given) == len(parameters), f"{name} takes {', '.join(p.text for p in parameters)}"
        (first, result), (second, _) = (self._once(name, parameters, given, fill) for fill in _FILLS)
        for parameter, value, one, other in zip(parameters, given, first, second):
            if isinstance(value, Memory):
                _take(value, one, other, f"{name}: {parameter.text}")
        return result

    def _once(self, name: str, parameters: list, given: tuple, fill: int) -> tuple[list, object]:
        """What the writable arguments are afterwards, as bytes, and what the function returns."""
        places = [_Place(p, value, fill) for p, value in zip(parameters, given)]
        result = getattr(self._library, name)(*[place.argument for place in places])
        cudart.synchronize()
        return [place.fetch(f"{name}: {p.text}") for place, p in zip(places, parameters)], result


class _Place:
    """An argument: a number, or memory on the device."""

    def __init__(self, parameter, value, fill: int):
        self._memory, self._nbytes = None, 0
        if not parameter.pointer:
            self.argument = NUMBERS[parameter.type](value)
        elif value is None:
            self.argument = ctypes.c_void_p(0)
        else:
            content = np.ascontiguousarray(value.array if isinstance(value, Memory) else value)
            raw = content.reshape(-1).view(np.uint8).copy()
            if isinstance(value, Memory):
                raw[value.written.reshape(-1) == 0] = fill
            self._nbytes = len(raw)
            guard = np.full(_GUARD, fill ^ 0xA5, np.uint8)
            self._guard = guard
            self._memory = cudart.Memory(2 * _GUARD + len(raw))
            cudart.to_device(self._memory.pointer, np.concatenate([guard, raw, guard]))
            cudart.synchronize()
            self.argument = ctypes.c_void_p(self._memory.pointer + _GUARD)

    def fetch(self, what: str) -> np.ndarray | None:
        if self._memory is None:
            return None
        raw = np.empty(2 * _GUARD + self._nbytes, np.uint8)
        cudart.to_host(raw, self._memory.pointer)
        for guard in (raw[:_GUARD], raw[_GUARD + self._nbytes :]):
            if not np.array_equal(guard, self._guard):
                raise KernelError(f"{what}: written outside of it")
        return raw[_GUARD : _GUARD + self._nbytes]


def _take(value: Memory, one: np.ndarray, other: np.ndarray, what: str) -> None:
    before = value.written.reshape(-1) != 0
    untouched = ~before & (one == _FILLS[0]) & (other == _FILLS[1])
    if not np.array_equal(one[~untouched], other[~untouched]):
        raise KernelError(f"{what}: differs from call to call, or depends on what was never written")
    value.array.reshape(-1).view(np.uint8)[~untouched] = one[~untouched]
    value.written.reshape(-1)[~untouched] = 1
