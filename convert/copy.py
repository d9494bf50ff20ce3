"""Writes tensors to a file in chunks, so that only a chunk is ever in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, Callable

import numpy as np

from ..weights.layout import Tensor
from .mapping import Band
from .view import cast

CHUNK = 2 << 20  # bytes read at a time: what a cache holds is read, cast and written fastest

Advance = Callable[[int], None]  # told the number of bytes just written


def write_tensor(file: BinaryIO, target: Tensor, bands: list[Band], advance: Advance) -> None:
    """Append ``target``'s bytes, cast to its dtype. Raises MossError for what cannot be read or cast, OSError for writing."""
    for rows in (rows for band in bands for rows in _chunks(band)):
        parts = [cast(view.read(), view, target.dtype) for view in rows.views]
        data = np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))
        file.write(data.data)
        advance(data.nbytes)


def _chunks(band: Band) -> Iterator[Band]:
    """Cut a band into runs of rows of about CHUNK bytes; not at all where its rows lie mixed, as when it is transposed."""
    total = band.views[0].shape[0]
    costs = [view.row_bytes for view in band.views]
    step = total if None in costs else max(1, CHUNK // sum(costs))
    for first in range(0, total, step):
        yield Band(tuple(view.rows(first, min(step, total - first)) for view in band.views))
