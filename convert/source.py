"""What a converted checkpoint is made from: an official one, quantised or not, or one of ours that is still in fp16."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from ..config import Config
from ..errors import MossError
from ..weights import is_converted, open_weights
from .gptq import Gptq, is_gptq
from .mapping import Band, our_bands, pieces
from .official import open_official, problems
from .view import of_region


@dataclass(frozen=True)
class Source:
    """A source, opened and checked: no tensor is read."""

    config: Config
    official: bool
    files: tuple[Path, ...]  # that hold the weights
    bands: Callable[[str, str], list[Band]]  # one of our files, a tensor of it as in fp16 -> what it is made of
    gptq: Gptq | None = None  # what the blocks' matrices are made of instead


def open_source(folder: Path) -> Source:
    """Raises MossError for the first thing that is wrong with it."""
    if folder.is_dir() and is_converted(folder):
        return _ours(folder)
    official = open_official(folder)
    for problem in problems(official):
        raise MossError(problem)
    of_file = pieces(official.config)

    def bands(file: str, tensor: str) -> list[Band]:
        return our_bands(of_file[file], tensor, official.tensors)

    gptq = Gptq(folder, official.config, official.tensors) if is_gptq(official.tensors) else None
    return Source(official.config, True, official.shards, bands, gptq)


def _ours(folder: Path) -> Source:
    weights = open_weights(folder)
    if not weights.coding.is_fp16:
        raise MossError(f"{folder}: already in {weights.coding}; convert the official checkpoint, or one of ours in fp16")
    views = {name: of_region(region) for name, region in weights.regions.items()}
    files = tuple(region.path for region in weights.regions.values())
    return Source(weights.config, False, files, lambda file, tensor: [Band((views[file][tensor],))])
