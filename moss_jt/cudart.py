"""Device memory, pinned memory, copies, streams and events: the few calls of the CUDA runtime that moving weights needs.

They are calls into the very libcudart that Jittor's ops were linked with, so both see the same device, context and streams.
(CuPy has the same calls, but a runtime of its own linked into it, and is larger than the rest of this program.)
Jittor launches everything on the default stream, here ``None``. A Stream made here is not ordered with it except by events.
Sizes are bytes. Every call raises MossError where the runtime answers with an error.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from pathlib import Path

import numpy as np

from .errors import MossError

_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # enum cudaMemcpyKind
_MAPPED = 2  # cudaHostAllocMapped: kernels can read it, too
_NON_BLOCKING, _NO_TIMING = 1, 2
_OUT_OF_MEMORY = 2
_GLOBAL = 1  # cudaMemAttachGlobal
_PREFERRED_LOCATION, _ACCESSED_BY = 3, 5  # enum cudaMemoryAdvise
_AT_DEVICE, _AT_HOST = 1, 2  # enum cudaMemLocationType
_CONCURRENT_MANAGED_ACCESS, _REGISTERS_READ_ONLY = 89, 113  # enum cudaDeviceAttr
_READ_ONLY = 8  # cudaHostRegisterReadOnly


class OutOfDeviceMemory(MossError):
    """The device has no room for what was asked; nothing was allocated. Says so as the runtime does: out of memory."""


class Memory:
    """``nbytes`` on the device, at ``pointer``; freed when no longer used."""

    def __init__(self, nbytes: int):
        pointer = c_void_p()
        _call("cudaMalloc", byref(pointer), c_size_t(max(1, nbytes)))
        self.pointer, self.nbytes = pointer.value, nbytes
        self.free = weakref.finalize(self, _quietly, "cudaFree", pointer)


class Managed:
    """``nbytes`` that the host and the device have at one address, ``pointer``, and the host as ``bytes``, uint8 (nbytes,).

    They are in RAM, and the device reads them over the link, until they are moved. Where the driver cannot move pages ahead of
    their use, as on Windows' and WSL's, it moves all of them whenever it sees fit, and the host must not touch them while the
    device is busy.
    """

    def __init__(self, nbytes: int):
        pointer = c_void_p()
        _call("cudaMallocManaged", byref(pointer), c_size_t(max(1, nbytes)), c_uint(_GLOBAL))
        self.pointer, self.nbytes = pointer.value, nbytes
        self.bytes = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(self.pointer), np.uint8)
        self.free = weakref.finalize(self, _quietly, "cudaFree", pointer)
        if _can(_CONCURRENT_MANAGED_ACCESS):
            for advice, on_device in ((_PREFERRED_LOCATION, False), (_ACCESSED_BY, True)):
                _call("cudaMemAdvise", pointer, c_size_t(nbytes), c_int(advice), _location(on_device))

    def move(self, to_device: bool, stream: Stream) -> None:
        """Begin to bring it to the device, or back."""
        if _can(_CONCURRENT_MANAGED_ACCESS):
            flags = () if _version() < 13000 else (c_uint(0),)
            where = _location(to_device)
            _call("cudaMemPrefetchAsync", c_void_p(self.pointer), c_size_t(self.nbytes), where, *flags, stream.handle)


class _Location(ctypes.Structure):
    """struct cudaMemLocation, with which CUDA 13 says where memory is; before, it was the device's number, or -1."""

    _fields_ = (("type", c_int), ("id", c_int))


def _location(on_device: bool) -> _Location | c_int:
    device = c_int()
    _call("cudaGetDevice", byref(device))
    if _version() >= 13000:
        return _Location(_AT_DEVICE, device.value) if on_device else _Location(_AT_HOST, 0)
    return device if on_device else c_int(-1)


@cache
def _version() -> int:
    found = c_int()
    _call("cudaRuntimeGetVersion", byref(found))
    return found.value


@cache
def _can(attribute: int) -> bool:
    device, found = c_int(), c_int()
    _call("cudaGetDevice", byref(device))
    _call("cudaDeviceGetAttribute", byref(found), c_int(attribute), device)
    return bool(found.value)


class Stream:
    """A queue of copies and launches, carried out in order, beside what other streams do."""

    def __init__(self):
        handle = c_void_p()
        _call("cudaStreamCreateWithFlags", byref(handle), c_uint(_NON_BLOCKING))
        self.handle = handle
        self._free = weakref.finalize(self, _quietly, "cudaStreamDestroy", handle)

    def wait(self, event: Event) -> None:
        """What is put into the stream from now on begins after the event."""
        _call("cudaStreamWaitEvent", self.handle, event.handle, c_uint(0))

    def synchronize(self) -> None:
        _call("cudaStreamSynchronize", self.handle)


class Event:
    """A point in a stream, which other streams or the host can wait for."""

    def __init__(self):
        handle = c_void_p()
        _call("cudaEventCreateWithFlags", byref(handle), c_uint(_NO_TIMING))
        self.handle = handle
        self._free = weakref.finalize(self, _quietly, "cudaEventDestroy", handle)

    def record(self, stream: Stream | None = None) -> None:
        """The event is where the stream, by default Jittor's, is now."""
        _call("cudaEventRecord", self.handle, _handle(stream))

    def wait_on_default(self) -> None:
        """What Jittor launches from now on begins after the event."""
        _call("cudaStreamWaitEvent", c_void_p(), self.handle, c_uint(0))

    def synchronize(self) -> None:
        _call("cudaEventSynchronize", self.handle)


