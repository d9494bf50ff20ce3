"""Opening a converted checkpoint: every name, shape, dtype and length is checked, then each file is mapped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import Config, read_json
from ..errors import MossError
from .layout import ALIGN, FORMAT, HEAD_FILE, WTE_FILE, Tensor, block_file, files_of

_NUMPY = {"F16": np.float16, "F32": np.float32, "I8": np.int8, "U8": np.uint8, "I32": np.int32}
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors library's own bound


@dataclass(frozen=True)
class Region:
    """Where a file's data lies: ``nbytes`` from ``start`` (a multiple of 4096), its tensors in order without gaps."""

    path: Path
    start: int
    nbytes: int
    tensors: tuple[Tensor, ...]

    def map(self) -> dict[str, np.ndarray]:
        """Map the region read-only; name -> array. Pages are read when they are first touched."""
        raw = np.memmap(self.path, np.uint8, "r", self.start, (self.nbytes,))
        arrays, at = {}, 0
        for t in self.tensors:
            arrays[t.name] = raw[at : at + t.nbytes].view(_NUMPY[t.dtype]).reshape(t.shape)
            at += t.nbytes
        return arrays


@dataclass(frozen=True)
class Weights:
    """A checked checkpoint. ``regions`` holds one Region per file: wte, each block, head."""

    folder: Path
    config: Config
    dtype: str
    regions: dict[str, Region]

    def block(self, i: int) -> dict[str, np.ndarray]:
        return self.regions[block_file(i)].map()

    def wte(self) -> dict[str, np.ndarray]:
        return self.regions[WTE_FILE].map()

    def head(self) -> dict[str, np.ndarray]:
        return self.regions[HEAD_FILE].map()

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self.regions.values())


def is_converted(folder: str | Path) -> bool:
    """Whether the folder is a converted checkpoint (as opposed to an official one). Raises MossError without a config.json."""
    return "moss_jt" in read_json(folder)


def open_weights(folder: str | Path) -> Weights:
    """Open and check a converted checkpoint. Raises MossError saying which file and tensor is wrong, and how."""
    folder = Path(folder)
    if not folder.is_dir():
        raise MossError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    raw = read_json(folder)
    ours = raw.get("moss_jt")
    if not isinstance(ours, dict):
        raise MossError(f"{folder}: not converted yet; run: moss-jt convert weights {folder} {folder.resolve().name}-jt")
    if ours.get("format") != FORMAT:
        raise MossError(f"{folder}: format {ours.get('format')!r}, this moss-jt reads {FORMAT}; convert the checkpoint again")
    if ours.get("dtype") != "fp16":
        raise MossError(f"{folder}: dtype {ours.get('dtype')!r} in config.json, this moss-jt reads fp16")
    config = Config.from_dict(raw, str(folder / "config.json"))
    regions = {name: check_file(folder / name, expected) for name, expected in files_of(config).items()}
    return Weights(folder, config, ours["dtype"], regions)


def read_header(path: Path) -> tuple[dict, int]:
    """A safetensors file's header (a dict, ``__metadata__`` left out) and where its data starts. Raises MossError."""
    try:
        with open(path, "rb") as f:
            size = f.seek(0, 2)
            f.seek(0)
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise MossError(f"{path}: not a safetensors file, or cut short ({size:,} bytes)")
            header = json.loads(f.read(length).decode())
    except FileNotFoundError:
        raise MossError(f"{path}: missing; convert the checkpoint again") from None
    except OSError as e:
        raise MossError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise MossError(f"{path}: its header is damaged; it is not a safetensors file") from None
    if not isinstance(header, dict):
        raise MossError(f"{path}: its header is damaged; it is not a safetensors file")
    header.pop("__metadata__", None)
    return header, 8 + length


def check_file(path: Path, expected: list[Tensor]) -> Region:
    """Compare a file's header and length with what the config asks for. Raises MossError at the first difference."""
    header, start = read_header(path)
    at = 0
    for t in expected:
        entry = header.pop(t.name, None)
        if not isinstance(entry, dict):
            raise MossError(f"{path}: tensor {t.name} is missing")
        if entry.get("dtype") != t.dtype:
            raise MossError(f"{path}: tensor {t.name} is {entry.get('dtype')}, expected {t.dtype}")
        if entry.get("shape") != list(t.shape):
            raise MossError(f"{path}: tensor {t.name} has shape {entry.get('shape')}, config.json asks for {list(t.shape)}")
        if entry.get("data_offsets") != [at, at + t.nbytes]:
            raise MossError(f"{path}: tensor {t.name} lies at {entry.get('data_offsets')}, expected {[at, at + t.nbytes]}")
        at += t.nbytes
    if header:
        raise MossError(f"{path}: unexpected tensor {next(iter(header))}")
    if start % ALIGN:
        raise MossError(f"{path}: its data starts at byte {start}, not at a multiple of {ALIGN}")
    if (size := path.stat().st_size) != start + at:
        raise MossError(f"{path}: {size:,} bytes long, expected {start + at:,}; it was cut short or changed")
    return Region(path, start, at, tuple(expected))
