"""The ops of training: a block, what follows the last one to the loss, the embedding, and what an optimizer does. Each has an
explicit derivative.

As on a GPU (``ops/sweep.py``), weights and gradients are memory that a table of addresses describes, so that they can lie
anywhere, and an op adds to the gradients in place. States are Vars, float32 (M, D), M = B·T.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np

from ..config import Config
from ..ops.kernel import header, run
from ..ops.rotary import rotary_angles
from ..runtime import compiling, float_environment_kept, jittor
from .parameter import Parameter

# As train_linear.h and train_block.h declare them: everything has 8 bytes.
LEARNED = np.dtype([("value", "u8"), ("gradient", "u8")])
LINEAR = np.dtype(
    [(name, "i8") for name in ("N", "K", "x", "y", "bits", "group")]
    + [(name, "u8") for name in ("q", "scale", "zero", "order", "gradient")]
)
ADAPTER = np.dtype(
    [(name, "i8") for name in ("N", "K", "rank", "x", "y", "parts")]
    + [("scale", "f8"), ("dropout", "f8")]
    + [(name, "u8") for name in ("seed", "a", "b", "da", "db")]
)
BLOCK = np.dtype(
    [(name, LEARNED) for name in ("norm_weight", "norm_bias", "in_bias", "out_bias")]
    + [(name, "i8") for name in ("n_in", "n_out", "n_adapters_in", "n_adapters_out")]
    + [("in", LINEAR, 2), ("out", LINEAR, 2), ("adapters_in", ADAPTER, 2), ("adapters_out", ADAPTER, 2)]
)
HEAD = np.dtype([(name, LEARNED) for name in ("norm_weight", "norm_bias", "bias")] + [("lm_head", LINEAR)])
_SIZES = np.dtype(
    [(name, "i8") for name in ("B", "T", "D", "I", "H", "rotary", "official")] + [("eps", "f8"), ("angles", "u8")]
)

# One op for all that is done: so there is one thing to compile.
_FORWARD, _BACKWARD, _HEAD, _EMBEDDING, _ADAMW, _SQUARES = range(6)
_SOURCE = """
using namespace moss;
const auto number = [&](const char* name) { return (int64_t)data[name]; };
const auto at = [&](const char* name) { return reinterpret_cast<float*>((uintptr_t)number(name)); };
const int what = (int)number("what");
const int64_t M = in0_shape0, D = in0_shape1, n = number("n");
if (what == 0) block_forward(*(const BlockLearned*)at("table"), *(const Sizes*)at("sizes"), in0_p, out_p);
if (what == 1) block_backward(*(const BlockLearned*)at("table"), *(const Sizes*)at("sizes"), in0_p, in1_p, out_p);
if (what == 2) {
    const Sums sums = head(*(const HeadLearned*)at("table"), in0_p, (const int64_t*)at("rows"), (const int64_t*)at("targets"),
                           n, D, data["eps"], (float)data["scale"], number("derive") ? out_p : nullptr, M);
    ((double*)at("sums"))[0] = sums.loss, ((double*)at("sums"))[1] = (double)sums.right;
}
if (what == 3) embedding_backward((const int32_t*)at("ids"), in0_p, at("gradient"), M, D);
if (what == 4)
    adamw(at("value"), at("gradient"), at("m"), at("v"), n, (float)data["shrink"], (float)data["rate"], (float)data["root"],
          data["beta1"], data["beta2"], (float)data["eps"]);
