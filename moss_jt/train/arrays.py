"""Named arrays in a safetensors file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..convert.job import whole_file
from ..errors import MossError
from ..weights.header import header_bytes, read_header
from ..weights.layout import Tensor

FOR_PYTORCH = {"format": "pt"}  # metadata that transformers insists on
_DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64"}
_NUMPY = {name: np.dtype(numpy) for numpy, name in _DTYPES.items()}


def write_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Float32, float16 and int64 ones, one after another, whole and on the disk. Raises OSError."""
    tensors = [Tensor(name, _DTYPES[str(x.dtype)], x.shape) for name, x in arrays.items()]
    with whole_file(path) as file:
        file.write(header_bytes(tensors, metadata or {}))
        for x in arrays.values():
            file.write(np.ascontiguousarray(x).data)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Mapped, read-only. Raises MossError for a file that is damaged, or holds other dtypes."""
    found = {}
    for name, (tensor, start) in read_header(path).entries.items():
        if tensor.dtype not in _NUMPY:
            raise MossError(f"{path}: tensor {name} is {tensor.dtype}, expected one of {', '.join(_NUMPY)}")
        found[name] = (
            np.memmap(path, _NUMPY[tensor.dtype], "r", start, tensor.shape) if tensor.nbytes else np.empty(tensor.shape)
        )
    return found


def fill(path: Path, into: dict[str, np.ndarray]) -> None:
    """Read a file into arrays that are there. Raises MossError where it does not hold exactly these."""
    found = read_arrays(path)
    for name, x in into.items():
        if name not in found:
            raise MossError(f"{path}: tensor {name} is missing")
        if found[name].shape != x.shape:
            raise MossError(f"{path}: tensor {name} has shape {list(found[name].shape)}, expected {list(x.shape)}")
    if more := found.keys() - into.keys():
        raise MossError(f"{path}: unexpected tensor {min(more)}")
    for name, x in into.items():
        x[...] = found[name]
