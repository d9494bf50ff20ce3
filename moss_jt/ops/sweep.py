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
MOVED = 1 << 62  # an address from there on is relative to a Var, as sweep.cuh has it

# As sweep.cuh declares them.
_MATRIX = [(name, "u8") for name in ("q", "scale", "zero", "order")]
_BLOCK = np.dtype(
    [(name, "u8") for name in ("ln_1.weight", "ln_1.bias", "in.bias", "out.bias")]
    + [("in.weight", _MATRIX), ("out.weight", _MATRIX)]
    + [(name, "u8") for name in ("keys", "values", "key_scales", "value_scales")]
)
_HEAD = np.dtype(
    [(name, "u8") for name in ("ln_f.weight", "ln_f.bias", "lm_head.bias")]
    + [("lm_head.weight", _MATRIX), ("first", "i8"), ("rows", "i8")]
)
_SIZES = (
    *("D", "I", "V", "heads", "rotary", "context"),
    *("bits", "group", "ordered", "head_bits", "head_group", "cache_bits", "head_part"),
)
_PENALTIES = np.dtype([("start", "i4", MOST_ROWS + 1), ("by", "f4", MOST_ROWS)])
_MODEL = np.dtype([(name, "i8") for name in _SIZES] + [("angles", "u8"), ("eps", "f8")])


# One op for all that is done: its kernels take a minute to compile.
_BYTES, _BLOCKS, _HEADS, _LOGITS, _LIKELIEST = range(5)
_SOURCE = """
using namespace moss_cuda;
const auto number = [&](const char* name) { return (int64_t)data[name]; };
const auto at = [&](const char* name) { return reinterpret_cast<char*>((uintptr_t)number(name)); };
const ModelSizes& model = *(const ModelSizes*)at("model");
const Space space(model, number("tokens"), MOST_ROWS, at("space"));
const int what = (int)number("what");
const int64_t n = number("n"), R = number("R");
if (what == 0) {
    const int64_t bytes = space_bytes(model, number("tokens"), MOST_ROWS, number("places"));
    check(cudaMemcpy(out_p, &bytes, 8, cudaMemcpyHostToDevice), "cudaMemcpy");
} else if (what == 1) {
    const auto blocks = located((const BlockTensors*)at("table"), n, in1_p);
    run_blocks(model, blocks.data(), n, (const half*)at("embedded"), (const Sequence*)at("sequences"), number("n_sequences"),
               number("T"), space, 0);
} else {
    for (const HeadTensors& head : located((const HeadTensors*)at("table"), n, in1_p))
        run_head(model, head, (const int32_t*)at("rows"), R, space, 0);
}
if (what == 3) {
    check(cudaMemcpyAsync(out_p, space.logits, 4 * R * model.V, cudaMemcpyDeviceToDevice, 0), "cudaMemcpyAsync");
} else if (what == 4) {
    run_top(model, *(const Penalties*)at("penalties"), (const int32_t*)at("ids"), R, number("k"), out_p, space, 0);
}
"""


class Space(NamedTuple):
    """Work space on the device for sweeps of up to ``tokens`` tokens."""

    address: int
    tokens: int


class Sweeps:
    """The ops of a model whose tensors are on the device. ``context``: tokens that its caches have room for.

    ``angles``: the address of rotary_angles(context, …) there. ``head_part``: rows of lm_head that are there at a time, at
    most; None: all of them are. Only tables are kept here; whoever allocated what they point to keeps that, and whatever a
    method is given, until its result has been computed.
    """

    def __init__(
        self, config: Config, coding: Coding, context: int, angles: int, cache_bits: int = 16, head_part: int | None = None
    ):
        sizes = (config.n_embd, config.n_inner, config.vocab_size, config.n_head, config.rotary_dim, context)
        codes = (BITS[coding.dtype], coding.group, coding.ordered, BITS[coding.head_dtype], GROUP, cache_bits)
        self._vocab = config.vocab_size
        self._first = jittor().array(np.zeros(1, np.float32))
        self._model = np.array([(*sizes, *codes, head_part or self._vocab, angles, config.layer_norm_epsilon)], _MODEL)

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

    def heads(self, parts: list[tuple[dict[str, int], int, int]]) -> np.ndarray:
        """ln_f and parts of lm_head: the addresses of their tensors, the number of the first row, and how many there are."""
        table = np.zeros(len(parts), _HEAD)
        for row, (tensors, first, count) in zip(table, parts):
            _fill(row, tensors)
            row["first"], row["rows"] = first, count
        return table

    def blocks(
        self,
        table: np.ndarray,
        sequences: np.ndarray,
        tokens: int,
        embedded: np.ndarray | None,
        space: Space,
        after=None,
        moved=None,
    ):
        """The blocks of a table for new tokens of some sequences (int32 (n, 4), as ``ops.sequences`` takes it).

        embedded: float16 (T, D) in pinned memory; None: these blocks follow those that ``after``, their result, came from.
        moved: a float32 Var, wherever Jittor has it; addresses of the table from MOVED on are relative to it. Returns a Var
        that says no more than that they were.
        """
        given = {"table": table, "sequences": sequences, "embedded": embedded}
        counts = {"n": len(table), "n_sequences": len(sequences), "T": tokens}
        return self._run(1, _BLOCKS, space, after, given, moved, **counts)

    def compute(self, heads: np.ndarray, rows: np.ndarray, space: Space, after, moved=None):
        """Parts of the logits of at most MOST_ROWS rows (int32) of the sweep whose result ``after`` is; moved, and a Var, as of
        blocks."""
        return self._run(1, _HEADS, space, after, {"table": heads, "rows": rows}, moved, n=len(heads), R=len(rows))

    def logits(self, heads: np.ndarray, rows: np.ndarray, space: Space, after) -> np.ndarray:
        """float32 (R, V), once these last parts are computed, too. Waits for them."""
        given = {"table": heads, "rows": rows}
        found = self._run(len(rows) * self._vocab, _LOGITS, space, after, given, n=len(heads), R=len(rows))
        return found.numpy().reshape(len(rows), self._vocab)

    def likeliest(
        self, heads: np.ndarray, rows: np.ndarray, k: int, penalties: np.ndarray, ids: int, space: Space, after
    ) -> tuple[np.ndarray, np.ndarray]:
        """In place of all logits the k highest of each row, float32 (R, k), and their ids, int32 (R, k). Waits for them.

        penalties: from ``penalties``; ids: the address on the device of those that it is about.
        """
        given = {"table": heads, "rows": rows, "penalties": penalties}
        counts = {"n": len(heads), "R": len(rows), "k": k}
        found = self._run(2 * len(rows) * k, _LIKELIEST, space, after, given, ids=ids, **counts).numpy()
        logits, chosen = found.reshape(2, len(rows), k)
        return logits, chosen.view(np.int32)

    def _run(self, size: int, what: int, space: Space, after=None, given: dict | None = None, moved=None, **numbers: float):
        """What it takes and gives has one dimension throughout, and float32: Jittor compiles an op again for what differs."""
        addresses = {name: 0 if array is None else array.ctypes.data for name, array in (given or {}).items()}
        numbers = {"n": 0, "R": 0, **addresses, **numbers, "what": what, "space": space.address, "tokens": space.tokens}
        inputs = [self._first if var is None else var for var in (after, moved)]
        data = {**numbers, "model": self._model.ctypes.data}
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
