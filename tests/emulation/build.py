"""Compiles kernels of kernels_cuda/ for the emulated device, and calls them with numpy arrays (docs/cuda-kernels.md).

A kernel's test has a file of wrappers, C functions that call its launchers::

    #include "norm.cuh"
    void layer_norm(const float* x, const float* weight, const float* bias, float eps, half* y, int64_t T, int64_t D) {
        launch_layer_norm(x, {weight, bias, eps}, y, T, D, 0);
    }

and calls them by name. The arguments are what the C function declares::

    kernels = build(WRAPPERS)                              # or arch=750: what __CUDA_ARCH__ is, 800 unless said
    y = unwritten((T, D), np.float16)                      # an output: reading it before it is written is an error
    kernels.layer_norm(x, weight, bias, 1e-5, y, T, D)     # KernelError: what is wrong, which block and thread, which line
    y.array

A ``const`` pointer takes an array, which nothing may write. Any other pointer takes an ``unwritten`` or an ``inout``, which
is written in place; its bytes that were written are remembered from call to call, so that several calls can work on it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import secrets
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels_cuda"

# -O2 with GCC's sanitizers as eyes only: hooks.cc answers their calls, the libraries are not linked. They do not see what the
# compiler makes of a memcpy.
SANITIZERS = ["-fsanitize=thread", "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"]
SANITIZERS += [f"-fno-builtin-{name}" for name in ("memcpy", "memmove", "memset")]
GCC = [
    os.environ.get("CXX", "g++"),
    "-std=c++14",
    "-O2",
    "-g1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    f"-I{HERE}",
]
MOST_SHARED = {600: 48, 700: 96, 750: 64, 800: 163, 860: 99, 890: 99, 900: 227}  # KB a block can have, by architecture
POINTERS = {
    "half": np.float16,
    "float": np.float32,
    "double": np.float64,
    "int8_t": np.int8,
    "uint8_t": np.uint8,
    "int32_t": np.int32,
    "uint32_t": np.uint32,
    "int64_t": np.int64,
    "uint64_t": np.uint64,
    "void": None,
}
FUNCTION = r"^(void|int64_t) (\w+)\(([^)]*)\)"
NUMBERS = {
    "int": ctypes.c_int32,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
}


class KernelError(Exception):
    """What a kernel did wrong: the kernel, the block and the thread, what, where in the source, and a seed that repeats it."""


class Memory:
    """What kernels may write. ``array``: its content; ``written``: of each byte, whether it may be read."""

    def __init__(self, array: np.ndarray, written: np.ndarray):
        self.array, self.written = array, written


def unwritten(shape, dtype) -> Memory:
    """An output or a workspace: a kernel that reads a byte of it before writing it is wrong."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xFF  # NaN
    return Memory(array, np.zeros(array.nbytes, np.uint8))


def inout(array: np.ndarray, written: np.ndarray | None = None) -> Memory:
    """An array that is written in place. ``written``: of each entry, whether it may be read; all may, unless given."""
    assert array.flags.c_contiguous
    if written is None:
        written = np.ones(array.shape, bool)
    return Memory(array, np.repeat(written.reshape(-1).astype(np.uint8), array.itemsize))


def build(wrappers: str, arch: int = 800) -> Kernels:
    """Compile wrappers with the kernels that they include. Skips the test where that is not possible.

    Where MOSS_JT_KERNELS is ``gpu``, for the GPU that is there.
    """
    if os.environ.get("MOSS_JT_KERNELS") == "gpu":
        from . import gpu

        return gpu.build(wrappers)
    if platform.machine() != "x86_64" or not (shutil.which(GCC[0]) and shutil.which("objcopy")):
        pytest.skip("the emulated device needs an x86-64 CPU, g++ and binutils")

    def compile(into: Path) -> None:
        source, unlinked = into.with_suffix(".cc"), into.with_suffix(".kernels.o")
        source.write_text(_source(wrappers))
        run(*GCC, *SANITIZERS, f"-I{KERNELS}", f"-DMOSS_EMULATED={arch}", "-c", str(source), "-o", str(unlinked))
        renamed = [f"--redefine-sym={name}=emulation_{name}" for name in ("memcpy", "memmove", "memset")]
        run("objcopy", *renamed, str(unlinked))
        run(*GCC, "-shared", str(unlinked), *map(str, runtime), "-o", str(into))

    runtime = [_runtime(name) for name in ("fibers", "hooks", "memory", "order", "warps")]
    return Kernels(_kept(".so", [*KERNELS.glob("*.cuh"), *HERE.glob("*.h"), *runtime], compile, wrappers, arch), wrappers, arch)


def _runtime(name: str) -> Path:
    source = HERE / f"{name}.cc"
    return _kept(".o", [source, *HERE.glob("*.h")], lambda into: run(*GCC, "-c", str(source), "-o", str(into)))


