"""Activations on the disk: a float32 matrix with a row for each token, written once from first to last, and read in chunks.

It is never mapped, because mapped pages count as the memory of the process.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

from .view import read_bytes

SUFFIX = ".spill"  # ends the names of files that are there only while a checkpoint is written


def append(file: BinaryIO, x: np.ndarray) -> None:
    """The rows x (T, K), float32, to a file that is open for writing."""
    file.write(np.ascontiguousarray(x, np.float32).data)


def read(path: Path, start: int, stop: int, width: int) -> np.ndarray:
    """Rows start ... stop, (stop - start, width). Raises MossError where the file is too short."""
    row = 4 * width
    return read_bytes(path, start * row, (stop - start) * row).view(np.float32).reshape(-1, width)
