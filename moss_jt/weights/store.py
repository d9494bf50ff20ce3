"""Opening a converted checkpoint: every name, shape, dtype, length and order of inputs is checked, then each file is mapped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import Config, read_json
from ..errors import MossError
from .header import read_header
from .layout import ALIGN, FORMAT, HEAD_FILE, WTE_FILE, Coding, Tensor, block_file, files_of

_NUMPY = {"F16": np.float16, "F32": np.float32, "U8": np.uint8, "I32": np.int32}


@dataclass(frozen=True)
class Region:
    """Where a file's data lies: ``nbytes`` from ``start`` (a multiple of 4096), its tensors in order without gaps."""

    path: Path
    start: int
    nbytes: int
    tensors: tuple[Tensor, ...]

    def map(self) -> dict[str, np.ndarray]:
        """Map the region read-only; name -> array. Pages are read when they are first touched."""
        return arrays(np.memmap(self.path, np.uint8, "r", self.start, (self.nbytes,)), self.tensors)


def arrays(raw: np.ndarray, tensors: Iterable[Tensor]) -> dict[str, np.ndarray]:
    """Tensors that lie one after the other in ``raw`` (uint8), which may be longer; name -> array in the same memory."""
    found, at = {}, 0
    for t in tensors:
        found[t.name] = raw[at : at + t.nbytes].view(_NUMPY[t.dtype]).reshape(t.shape)
        at += t.nbytes
    return found


@dataclass(frozen=True)
class Weights:
    """A checked checkpoint. ``regions`` holds one Region per file: wte, each block, head."""

    folder: Path
    config: Config
    coding: Coding
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
    try:
        coding = Coding.from_dict(ours)
    except MossError as e:
        raise MossError(f"{folder / 'config.json'}: {e}") from None
    config = Config.from_dict(raw, str(folder / "config.json"))
    regions = {name: check_file(folder / name, expected) for name, expected in files_of(config, coding).items()}
    if coding.ordered:
        for region in regions.values():
            _check_orders(region)
    return Weights(folder, config, coding, regions)


def check_file(path: Path, expected: list[Tensor]) -> Region:
    """Compare a file's header and length with what the config asks for. Raises MossError at the first difference."""
    if not path.is_file():
        raise MossError(f"{path}: missing; convert the checkpoint again")
    header = read_header(path)
    for t in expected:
        found, _ = header.entries.get(t.name, (None, 0))
        if found is None:
            raise MossError(f"{path}: tensor {t.name} is missing")
        if found.dtype != t.dtype:
            raise MossError(f"{path}: tensor {t.name} is {found.dtype}, expected {t.dtype}")
        if found.shape != t.shape:
            raise MossError(f"{path}: tensor {t.name} has shape {list(found.shape)}, config.json asks for {list(t.shape)}")
    if unexpected := header.entries.keys() - {t.name for t in expected}:
        raise MossError(f"{path}: unexpected tensor {min(unexpected)}")
    if list(header.entries) != [t.name for t in expected]:
        raise MossError(f"{path}: its tensors lie in the order {', '.join(header.entries)}, not in that of the format")
    if header.start % ALIGN:
        raise MossError(f"{path}: its data starts at byte {header.start}, not at a multiple of {ALIGN}")
    return Region(path, header.start, sum(t.nbytes for t in expected), tuple(expected))


def _check_orders(region: Region) -> None:
    """Raises MossError unless each order holds each input once: kernels take these numbers as they are."""
    for name, x in region.map().items():
        if name.endswith(".order") and (np.sort(x) != np.arange(x.shape[1])).any():
            raise MossError(f"{region.path}: tensor {name} is damaged: it does not hold every input once")
