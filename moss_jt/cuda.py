"""What CUDA there is: the driver and its devices, asked through libcuda, and the toolkit that Jittor would compile with.

The driver is the one to ask: nvcc says nothing about a GPU, and a GPU nothing about nvcc. Sizes are bytes.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import time
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

from .errors import MossError

Version = tuple  # (major, minor)


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
class Toolkit:
    nvcc: str
    version: Version
    missing: tuple[str, ...]  # files that Jittor needs beside this nvcc and that are not there


# Where Jittor looks for nvcc, in its order, after the environment variable nvcc_path.
_NVCC = ("nvcc", "/usr/local/cuda/bin/nvcc", "/usr/bin/nvcc", "/opt/cuda/bin/nvcc")
# What Jittor needs of a toolkit when it is told (conv_opt=1) to do without cudnn, cufft and cusparse.
_LIBRARIES = ("libcudart.so", "libcublas.so", "libcurand.so")
_HEADERS = ("cuda_runtime.h", "cublas.h", "curand.h")


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


def toolkit() -> Toolkit | None:
    """The first complete toolkit of those where Jittor looks, or else the first; None where there is no nvcc."""
    first = None
    named = os.environ.get("nvcc_path")  # noqa: SIM112 (Jittor's own name)
    for path in filter(None, (named, *_NVCC)):
        kit = _toolkit(shutil.which(path))
        if kit and not kit.missing:
            return kit
        first = first or kit
    return first


def _toolkit(nvcc: str | None) -> Toolkit | None:
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20).stdout if nvcc else ""
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r"release (\d+)\.(\d+)", answer)
    if not version:
        return None
    home = Path(os.path.realpath(nvcc)).parent.parent
    # Debian's own package spreads over /usr, where Jittor knows this one folder.
    libraries = Path("/usr/lib/x86_64-linux-gnu") if nvcc == "/usr/bin/nvcc" else home / "lib64"
    needed = [libraries / name for name in _LIBRARIES] + [home / "include" / name for name in _HEADERS]
    missing = tuple(str(path) for path in needed if not path.exists())
    return Toolkit(nvcc, (int(version[1]), int(version[2])), missing)


def show(version: Version) -> str:
    return ".".join(map(str, version))


def unusable(found: Driver, kit: Toolkit | None) -> str:
    """Why Jittor cannot compute on the device, in a few words; empty where it can."""
    if not found.devices:
        return found.problem
    if not kit:
        return "there is no nvcc: install a CUDA toolkit 11 or 12"
    if kit.version[0] >= 13:
        return f"the toolkit of {kit.nvcc} is CUDA {show(kit.version)}, and Jittor takes 11 and 12"
    if kit.missing:
        return f"beside {kit.nvcc} there is no {Path(kit.missing[0]).name} ({kit.missing[0]})"
    if found.version and kit.version > found.version:
        return (
            f"the driver runs CUDA up to {show(found.version)}, and {kit.nvcc} is {show(kit.version)}: "
            f"update the driver, or install a toolkit up to {show(found.version)}"
        )
    return ""


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
