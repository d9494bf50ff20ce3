"""Conversations to train on: read, masked as officially, cut into batches in an order that a seed decides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..dialogues import read_dialogues
from ..errors import MossError
from .batch import NO_LOSS, Batch

_POOL = 64  # batches that are sorted by length together: padding becomes rare, and the order stays random


@dataclass(frozen=True, eq=False)
class Conversations:
    """A file of them. Conversation i is ``starts[i]:starts[i + 1]`` of what follows."""

    path: Path
    ids: np.ndarray  # int32
    trained: np.ndarray  # bool: whether it has loss
    starts: np.ndarray  # int64 (n + 1,)
    left_out: dict[int, int] = field(default_factory=dict)  # line -> its turns that were too long
    bad: dict[int, str] = field(default_factory=dict)  # line -> what is wrong with it

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return np.diff(self.starts)

    @property
    def digest(self) -> str:
        """Tells whether the tokens are the same as before."""
        found = hashlib.sha256()
        for array in (self.starts, self.ids, self.trained):
            found.update(array.tobytes())
        return found.hexdigest()

    def batch(self, which: np.ndarray) -> Batch:
        """These conversations, as long as the longest one."""
        lengths = self.lengths[which]
        ids = np.zeros((len(which), int(lengths.max())), np.int32)
        labels = np.full(ids.shape, NO_LOSS, np.int32)
        for row, (i, length) in enumerate(zip(which, lengths)):
            here = slice(self.starts[i], self.starts[i + 1])
            ids[row, :length] = self.ids[here]
            labels[row, :length] = np.where(self.trained[here], self.ids[here], NO_LOSS)
        return Batch(ids, labels)


def read_conversations(path: Path, tokenizer: Any, limit: int, skip_bad: bool = False) -> Conversations:
    """A file in the official format (see dialogues). Turns that would pass ``limit`` tokens are left out.

    Raises MossError, naming file and line, for a line that is no conversation, or of which no turn fits; with ``skip_bad`` only
    where no conversation remains.
    """
    ids, trained, starts = [], [], [0]
    left_out: dict[int, int] = {}
    bad: dict[int, str] = {}

    def refuse(line: int, why: str) -> None:
        if not skip_bad:
            raise MossError(f"{path}, line {line}: {why}; --skip_bad leaves such lines out")
        bad[line] = why

    for dialogue in read_dialogues(path, tokenizer, limit, left_out.__setitem__, refuse):
        ids.append(dialogue.ids)
        trained.append(dialogue.trained)
        starts.append(starts[-1] + len(dialogue.ids))
    if not ids:
        raise MossError(f"{path}: holds no conversation" + (f"; {len(bad)} bad lines were left out" if bad else ""))
    return Conversations(path, np.concatenate(ids), np.concatenate(trained), np.array(starts), left_out, bad)


class Order:
    """Which conversations each step is made of: a pure function of lengths, sizes and seed.

    Every epoch takes each conversation once. Those of one batch are about equally long; a step is ``accumulated`` batches,
    and the last one of an epoch what is left.
    """

    def __init__(self, lengths: np.ndarray, batch: int, accumulated: int, seed: int):
        self._lengths, self._batch, self._accumulated, self._seed = lengths, batch, accumulated, seed
        self._epoch, self._batches = -1, []
        count = -(-len(lengths) // batch)
        self.steps_per_epoch = -(-count // accumulated)

    def step(self, number: int) -> list[np.ndarray]:
        """The batches of step ``number``, counted from 0 over all epochs."""
        epoch, position = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        first = position * self._accumulated
        return self._batches[first : first + self._accumulated]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        random = np.random.RandomState([self._seed, epoch])  # the generator whose numbers numpy promises to keep
        order, pool, batches = random.permutation(len(self._lengths)), _POOL * self._batch, []
        for first in range(0, len(order), pool):
            some = order[first : first + pool]
            some = some[np.argsort(-self._lengths[some], kind="stable")]
            batches += [some[i : i + self._batch] for i in range(0, len(some), self._batch)]
        return [batches[i] for i in random.permutation(len(batches))]


def in_file_order(count: int, batch: int) -> Iterator[np.ndarray]:
    """Batches to evaluate, as the official code takes them, and the last one besides, which that drops if it is not full."""
    for first in range(0, count, batch):
        yield np.arange(first, min(first + batch, count))
