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


# One op for all that is done: its kernels take a minute to compile.
_BYTES, _BLOCKS, _LOGITS, _LIKELIEST = range(4)
_SOURCE = """
using namespace moss_cuda;
const auto number = [&](const char* name) { return (int64_t)data[name]; };
const auto at = [&](const char* name) { return reinterpret_cast<char*>((uintptr_t)number(name)); };
const ModelSizes& model = *(const ModelSizes*)at("model");
const Space space(model, number("tokens"), MOST_ROWS, at("space"));
switch (number("what")) {
case 0: {
    const int64_t bytes = space_bytes(model, number("tokens"), MOST_ROWS, number("places"));
    check(cudaMemcpy(out_p, &bytes, 8, cudaMemcpyHostToDevice), "cudaMemcpy");
    break;
}
case 1:
    run_blocks(model, (const BlockTensors*)at("blocks"), number("n"), (const half*)at("embedded"),
               (const Sequence*)at("sequences"), number("n_sequences"), number("T"), space, 0);
    break;
case 2:
    run_head(model, *(const HeadTensors*)at("head"), (const int32_t*)at("rows"), number("R"), out_p, space, 0);
    break;
case 3:
    run_head(model, *(const HeadTensors*)at("head"), (const int32_t*)at("rows"), number("R"), space.logits, space, 0);
    run_top(model, *(const Penalties*)at("penalties"), (const int32_t*)at("ids"), number("R"), number("k"), out_p, space, 0);
}
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
        self._first = jittor().array(np.zeros(1, np.float32))
        self._model = np.array([(*sizes, *codes, angles, config.layer_norm_epsilon)], _MODEL)

    def space_bytes(self, tokens: int, places: int) -> int:
        """The work space that sweeps of up to ``tokens`` tokens of up to ``places`` sequences need."""
        return int(self._run(2, _BYTES, Space(0, tokens), places=places).numpy().view(np.int64)[0])

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
        Returns a Var that says no more than that they were.
        """
        given = {"blocks": table, "sequences": sequences, "embedded": embedded}
        counts = {"n": len(table), "n_sequences": len(sequences), "T": tokens}
        return self._run(1, _BLOCKS, space, after, given, **counts)

    def logits(self, head: np.ndarray, rows: np.ndarray, space: Space, after) -> np.ndarray:
        """float32 (R, V) of at most MOST_ROWS rows (int32) of the sweep whose result ``after`` is. Waits for them."""
        count = int(head["rows"][0])
        found = self._run(len(rows) * count, _LOGITS, space, after, {"head": head, "rows": rows}, R=len(rows))
        return found.numpy().reshape(len(rows), count)

    def likeliest(
        self, head: np.ndarray, rows: np.ndarray, k: int, penalties: np.ndarray, ids: int, space: Space, after
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k highest logits of each of the rows, float32 (R, k), and their ids, int32 (R, k). Waits for them.

        penalties: from ``penalties``; ids: the address on the device of those that it is about.
        """
        given = {"head": head, "rows": rows, "penalties": penalties}
        found = self._run(2 * len(rows) * k, _LIKELIEST, space, after, given, ids=ids, R=len(rows), k=k).numpy()
        logits, ids = found.reshape(2, len(rows), k)
        return logits, ids.view(np.int32)

    def _run(self, size: int, what: int, space: Space, after=None, given: dict | None = None, **numbers: float):
        """What it takes and gives has one dimension throughout: Jittor compiles an op again for every other number of them."""
        addresses = {name: 0 if array is None else array.ctypes.data for name, array in (given or {}).items()}
        numbers = {**addresses, **numbers, "model": self._model.ctypes.data, "space": space.address, "tokens": space.tokens}
        inputs = [self._first if after is None else after]
        data = {**numbers, "what": what}
        return jittor().code((size,), "float32", inputs, cuda_header=source(), cuda_src=_SOURCE, data=data)


def source() -> str:
    """What the op is compiled from."""
    return header("sweep.cuh", "kernels_cuda")


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
