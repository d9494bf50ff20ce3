"""Where each part of a checkpoint is read from."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from ..weights import Weights
from ..weights.layout import HEAD_FILE, block_file
from ..weights.store import Region
from . import parts
from .parts import Part
from .reader import File


@dataclass(frozen=True)
class Source:
    """Where a part is read from: a file, and where in it the data starts."""

    file: File
    start: int
    part: Part

    def fetch(self, memory: np.ndarray) -> None:
        at = 0
        for span in self.part.spans:
            self.file.read(self.start + span.offset, memory[at : at + span.room], span.nbytes)
            at += span.room

    def mapped(self) -> np.ndarray:
        """The same of a part that is one span, as File.mapped has it."""
        (span,) = self.part.spans
        return self.file.mapped(self.start + span.offset, span.nbytes)


def sources(weights: Weights, head_ranges: list[tuple[int, int]]) -> dict[Hashable, Source]:
    """Every part: the blocks, and lm_head in these ranges of rows."""

    def source(region: Region, *those: Part) -> list[Source]:
        file = File(region.path)
        return [Source(file, region.start, part) for part in those]

    regions = [weights.regions[block_file(i)] for i in range(weights.config.n_layer)]
    found: dict[Hashable, Source] = {i: source(r, parts.whole(r.tensors))[0] for i, r in enumerate(regions)}
    head = weights.regions[HEAD_FILE]
    cut = [parts.rows(head.tensors, "lm_head.weight", *rows) for rows in head_ranges]
    return {**found, **dict(zip(head_ranges, source(head, *cut)))}
