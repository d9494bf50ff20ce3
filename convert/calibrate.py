"""What a checkpoint is calibrated with: the tokens of some dialogues."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import Config
from ..dialogues import read_dialogues
from ..errors import MossError
from ..tokenizer import load_tokenizer

DIALOGUES = 128  # of a file, from its start
TOKENS = 512  # of a dialogue, from its start
_CHUNK = 2048  # tokens at a time, in whole dialogues
_SAMPLE = 512  # tokens whose products' errors are reported


class Chunk(NamedTuple):
    """Some dialogues that are computed together: tokens ``start`` to ``stop`` of all, each dialogue's place among these, and
    which of these are in the sample."""

    start: int
    stop: int
    dialogues: list[slice]
    sampled: np.ndarray

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Calibration:
    """Token ids of dialogues, each (T,), in one row."""

    dialogues: tuple[np.ndarray, ...]

    @cached_property
    def ids(self) -> np.ndarray:
        return np.concatenate(self.dialogues)

    @cached_property
    def chunks(self) -> list[Chunk]:
        sample = np.linspace(0, len(self.ids) - 1, min(len(self.ids), _SAMPLE)).round().astype(np.int64)
        found: list[Chunk] = []
        start = at = 0
        places: list[slice] = []
        for ids in (*self.dialogues, None):
            if places and (ids is None or at + len(ids) - start > _CHUNK):
                found.append(Chunk(start, at, places, sample[(start <= sample) & (sample < at)] - start))
                start, places = at, []
            if ids is not None:
                places.append(slice(at - start, at - start + len(ids)))
                at += len(ids)
        return found


def read_calibration(path: Path, model: Path, config: Config) -> Calibration:
    """The first dialogues of a file, by the tokenizer of the folder ``model``. Raises MossError where the file holds none."""
    dialogues = islice(read_dialogues(path, load_tokenizer(model)), DIALOGUES)
    found = tuple(d.ids[: min(TOKENS, config.n_ctx)] for d in dialogues)
    if not found:
        raise MossError(f"{path}: holds no dialogue of at most 2048 tokens, so there is nothing to calibrate with")
    if (largest := max(ids.max() for ids in found)) >= config.vocab_size:
        raise MossError(f"{path}: has the token {largest}, but the model's vocabulary ends at {config.vocab_size}")
    return Calibration(found)
