"""How int8 and int4 matrices lie in a file: sixteen rows together, a group of inputs after the other (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..weights.layout import PANEL


class Quantised(NamedTuple):
    """N rows of G groups of S inputs, row by row: q uint8 (N, G, S), scale float16 (N, G), zero uint8 (N, G), less one."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def with_zeros(q: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> Quantised:
    """From zeros that are whole numbers 0 ... 256 of any dtype. One of 0 cannot be stored, but its group can, mirrored:
    (q - 0) * scale is (top - q - top) * -scale, with top the largest q."""
    none, top = zero == 0, 2**bits - 1
    if none.any():
        q = np.where(none[..., None], top - q, q)
        scale, zero = np.where(none, -scale, scale), np.where(none, top, zero)
    return Quantised(q.astype(np.uint8), scale.astype(np.float16), (zero - 1).astype(np.uint8))


def in_panels(parts: Iterable[Quantised], bits: int) -> Iterator[Quantised]:
    """The same rows as they are stored, P panels at a time: q (P, G, S·bits/32, 64), scale and zero (P, G, 16). Rows that the
    last panel lacks are zeros."""
    kept: list[Quantised] = []
    for part in parts:
        kept.append(part)
        if (count := sum(len(p.q) for p in kept)) >= PANEL:
            rows = Quantised(*map(np.concatenate, zip(*kept)))
            whole = count // PANEL * PANEL
            yield _pack(Quantised(*(x[:whole] for x in rows)), bits)
            kept = [Quantised(*(x[whole:] for x in rows))]
    rows = Quantised(*map(np.concatenate, zip(*kept)))
    if missing := -len(rows.q) % PANEL:
        yield _pack(Quantised(*(np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in rows)), bits)


def packed(q: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of 8 or 4 bits (..., M) as bytes (..., M·bits/8), the first one lowest; both uint8."""
    return q if bits == 8 else q[..., 0::2] | q[..., 1::2] << 4


def unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    """Bytes (..., B) as the numbers of 8 or 4 bits in them (..., B·8/bits), the lowest one first; both uint8."""
    return data if bits == 8 else np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def rows_of(q: np.ndarray, bits: int, first: int, end: int) -> np.ndarray:
    """Rows [first, end) of a stored q (P, G, S·bits/32, 64), uint8 (end - first, G·S)."""
    some = q[first // PANEL : -(-end // PANEL)]
    panels, groups, chunks, _ = some.shape
    data = some.reshape(panels, groups, chunks, PANEL, 4).transpose(0, 3, 1, 2, 4).reshape(panels * PANEL, -1)
    return unpacked(data, bits)[first % PANEL :][: end - first]


def _pack(rows: Quantised, bits: int) -> Quantised:
    n, groups, group = rows.q.shape
    q = packed(rows.q.reshape(n // PANEL, PANEL, groups, group * bits // 32, 32 // bits), bits)
    scale, zero = (x.reshape(n // PANEL, PANEL, groups).transpose(0, 2, 1) for x in (rows.scale, rows.zero))
    return Quantised(q.transpose(0, 2, 3, 1, 4).reshape(n // PANEL, groups, -1, 4 * PANEL), scale, zero)


def from_panels(q: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> Quantised:
    """Stored panels q (P, G, S·bits/32, 64), scale and zero (P, G, 16) as their rows, 16·P of them."""
    rows, groups = PANEL * len(q), q.shape[1]
    scale, zero = (x.transpose(0, 2, 1).reshape(rows, groups) for x in (scale, zero))
    return Quantised(rows_of(q, bits, 0, rows).reshape(rows, groups, -1), scale, zero)


def dequantised(rows: Quantised) -> np.ndarray:
    """The weights (N, G·S), float32: exact, for q less its zero has 9 bits and the scale 11."""
    steps = rows.q.astype(np.float32) - (rows.zero.astype(np.float32) + 1)[..., None]
    return (steps * rows.scale.astype(np.float32)[..., None]).reshape(len(steps), -1)
