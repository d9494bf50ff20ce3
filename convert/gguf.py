"""The GGUF container (version 3) and those of its types that an export uses, as ggml's documentation describes them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

import numpy as np

ALIGN = 32  # bytes; where the data and each tensor in it start
BLOCK = 32  # weights that share a scale in q8_0 and q4_0
_MAGIC, _VERSION = b"GGUF", 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))  # a half would take the number before 0.5 up to 1


class Type(NamedTuple):
    """How numbers are stored: ``block`` of them in ``nbytes``, which ``encode`` makes of float32 (N, K)."""

    name: str
    number: int  # in the file
    block: int
    nbytes: int
    encode: Callable[[np.ndarray], np.ndarray]


def _q8_0(x: np.ndarray) -> np.ndarray:
    """Blocks of an fp16 scale and 32 int8: the reference's rounding, halves away from zero."""
    blocks = x.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    y = blocks * _inverse(scale)
    q = np.trunc(y + np.copysign(_BELOW_HALF, y)).astype(np.int8)
    return _rows(x, scale, q.view(np.uint8))


def _q4_0(x: np.ndarray) -> np.ndarray:
    """Blocks of an fp16 scale and 32 numbers 0 … 15, for -8 … 7: number j in the low, j + 16 in the high half of byte j.
    The reference's rule: the largest number, whatever its sign, becomes -8."""
    blocks = x.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = largest / np.float32(-8)
    q = np.minimum(blocks * _inverse(scale) + np.float32(8.5), 15).astype(np.uint8)
    return _rows(x, scale, q[:, : BLOCK // 2] | q[:, BLOCK // 2 :] << 4)


def _inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _rows(x: np.ndarray, scale: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.concatenate([scale.astype("<f2").view(np.uint8), q], axis=1).reshape(len(x), -1)


F32 = Type("f32", 0, 1, 4, lambda x: x.astype("<f4", copy=False))
F16 = Type("f16", 1, 1, 2, lambda x: x.astype("<f2", copy=False))
Q4_0 = Type("q4_0", 2, BLOCK, 2 + BLOCK // 2, _q4_0)
Q8_0 = Type("q8_0", 8, BLOCK, 2 + BLOCK, _q8_0)


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: (N, K), or (N,)."""

    name: str
    type: Type
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.nbytes

    @property
    def padded(self) -> int:
        """With the zeros that follow it."""
        return aligned(self.nbytes)


def aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def header_bytes(metadata: dict[str, Any], entries: list[Entry]) -> bytes:
    """All that comes before the data, padded. Values may be bool, int (unsigned, 32 bits), float, str, and lists of int
    (signed, 32 bits) or str."""
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    at = 0
    for e in entries:
        dims = struct.pack(f"<I{len(e.shape)}Q", len(e.shape), *reversed(e.shape))  # the fastest-moving one first
        parts += [_string(e.name), dims, struct.pack("<IQ", e.type.number, at)]
        at += e.padded
    data = b"".join(parts)
    return data.ljust(aligned(len(data)), b"\0")


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
