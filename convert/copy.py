"""Writes tensors to a file in chunks, so that only a few chunks are ever in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO, Callable

import numpy as np

from ..machine import cores
from ..weights.layout import Tensor
from .mapping import Band
from .panels import Quantised, in_panels
from .quantise import quantise
from .view import cast, cast_to_quantise

CHUNK = 2 << 20  # bytes read at a time: what a cache holds is read, cast and written fastest
_BLOCK = 1 << 18  # weights quantised at a time, for the same reason
_MOST_THREADS = 16  # each holds some 10 MB; together they quantise faster than disks write

Advance = Callable[[int], None]  # told the number of bytes just written


def write_tensor(file: BinaryIO, target: Tensor, bands: list[Band], advance: Advance) -> None:
    """Append ``target``'s bytes, cast to its dtype. Raises MossError for what cannot be read or cast, OSError for writing."""
    for rows in (rows for band in bands for rows in chunks(band)):
        parts = [cast(view.read(), view, target.dtype) for view in rows.views]
        append(file, parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1), advance)


def write_quantised(file: BinaryIO, bits: int, group: int, bands: list[Band], advance: Advance) -> None:
    """Append a matrix rounded to 8 or 4 bits, ``group`` inputs sharing a scale. Raises as ``write_tensor`` does."""
    rows = (rows for band in bands for rows in chunks(band))
    write_panels(file, in_panels(in_order(partial(_quantised, bits, group), rows), bits), advance)


def write_panels(file: BinaryIO, panels: Iterable[Quantised], advance: Advance) -> None:
    """Append all of a matrix's q, then its scale, then its zero."""
    small = []
    for q, *scale_and_zero in panels:
        append(file, q, advance)
        small.append(scale_and_zero)
    for parts in zip(*small):
        append(file, np.concatenate(parts), advance)


def append(file: BinaryIO, data: np.ndarray, advance: Advance) -> None:
    file.write(np.ascontiguousarray(data).data)
    advance(data.nbytes)


def _quantised(bits: int, group: int, rows: Band) -> Quantised:
    parts = [(view.read(), view) for view in rows.views]
    step = max(1, _BLOCK // sum(view.shape[1] for view in rows.views))
    blocks = []
    for i in range(0, rows.views[0].shape[0], step):
        w = np.concatenate([cast_to_quantise(x[i : i + step], view) for x, view in parts], axis=1)
        blocks.append(quantise(w, bits, group))
    return Quantised(*map(np.concatenate, zip(*blocks)))


def in_order(work: Callable, items: Iterable) -> Iterator[Any]:
    """``map`` by several threads (numpy lets others run while it computes), never more than an item each ahead."""
    threads = min(cores().usable, _MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque = deque()
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def chunks(band: Band) -> Iterator[Band]:
    """Cut a band into runs of rows of about CHUNK bytes; not at all where its rows lie mixed, as when it is transposed."""
    total = band.views[0].shape[0]
    costs = [view.row_bytes for view in band.views]
    step = total if None in costs else max(1, CHUNK // sum(costs))
    for first in range(0, total, step):
        yield Band(tuple(view.rows(first, min(step, total - first)) for view in band.views))
