"""Writes what ``torch.save`` would of a dict of fp16 and int32 tensors, without torch; ``torch.load(weights_only=True)`` opens
it."""

from __future__ import annotations

import struct
import zipfile
from typing import BinaryIO, Callable

from ..weights.layout import Tensor

_ROOT = "archive/"
_ALIGN = 64  # bytes; torch's own alignment of storages, so that they can be mapped
_STORAGES = {"F16": b"HalfStorage", "I32": b"IntStorage"}
_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20  # bytes; APPNOTE.TXT 4.3.7 and 4.5.3


def write_torch(file: BinaryIO, tensors: list[Tensor], write: Callable[[BinaryIO, Tensor], None]) -> None:
    """Write a zip container; ``write`` is called for each tensor to write its bytes (C order)."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_entry(archive, "data.pkl"), _pickle(tensors))
        archive.writestr(_entry(archive, "byteorder"), b"little")
        for i, tensor in enumerate(tensors):
            with archive.open(_entry(archive, f"data/{i}", tensor.nbytes), "w") as out:
                write(out, tensor)
        archive.writestr(_entry(archive, "version"), b"3\n")


def _entry(archive: zipfile.ZipFile, name: str, nbytes: int = 0) -> zipfile.ZipInfo:
    """A stored entry whose bytes will start at a multiple of _ALIGN: a padding field in its header sees to that."""
    entry = zipfile.ZipInfo(_ROOT + name)  # always of 1980: the same tensors give the same file
    entry.file_size = nbytes
    is_zip64 = nbytes * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule
    start = archive.fp.tell() + _LOCAL_HEADER + len(entry.filename) + (_ZIP64_EXTRA if is_zip64 else 0) + 4
    padding = -start % _ALIGN
    entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    return entry


def _pickle(tensors: list[Tensor]) -> bytes:
    """{name: tensor}, protocol 2; the tensor of storage i is the i-th."""
    items = b"".join(_string(t.name) + _tensor(str(i), t) for i, t in enumerate(tensors))
    return b"\x80\x02}(" + items + b"u."


def _tensor(key: str, t: Tensor) -> bytes:
    strides, step = [], 1
    for n in reversed(t.shape):
        strides.insert(0, step)
        step *= n
    storage = (
        _tuple(_string("storage"), b"ctorch\n" + _STORAGES[t.dtype] + b"\n", _string(key), _string("cpu"), _int(step)) + b"Q"
    )
    no_hooks = b"ccollections\nOrderedDict\n)R"
    shape = _tuple(*map(_int, t.shape)), _tuple(*map(_int, strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(storage, _int(0), *shape, b"\x89", no_hooks) + b"R"


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _string(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _int(n: int) -> bytes:
    if n < 1 << 31:
        return b"J" + struct.pack("<i", n)
    return b"\x8a\x08" + struct.pack("<q", n)
