"""A whole block as one op, so that a sweep issues one for each of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..runtime import jittor
from .kernel import check, run
from .weight import Weight

_CALL = """
const int64_t D = in0_shape1, I = in4_shape0;
const moss::Heads heads{{in7_shape1, in7_shape3, 2 * in6_shape2, in7_shape2}};
const moss::Norm norm{{in1_p, in2_p, (float)data["eps"]}};
moss::block(in0_p, norm, {weight_in}, {more_in}, in4_p, {weight_out}, {more_out}, in5_p, in6_p, {cache}, heads,
            (const moss::Sequence*)in3_p, in3_shape0, out_p, in0_shape0, D, I);
"""
# The kernels' objects over keys and values, by the dtype of these.
_CACHES = {
    "float16": "moss::CacheF16{(moss::f16*)in7_p}, moss::CacheF16{(moss::f16*)in8_p}",
    "int8": "moss::CacheI8{in7_p, in9_p}, moss::CacheI8{in8_p, in10_p}",
}


class LowRank(NamedTuple):
    """What an adapter adds to a block's matrices, ``up @ down`` each, float32 Vars ``down`` (R, K) and ``up`` (N, R), one after
    the other; () where it leaves that matrix alone."""

    rows: tuple = ()  # to in.weight
    columns: tuple = ()  # to out.weight

    def check(self, shapes: tuple[tuple[int, int], ...]) -> None:
        """Raises ValueError unless they suit matrices of these two shapes (N, K)."""
        for what, those, (n, k) in zip(self._fields, self, shapes):
            if those:
                rank = those[0].shape[0]
                expected = {"down": ("float32", (rank, k)), "up": ("float32", (n, rank))}
                check(f"block: low rank of {what}", expected, down=those[0], up=those[1])


_NONE = LowRank()


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
        self._rows, self._columns = rows, columns
        self._shapes = (3 * d + inner, d), (d, d + inner)
        self._calls: dict[tuple, str] = {}

    def _call(self, dtype: str, low_rank: LowRank) -> str:
        key = (dtype, *map(bool, low_rank))
        if key not in self._calls:
            first = 9 if dtype == "float16" else 11
            second = first + len(self._rows.parts)
            third = second + len(self._columns.parts)
            self._calls[key] = _CALL.format(
                weight_in=self._rows.code(first, "3 * D + I", "D"),
                more_in=_low_rank(third, low_rank.rows),
                weight_out=self._columns.code(second, "D", "D + I"),
                more_out=_low_rank(third + len(low_rank.rows), low_rank.columns),
                cache=_CACHES[dtype],
            )
        return self._calls[key]

    def __call__(self, x, angles, cache: list, sequences, low_rank: LowRank = _NONE):
        """The new state of T tokens, of one or several sequences.

        x float32 (T, D). angles float32 (2, C, rotary/2) from ``rotary_angles``. cache: keys and values of B sequences, float16
        (B, H, C, S) each; or int8 and, float32 (B, H, C) each, the scales of keys and of values. **Written in place**, k after
        rotary. sequences from ``sequences``. low_rank is added to the weights. Returns float32 (T, D).
        """
        (places, heads, capacity, _), (_, _, pairs), dtype = cache[0].shape, angles.shape, str(cache[0].dtype)
        expected = {"x": ("float32", (x.shape[0], self._d)), "angles": ("float32", (2, capacity, pairs))}
        row = (places, heads, capacity)
        numbers = ("int8" if dtype == "int8" else "float16", (*row, self._d // heads))
        expected.update(keys=numbers, values=numbers)
        if dtype == "int8":
            expected.update(key_scales=("float32", row), value_scales=("float32", row))
        check("block", expected, **dict(zip(expected, [x, angles, *cache])))
        inputs = [x, *self._norm, sequences, *self._rest, angles, *cache, *self._rows.parts, *self._columns.parts]
        low_rank.check(self._shapes)
        call = self._call(dtype, low_rank)
        return run("block.h", x.shape, [*inputs, *low_rank.rows, *low_rank.columns], call, eps=self._eps)


def _low_rank(first: int, those: tuple) -> str:
    """C++ for it, where it is the op's inputs from number ``first`` on."""
    return f"moss::LowRank{{in{first}_p, in{first + 1}_p, in{first}_shape0}}" if those else "moss::LowRank{nullptr, nullptr, 0}"


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