def pinned(nbytes: int) -> np.ndarray:
    """Host memory that never leaves RAM, uint8 (nbytes,): copies from it run at the link's speed and beside everything else,
    and kernels can read it at the same address."""
    pointer = c_void_p()
    try:
        _call("cudaHostAlloc", byref(pointer), c_size_t(max(1, nbytes)), c_uint(_MAPPED))
    except OutOfDeviceMemory:  # of which there is enough: it is the host's that cannot be had
        raise MossError(f"{nbytes / 1e9:.2f} GB of RAM cannot be pinned for the GPU: give less with --ram") from None
    buffer = (ctypes.c_uint8 * nbytes).from_address(pointer.value)
    weakref.finalize(buffer, _quietly, "cudaFreeHost", pointer)  # an array over it, or a view of one, keeps it
    return np.frombuffer(buffer, np.uint8) if nbytes else np.empty(0, np.uint8)


def registered(memory: np.ndarray) -> np.ndarray:
    """Read-only memory, such as a mapped file, pinned where it is: uint8 (n,) over the same, pinned as long as that is used.
    Raises MossError where the device or its driver cannot."""
    if not _can(_REGISTERS_READ_ONLY):
        raise MossError("the device does not take memory that it must not write to")
    pointer = c_void_p(memory.ctypes.data)
    _call("cudaHostRegister", pointer, c_size_t(memory.nbytes), c_uint(_READ_ONLY))
    buffer = (ctypes.c_uint8 * memory.nbytes).from_address(pointer.value)
    weakref.finalize(buffer, _unregister, pointer, memory)
    return np.frombuffer(buffer, np.uint8)


def _unregister(pointer: c_void_p, memory: np.ndarray) -> None:
    """``memory`` may go now, not before."""
    _quietly("cudaHostUnregister", pointer)


def to_device(pointer: int, source: np.ndarray, stream: Stream | None = None) -> None:
    """Copy a contiguous array; returns at once where it is pinned, and then it must stay as it is until the stream is past."""
    size = c_size_t(source.nbytes)
    _call("cudaMemcpyAsync", c_void_p(pointer), c_void_p(source.ctypes.data), size, c_int(_TO_DEVICE), _handle(stream))


def rows_to_device(pointer: int, pitch: int, source: np.ndarray, stream: Stream) -> None:
    """Copy uint8 (n, width) of pinned memory, rows any distance apart, to rows ``pitch`` bytes apart; returns at once."""
    _rows(pointer, pitch, source.ctypes.data, source.strides[0], source, _TO_DEVICE, stream)


def rows_to_host(target: np.ndarray, pointer: int, pitch: int, stream: Stream) -> None:
    """The way back of rows_to_device."""
    _rows(target.ctypes.data, target.strides[0], pointer, pitch, target, _TO_HOST, stream)


def _rows(to: int, to_pitch: int, source: int, pitch: int, rows: np.ndarray, kind: int, stream: Stream) -> None:
    height, width = rows.shape
    there = (c_void_p(to), c_size_t(to_pitch), c_void_p(source), c_size_t(pitch))
    _call("cudaMemcpy2DAsync", *there, c_size_t(width), c_size_t(height), c_int(kind), stream.handle)


def on_device(pointer: int, source: int, nbytes: int) -> None:
    """Copy from one place on the device to another; returns at once."""
    size = c_size_t(nbytes)
    _call("cudaMemcpyAsync", c_void_p(pointer), c_void_p(source), size, c_int(_ON_DEVICE), _handle(None))


def to_host(target: np.ndarray, pointer: int) -> None:
    """Copy into a contiguous array, once all that Jittor launched before is over."""
    _call("cudaMemcpy", c_void_p(target.ctypes.data), c_void_p(pointer), c_size_t(target.nbytes), c_int(_TO_HOST))


def zero(memory: Memory) -> None:
    _call("cudaMemset", c_void_p(memory.pointer), c_int(0), c_size_t(memory.nbytes))


def memory_info() -> tuple[int, int]:
    """(free, total) of the device, as the driver says: everyone's use counts."""
    free, total = c_size_t(), c_size_t()
    _call("cudaMemGetInfo", byref(free), byref(total))
    return free.value, total.value


def link_bandwidth() -> float:
    """Bytes a second from pinned host memory to the device: of 64 MiB, best of three."""
    source = pinned(64 << 20)
    return source.nbytes / copy_seconds(Memory(source.nbytes), source)


def copy_seconds(memory: Memory, source: np.ndarray) -> float:
    """How long it takes to copy pinned memory to the device. Best of three."""

    def seconds() -> float:
        synchronize()
        start = time.perf_counter()
        to_device(memory.pointer, source)
        synchronize()
        return time.perf_counter() - start

    return min(seconds() for _ in range(4))  # the first one wakes the link


def synchronize() -> None:
    _call("cudaDeviceSynchronize")


def _handle(stream: Stream | None) -> c_void_p:
    return stream.handle if stream else c_void_p()


@cache
def loaded(name: str) -> ctypes.CDLL:
    """The library of that name, like ``libcudart``, that this process has loaded already."""
    maps = Path("/proc/self/maps").read_text()
    for line in maps.splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(f"{name}.so"):
            return ctypes.CDLL(path)
    raise MossError(f"Jittor was not imported with CUDA in this process: {name} is not there")


def _call(name: str, *args) -> None:
    lib = loaded("libcudart")
    code = getattr(lib, name)(*args)
    if code:
        lib.cudaGetErrorString.restype = c_char_p
        lib.cudaGetLastError()  # or the next launch reports it again
        kind = OutOfDeviceMemory if code == _OUT_OF_MEMORY else MossError
        raise kind(f"the CUDA runtime answers {lib.cudaGetErrorString(code).decode()} ({code}) to {name}")


def _quietly(name: str, handle: c_void_p) -> None:
    """For what is freed, perhaps at the process's end when the runtime is gone already."""
    getattr(loaded("libcudart"), name)(handle)