def _kept(suffix: str, sources: list[Path], compile, *given) -> Path:
    """The file that ``compile`` writes: made once, and found again while sources, compiler and ``given`` are the same."""
    digest = hashlib.sha256(repr((given, GCC, SANITIZERS, _version())).encode())
    for path in sorted(sources):
        digest.update(path.read_bytes())
    kept = _folder() / (digest.hexdigest()[:32] + suffix)
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=kept.parent) as where:
            compile(Path(where, kept.name))
            os.replace(Path(where, kept.name), kept)
    return kept


@cache
def _version() -> str:
    return run(GCC[0], "--version")


@cache
def _folder() -> Path:
    """Where compiled files are kept; the oldest go when there are many."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moss-jt" / "emulation"
    place.mkdir(parents=True, exist_ok=True)
    for old in sorted(place.glob("*.*o"), key=lambda p: p.stat().st_mtime)[:-100]:
        old.unlink(missing_ok=True)
    return place


def _source(wrappers: str) -> str:
    """C++ in which lines have the numbers that they have in the wrappers. From the first function that is no kernel on,
    nothing but functions for C follows."""
    lines = wrappers.splitlines()
    first = next(i for i, line in enumerate(lines) if re.match(FUNCTION, line))
    functions = f'#pragma GCC visibility push(default)\nextern "C" {{\n#line {first + 1} "wrappers"\n{_text(lines[first:])}}}\n'
    return f'#include "device.cuh"\nusing namespace moss_cuda;\n#line 1 "wrappers"\n{_text(lines[:first])}{functions}'


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


_DEVICE = threading.Lock()  # of which there is one, whichever thread launches


class Kernels:
    """The wrappers of a library, each a method."""

    def __init__(self, path: Path, wrappers: str, arch: int):
        self._path, self._arch = path, arch
        self._library = ctypes.CDLL(str(path))
        self._library.emulation_allocate.restype = ctypes.c_void_p
        self._library.emulation_error.restype = ctypes.c_char_p
        found = re.findall(FUNCTION, wrappers, re.M)
        self._functions = {name: [_Parameter(p) for p in parameters.split(",")] for _, name, parameters in found}
        for returned, name, _ in found:
            getattr(self._library, name).restype = NUMBERS.get(returned)

    def __getattr__(self, name: str):
        if name.startswith("_") or name not in self._functions:
            raise AttributeError(name)
        return lambda *given, seed=None: self._call(name, given, seed)

    def _call(self, name: str, given: tuple, seed: int | None):
        with _DEVICE:
            return self._launched(name, given, seed)

    def _launched(self, name: str, given: tuple, seed: int | None):
        parameters, library = self._functions[name], self._library
        assert len(given) == len(parameters), f"{name} takes {', '.join(p.text for p in parameters)}"
        seed = secrets.randbits(32) if seed is None else seed
        library.emulation_begin(ctypes.c_uint64(seed), ctypes.c_uint64(MOST_SHARED[self._arch] << 10))
        places = [p.place(library, value) for p, value in zip(parameters, given)]
        result = getattr(library, name)(*places)
        for place, value in zip(places, given):
            if isinstance(value, Memory):
                data, written = _pointer(value.array), _pointer(value.written)
                library.emulation_fetch(place, data, written, ctypes.c_uint64(value.array.nbytes))
        error = library.emulation_error().decode()
        if error:
            raise KernelError(f"{self._with_lines(error)} [seed={seed}]")
        return result

    def _with_lines(self, error: str) -> str:
        """The error, with places in the code as files and lines: the innermost ones outside of the emulation."""

        def line(match: re.Match) -> str:
            address = hex(int(match[1], 16) - 1)  # the call, not what it returns to
            found = run("addr2line", "-i", "-e", str(self._path), address).split("\n")
            ours = [at for at in found if at and not at.startswith("?") and str(HERE) not in at and "/include/" not in at]
            return f" ({Path(ours[0].split(' ')[0]).name})" if ours else ""

        return re.sub(r"\{code (\w+)\}", line, error)


class _Parameter:
    def __init__(self, text: str):
        self.text = " ".join(text.split())
        self.name = re.search(r"\w+$", self.text)[0]
        words = re.findall(r"\w+", self.text)[:-1]
        self.pointer, self.constant, self.type = "*" in self.text, "const" in words, words[-1]

    def place(self, library: ctypes.CDLL, value):
        if not self.pointer:
            return NUMBERS[self.type](value)
        if value is None:
            return ctypes.c_void_p(0)
        if isinstance(value, Memory):
            array, written = value.array, _pointer(value.written)
        else:
            assert self.constant, f"{self.text}: an output is an unwritten(…) or an inout(…)"
            array, written = np.ascontiguousarray(value), ctypes.c_void_p(0)
        expected = POINTERS.get(self.type)
        assert expected is None or array.dtype == expected, f"{self.text}: the array is {array.dtype}"
        size = [ctypes.c_uint64(array.nbytes), ctypes.c_uint64(array.itemsize), ctypes.c_int(self.constant)]
        return ctypes.c_void_p(library.emulation_allocate(self.name.encode(), _pointer(array), written, *size))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
