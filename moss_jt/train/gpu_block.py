"""A block with an adapter, and what follows the last one to the loss, on a GPU: train_block.h's computation, in products by
cuBLAS and the kernels of train.cuh.

A frozen matrix becomes floats some rows at a time, just before they are multiplied: so no more of it than that is there, in
whatever it is stored, and the product needs no kernel of its own. Of a block only the input is kept; backwards the rest is
computed again. Attention's weights are there for some heads of one sequence at a time, and computed again, too.
"""

from __future__ import annotations

from typing import NamedTuple

from ..config import Config
from ..cublas import Blas, Matrix
from ..weights.layout import BITS, GROUP, PANEL, Coding
from .gpu_ops import Coded, Kernels, Mask
from .gpu_plan import Space

_FLOAT = 4  # bytes


class Linear(NamedTuple):
    """A frozen matrix, and the columns of its inputs' and outputs' rows at which it begins."""

    stored: Coded
    x: int
    y: int


class Adapter(NamedTuple):
    """Of one target: addresses of A (rank, k), B (n, rank) and their derivatives, which are written, not added to. ``y``'s rows
    are in our order, and so are B's."""

    n: int
    k: int
    rank: int
    x: int
    y: int
    scale: float
    mask: Mask | None
    a: int
    b: int
    da: int
    db: int


class Side(NamedTuple):
    """What is multiplied with the same inputs."""

    linears: list[Linear]
    adapters: list[Adapter]


class Frozen(NamedTuple):
    """A block while it is lent: addresses of its vectors, and both its products."""

    norm_weight: int
    norm_bias: int
    in_bias: int
    out_bias: int
    into: Side
    out: Side


