"""Opens what ``torch.save`` wrote, without torch: a zip container, or the older file of pickles and raw storages.

Both give each tensor's place in the file; no tensor is read here. Hostile files can at worst be refused.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from ..errors import MossError
from ..weights.layout import DTYPE_BYTES
from . import pickles
from .pickles import Forbidden, PickledTensor, Refused, Storage
from .view import View

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = 30  # bytes before the name in a zip entry's local header; APPNOTE.TXT 4.3.7


def open_torch(path: Path) -> dict[str, View]:
    """The tensors of a torch checkpoint, name -> View, each lying inside the file. Raises MossError with one line."""
    try:
        with open(path, "rb") as f:
            start = f.read(64)
            f.seek(0)
            if start.startswith(b"version https://git-lfs"):
                raise Refused("this is a Git LFS pointer, not the file itself; run: git lfs pull")
            tensors, places = _open_zip(f) if start.startswith(_ZIP_MAGIC) else _open_legacy(f)
            return {name: _view(path, name, t, places) for name, t in _named(tensors)}
    except Refused as e:
        raise MossError(f"{path}: {e}") from None
    except OSError as e:
        raise MossError(f"{path}: cannot be read: {e.strerror}") from None


def is_zip(path: Path) -> bool:
    """Whether a file is the newer of the two containers."""
    with open(path, "rb") as f:
        return f.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def _named(tensors: object):
    if not isinstance(tensors, dict) or not tensors:
        raise Refused("holds no dict of tensors, so it is not a model's checkpoint")
    for name, tensor in tensors.items():
        if not name.isprintable():
            raise Refused("its pickle is damaged: a tensor's name has control characters")
        if not isinstance(tensor, PickledTensor):
            raise Refused(f"its {name!r} is no tensor; only a model's own tensors can be converted")
        yield name, tensor


def _view(path: Path, name: str, t: PickledTensor, places: dict[str, tuple[int, int]]) -> View:
    """Check a tensor against its storage, and the storage against the file."""
    storage = t.storage
    if storage.key not in places:
        raise Refused(f"the storage {storage.key!r} of tensor {name} is missing")
    start, nbytes = places[storage.key]
    width = DTYPE_BYTES[storage.dtype]
    if nbytes != storage.numel * width:
        raise Refused(f"the storage of tensor {name} has {nbytes:,} bytes, its pickle says {storage.numel * width:,}")
    view = View(name, path, storage.dtype, t.shape, t.strides, start + t.offset * width)
    if t.offset * width + view.span > nbytes:
        raise Refused(f"tensor {name} {list(t.shape)} reaches beyond its storage of {storage.numel:,} elements")
    return view


def _open_zip(f: BinaryIO) -> tuple[object, dict[str, tuple[int, int]]]:
    entries = _zip_entries(f)
    (root, index) = _find_pickle(entries)
    data = _small_entry(f, index)
    if (order := entries.get(root + "byteorder")) and _small_entry(f, order).strip() != b"little":
        raise Refused("its numbers are big-endian; save it again on an ordinary machine")
    tensors = pickles.load(io.BytesIO(data))
    prefix = root + "data/"
    places = {name[len(prefix) :]: _place(f, e) for name, e in entries.items() if name.startswith(prefix)}
    return tensors, places


def _zip_entries(f: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    try:
        infos = zipfile.ZipFile(f).infolist()
    except Exception:  # zipfile answers damaged directories with half a dozen different exceptions
        raise Refused("damaged or cut short: its zip directory (at the end of the file) cannot be read") from None
    entries = {e.filename: e for e in infos}
    if len(entries) != len(infos):
        raise Refused("damaged: its zip directory names an entry twice")
    return entries


def _find_pickle(entries: dict[str, zipfile.ZipInfo]) -> tuple[str, zipfile.ZipInfo]:
    found = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise Refused("a zip file, but not one that torch.save wrote (it has no data.pkl)")
    return found[0][: -len("data.pkl")], entries[found[0]]


def _place(f: BinaryIO, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Where an entry's bytes start in the file, and how many they are."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise Refused(f"its entry {entry.filename!r} is compressed or encrypted, which torch.save never does")
    f.seek(max(entry.header_offset, 0))  # a damaged directory can make it negative
    header = f.read(_LOCAL_HEADER)
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    if not header.startswith(_ZIP_MAGIC) or f.read(name_length) != entry.orig_filename.encode():
        raise Refused(f"damaged: its entry {entry.filename!r} is not where its zip directory says")
    start = entry.header_offset + _LOCAL_HEADER + name_length + extra_length
    if start + entry.file_size > f.seek(0, io.SEEK_END):
        raise Refused(f"cut short: its entry {entry.filename!r} reaches beyond the end of the file")
    return start, entry.file_size


def _small_entry(f: BinaryIO, entry: zipfile.ZipInfo) -> bytes:
    start, size = _place(f, entry)
    if size > pickles.LONGEST:
        raise Refused(f"its entry {entry.filename!r} has {size:,} bytes, more than any checkpoint needs")
    f.seek(start)
    data = f.read(size)
    if entry.CRC and zlib.crc32(data) != entry.CRC:  # torch can be told to leave checksums out; then it writes 0
        raise Refused(f"damaged: the checksum of its entry {entry.filename!r} is wrong")
    return data


def _open_legacy(f: BinaryIO) -> tuple[object, dict[str, tuple[int, int]]]:
    """Five pickles (magic number, protocol, sys_info, the tensors, the storages' keys), then storage after storage."""
    not_torch = Refused("neither a torch checkpoint nor a safetensors file, or damaged at its start")
    try:
        if pickles.load(f) != _LEGACY_MAGIC or pickles.load(f) != _LEGACY_PROTOCOL:
            raise not_torch
    except Forbidden:
        raise
    except Refused:
        raise not_torch from None
    system = pickles.load(f)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("its numbers are big-endian, or its start is damaged")
    tensors, keys = pickles.load(f), pickles.load(f)
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise Refused("damaged: its list of storages cannot be read")
    return tensors, _legacy_places(f, keys, _storages(tensors))


def _storages(tensors: object) -> dict[str, Storage]:
    return {t.storage.key: t.storage for _, t in _named(tensors)}


def _legacy_places(f: BinaryIO, keys: list[str], storages: dict[str, Storage]) -> dict[str, tuple[int, int]]:
    """Each storage is its number of elements (int64), then its bytes; their width is known from the pickle."""
    at, size = f.tell(), f.seek(0, io.SEEK_END)
    places = {}
    for key in keys:
        f.seek(at)
        numel = int.from_bytes(f.read(8), "little")
        if key not in storages or key in places:
            raise Refused(f"damaged: no tensor uses its storage {key!r}, so what follows cannot be found")
        nbytes = numel * DTYPE_BYTES[storages[key].dtype]
        if at + 8 + nbytes > size:
            raise Refused(f"cut short: storage {key!r} needs {nbytes:,} bytes, the file ends after {size - at - 8:,}")
        places[key] = (at + 8, nbytes)
        at += 8 + nbytes
    if at != size:
        raise Refused(f"damaged: {size - at:,} bytes follow its last storage")
    return places
