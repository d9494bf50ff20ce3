"""From our checkpoint to a GGUF file, which llama.cpp runs.

Its architecture ``phi2`` computes what MOSS does: one norm feeds attention and MLP side by side, with the tanh form of GELU
and rotary on a part of each head. Two things differ: phi2 turns entry i with entry i + R/2 where MOSS turns 2i with 2i + 1, so
the rows of queries and keys are put in that order; and it has biases everywhere, so those that MOSS lacks are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Callable

import numpy as np

from ..config import Config
from ..errors import MossError
from ..tokenizer.files import COPIED as TOKENIZER_FILES
from ..weights import Weights, open_weights
from ..weights.layout import BITS, HEAD_FILE, WTE_FILE, block_file
from .copy import Advance, append, in_order
from .gguf import BLOCK, F16, F32, Q4_0, Q8_0, Entry, Type, header_bytes
from .gguf_vocabulary import vocabulary
from .job import FileJob, source_record
from .rows import Matrix, vector
from .to_moss_jt import check_apart
from .view import of_region

# format -> (the blocks' matrices, the embedding and lm_head, llama.cpp's number for such a file)
FORMATS = {"gguf-f16": (F16, F16, 1), "gguf-q8_0": (Q8_0, Q8_0, 7), "gguf-q4_0": (Q4_0, Q8_0, 2)}
_CHUNK = 1 << 19  # weights read at a time, by each thread
_HEADER = "header"


@dataclass(frozen=True)
class _Source:
    """What a tensor is made of: ``rows(first, count)`` are float32. ``width``: numbers that are read for a row; ``unit``: rows
    that have to be taken together."""

    entry: Entry
    rows: Callable[[int, int], np.ndarray]
    width: int
    unit: int = 1


def plan(src: Path, out: Path, format: str) -> FileJob:
    """Open and check the converted checkpoint ``src``. Raises MossError where it is broken, or ``out`` is not possible."""
    if out.suffix != ".gguf":
        raise MossError(f"{out}: a GGUF file's name has to end in .gguf")
    check_apart(src, out)
    weights = open_weights(src)
    matrices, others, number = FORMATS[format]
    _check_width(weights.config, format, matrices)
    parts = _parts(weights, matrices, others)
    entries = [s.entry for sources in parts.values() for s in sources]
    header = header_bytes(_metadata(weights, number), entries)
    files = {_HEADER: len(header), **{name: sum(s.entry.padded for s in sources) for name, sources in parts.items()}}

    def write(file: BinaryIO, name: str, advance: Advance) -> None:
        if name == _HEADER:
            append(file, np.frombuffer(header, np.uint8), advance)
        for source in parts.get(name, ()):
            _write(file, source, advance)

    used = [src / name for name in ("config.json", *TOKENIZER_FILES) if (src / name).is_file()]
    record = {"export": format, "source": source_record([*used, *(region.path for region in weights.regions.values())])}
    notes = [] if weights.coding.is_fp16 else [f"{src} is in {weights.coding}: weights are dequantised and stored as {format}"]
    return FileJob(out, record, files, lambda folder: None, write, notes)


def _check_width(config: Config, format: str, matrices: Type) -> None:
    for name in ("n_embd", "n_inner"):
        if getattr(config, name) % matrices.block:
            raise MossError(
                f"{name} is {getattr(config, name)}, which {format} cannot store in blocks of {BLOCK}; use gguf-f16"
            )


def _metadata(weights: Weights, number: int) -> dict[str, Any]:
    c = weights.config
    quantised = {} if number == 1 else {"general.quantization_version": 2}
    return {
        "general.architecture": "phi2",
        "general.name": weights.folder.resolve().name,
        "general.file_type": number,
        **quantised,
        "phi2.context_length": c.n_ctx,
        "phi2.embedding_length": c.n_embd,
        "phi2.feed_forward_length": c.n_inner,
        "phi2.block_count": c.n_layer,
        "phi2.attention.head_count": c.n_head,
        "phi2.attention.head_count_kv": c.n_head,
        "phi2.attention.layer_norm_epsilon": c.layer_norm_epsilon,
        "phi2.rope.dimension_count": c.rotary_dim,
        "phi2.rope.freq_base": 10000.0,
        **vocabulary(weights.folder, c),
    }


def _parts(weights: Weights, matrices: Type, others: Type) -> dict[str, list[_Source]]:
    """The tensors in the order of the file, those of a block together."""
    c, bits = weights.config, BITS[weights.coding.head_dtype]
    shape = c.vocab_size, c.n_embd
    wte, head = (of_region(weights.regions[name]) for name in (WTE_FILE, HEAD_FILE))
    embedding, output = Matrix(wte, "wte.weight", shape, 16), Matrix(head, "lm_head.weight", shape, bits)
    parts = {"token_embd": [_Source(Entry("token_embd.weight", others, shape), embedding.rows, c.n_embd)]}
    for i in range(c.n_layer):
        parts[f"blk.{i}"] = list(_block(weights, i, matrices))
    parts["output"] = [
        _vector("output_norm.weight", c.n_embd, vector(head["ln_f.weight"])),
        _vector("output_norm.bias", c.n_embd, vector(head["ln_f.bias"])),
        _Source(Entry("output.weight", others, shape), output.rows, c.n_embd),
        _vector("output.bias", c.vocab_size, vector(head["lm_head.bias"])),
    ]
    return parts


def _block(weights: Weights, i: int, matrices: Type) -> Iterator[_Source]:
    c, bits = weights.config, BITS[weights.coding.dtype]
    d, inner = c.n_embd, c.n_inner
    views = of_region(weights.regions[block_file(i)])
    rows = Matrix(views, "in.weight", (3 * d + inner, d), bits, second=3 * d)
    columns = Matrix(views, "out.weight", (d, d + inner), bits)
    b = f"blk.{i}."
    yield _vector(b + "attn_norm.weight", d, vector(views["ln_1.weight"]))
    yield _vector(b + "attn_norm.bias", d, vector(views["ln_1.bias"]))
    qkv = Entry(b + "attn_qkv.weight", matrices, (3 * d, d))
    yield _Source(qkv, partial(_half_split, rows, _rotary_order(c)), d, c.head_size)
    yield _vector(b + "attn_qkv.bias", 3 * d, _zeros)
    yield _Source(Entry(b + "attn_output.weight", matrices, (d, d)), lambda a, n: columns.rows(a, n)[:, :d], d + inner)
    yield _vector(b + "attn_output.bias", d, _zeros)
    yield _Source(Entry(b + "ffn_up.weight", matrices, (inner, d)), lambda a, n: rows.rows(3 * d + a, n), d)
    yield _vector(b + "ffn_up.bias", inner, vector(views["in.bias"]))
    yield _Source(Entry(b + "ffn_down.weight", matrices, (d, inner)), lambda a, n: columns.rows(a, n)[:, d:], d + inner)
    yield _vector(b + "ffn_down.bias", d, vector(views["out.bias"]))


def _vector(name: str, count: int, rows: Callable[[int, int], np.ndarray]) -> _Source:
    return _Source(Entry(name, F32, (count,)), rows, 1)


def _zeros(first: int, count: int) -> np.ndarray:
    return np.zeros(count, np.float32)


def _rotary_order(config: Config) -> np.ndarray:
    """Of q, k and v (3·D rows): which of ours stands at each row. In each head of q and k the rotated entries come in the
    order 0, 2, …, 1, 3, …."""
    head = np.arange(config.head_size)
    head[: config.rotary_dim] = np.concatenate([np.arange(first, config.rotary_dim, 2) for first in (0, 1)])
    order = np.arange(3 * config.n_embd).reshape(-1, config.head_size)
    order[: 2 * config.n_head] = order[: 2 * config.n_head, head]
    return order.reshape(-1)


def _half_split(matrix: Matrix, order: np.ndarray, first: int, count: int) -> np.ndarray:
    return matrix.rows(first, count)[order[first : first + count] - first]


def _write(file: BinaryIO, source: _Source, advance: Advance) -> None:
    entry, total = source.entry, source.entry.shape[0]
    step = max(1, _CHUNK // (source.unit * source.width)) * source.unit

    def encoded(first: int) -> np.ndarray:
        return entry.type.encode(source.rows(first, min(step, total - first)))

    for data in in_order(encoded, range(0, total, step)):
        append(file, data, advance)
    append(file, np.zeros(entry.padded - entry.nbytes, np.uint8), advance)
