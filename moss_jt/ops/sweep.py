"""Sweeps on a GPU: one op for all blocks that lie on the device, and one for what follows them.

What they work on is not Jittor's: weights, caches and work space are device memory that tables of addresses describe, so that
a block can be anywhere. Their results are Vars. All of it is launched on Jittor's stream, in the order of the calls.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..config import Config
from ..runtime import jittor
from ..weights.layout import BITS, GROUP, Coding
from .kernel import header

MOST_ROWS = 16  # whose logits are wanted at a time, as rows.cuh has it
MOST_LIKELIEST = 64  # tokens of a row, as top.cuh has it

# As sweep.cuh declares them.
_MATRIX = [(name, "u8") for name in ("q", "scale", "zero", "order")]
_BLOCK = np.dtype(
    [(name, "u8") for name in ("ln_1.weight", "ln_1.bias", "in.bias", "out.bias")]
    + [("in.weight", _MATRIX), ("out.weight", _MATRIX)]
    + [(name, "u8") for name in ("keys", "values", "key_scales", "value_scales")]
)
_HEAD = np.dtype(
    [(name, "u8") for name in ("ln_f.weight", "ln_f.bias", "lm_head.bias")] + [("lm_head.weight", _MATRIX), ("rows", "i8")]
)
_SIZES = ("D", "I", "V", "heads", "rotary", "context", "bits", "group", "ordered", "head_bits", "head_group", "cache_bits")
_PENALTIES = np.dtype([("start", "i4", MOST_ROWS + 1), ("by", "f4", MOST_ROWS)])
_MODEL = np.dtype([(name, "i8") for name in _SIZES] + [("angles", "u8"), ("eps", "f8")])


_SETUP = """
using namespace moss_cuda;
const auto at = [&](const char* name) { return reinterpret_cast<char*>(static_cast<uintptr_t>(data[name])); };
const ModelSizes& model = *(const ModelSizes*)at("model");
const Space space(model, (int64_t)data["tokens"], MOST_ROWS, at("space"));
"""
_BYTES = """
const int64_t bytes = space_bytes(model, (int64_t)data["tokens"], MOST_ROWS, (int64_t)data["places"]);
check(cudaMemcpy(out_p, &bytes, 8, cudaMemcpyHostToDevice), "cudaMemcpy");
"""
_BLOCKS = """
run_blocks(model, (const BlockTensors*)at("blocks"), (int64_t)data["n"], (const half*)at("embedded"),
           (const Sequence*)at("sequences"), (int64_t)data["n_sequences"], (int64_t)data["T"], space, 0);
