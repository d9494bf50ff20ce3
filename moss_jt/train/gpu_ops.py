"""What a GPU computes in training beside its matrix products: one op, which launches one of the kernels of train.cuh a call.

All of it works on device memory that addresses describe, rows of float32 so many numbers apart, and is launched on Jittor's
stream in the order of the calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from ..ops.kernel import header
from ..runtime import compiling, float_environment_kept, jittor

# As train.cuh declares them.
CALL = np.dtype([("what", "i8"), ("n", "i8", 6), ("f", "f8", 2), ("p", "u8", 8)])
(
    _DEQUANTISE, _EMBED, _NORM, _NORM_BACKWARD, _TURN, _WEIGH, _WEIGH_BACKWARD, _GELU, _GELU_BACKWARD, _RESIDUAL, _DROP,
    _CROSS_ENTROPY, _ZERO,
) = range(13)  # fmt: skip
_SOURCE = """
const auto call = (const moss_cuda::TrainCall*)(uintptr_t)data["call"];
if (call) moss_cuda::run_train(*call, 0);
"""


class Coded(NamedTuple):
    """A stored matrix (docs/formats.md) on the device: ``n`` outputs of ``k`` inputs. Addresses: 0 where there is none."""

    bits: int
    n: int
    k: int
    group: int
    q: int
    scale: int = 0
    zero: int = 0
    order: int = 0


class Mask(NamedTuple):
    """Which inputs of an adapter are left out: the masks of train_linear.h."""

    seed: int
    dropout: float


class Kernels:
    """Arguments are addresses, and counts of rows and of the numbers in them."""

    def prepare(self) -> None:
        """Compile the op, which takes a minute the first time on a machine, and says so. Raises MossError where it fails."""
        self._spare = jittor().array(np.zeros(1, np.float32))
        with float_environment_kept(), compiling(source(), _SOURCE), self.issuing():
            self._op(0)

    @contextmanager
    def issuing(self) -> Iterator[None]:
        """Around all calls: Jittor launches them on the device."""
        with jittor().flag_scope(lazy_execution=1, no_grad=1, use_cuda=1):
            yield

    def dequantise(self, w: Coded, first: int, count: int, to: int) -> None:
        """Rows from ``first``, a multiple of 16, on, as floats (count, k), inputs in the model's order."""
        self._run(_DEQUANTISE, (count, first, w.bits, w.n, w.k, w.group), (), (w.q, w.scale, w.zero, w.order, to))

    def embed(self, halves: int, x: int, rows: int, d: int) -> None:
        """x = halves."""
        self._run(_EMBED, (rows, d), (), (halves, x))

    def norm(self, x: int, which: int, weight: int, bias: int, eps: float, y: int, stats: int, rows: int, d: int) -> None:
        """y (rows, d) of rows ``which`` (int32) of x, by default all; stats (rows, 2) for the way back."""
        self._run(_NORM, (rows, d), (eps,), (x, which, weight, bias, y, stats))

    def norm_backward(self, x: int, which: int, stats: int, weight: int, dy: int, dx: int, rows: int, d: int) -> None:
        """dx += the derivative, in rows ``which``."""
        self._run(_NORM_BACKWARD, (rows, d), (), (x, which, stats, weight, dy, dx))

    def turn(
        self, y: int, stride: int, angles: int, tokens: int, heads: int, size: int, rotary: int, way: int, rows: int
    ) -> None:
        """Rotary embedding of ``heads`` heads side by side; angles (2, tokens, rotary / 2). ``way`` -1: back."""
        self._run(_TURN, (rows, stride, tokens, heads, size, rotary), (way,), (y, angles))

    def weigh(self, scores: int, tokens: int, scale: float, rows: int) -> None:
        """Causal softmax of scale times scores (rows, tokens), in place."""
        self._run(_WEIGH, (rows, tokens), (scale,), (scores,))

    def weigh_backward(self, weights: int, d: int, tokens: int, scale: float, rows: int) -> None:
        """In place of the weights' derivatives the scores'."""
        self._run(_WEIGH_BACKWARD, (rows, tokens), (scale,), (weights, d))

    def gelu(self, f: int, f_stride: int, bias: int, g: int, g_stride: int, rows: int, n: int) -> None:
        """f += bias; g = gelu_new(f)."""
        self._run(_GELU, (rows, f_stride, g_stride, n), (), (f, bias, g))

    def gelu_backward(self, f: int, dg: int, df: int, f_stride: int, g_stride: int, rows: int, n: int) -> None:
        """df, in rows as f's, from dg, in rows as g's."""
        self._run(_GELU_BACKWARD, (rows, f_stride, g_stride, n), (), (f, dg, df))

    def residual(self, x: int, bias: int, y: int, rows: int, d: int) -> None:
        """y = x + bias."""
        self._run(_RESIDUAL, (rows, d), (), (x, bias, y))

    def drop(self, x: int, x_stride: int, mask: Mask, y: int, y_stride: int, rows: int, n: int, add: bool) -> None:
        """y = or += x times the mask (rows, n)."""
        seed = int(np.uint64(mask.seed).view(np.int64))
        kept = 1 / (1 - np.float32(mask.dropout))
        self._run(_DROP, (rows, x_stride, y_stride, n, add, seed), (np.float32(mask.dropout) * 2**24, kept), (x, y))

    def cross_entropy(self, logits: int, bias: int, targets: int, scale: float | None, found: int, rows: int, v: int) -> None:
        """found (rows, 4): of logits + bias the largest, the sum of e^(logit - largest), the target's, and whether that is the
        first of the largest. Logits become ``scale`` times the derivative of -log p, unless it is None."""
        derive = scale is not None
        self._run(_CROSS_ENTROPY, (rows, v, derive), (scale or 0,), (logits, bias, targets, found))

    def zero(self, x: int, rows: int, d: int) -> None:
        self._run(_ZERO, (rows, d), (), (x,))

    def _run(self, what: int, n: Sequence[int], f: Sequence[float], p: Sequence[int]) -> None:
        call = np.zeros(1, CALL)
        call["what"], call["n"][0, : len(n)], call["f"][0, : len(f)], call["p"][0, : len(p)] = what, n, f, p
        self._launch(call)

    def _launch(self, call: np.ndarray) -> None:
        """Issued when this returns, and not waited for."""
        self._op(call.ctypes.data)

    def _op(self, call: int) -> None:
        given = {"cuda_header": source(), "cuda_src": _SOURCE, "data": {"call": call}}
        jittor().code((1,), "float32", [self._spare], **given).sync()


def source() -> str:
    """What the op is compiled from."""
    return header("train.cuh", "kernels_cuda")
