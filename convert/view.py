"""A tensor that lies in a file: where, and how it is strided. Nothing is read until it is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import MossError
from ..weights.layout import DTYPE_BYTES
from ..weights.store import Region

# How each safetensors dtype is held by numpy, which has no bfloat16: those stay their 16 bits until they are cast.
_HELD = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
_LARGEST_F16 = 65504


@dataclass(frozen=True)
class View:
    """A tensor of ``shape`` in ``path``: its first element at byte ``start``, the others ``strides`` elements apart.

    Views may overlap, and need not be contiguous. Whoever makes one has checked that it lies inside its file.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    @property
    def span(self) -> int:
        """Bytes from the first element in the file to the end of the last one."""
        if 0 in self.shape:
            return 0
        return (sum((n - 1) * s for n, s in zip(self.shape, self.strides)) + 1) * DTYPE_BYTES[self.dtype]

    def rows(self, first: int, count: int) -> View:
        return self._cut(0, first, count)

    def columns(self, first: int, count: int) -> View:
        return self._cut(1, first, count)

    def _cut(self, axis: int, first: int, count: int) -> View:
        shape = (*self.shape[:axis], count, *self.shape[axis + 1 :])
        return replace(self, shape=shape, start=self.start + first * self.strides[axis] * DTYPE_BYTES[self.dtype])

    @property
    def row_bytes(self) -> int | None:
        """Bytes to read for each further row; None where rows lie mixed, so that a few rows cost as much as all."""
        step = self.strides[0] * DTYPE_BYTES[self.dtype]
        return step if step >= self.rows(0, 1).span else None

    def read(self) -> np.ndarray:
        """The tensor as a read-only array. Raises MossError where the file ends early or cannot be read."""
        raw = read_bytes(self.path, self.start, self.span).view(_HELD[self.dtype])
        return np.lib.stride_tricks.as_strided(raw, self.shape, [s * raw.itemsize for s in self.strides], writeable=False)


def contiguous(name: str, path: Path, dtype: str, shape: tuple[int, ...], start: int) -> View:
    """A View whose rows follow each other without gaps (C order)."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return View(name, path, dtype, shape, tuple(reversed(strides)), start)


def of_region(region: Region) -> dict[str, View]:
    """The tensors of one of our own files."""
    views, at = {}, region.start
    for t in region.tensors:
        views[t.name] = contiguous(t.name, region.path, t.dtype, t.shape, at)
        at += t.nbytes
    return views


def read_bytes(path: Path, start: int, count: int) -> np.ndarray:
    """Exactly ``count`` bytes from ``start``. They are read once, so the system need not keep them in memory."""
    buffer = np.empty(count, np.uint8)
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            at = 0
            while at < count:
                got = os.preadv(fd, [buffer[at:]], start + at)
                if not got:
                    raise MossError(f"{path}: ends before byte {start + count:,}; it was cut short while it was read")
                at += got
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, start, count, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    except OSError as e:
        raise MossError(f"{path}: cannot be read: {e.strerror}") from None
    return buffer


def cast(x: np.ndarray, view: View, dtype: str) -> np.ndarray:
    """``x``, read from ``view``, as F16 or F32. Raises MossError for NaN, infinity and what is too large for fp16."""
    x = widened(x, view)
    with np.errstate(over="ignore"):
        y = x.astype(_HELD[dtype], copy=False)
    if not _all_finite(y):
        raise _unusable(x, view)
    return y


def cast_to_quantise(x: np.ndarray, view: View) -> np.ndarray:
    """``x``, read from ``view``, as F32, with every bit the source has. Raises MossError for what F16 could not hold."""
    y = widened(x, view).astype(np.float32, copy=False)
    if not (y.max() <= _LARGEST_F16 and y.min() >= -_LARGEST_F16):  # so, because a comparison with NaN is false
        raise _unusable(y, view)
    return y


def widened(x: np.ndarray, view: View) -> np.ndarray:
    """``x``, read from ``view``, as numpy's own floats: bfloat16 as float32."""
    return (x.astype(np.uint32) << 16).view(np.float32) if view.dtype == "BF16" else x


def _all_finite(y: np.ndarray) -> bool:
    if y.dtype == np.float16:  # by their bits: ten times faster than numpy's isfinite
        return bool((y.view(np.uint16) & 0x7FFF).max() < 0x7C00)
    return bool(np.isfinite(y).all())


def _unusable(x: np.ndarray, view: View) -> MossError:
    return MossError(f"{view.path}: tensor {view.name} {_what_is_there(x)}; damaged, or not made for fp16")


def _what_is_there(x: np.ndarray) -> str:
    if np.isnan(x).any():
        return "holds NaN (not a number)"
    if np.isinf(x).any():
        return "holds infinity"
    return f"holds {x.flat[np.abs(x).argmax()]:g}, beyond fp16's largest number {_LARGEST_F16}"