"""
_LOGITS = """
run_head(model, *(const HeadTensors*)at("head"), (const int32_t*)at("rows"), out_shape0, out_p, space, 0);
"""
_LIKELIEST = """
run_head(model, *(const HeadTensors*)at("head"), (const int32_t*)at("rows"), out_shape1, space.logits, space, 0);
run_top(model, *(const Penalties*)at("penalties"), (const int32_t*)at("ids"), out_shape1, out_shape2, out_p, space, 0);
"""


class Space(NamedTuple):
    """Work space on the device for sweeps of up to ``tokens`` tokens."""

    address: int
    tokens: int


class Sweeps:
    """The ops of a model whose tensors are on the device. ``context``: tokens that its caches have room for.

    ``angles``: the address of rotary_angles(context, …) there. Only tables are kept here; whoever allocated what they point to
    keeps that, and whatever a method is given, until its result has been computed.
    """

    def __init__(self, config: Config, coding: Coding, context: int, angles: int, cache_bits: int = 16):
        sizes = (config.n_embd, config.n_inner, config.vocab_size, config.n_head, config.rotary_dim, context)
        codes = (BITS[coding.dtype], coding.group, coding.ordered, BITS[coding.head_dtype], GROUP, cache_bits)
        self._model = np.array([(*sizes, *codes, angles, config.layer_norm_epsilon)], _MODEL)

    def space_bytes(self, tokens: int, places: int) -> int:
        """The work space that sweeps of up to ``tokens`` tokens of up to ``places`` sequences need."""
        low, high = self._run((2,), _BYTES, Space(0, tokens), places=places).numpy().view(np.uint32)
        return int(high) << 32 | int(low)

    def table(self, blocks: list[dict[str, int]], cache: list[list[int]]) -> np.ndarray:
        """The blocks: addresses of each one's tensors, as docs/formats.md names them, and of its keys, values and, in int8,
        their scales."""
        table = np.zeros(len(blocks), _BLOCK)
        for row, tensors, parts in zip(table, blocks, cache):
            _fill(row, tensors)
            for name, address in zip(("keys", "values", "key_scales", "value_scales"), parts):
                row[name] = address
        return table

    def head(self, tensors: dict[str, int], rows: int) -> np.ndarray:
        """ln_f and lm_head, or so many of its rows."""
        table = np.zeros(1, _HEAD)
        _fill(table[0], tensors)
        table["rows"] = rows
        return table

    def blocks(
        self, table: np.ndarray, sequences: np.ndarray, tokens: int, embedded: np.ndarray | None, space: Space, after=None
    ):
        """The blocks of a table for new tokens of some sequences (int32 (n, 4), as ``ops.sequences`` takes it).

        embedded: float16 (T, D) in pinned memory; None: these blocks follow those that ``after``, their result, came from.
        Returns a Var that says no more than that.
        """
        given = {"blocks": table, "sequences": sequences, "embedded": embedded}
        counts = {"n": len(table), "n_sequences": len(sequences), "T": tokens}
        return self._run((1,), _BLOCKS, space, after, given, **counts)

    def logits(self, head: np.ndarray, rows: np.ndarray, space: Space, after):
        """float32 (R, V) of at most MOST_ROWS rows (int32) of the sweep whose result ``after`` is."""
        return self._run((len(rows), int(head["rows"][0])), _LOGITS, space, after, {"head": head, "rows": rows})

    def likeliest(self, head: np.ndarray, rows: np.ndarray, k: int, penalties: np.ndarray, ids: int, space: Space, after):
        """float32 (2, R, k): of each of the rows the k highest logits, and their ids as the bits of int32.

        penalties: from ``penalties``; ids: the address on the device of those that it is about.
        """
        given = {"head": head, "rows": rows, "penalties": penalties}
        return self._run((2, len(rows), k), _LIKELIEST, space, after, given, ids=ids)

    def _run(self, shape: tuple[int, ...], call: str, space: Space, after=None, given: dict | None = None, **numbers: float):
        addresses = {name: 0 if array is None else array.ctypes.data for name, array in (given or {}).items()}
        numbers = {**addresses, **numbers, "model": self._model.ctypes.data, "space": space.address, "tokens": space.tokens}
        inputs = [] if after is None else [after]
        return jittor().code(
            shape, "float32", inputs, cuda_header=header("sweep.cuh", "kernels_cuda"), cuda_src=_SETUP + call, data=numbers
        )


def penalties(counts: list[int], by: list[float]) -> np.ndarray:
    """For each row, how many ids of a list are its, one row's after the other's, and by how much they are penalised."""
    table = np.zeros(1, _PENALTIES)
    table["start"][0, 1:] = np.cumsum([*counts, *[0] * (MOST_ROWS - len(counts))])
    table["by"][0, : len(by)] = by
    return table


def _fill(row: np.void, tensors: dict[str, int]) -> None:
    """A matrix is its own tensor, or q, scale, zero and perhaps order."""
    for name, address in tensors.items():
        matrix, _, part = name.rpartition(".")
        if matrix in row.dtype.names:
            row[matrix][part] = address
        elif row.dtype[name].names:
            row[name]["q"] = address
        else:
            row[name] = address
