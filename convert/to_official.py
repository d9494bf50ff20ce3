"""From our checkpoint back to the official names and layout."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ..errors import MossError
from ..weights import Weights, open_weights
from ..weights.header import header_bytes
from ..weights.layout import Tensor, files_of
from .copy import Advance, write_tensor
from .job import RECORD, Job, recorded_source, source_record, whole_file
from .mapping import Band, official_bands, official_shapes, pieces
from .to_moss_jt import check_apart, official_config
from .torchsave import write_torch
from .view import of_region

# format -> (a shard's name without its end, the end)
FORMATS = {"pytorch": ("pytorch_model", "bin"), "safetensors": ("model", "safetensors")}


def plan(src: Path, out: Path, format: str, shard_size: int) -> Job:
    """Open and check the converted checkpoint ``src``. Raises MossError where it is broken, or ``out`` is not possible."""
    if format not in FORMATS:
        raise MossError(f"format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if shard_size < 1:
        raise MossError(f"a shard of {shard_size} bytes cannot hold anything")
    check_apart(src, out)
    weights = open_weights(src)
    if not weights.coding.is_fp16:
        raise MossError(f"{src}: is in {weights.coding}, and only fp16 is exported; give a folder converted with --dtype fp16")
    shards = _shards([Tensor(n, "F16", s) for n, s in official_shapes(weights.config).items()], format, shard_size)
    bands = _bands(weights)

    def write(file: BinaryIO, name: str, advance: Advance) -> None:
        _WRITERS[format](file, shards[name], lambda f, t: write_tensor(f, t, bands[t.name], advance))

    index_name = ".".join((*FORMATS[format], "index.json"))
    files = {name: sum(t.nbytes for t in tensors) for name, tensors in shards.items()}
    source = [src / "config.json", *(region.path for region in weights.regions.values())]
    record = {"export": format, "shard_size": shard_size, "source": source_record(source)}
    return Job(out, record, files, partial(_write_small_files, weights, shards, index_name), write, keep_record=False)


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


def _bands(weights: Weights) -> dict[str, list[Band]]:
    """What each official tensor is made of."""
    bands = {}
    for file, file_pieces in pieces(weights.config).items():
        ours = of_region(weights.regions[file])
        for name in {p.official for p in file_pieces}:
            bands[name] = official_bands(file_pieces, name, ours)
    return bands


def _write_safetensors(file: BinaryIO, tensors: list[Tensor], write) -> None:
    file.write(header_bytes(tensors, {"format": "pt"}))  # transformers insists on this metadata
    for t in tensors:
        write(file, t)


_WRITERS = {"pytorch": write_torch, "safetensors": _write_safetensors}


def _write_small_files(weights: Weights, shards: dict[str, list[Tensor]], index_name: str, folder: Path) -> None:
    """config.json as it was, an index if there are several shards, and whatever else was copied when converting."""
    src = weights.folder
    with whole_file(folder / "config.json") as f:
        f.write(official_config((src / "config.json").read_bytes()))
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
    return {*files_of(weights.config), "config.json", RECORD, *made}