class Passes:
    """Forwards and backwards through a block, and the loss, for B sequences of T tokens, M = B T. States are at addresses,
    float32 (M, D). All is issued and nothing waited for."""

    def __init__(self, config: Config, coding: Coding, space: Space, base: int, kernels: Kernels, blas: Blas):
        self._c, self._coding, self._kernels, self._blas, self._sizes = config, coding, kernels, blas, space.sizes
        self._at = space.places(base)

    # ---- a block -------------------------------------------------------------------------------------------------------------

    def frozen(self, tensors: dict[str, int], adapters: tuple[list[Adapter], list[Adapter]]) -> Frozen:
        """A block's tensors, addresses by the names of docs/formats.md."""
        d, inner = self._c.n_embd, self._c.n_inner
        code = (BITS[self._coding.dtype], self._coding.group)
        if self._coding.ordered:  # q, k and v have one order, fc_in another
            qkv, mlp = (3 * d, d), (inner, d)
            into = [Linear(_coded(tensors, "in.weight", qkv, code), 0, 0)]
            into.append(Linear(_coded(tensors, "in.weight", mlp, code, first=3 * d, order=1), 0, 3 * d))
        else:
            into = [Linear(_coded(tensors, "in.weight", (3 * d + inner, d), code), 0, 0)]
        out = [Linear(_coded(tensors, "out.weight", (d, d + inner), code), 0, 0)]
        vectors = (tensors[name] for name in ("ln_1.weight", "ln_1.bias", "in.bias", "out.bias"))
        return Frozen(*vectors, Side(into, adapters[0]), Side(out, adapters[1]))

    def forward(self, block: Frozen, x: int, y: int, shape: tuple[int, int]) -> None:
        """y = the block of x; ``shape``: B, T."""
        self._inside(block, x, shape)
        m, d, (_, z, *_) = shape[0] * shape[1], self._c.n_embd, self._insides(shape)
        self._kernels.residual(x, block.out_bias, y, m, d)
        self._side(block.out, z, Matrix(y, d), m, add=True)

    def backward(self, block: Frozen, x: int, gradient: int, shape: tuple[int, int]) -> None:
        """``gradient``, of the block's result, becomes that of x; the adapters' are written."""
        self._inside(block, x, shape)
        c, k, m, at = self._c, self._kernels, shape[0] * shape[1], self._at
        d, (y, z, dy, dz) = c.n_embd, self._insides(shape)
        self._side_backward(block.out, z, Matrix(gradient, d), dz, m)
        f, dg, df = _column(y, 3 * d), _column(dz, d), _column(dy, 3 * d)
        k.gelu_backward(f.address, dg.address, df.address, f.stride, dg.stride, m, c.n_inner)
        self._attention_backward(y, dz, dy, shape)
        self._turn(dy, -1, shape)
        self._side_backward(block.into, Matrix(at["h"], d), dy, Matrix(at["dh"], d), m)
        k.norm_backward(x, 0, at["stats"], block.norm_weight, at["dh"], gradient, m, d)

    def _insides(self, shape: tuple[int, int]) -> tuple[Matrix, Matrix, Matrix, Matrix]:
        """y [q k v fc_in], z [attention gelu], and the places of their derivatives."""
        m, found, at = shape[0] * shape[1], [], self._at["insides"]
        widths = (3 * self._c.n_embd + self._c.n_inner, self._c.n_embd + self._c.n_inner)
        for width in widths * 2:
            found.append(Matrix(at, width))
            at += _FLOAT * m * width
        return tuple(found)

    def _inside(self, block: Frozen, x: int, shape: tuple[int, int]) -> None:
        c, k, at = self._c, self._kernels, self._at
        m, d, (y, z, *_) = shape[0] * shape[1], c.n_embd, self._insides(shape)
        k.norm(x, 0, block.norm_weight, block.norm_bias, c.layer_norm_epsilon, at["h"], at["stats"], m, d)
        self._side(block.into, Matrix(at["h"], d), y, m, add=False)
        self._turn(y, 1, shape)
        self._attention(y, z, shape)
        f, g = _column(y, 3 * d), _column(z, d)
        k.gelu(f.address, f.stride, block.in_bias, g.address, g.stride, m, c.n_inner)

    def _turn(self, y: Matrix, way: int, shape: tuple[int, int]) -> None:
        """q and k of all rows."""
        c = self._c
        tokens, rows = shape[1], shape[0] * shape[1]
        self._kernels.turn(y.address, y.stride, self._at["angles"], tokens, 2 * c.n_head, c.head_size, c.rotary_dim, way, rows)

    # ---- matrices ------------------------------------------------------------------------------------------------------------

    def _side(self, side: Side, x: Matrix, y: Matrix, rows: int, add: bool) -> None:
        """y = or += what all of a side gives for x."""
        for linear in side.linears:
            self._linear(linear, x, y, rows, add)
        for adapter in side.adapters:
            _, inner, _ = self._inner(adapter, x, rows)
            b = Matrix(adapter.b, adapter.rank, turned=True)
            self._blas.multiply(inner, b, _column(y, adapter.y), (rows, adapter.n, adapter.rank), add=True, exact=True)

    def _side_backward(self, side: Side, x: Matrix, dy: Matrix, dx: Matrix, rows: int) -> None:
        """dx, and the adapters' gradients."""
        for i, linear in enumerate(side.linears):
            self._linear_backward(linear, dy, dx, rows, add=i > 0)
        for adapter in side.adapters:
            self._adapter_backward(adapter, x, dy, dx, rows)

    def _rows(self, w: Coded):
        """Some rows of a matrix at a time, as floats: the first, how many, where."""
        most = self._sizes["weights"] // (_FLOAT * w.k) // PANEL * PANEL
        for first in range(0, w.n, most):
            count = min(most, w.n - first)
            self._kernels.dequantise(w, first, count, self._at["weights"])
            yield first, count, self._at["weights"]

    def _linear(self, linear: Linear, x: Matrix, y: Matrix, rows: int, add: bool) -> None:
        w = linear.stored
        for first, count, at in self._rows(w):
            to = _column(y, linear.y + first)
            self._blas.multiply(_column(x, linear.x), Matrix(at, w.k, turned=True), to, (rows, count, w.k), add=add)

    def _linear_backward(self, linear: Linear, dy: Matrix, dx: Matrix, rows: int, add: bool) -> None:
        w = linear.stored
        for first, count, at in self._rows(w):
            of = _column(dy, linear.y + first)
            to = _column(dx, linear.x)
            self._blas.multiply(of, Matrix(at, w.k), to, (rows, w.k, count), add=add or first > 0)

    # ---- adapters ------------------------------------------------------------------------------------------------------------
    # Their products are small, and exact: gradients of A and B are what is learned from.

    def _inner(self, a: Adapter, x: Matrix, rows: int) -> tuple[Matrix, Matrix, Matrix]:
        """What A multiplies, after dropout; scale times the product (rows, rank); and where dropout's result is."""
        given, dropped, inner = _column(x, a.x), Matrix(self._at["dropped"], a.k), Matrix(self._at["inner"], a.rank)
        if a.mask:
            self._kernels.drop(given.address, given.stride, a.mask, dropped.address, a.k, rows, a.k, add=False)
            given = dropped
        turned = Matrix(a.a, a.k, turned=True)
        self._blas.multiply(given, turned, inner, (rows, a.rank, a.k), scale=a.scale, exact=True)
        return given, inner, dropped

    def _adapter_backward(self, a: Adapter, x: Matrix, dy: Matrix, dx: Matrix, rows: int) -> None:
        given, inner, dropped = self._inner(a, x, rows)
        dy, dx, back = _column(dy, a.y), _column(dx, a.x), Matrix(self._at["inner gradient"], a.rank)
        times = self._blas.multiply
        times(dy._replace(turned=True), inner, Matrix(a.db, a.rank), (a.n, a.rank, rows), exact=True)
        times(dy, Matrix(a.b, a.rank), back, (rows, a.rank, a.n), scale=a.scale, exact=True)
        times(back._replace(turned=True), given, Matrix(a.da, a.k), (a.rank, a.k, rows), exact=True)
        size = (rows, a.k, a.rank)
        if not a.mask:
            times(back, Matrix(a.a, a.k), dx, size, add=True, exact=True)
        else:
            times(back, Matrix(a.a, a.k), dropped, size, exact=True)
            self._kernels.drop(dropped.address, a.k, a.mask, dx.address, dx.stride, rows, a.k, add=True)

    # ---- attention -----------------------------------------------------------------------------------------------------------

    def _heads(self, shape: tuple[int, int]):
        """Some heads of one sequence at a time: its first row, the first head's first column, how many."""
        (sequences, tokens), c = shape, self._c
        most = min(c.n_head, self._sizes["scores"] // (_FLOAT * tokens * tokens))
        for sequence in range(sequences):
            for head in range(0, c.n_head, most):
                yield sequence * tokens, head * c.head_size, min(most, c.n_head - head)

    def _weights(self, q: Matrix, k: Matrix, heads: int, tokens: int) -> Matrix:
        """Of so many heads side by side, (heads, T, T)."""
        size, found = self._c.head_size, Matrix(self._at["scores"], tokens)
        turned, steps = k._replace(turned=True), (size, size, tokens * tokens)
        self._blas.multiply(q, turned, found, (tokens, tokens, size), many=heads, steps=steps)
        self._kernels.weigh(found.address, tokens, size**-0.5, heads * tokens)
        return found

    def _parts(self, y: Matrix, row: int, column: int) -> list[Matrix]:
        """q, k and v from a row and a head on."""
        at = y.address + _FLOAT * row * y.stride
        return [Matrix(at + _FLOAT * (part * self._c.n_embd + column), y.stride) for part in range(3)]

    def _attention(self, y: Matrix, z: Matrix, shape: tuple[int, int]) -> None:
        tokens, size = shape[1], self._c.head_size
        for row, column, heads in self._heads(shape):
            q, k, v = self._parts(y, row, column)
            weights, to = self._weights(q, k, heads, tokens), self._parts(z, row, column)[0]
            steps = (tokens * tokens, size, size)
            self._blas.multiply(weights, v, to, (tokens, size, tokens), many=heads, steps=steps)

    def _attention_backward(self, y: Matrix, dz: Matrix, dy: Matrix, shape: tuple[int, int]) -> None:
        """Of turned q and k, and of v."""
        tokens, size, scores = shape[1], self._c.head_size, Matrix(self._at["score gradients"], shape[1])
        square = tokens * tokens
        narrow, wide = (tokens, size, tokens), (tokens, tokens, size)
        for row, column, heads in self._heads(shape):
            (q, k, v), (dq, dk, dv) = (self._parts(of, row, column) for of in (y, dy))
            weights, of = self._weights(q, k, heads, tokens), self._parts(dz, row, column)[0]

            def times(a: Matrix, b: Matrix, c: Matrix, sizes: tuple, steps: tuple, heads: int = heads) -> None:
                self._blas.multiply(a, b, c, sizes, many=heads, steps=steps)

            times(weights._replace(turned=True), of, dv, narrow, (square, size, size))
            times(of, v._replace(turned=True), scores, wide, (size, size, square))
            self._kernels.weigh_backward(weights.address, scores.address, tokens, size**-0.5, heads * tokens)
            times(scores, k, dq, narrow, (square, size, size))
            times(scores._replace(turned=True), q, dk, narrow, (square, size, size))

    # ---- the loss ------------------------------------------------------------------------------------------------------------

    def head(self, tensors: dict[str, int], x: int, count: int, scale: float | None, gradient: int, tokens: int) -> None:
        """``found``: of each of ``count`` ``rows`` of x the four numbers of cross_entropy. ``gradient`` (tokens, D), unless
        scale is None: ``scale`` times the derivative of the sum of losses."""
        c, k, at = self._c, self._kernels, self._at
        d, v, code = c.n_embd, c.vocab_size, (BITS[self._coding.head_dtype], GROUP)
        lm_head = Linear(_coded(tensors, "lm_head.weight", (v, d), code), 0, 0)
        h, dh, logits = Matrix(at["h"], d), Matrix(at["dh"], d), Matrix(at["insides"], v)
        weight, bias, stats = tensors["ln_f.weight"], tensors["ln_f.bias"], at["stats"]
        most = self._sizes["insides"] // (_FLOAT * v)
        if scale is not None:
            k.zero(gradient, tokens, d)
        for first in range(0, count, most):
            n = min(most, count - first)
            which, targets = (at[name] + _FLOAT * first for name in ("rows", "targets"))
            k.norm(x, which, weight, bias, c.layer_norm_epsilon, h.address, stats, n, d)
            self._linear(lm_head, h, logits, n, add=False)
            found = at["found"] + 4 * _FLOAT * first
            k.cross_entropy(logits.address, tensors["lm_head.bias"], targets, scale, found, n, v)
            if scale is not None:
                self._linear_backward(lm_head, logits, dh, n, add=False)
                k.norm_backward(x, which, stats, weight, dh.address, gradient, n, d)


def _column(of: Matrix, column: int) -> Matrix:
    return of._replace(address=of.address + _FLOAT * column)


def _coded(tensors: dict, name: str, shape: tuple[int, int], code: tuple[int, int], first: int = 0, order: int = 0) -> Coded:
    """Rows of a stored matrix from ``first``, the beginning of a panel, on; with the order of that number."""
    (n, k), (bits, group) = shape, code
    if name in tensors:
        return Coded(bits, n, k, group, tensors[name])
    panels, groups = first // PANEL, -(-k // group)
    q = tensors[f"{name}.q"] + panels * groups * (group * bits // 32) * 4 * PANEL
    scale = tensors[f"{name}.scale"] + panels * groups * 2 * PANEL
    zero = tensors[f"{name}.zero"] + panels * groups * PANEL
    orders = tensors.get(f"{name}.order", 0)
    return Coded(bits, n, k, group, q, scale, zero, orders and orders + 4 * order * k)
