"""GPTQ: rounds a matrix's inputs one after the other, and lets those that follow make up for what rounding took away.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023. As there, what a
group of inputs lacks reaches the others at once, in one product. But nothing large is inverted: with H = R Rᵀ, R upper, and
D = W − Ŵ of all inputs before a group, its weights move by D R[before, group] R[group, group]⁻¹, and R[group, group]⁻¹ is what
the paper's factor of H⁻¹ has there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .copy import in_order
from .panels import Quantised, with_zeros
from .quantise import best_grid, steps

_ROWS = 4096  # outputs at a time, so that a group's weights and errors stay in a core's cache
_SEARCHED = 256  # outputs whose grids one thread chooses at a time, for the same reason
_WRITTEN = 1024  # outputs at a time that are laid out to be written


class Part(NamedTuple):
    """Some of a matrix's inputs, from the one at ``start``, and the upper factor r of their Hessian. Parts are independent."""

    start: int
    r: np.ndarray


class Solved(NamedTuple):
    """A quantised matrix, inputs first: q uint8 (K, N); scale and true zero float32 (G, N)."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def solve(w: np.ndarray, parts: list[Part], bits: int, group: int) -> Iterator[Solved]:
    """Quantise w float32 (K, N), K inputs of N outputs, group by group: yields each group's (S, N), (1, N), (1, N).

    Each group's grid is chosen for its weights as they are when its turn comes. w is replaced by what the result lacks, W − Ŵ.
    """
    for start in range(0, len(w), group):
        stop = min(start + group, len(w))
        moved, inverse = _moved(w, parts, start, stop)
        moved += w[start:stop]
        scale, zero = _grids(moved, bits)
        q = np.empty(moved.shape, np.uint8)
        for at in range(0, w.shape[1], _ROWS):
            rows = slice(at, at + _ROWS)
            q[:, rows], taken = _rounded(moved[:, rows], inverse, scale[rows], zero[rows], bits)
            w[start:stop, rows] -= taken
        yield Solved(q, scale[None], zero[None])


def _moved(w: np.ndarray, parts: list[Part], start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """How far inputs start ... stop are moved by what those before them lack, (S, N); and the inverse of their square of R."""
    moved = np.zeros((stop - start, w.shape[1]), np.float32)
    inverse = np.zeros((stop - start, stop - start))
    for first, r in parts:
        low, high = max(start, first), min(stop, first + len(r))
        if low >= high:
            continue
        here, own = slice(low - start, high - start), slice(low - first, high - first)
        inverse[here, here] = np.linalg.inv(np.triu(r[own, own].astype(np.float64)))
        if low > first:
            moved[here] = inverse[here, here].T.astype(np.float32) @ (r[: own.start, own].T @ w[first:low])
    return moved, inverse.astype(np.float32)


def _grids(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The best scale and zero for each column of w (S, N), float32 (N,)."""
    rows = (w[:, at : at + _SEARCHED] for at in range(0, w.shape[1], _SEARCHED))
    found = in_order(lambda x: best_grid(np.ascontiguousarray(x.T)[:, None], bits), rows)
    return tuple(np.concatenate([x.ravel() for x in side]) for side in zip(*found))


def _rounded(w: np.ndarray, inverse: np.ndarray, scale, zero, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A group's q, uint8 (S, N), and its weights as rounded, float32 (S, N), where each input's error moves those after it."""
    errors, rounded = np.empty_like(w), np.empty_like(w)
    for j, column in enumerate(w):
        now = column - inverse[:j, j] @ errors[:j]
        rounded[j] = steps(now / scale, zero, bits)
        errors[j] = (now - rounded[j] * scale) / inverse[j, j]
    q = (rounded + zero).astype(np.uint8)
    rounded *= scale
    return q, rounded


def weights_of(solved: Solved, group: int) -> np.ndarray:
    """The quantised weights, float32 (K, N)."""
    w = solved.q.astype(np.float32)
    for g, (scale, zero) in enumerate(zip(solved.scale, solved.zero)):
        rows = w[g * group : (g + 1) * group]
        rows -= zero
        rows *= scale
    return w


def by_rows(solved: Solved, bits: int, group: int) -> Iterator[Quantised]:
    """The same as it is written, some outputs at a time. Inputs that the last group lacks become exact zeros."""
    (k, n), groups = solved.q.shape, len(solved.scale)
    for at in range(0, n, _WRITTEN):
        rows = slice(at, at + _WRITTEN)
        scale, zero = solved.scale[:, rows].T, solved.zero[:, rows].T
        q = np.repeat(zero.astype(np.int16)[..., None], group, axis=2)
        q.reshape(len(q), groups * group)[:, :k] = solved.q[:, rows].T
        yield with_zeros(q, scale, zero, bits)
