"""From our checkpoint back to the official names and layout."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Callable

from ..errors import MossError
from ..weights import Weights, open_weights
from ..weights.header import header_bytes
from ..weights.layout import Tensor, files_of
from .copy import Advance, write_tensor
from .job import RECORD, REPORT, Job, recorded_source, source_record, whole_file
from .mapping import Band, official_bands, official_shapes, pieces
from .to_gguf import FORMATS as GGUF
from .to_gptq import ToGptq
from .to_moss_jt import check_apart, official_config
from .torchsave import write_torch
from .view import of_region

_PYTORCH, _SAFETENSORS = ("pytorch_model", "bin"), ("model", "safetensors")  # a shard's name without its end, the end
FORMATS = {"pytorch": _PYTORCH, "safetensors": _SAFETENSORS, "gptq": _PYTORCH, "gptq-safetensors": _SAFETENSORS}
_SHARD = 10_000_000_000  # bytes; of GPTQ's layout everything is one file, as officially


def plan(src: Path, out: Path, format: str, shard_size: int | None) -> Job:
    """Open and check the converted checkpoint ``src``. Raises MossError where it is broken, or ``out`` is not possible."""
    if format not in FORMATS:
        raise MossError(f"format {format!r} is unknown; choose one of {', '.join([*FORMATS, *GGUF])}")
    is_gptq = format.startswith("gptq")
    if shard_size is None:
        shard_size = sys.maxsize if is_gptq else _SHARD
    if shard_size < 1:
        raise MossError(f"a shard of {shard_size} bytes cannot hold anything")
    check_apart(src, out)
    weights = open_weights(src)
    content = (ToGptq if is_gptq else _Fp16)(weights, _bands(weights))
    shards = _shards(content.tensors, format, shard_size)

    def write(file: BinaryIO, name: str, advance: Advance) -> None:
        _WRITERS[FORMATS[format]](file, shards[name], lambda f, t: content.write(f, t, advance))

    index_name = ".".join((*FORMATS[format], "index.json"))
    files = {name: sum(t.nbytes for t in tensors) for name, tensors in shards.items()}
    source = [src / "config.json", *(region.path for region in weights.regions.values())]
    record = {"export": format, "shard_size": shard_size, "source": source_record(source)}
    small = partial(_write_small_files, weights, content.config, shards, index_name)
    return Job(out, record, files, small, write, content.notes, keep_record=False)


class _Fp16:
    """The tensors of the official layout in fp16, and what writes each."""

    notes: Sequence[str] = ()

    def __init__(self, weights: Weights, bands: Callable[[str], list[Band]]):
        if not weights.coding.is_fp16:
            only = "only fp16 is exported so; convert with --dtype fp16, or choose the format gptq for int8 and int4"
            raise MossError(f"{weights.folder}: is in {weights.coding}, and {only}")
        self.tensors = [Tensor(n, "F16", s) for n, s in official_shapes(weights.config).items()]
        self._bands = bands

    def write(self, file: BinaryIO, tensor: Tensor, advance: Advance) -> None:
        write_tensor(file, tensor, self._bands(tensor.name), advance)

    def config(self, text: bytes) -> bytes:
        return text


def _shards(tensors: list[Tensor], format: str, shard_size: int) -> dict[str, list[Tensor]]:
    """Fill shard after shard in order; one tensor larger than a shard is a shard of its own."""
    shards: list[list[Tensor]] = [[]]
    for t in tensors:
        if shards[-1] and sum(x.nbytes for x in shards[-1]) + t.nbytes > shard_size:
            shards.append([])
        shards[-1].append(t)
    stem, end = FORMATS[format]
    if len(shards) == 1:
        return {f"{stem}.{end}": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.{end}": shard for i, shard in enumerate(shards, 1)}


def _bands(weights: Weights) -> Callable[[str], list[Band]]:
    """What an official tensor, given by its name, is made of."""
    of_file = pieces(weights.config)
    files = {p.official: file for file, its in of_file.items() for p in its}

    def bands(name: str) -> list[Band]:
        return official_bands(of_file[files[name]], name, of_region(weights.regions[files[name]]))

    return bands


def _write_safetensors(file: BinaryIO, tensors: list[Tensor], write) -> None:
    file.write(header_bytes(tensors, {"format": "pt"}))  # transformers insists on this metadata
    for t in tensors:
        write(file, t)


_WRITERS = {_PYTORCH: write_torch, _SAFETENSORS: _write_safetensors}


def _write_small_files(
    weights: Weights, config: Callable[[bytes], bytes], shards: dict[str, list[Tensor]], index_name: str, folder: Path
) -> None:
    """config.json as it was, an index if there are several shards, and whatever else was copied when converting."""
    src = weights.folder
    with whole_file(folder / "config.json") as f:
        f.write(config(official_config((src / "config.json").read_bytes())))
    if len(shards) > 1:
        total = sum(t.nbytes for tensors in shards.values() for t in tensors)
        weight_map = {t.name: name for name, tensors in shards.items() for t in tensors}
        with whole_file(folder / index_name) as f:
            f.write(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n")
    for path in sorted(src.iterdir()):
        if path.is_file() and path.name not in _ours(src, weights):
            shutil.copyfile(path, folder / path.name)


def _ours(src: Path, weights: Weights) -> set[str]:
    """Files that the official folder did not have: tokenizer.json may have been made from the vocabulary."""
    made = {"tokenizer.json"} - recorded_source(src) if (src / "vocab.json").exists() else set()
    return {*files_of(weights.config), "config.json", RECORD, REPORT, *made}
