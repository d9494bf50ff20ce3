"""An adapter put into the weights of its model: W + alpha / rank · B A, in float32, then in fp16 or quantised."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import BinaryIO, Callable

import numpy as np

from ..convert.copy import CHUNK, Advance, append, in_order, write_panels, write_tensor
from ..convert.job import Job, source_record, whole_file
from ..convert.mapping import Band
from ..convert.panels import in_panels
from ..convert.quantise import quantise
from ..convert.rows import Matrix
from ..convert.to_moss_jt import COPIED, check_apart, our_config
from ..convert.view import View, cast, cast_to_quantise, contiguous, of_region
from ..tokenizer.files import COPIED as TOKENIZER_FILES
from ..weights import Weights, open_weights
from ..weights.header import header_bytes
from ..weights.layout import BITS, FORMAT, GROUP, HEAD_FILE, METADATA, WTE_FILE, Coding, Tensor, block_file, files_of
from .lora import ADAPTER_CONFIG, ADAPTER_FILE
from .low_rank import LowRankTerms
from .result import write_small_files

# What the configs of a quantised model say of its numbers, which are others now.
_QUANTISED = ("wbits", "groupsize", "quantization_config")


def plan_merge(model: Path, adapter: Path, dst: Path, dtype: str = "fp16") -> Job:
    """Open and check everything; nothing is written. Raises MossError for the first thing that is wrong.

    ``model``: a converted checkpoint in any dtype, taken as the numbers it stands for. ``dtype``: of the blocks of ``dst``;
    lm_head is then in fp16 or int8, as converting has it.
    """
    check_apart(model, dst)
    weights = open_weights(model)
    merged = Merged(weights, LowRankTerms(weights.config, adapter))
    coding = Coding(dtype, "fp16" if dtype == "fp16" else "int8")
    files = files_of(weights.config, coding)
    sizes = {name: len(header_bytes(ts, METADATA)) + sum(t.nbytes for t in ts) for name, ts in files.items()}
    small = [model / name for name in ("config.json", *COPIED, *TOKENIZER_FILES) if (model / name).is_file()]
    sources = [*small, *(r.path for r in weights.regions.values()), adapter / ADAPTER_CONFIG, adapter / ADAPTER_FILE]
    key = {"format": FORMAT, **coding.to_dict()}
    record = {**key, "source": source_record(sources)}
    return Job(dst, record, sizes, partial(_prepare, model, key), partial(merged.write, coding))


def _prepare(model: Path, key: dict, folder: Path) -> None:
    write_small_files(model, folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in raw.items() if name not in _QUANTISED}
    with whole_file(folder / "config.json") as file:
        file.write(our_config(json.dumps(kept, indent=2, ensure_ascii=False).encode() + b"\n", key))


class Merged:
    """A model's files with an adapter in them."""

    def __init__(self, weights: Weights, low_rank: LowRankTerms):
        self._weights, self._low_rank = weights, low_rank
        self._blocks = {block_file(i): i for i in range(weights.config.n_layer)}

    def write(self, coding: Coding, file: BinaryIO, name: str, advance: Advance) -> None:
        """One of our weights files in ``coding``, for a Job."""
        config, views = self._weights.config, of_region(self._weights.regions[name])
        header = header_bytes(files_of(config, coding)[name], METADATA)
        file.write(header)
        advance(len(header))
        for tensor in files_of(config)[name]:
            if len(tensor.shape) == 1 or name == WTE_FILE:
                write_tensor(file, tensor, [Band((views[tensor.name],))], advance)
            else:
                dtype, group = (coding.head_dtype, GROUP) if name == HEAD_FILE else (coding.dtype, coding.group)
                self._write_matrix(file, BITS[dtype], group, name, tensor, views, advance)

    def _write_matrix(
        self, file: BinaryIO, bits: int, group: int, name: str, tensor: Tensor, views: dict[str, View], advance: Advance
    ) -> None:
        n, k = tensor.shape
        step = max(1, CHUNK // (4 * k))
        rows = in_order(self._rows(name, tensor, views), ((first, min(step, n - first)) for first in range(0, n, step)))
        path = self._weights.regions[name].path
        view = contiguous(tensor.name, path, "F32", tensor.shape, 0)  # for its name, if it overflows
        if bits == 16:
            for w in rows:
                append(file, cast(w, view, "F16"), advance)
        else:
            write_panels(file, in_panels((quantise(cast_to_quantise(w, view), bits, group) for w in rows), bits), advance)

    def _rows(self, name: str, tensor: Tensor, views: dict[str, View]) -> Callable[[tuple[int, int]], np.ndarray]:
        """What gives (first, count) rows of a matrix, with the adapter in them: float32."""
        coding, second = self._weights.coding, 3 * self._weights.config.n_embd if tensor.name == "in.weight" else 0
        bits = BITS[coding.head_dtype if name == HEAD_FILE else coding.dtype]
        matrix = Matrix(views, tensor.name, tensor.shape, bits, second)
        if name == HEAD_FILE:
            return lambda some: matrix.rows(*some)
        down, up = self._low_rank.of(self._blocks[name], tensor.name)
        return lambda some: matrix.rows(*some) + up[some[0] : sum(some)] @ down
