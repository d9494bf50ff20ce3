"""One matrix by GPTQ: from what its inputs were in calibration to what is stored, and how far off its outputs are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..config import Config
from ..weights.layout import BITS, Coding
from . import hessian
from .copy import chunks, in_order
from .gptq_solver import Part, Solved, solve
from .mapping import Band
from .quantise import nearest
from .view import cast_to_quantise
from .work import SEARCH, Work

Squares = dict[str, dict[str, float]]  # official matrix -> what of its outputs -> the sum of its squares

DAMPING = 0.01  # of a Hessian's mean diagonal, added to it; the paper's


@dataclass(frozen=True)
class Matrix:
    """One of a block's two: N outputs of K inputs. ``places``: where, rows and columns, the official ones are in it.
    ``parts``: inputs that are quantised independently of the others."""

    name: str
    n: int
    k: int
    places: dict[str, tuple[slice, slice]]
    parts: tuple[range, ...]
    orders: int  # how many lists of its inputs' order are stored

    # Floating-point operations of the steps of quantising it, for their progress.
    @property
    def to_add(self) -> int:
        """A token to the Hessians."""
        return sum(len(part) ** 2 for part in self.parts)

    @property
    def to_multiply(self) -> int:
        """A token by the weights."""
        return 2 * self.n * self.k

    @property
    def to_factor(self) -> int:
        return sum(len(part) ** 3 // 3 for part in self.parts)

    @property
    def to_solve(self) -> int:
        """An input."""
        return self.n * (self.k + SEARCH)


def matrices(config: Config) -> tuple[Matrix, Matrix]:
    """The in-product's and the out-product's."""
    d, inner = config.n_embd, config.n_inner
    every, qkv, fc_in = slice(0, d), slice(0, 3 * d), slice(3 * d, 3 * d + inner)
    attended, widened = slice(0, d), slice(d, d + inner)
    parts = range(0, d), range(d, d + inner)
    return (
        Matrix("in.weight", 3 * d + inner, d, {"attn.qkv_proj": (qkv, every), "mlp.fc_in": (fc_in, every)}, parts[:1], 2),
        Matrix("out.weight", d, d + inner, {"attn.out_proj": (every, attended), "mlp.fc_out": (every, widened)}, parts, 1),
    )


class Inputs:
    """A product's inputs in calibration, as far as quantising needs them: each part's Hessian, and some of the inputs."""

    def __init__(self, matrix: Matrix):
        self.parts = matrix.parts
        self.hessians = [np.zeros((len(part), len(part)), np.float32) for part in matrix.parts]
        self._sampled: list[np.ndarray] = []

    def add(self, x: np.ndarray, sampled: np.ndarray) -> None:
        """More inputs (T, K); ``sampled``: the indices of those that are to be kept."""
        for part, h in zip(self.parts, self.hessians):
            hessian.add(h, x[:, part.start : part.stop])
        self._sampled.append(x[sampled])

    @property
    def sample(self) -> np.ndarray:
        return np.concatenate(self._sampled)


class Result(NamedTuple):
    """``order``: which input is where in what was solved. ``errors``: official matrix -> method -> how far its outputs are
    off, root mean square, relative to the outputs."""

    solved: Solved
    order: np.ndarray
    errors: dict[str, dict[str, float]]


def quantise_matrix(matrix: Matrix, bands: list[Band], inputs: Inputs, coding: Coding, work: Work) -> Result:
    """Quantise what ``bands`` hold, (N, K), in the way of ``coding``. Uses up the Hessians, which can be most of the memory."""
    bits = BITS[coding.dtype]
    orders, parts = [], []
    for part in matrix.parts:
        h = inputs.hessians.pop(0)
        hessian.mirror(h)
        order = np.arange(len(h))
        if coding.ordered:
            order = np.argsort(-h.diagonal(), kind="stable")
            h = hessian.reordered(h, order)
        hessian.factor(h, DAMPING)
        work.did(len(h) ** 3 / 3)
        orders.append(part.start + order)
        parts.append(Part(part.start, h))
    order = np.concatenate(orders)
    squares = {name: {"signal": 0.0, "rtn": 0.0, "gptq": 0.0} for name in matrix.places}
    w = _load(matrix, bands, order, inputs.sample, coding, squares, work)
    pieces = []
    for piece in solve(w, parts, bits, coding.group):
        pieces.append(piece)
        work.did(matrix.to_solve * len(piece.q))
    _measure_gptq(matrix, w, order, inputs.sample, squares)
    errors = {name: {m: _relative(s[m], s["signal"]) for m in ("rtn", "gptq")} for name, s in squares.items()}
    return Result(Solved(*map(np.concatenate, zip(*pieces))), order, errors)


def _load(
    matrix: Matrix, bands: list[Band], order: np.ndarray, sample: np.ndarray, coding: Coding, squares: Squares, work: Work
) -> np.ndarray:
    """The matrix's transpose (K, N), its inputs in this order. Meanwhile: its outputs, and their errors by round to nearest."""
    bits = BITS[coding.dtype]

    def read(rows: Band) -> tuple[np.ndarray, np.ndarray]:
        w = np.concatenate([cast_to_quantise(view.read(), view) for view in rows.views], axis=1)
        return w, w - nearest(w, bits, coding.group)

    found, at = np.empty((matrix.k, matrix.n), np.float32), 0
    for w, lacks in in_order(read, (rows for band in bands for rows in chunks(band))):
        found[:, at : at + len(w)] = w.T[order]
        for name, (rows, columns) in matrix.places.items():
            here = slice(max(rows.start - at, 0), max(rows.stop - at, 0))
            for what, x in (("signal", w), ("rtn", lacks)):
                squares[name][what] += _square(sample[:, columns] @ x[here, columns].T)
        at += len(w)
        work.did(SEARCH * w.size)
    return found


def _measure_gptq(matrix: Matrix, lacks: np.ndarray, order: np.ndarray, sample: np.ndarray, squares: Squares) -> None:
    for name, (rows, columns) in matrix.places.items():  # an order keeps each part's inputs where the part is
        squares[name]["gptq"] = _square(sample[:, order[columns]] @ lacks[columns, rows])


def _square(x: np.ndarray) -> float:
    return float(np.square(x, dtype=np.float64).sum())


def _relative(error: float, signal: float) -> float:
    return (error / signal) ** 0.5 if signal else 0.0
