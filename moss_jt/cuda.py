"""What CUDA there is: the driver and its devices, asked through libcuda, and which toolkit goes with them.

The driver is the one to ask: nvcc says nothing about a GPU, and a GPU nothing about nvcc. Sizes are bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass

from . import requirements
from .errors import MossError
from .toolkit import Toolkit, Version, toolkits


@dataclass(frozen=True)
class Device:
    name: str
    memory: int
    capability: Version


@dataclass(frozen=True)
class Driver:
    """What libcuda answered. ``problem`` says in a few words why it did not; ``devices`` is then empty."""

    version: Version | None = None  # the newest CUDA it can run
    devices: tuple[Device, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Choice:
    """The toolkit to compile with, or why there is none for the first device, in a few words, and the command that mends it."""

    kit: Toolkit | None
    why: str = ""
    fix: str = ""

    @property
    def reason(self) -> str:
        return f"{self.why}: {self.fix}" if self.fix else self.why


_OLDEST = (6, 0)  # compute capability: what the kernels are written for
_TENSOR_CORES = {(8, 0): "m16n8k16 and cp.async", (7, 5): "m16n8k8"}  # from this capability on


def driver() -> Driver:
    """Ask the NVIDIA driver for its devices. Never raises: what went wrong is in the answer."""
    try:
        lib = _Libcuda()
    except OSError:
        return Driver(problem="no NVIDIA driver (libcuda.so.1) is installed")
    version, number, count = None, c_int(), c_int()
    try:
        lib.cuDriverGetVersion(byref(number))
        version = (number.value // 1000, number.value % 1000 // 10)
        lib.cuInit(0)
        lib.cuDeviceGetCount(byref(count))
        devices = tuple(_device(lib, i) for i in range(count.value))
        return Driver(version, devices, "" if devices else "the NVIDIA driver finds no device")
    except MossError as e:
        return Driver(version, problem=str(e))


def _device(lib: _Libcuda, index: int) -> Device:
    device, name, memory, major, minor = c_int(), ctypes.create_string_buffer(256), c_size_t(), c_int(), c_int()
    lib.cuDeviceGet(byref(device), index)
    lib.cuDeviceGetName(name, len(name), device)
    lib.cuDeviceTotalMem_v2(byref(memory), device)
    lib.cuDeviceGetAttribute(byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    lib.cuDeviceGetAttribute(byref(minor), 76, device)
    return Device(name.value.decode(errors="replace"), memory.value, (major.value, minor.value))


def link_bandwidth(index: int = 0) -> tuple[float, float]:
    """Bytes a second (host to device, device to host) of one copy at a time of 256 MiB of pinned memory, best of three.

    Raises MossError where the device is missing, busy or full.
    """
    size = 256 << 20
    try:
        lib = _Libcuda()
    except OSError:
        raise MossError("no NVIDIA driver (libcuda.so.1) is installed") from None
    device, context, host, there = c_int(), c_void_p(), c_void_p(), c_size_t()
    lib.cuInit(0)
    lib.cuDeviceGet(byref(device), index)
    lib.cuCtxCreate_v2(byref(context), 0, device)
    try:  # the context owns both buffers
        lib.cuMemHostAlloc(byref(host), c_size_t(size), 0)
        lib.cuMemAlloc_v2(byref(there), c_size_t(size))
        to_device = min(_seconds(lib.cuMemcpyHtoD_v2, there, host, c_size_t(size)) for _ in range(3))
        to_host = min(_seconds(lib.cuMemcpyDtoH_v2, host, there, c_size_t(size)) for _ in range(3))
    finally:
        lib.cuCtxDestroy_v2(context)
    return size / to_device, size / to_host


def choose(found: Driver) -> Choice:
    """The first toolkit that can compile for the first device; where none can, what keeps the first of them from it."""
    if not found.devices:
        return Choice(next(toolkits(), None), found.problem)
    first = None
    for kit in toolkits():
        choice = Choice(kit, *_unusable(found, kit))
        if not choice.why:
            return choice
        first = first or choice
    named = os.environ.get("nvcc_path")  # noqa: SIM112 (Jittor's own name)
    if named and not first:
        return Choice(None, f"nvcc_path names {named}, which is no nvcc", "unset nvcc_path")
    return first or Choice(None, "there is no nvcc", _fix_by_toolkit(found))


def _unusable(found: Driver, kit: Toolkit) -> tuple[str, str]:
    device, gcc = found.devices[0], requirements.gcc()
    code, newest = 10 * device.capability[0] + device.capability[1], found.version or kit.version
    name = f"nvcc {show(kit.version)} at {kit.nvcc}"
    if device.capability < _OLDEST:
        return f"the kernels need compute capability {show(_OLDEST)}, and this has {show(device.capability)}", ""
    if kit.version < (11,):
        return f"{name} is too old for Jittor", _fix_by_toolkit(found)
    if kit.codes and code < kit.codes[0]:
        oldest = show(divmod(kit.codes[0], 10))
        return f"{name} compiles for compute capability {oldest} and up, and this has {show(device.capability)}", _APT
    if kit.version[0] > newest[0]:
        return f"the driver runs CUDA up to {show(newest)}, and {name} is newer: update the driver", _fix_by_toolkit(found)
    if kit.codes and code > kit.codes[-1] and kit.version > newest:  # what it makes then, the driver has to translate
        return f"{name} is older than this device and newer than the driver: update the driver", ""
    if kit.newest_gcc and gcc > kit.newest_gcc:
        compiler = f"g++-{kit.newest_gcc}"
        fix = f"sudo apt-get install {compiler}; export cc_path={compiler}"
        return f"{name} takes g++ up to {kit.newest_gcc}, and this is g++ {gcc}", fix
    if kit.missing:
        return f"{name} has no {' and no '.join(kit.missing)}", _fix_by_wheels(kit.version[0])
    return "", ""


_APT = "sudo apt-get install nvidia-cuda-toolkit"
_WHEELS = {11: "nvidia-cuda-runtime-cu11 nvidia-cuda-cccl-cu11 nvidia-cublas-cu11 nvidia-curand-cu11"}


def _fix_by_toolkit(found: Driver) -> str:
    """The command that brings a toolkit for this driver and device. PyPI has nvcc from CUDA 13 on, which begins at 7.5."""
    device, version = found.devices[0], found.version or (0, 0)
    if version < (13,) or device.capability < (7, 5):
        return _APT
    return f"{sys.executable} -m pip install 'cuda-toolkit[nvcc,cccl,cublas,curand]==13.*'"


def _fix_by_wheels(major: int) -> str:
    wheels = _WHEELS.get(major, f"'cuda-toolkit[cudart,cccl,cublas,curand]=={major}.*'")
    return f"{sys.executable} -m pip install {wheels}"


def arithmetic(capability: Version) -> str:
    """What the kernels' matrix products use on a device."""
    kinds = [kind for oldest, kind in _TENSOR_CORES.items() if capability >= oldest]
    return f"tensor cores ({kinds[0]})" if kinds else "plain CUDA cores"


def show(version: Version) -> str:
    return ".".join(map(str, version))


class _Libcuda:
    """libcuda with every call checked: a MossError names the function and what the driver said."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libcuda.so.1")

    def __getattr__(self, name: str):
        try:
            function = getattr(self._lib, name)
        except AttributeError:
            raise MossError(f"the NVIDIA driver has no {name}: it is too old, or broken") from None

        def call(*args):
            code = function(*args)
            if code:
                raise MossError(f"the NVIDIA driver answers {self._text(code)} ({code}) to {name}")

        return call

    def _text(self, code: int) -> str:
        text = c_char_p()
        get = getattr(self._lib, "cuGetErrorString", None)
        return text.value.decode() if get and get(code, byref(text)) == 0 and text.value else "an error"


def _seconds(work, *args) -> float:
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start
