"""Checkpoints of random weights, made in seconds: what a token costs depends on the weights' shape, not on their values."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..config import Config
from ..errors import MossError
from ..machine import MIB, disk_free, memory
from ..weights.header import header_bytes
from ..weights.layout import BITS, FORMAT, HEAD_FILE, METADATA, Tensor
from .page_cache import in_memory
from .shape import Shape

_DEVIATION = 0.02  # of the weights, as models are initialised
_POOL = 4 * MIB  # bytes of random numbers, repeated: they stay in the processor's cache, so that writing them costs no more


def moon(blocks: int) -> Config:
    """The sizes of moss-moon-003, which has 34 blocks."""
    return Config(blocks, 6144, 24, 24576, 64, 2048, 107008, bos_token_id=106028, eos_token_id=106068)


@contextmanager
def random_checkpoint(shape: Shape, parent: Path) -> Iterator[Path]:
    """A converted checkpoint in a new folder in ``parent``, which is removed at the end, whatever happens.

    Its files are on the disk and, as far as there is room, in the page cache. Raises MossError where the disk is too small.
    """
    free = min(disk_free(parent), memory().available) if in_memory(parent) else disk_free(parent)
    if shape.nbytes > free:
        raise MossError(
            f"{parent}: {shape.config.n_layer} blocks in {shape.coding} take {shape.nbytes / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free there: take fewer, or another folder with --dir"
        )
    with ExitStack() as at_the_end:
        try:
            folder = Path(at_the_end.enter_context(tempfile.TemporaryDirectory(prefix="moss-jt-bench-", dir=parent)))
            _write_all(folder, shape)
        except OSError as e:
            raise MossError(f"{parent}: cannot be written to: {e.strerror}") from None
        yield folder


def _write_all(folder: Path, shape: Shape) -> None:
    ours = {"format": FORMAT, **shape.coding.to_dict()}
    (folder / "config.json").write_text(json.dumps({"moss_jt": ours, "model_type": "moss", **asdict(shape.config)}))
    for file, tensors in shape.files.items():
        _write(folder / file, tensors, BITS[shape.coding.head_dtype if file == HEAD_FILE else shape.coding.dtype])


def _write(path: Path, tensors: list[Tensor], bits: int) -> None:
    header = header_bytes(tensors, METADATA)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, len(header) + sum(t.nbytes for t in tensors))  # writing is six times as fast
        file.write(header)
        for tensor in tensors:
            pool = memoryview(_pool(tensor.name, tensor.dtype, bits))
            for at in range(0, tensor.nbytes, len(pool)):
                file.write(pool[: tensor.nbytes - at])
        file.flush()
        os.fdatasync(file.fileno())  # or it would be written while something is timed, and could not be dropped from memory


@lru_cache(maxsize=8)
def _pool(name: str, dtype: str, bits: int) -> np.ndarray:
    """Bytes to fill a tensor of this name with, again and again."""
    count, rng = _POOL // {"F32": 4, "F16": 2, "U8": 1}[dtype], np.random.default_rng(0)
    if name.endswith(".q"):
        values = rng.integers(0, 256, count, np.uint8)
    elif name.endswith(".zero"):
        values = np.full(count, (1 << (bits - 1)) - 1, np.uint8)  # stored less one
    elif name.endswith(".scale"):  # q is one of 2^bits numbers, all as likely
        values = np.full(count, _DEVIATION * 12**0.5 / (1 << bits), np.float16)
    elif name.startswith("ln_") and name.endswith(".weight"):
        values = np.ones(count, np.float32)
    else:
        values = (rng.standard_normal(count, np.float32) * _DEVIATION).astype(np.float16 if dtype == "F16" else np.float32)
    return values.view(np.uint8)
