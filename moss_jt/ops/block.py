"""A whole block as one op, so that a sweep issues one for each of them."""

from __future__ import annotations

import numpy as np

from ..runtime import jittor
from .kernel import check, run
from .weight import Weight

_CALL = """
const int64_t D = in0_shape1, I = in4_shape0;
const moss::Heads heads{{in7_shape1, in7_shape3, 2 * in6_shape2, in7_shape2}};
const moss::Norm norm{{in1_p, in2_p, (float)data["eps"]}};
moss::block(in0_p, norm, {weight_in}, in4_p, {weight_out}, in5_p, in6_p, (moss::f16*)in7_p, (moss::f16*)in8_p, heads,
            (const moss::Sequence*)in3_p, in3_shape0, out_p, in0_shape0, D, I);
"""


class Block:
    """A block's weights, and ``block(x, …)``: x + out_proj(attention(h)) + fc_out(gelu_new(fc_in(h))), h = ln_1(x).

    tensors: name -> Var, as docs/formats.md names and shapes them for D inputs and I of the MLP, matrices in ``bits`` bits.
    They are read when the block is called, so memory behind them may change in between. Raises ValueError for a wrong shape.
    """

    def __init__(self, tensors: dict, bits: int, eps: float):
        (d,), (inner,) = tensors["ln_1.weight"].shape, tensors["in.bias"].shape
        rows, columns = Weight.of(tensors, "in.weight", bits), Weight.of(tensors, "out.weight", bits)
        vectors = {name: ("float32", (d,)) for name in ("ln_1.weight", "ln_1.bias", "out.bias")}
        check("block", vectors, **{name: tensors[name] for name in vectors})
        rows.check("block: in.weight", 3 * d + inner, d)
        columns.check("block: out.weight", d, d + inner)
        self._d, self._eps = d, eps
        self._norm = [tensors["ln_1.weight"], tensors["ln_1.bias"]]
        self._rest = [tensors["in.bias"], tensors["out.bias"]]
        self._weights = [*rows.parts, *columns.parts]
        weight_in = rows.code(9, "3 * D + I", "D")
        self._call = _CALL.format(weight_in=weight_in, weight_out=columns.code(9 + len(rows.parts), "D", "D + I"))

    def __call__(self, x, angles, keys, values, sequences):
        """The new state of T tokens, of one or several sequences.

        x float32 (T, D). angles float32 (2, C, rotary/2) from ``rotary_angles``. keys, values float16 (B, H, C, S): the caches
        of B sequences; **written in place**, k after rotary. sequences from ``sequences``. Returns float32 (T, D).
        """
        (places, heads, capacity, _), (_, _, pairs) = keys.shape, angles.shape
        cache = ("float16", (places, heads, capacity, self._d // heads))
        expected = {"x": ("float32", (x.shape[0], self._d)), "angles": ("float32", (2, capacity, pairs))}
        check("block", {**expected, "keys": cache, "values": cache}, x=x, angles=angles, keys=keys, values=values)
        inputs = [x, *self._norm, sequences, *self._rest, angles, keys, values, *self._weights]
        return run("block.h", x.shape, inputs, self._call, eps=self._eps)


def sequences(table: np.ndarray, tokens: int, places: int, capacity: int):
    """Which rows of a block's input belong to which sequence, as a Var int32 (n, 4) for all blocks of a sweep.

    table: a row for each sequence: its place in the caches, the tokens it has there, its first row, and how many are its.
    Raises ValueError where that lies outside of ``tokens`` rows, or of caches of ``places`` sequences with ``capacity`` tokens.
    """
    place, start, first, count = table.T
    if min(table.min(), count.min() - 1) < 0 or place.max() >= places or (first + count).max() > tokens:
        raise ValueError(f"block: {table.tolist()} does not describe rows of {tokens} and {places} caches")
    if (start + count).max() > capacity:
        raise ValueError(f"block: {(start + count).max()} tokens do not fit a cache of {capacity}")
    return jittor().array(np.ascontiguousarray(table, np.int32))
