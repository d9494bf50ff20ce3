"""The header of a safetensors file: writing it, and reading it from a file that may be damaged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import MossError
from .layout import ALIGN, DTYPE_BYTES, Tensor

_LONGEST = 100_000_000  # bytes; the safetensors library's own bound


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: name -> (tensor, where it starts in the file, in bytes)."""

    metadata: dict
    start: int  # where the data region starts; a multiple of ALIGN in our own files
    entries: dict[str, tuple[Tensor, int]]


def header_bytes(tensors: list[Tensor], metadata: dict[str, str]) -> bytes:
    """The header of a file that holds ``tensors`` in this order without gaps, padded so that its data starts at a multiple
    of ALIGN."""
    entries: dict = {"__metadata__": metadata}
    at = 0
    for t in tensors:
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    start = -(-(8 + len(text)) // ALIGN) * ALIGN
    return (start - 8).to_bytes(8, "little") + text.ljust(start - 8)


def read_header(path: Path) -> Header:
    """Read and check a header: every tensor's bytes are inside the file, one after another, without gaps or overlaps.

    Raises MossError saying what is wrong with the file.
    """
    try:
        with open(path, "rb") as f:
            size = f.seek(0, 2)
            f.seek(0)
            raw = f.read(8)
            length = int.from_bytes(raw, "little")
            if raw.startswith(b"version "):
                raise MossError(f"{path}: this is a Git LFS pointer, not the file itself; run: git lfs pull")
            if size < 8 or length > min(size - 8, _LONGEST):
                raise MossError(f"{path}: not a safetensors file, or cut short ({size:,} bytes)")
            text = f.read(length)
    except FileNotFoundError:
        raise MossError(f"{path}: no such file") from None
    except OSError as e:
        raise MossError(f"{path}: cannot be read: {e.strerror}") from None
    return _parse(path, text, size)


def _parse(path: Path, text: bytes, size: int) -> Header:
    try:
        raw = json.loads(text.decode())
        metadata = raw.pop("__metadata__", {})
        found = [_entry(path, name, entry) for name, entry in raw.items()]
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise MossError(f"{path}: its header is damaged, or it is not a safetensors file") from None
    start = 8 + len(text)
    entries, at = {}, 0
    for tensor, begin, end in sorted(found, key=lambda e: e[1:]):
        if begin != at or end - begin != tensor.nbytes:
            raise MossError(f"{path}: its header is damaged: tensor {tensor.name} does not lie where its size and shape say")
        entries[tensor.name] = (tensor, start + begin)
        at = end
    if size != start + at:
        raise MossError(f"{path}: {size:,} bytes long, its header says {start + at:,}; it was cut short or changed")
    return Header(metadata if isinstance(metadata, dict) else {}, start, entries)


def _entry(path: Path, name: str, entry: dict) -> tuple[Tensor, int, int]:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not name.isprintable() or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError
    if dtype not in DTYPE_BYTES:
        raise MossError(f"{path}: tensor {name} has the dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    return Tensor(name, dtype, shape), begin, end