if (what == 5) *(double*)at("sums") = sum_of_squares(at("value"), n);
"""


def prepare() -> None:
    """Compile the op, which takes a minute the first time on a machine, and says so. Raises MossError where it fails."""
    with float_environment_kept(), compiling(header("train_block.h"), _SOURCE):
        sum_of_squares(np.zeros(1, np.float32))


class Sizes:
    """Of a batch, B sequences of T tokens, as the kernels take them. ``official``: whether q, k and v lie as in qkv_proj."""

    def __init__(self, config: Config, B: int, T: int, official: bool):
        c, self._angles = config, rotary_angles(T, config.rotary_dim)
        sizes = (B, T, c.n_embd, c.n_inner, c.n_head, c.rotary_dim, official)
        self.table = np.array([(*sizes, c.layer_norm_epsilon, address(self._angles))], _SIZES)


class Block:
    """``block(x)``: what a table (BLOCK, one entry) describes, of a state of B sequences.

    ``lend(backward)`` is a context that gives the table, for as long as what it points to may be used. It is asked once
    forwards, and once backwards, where what ``forward`` did is computed again, for of that x alone was kept. Backwards the
    table's gradients grow.
    """

    def __init__(self, lend: Callable[[bool], AbstractContextManager[np.ndarray]], sizes: Sizes):
        self._lend, self._sizes, self._x = lend, sizes, None

    def forward(self, x):
        self._x = x
        with self._lend(False) as table:
            return self._run(_FORWARD, table, [x, _nothing()])

    def backward(self, dy):
        """dx."""
        with self._lend(True) as table:
            return self._run(_BACKWARD, table, [self._x, dy])

    def _run(self, what: int, table: np.ndarray, inputs: list):
        return _run(what, inputs[0].shape, inputs, table=address(table), sizes=address(self._sizes.table))

    def __call__(self, x):
        """Differentiable by Jittor."""
        return differentiable(self.forward, self.backward)(x)


class Head:
    """``head(x)``: the sum of -log p of ``targets`` (n,), where ``rows`` (n,) of the state predict them, float32 (1,); of the
    last norm and lm_head, in a table (HEAD, one entry)."""

    def __init__(self, table: np.ndarray, rows: np.ndarray, targets: np.ndarray, eps: float):
        rows, targets = (np.ascontiguousarray(a, np.int64) for a in (rows, targets))
        self._sums, self._x = np.zeros(2), None
        self._data = {"table": address(table), "rows": address(rows), "targets": address(targets), "n": len(rows)}
        self._data.update(sums=address(self._sums), eps=eps)
        self._keep = (table, rows, targets)

    def measure(self, x) -> tuple[float, int]:
        """The sum of -log p, and how many targets were the likeliest."""
        _run(_HEAD, (1, 1), [x, _nothing()], scale=1, derive=0, **self._data)
        return float(self._sums[0]), int(self._sums[1])

    def derive(self, x, scale: float) -> tuple[float, int, Any]:
        """The same, and dx: ``scale`` times the sum's derivative. The table's gradients grow."""
        dx = _run(_HEAD, x.shape, [x, _nothing()], scale=scale, derive=1, **self._data)
        return float(self._sums[0]), int(self._sums[1]), dx

    def forward(self, x):
        self._x = x
        return jittor().array(np.array([self.measure(x)[0]], np.float32))

    def backward(self, dy):
        return self.derive(self._x, float(dy.numpy()[0]))[2]

    def __call__(self, x):
        """Differentiable by Jittor."""
        return differentiable(self.forward, self.backward)(x)


def embed_backward(ids: np.ndarray, dx, gradient: np.ndarray) -> None:
    """Add the rows of dx (M, D) to those of ``gradient`` (V, D) that ``ids``, int32 (M,), say."""
    _run(_EMBEDDING, (1, 1), [dx, _nothing()], ids=address(ids), gradient=address(gradient))


def adamw(p: Parameter, m: np.ndarray, v: np.ndarray, **numbers: float) -> None:
    """One step in place; ``numbers`` are those of train_rows.h."""
    addresses = {"value": p.value, "gradient": p.gradient, "m": m, "v": v}
    _run(_ADAMW, (1, 1), [_nothing()] * 2, n=p.value.size, **{k: address(a) for k, a in addresses.items()}, **numbers)


def sum_of_squares(x: np.ndarray) -> float:
    """Of float32, contiguous; in double."""
    found = np.zeros(1)
    _run(_SQUARES, (1, 1), [_nothing()] * 2, value=address(x), n=x.size, sums=address(found))
    return float(found[0])


def differentiable(forward: Callable, backward: Callable):
    """A function of one Var whose derivative Jittor knows: forward(x), and backward(dy) -> dx."""
    return _function()(forward, backward)


@cache
def _function() -> type:
    class Function(jittor().Function):
        def __init__(self, forward: Callable, backward: Callable):
            super().__init__()
            self.execute, self.grad = forward, backward

    return Function


@cache
def _nothing():
    return jittor().array(np.zeros((1, 1), np.float32))


def _run(what: int, shape: tuple[int, ...], inputs: list, **numbers: float):
    """Run at once: what it points to may change afterwards. All that it takes and gives has two dimensions: Jittor compiles an
    op again for every other number of them."""
    with jittor().flag_scope(lazy_execution=0):
        result = run("train_block.h", shape, inputs, _SOURCE, what=what, **{"n": 0, **numbers})
        result.sync()
    return result


def address(array: np.ndarray) -> int:
    return array.ctypes.data
