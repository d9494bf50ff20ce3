"""Whether a checkpoint's files are in memory: seeing to it, undoing it, and telling what came from the disk meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from .. import machine
from ..errors import MossError
from ..weights import Weights
from ..weights.layout import WTE_FILE
from .shape import Shape

_WORK = 1 << 30  # bytes that measuring needs besides weights and cache


def in_memory(folder: Path) -> bool:
    """Whether files there are in memory and nowhere else."""
    return machine.filesystem(folder) in ("tmpfs", "ramfs")


def check_room(shape: Shape, folder: Path, kv_cache: str = "fp16") -> None:
    """Raises MossError unless memory holds all that a token reads, with a cache for the whole context."""
    cache = shape.config.cache_bytes_per_token(kv_cache) * shape.config.n_ctx
    needed, there = _WORK + cache + (0 if in_memory(folder) else shape.token_bytes), machine.memory().available
    if needed > there:
        raise MossError(
            f"measuring from memory needs {needed / 1e9:.2f} GB of it, and {there / 1e9:.2f} GB are available: "
            "take a smaller checkpoint, fewer random blocks or another dtype, or measure with bench swap"
        )


def fill(weights: Weights) -> None:
    """Read the files that a token reads, so that they are in the page cache."""
    buffer = memoryview(bytearray(8 << 20))
    for path in _files(weights):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(weights: Weights) -> None:
    """Ask Linux to forget the files that a token reads. It keeps what somebody has mapped, or what is in memory only."""
    for path in _files(weights):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int | None:
    """What this process has read from disks so far, whichever way; None where Linux does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def _files(weights: Weights) -> list[Path]:
    return [region.path for name, region in weights.regions.items() if name != WTE_FILE]
