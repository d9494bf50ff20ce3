"""Sweeps on a GPU: one op for all blocks that lie on the device, and one for what follows them.

What they work on is not Jittor's: weights, caches and work space are device memory that tables of addresses describe, so that
a block can be anywhere. Their results are Vars. All of it is launched on Jittor's stream, in the order of the calls.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..config import Config
from ..weights.layout import BITS, GROUP, Coding
from .kernel import run_cuda

MOST_ROWS = 16  # whose logits are wanted at a time, as rows.cuh has it
MOST_LIKELIEST = 64  # tokens of a row, as top.cuh has it
_FEW = 8  # new tokens of a sequence up to which attention divides its cache, as attention.cuh has it

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
const Model& model = *(const Model*)at("model");
"""
_SPACE = 'Space space(model, (int64_t)data["tokens"], MOST_ROWS, (int64_t)data["few"], at("space"));'
_BYTES = _SETUP + _SPACE + "send(out_p, &space.bytes, 8, 0);"
_BLOCKS = (
    _SETUP
    + _SPACE
    + """
run_blocks(model, (const Block*)at("blocks"), (int64_t)data["n"], (const half*)at("embedded"), (const Sequence*)at("sequences"),
           (int64_t)data["n_sequences"], (int64_t)data["T"], space, 0);
"""
)
_LOGITS = (
    _SETUP
    + _SPACE
    + """
run_head(model, *(const Head*)at("head"), (const int32_t*)at("rows"), out_shape0, out_p, space, 0);
"""
)
_TOP = (
    _SETUP
    + _SPACE
    + """
run_head(model, *(const Head*)at("head"), (const int32_t*)at("rows"), out_shape1, space.logits, space, 0);
run_top(model, *(const Penalties*)at("penalties"), (const int32_t*)at("ids"), out_shape1, out_shape2, out_p, space, 0);
"""
)


class Space(NamedTuple):
    """Work space on the device for sweeps of up to ``tokens`` tokens, ``few`` of them of sequences that have few new ones."""

    address: int
    tokens: int
    few: int

    @classmethod
    def of(cls, address: int, tokens: int, places: int) -> Space:
        return cls(address, tokens, min(tokens, _FEW * places))


class Sweeps:
    """The ops of a model whose tensors are on the device. ``context``: tokens that its caches have room for.

    ``angles``: the address of rotary_angles(context, …) there. Only tables are kept here; whoever allocated what they point to
    keeps that.
    """

    def __init__(self, config: Config, coding: Coding, context: int, angles: int, cache_bits: int = 16):
        self._config, self._coding = config, coding
        sizes = (config.n_embd, config.n_inner, config.vocab_size, config.n_head, config.rotary_dim, context)
        codes = (BITS[coding.dtype], coding.group, coding.ordered, BITS[coding.head_dtype], GROUP, cache_bits)
        self._model = np.array([(*sizes, *codes, angles, config.layer_norm_epsilon)], _MODEL)

    def space_bytes(self, tokens: int, places: int) -> int:
        """The work space that sweeps of up to ``tokens`` tokens of ``places`` sequences need."""
        low, high = self._run((2,), _BYTES, Space.of(0, tokens, places), {}).numpy().view(np.uint32)
        return int(high) << 32 | int(low)

    def table(self, blocks: list[dict[str, int]], cache: list[tuple[int, ...]]) -> np.ndarray:
        """The blocks: addresses of each one's tensors, as docs/formats.md names them, and of its keys, values and, in int8,
        their scales."""
        table = np.zeros(len(blocks), _BLOCK)
        for row, tensors, parts in zip(table, blocks, cache):
            _fill(row, tensors)
            for name, address in zip(("keys", "values", "key_scales", "value_scales"), parts):
                row[name] = address
        return table

    def head(self, tensors: dict[str, int], rows: int) -> np.ndarray:
        """lm_head, or some of its rows."""
        table = np.zeros(1, _HEAD)
        _fill(table[0], tensors)
        table["rows"] = rows
        return table

    def blocks(self, table: np.ndarray, sequences: np.ndarray, tokens: int, embedded: np.ndarray | None, space: Space) -> None:
        """The blocks of a table for new tokens of some sequences (int32 (n, 4), as ``ops.sequences`` takes it).

        embedded: float16 (T, D) in pinned memory, which must stay as it is until the device is past it; None: these blocks
        follow others.
        """
        sequences = np.ascontiguousarray(sequences, np.int32)
        given = {"blocks": table, "sequences": sequences, "embedded": embedded}
        counts = {"n": len(table), "n_sequences": len(sequences), "T": tokens}
        self._run((1,), _BLOCKS, space, given, **counts)

    def logits(self, head: np.ndarray, rows: list[int], space: Space):
        """float32 (R, V) of at most MOST_ROWS of the last sweep's tokens."""
        return self._run((len(rows), int(head["rows"][0])), _LOGITS, space, {"head": head, "rows": np.array(rows, np.int32)})

    def likeliest(
        self, head: np.ndarray, rows: list[int], k: int, seen: list[np.ndarray], penalties: list[float], space: Space
    ):
        """float32 (2, R, k): of each row the k highest logits, and their ids as the bits of int32.

        seen: the ids whose logits are penalised, all different, and ``penalties`` by how much (sampling.penalised).
        """
        listed = np.zeros(1, _PENALTIES)
        listed["start"][0, 1 : len(rows) + 1] = np.cumsum([len(ids) for ids in seen])
        listed["by"][0, : len(rows)] = penalties
        given = {
            "head": head,
            "rows": np.array(rows, np.int32),
            "penalties": listed,
            "ids": np.concatenate(seen).astype(np.int32),
        }
        return self._run((2, len(rows), k), _TOP, space, given)

    def _run(self, shape: tuple[int, ...], call: str, space: Space, given: dict, **numbers: float):
        addresses = {name: 0 if array is None else array.ctypes.data for name, array in given.items()}
        numbers = {**addresses, **numbers, "model": self._model.ctypes.data}
        return run_cuda("sweep.cuh", shape, call, space=space.address, tokens=space.tokens, few=space.few, **numbers)


def _fill(row: np.void, tensors: dict[str, int]) -> None:
    """A matrix is its own tensor, or q, scale, zero and perhaps order."""
    for name, address in tensors.items():
        matrix, _, part = name.rpartition(".")
        if name in row.dtype.names and row.dtype[name].names:
            row[name]["q"] = address
        elif matrix in (row.dtype.names or ()):
            row[matrix][part] = address
        else:
            row[name] = address
