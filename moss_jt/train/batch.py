"""What a Trainee is given, and what it says of that."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..config import Config
from ..errors import MossError

NO_LOSS = -100  # the label of a position that does not count


class Batch(NamedTuple):
    """B sequences of up to T tokens, padded on the right; nobody sees what comes later, so padding needs no mask.

    ids int32 (B, T): the padding is any id. labels int32 (B, T): the id where it counts, NO_LOSS elsewhere, padding included;
    labels[:, t] is predicted from ids[:, :t], so those at t = 0 never count.
    """

    ids: np.ndarray
    labels: np.ndarray


class Measured(NamedTuple):
    """Sums over the labels that count."""

    loss: float  # of -log p, in nats
    tokens: int
    right: int  # tokens that were the likeliest


class Counted(NamedTuple):
    """What of a batch matters: ids int32 (B, T), up to the last one from which something is predicted; the rows of the state,
    M = B T of them, that predict, and what."""

    ids: np.ndarray
    rows: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, batch: Batch) -> Counted:
        sequence, at = np.nonzero(batch.labels[:, 1:] != NO_LOSS)
        length = int(at.max(initial=-1)) + 1
        ids = np.ascontiguousarray(batch.ids[:, :length], np.int32)
        return cls(ids, sequence * length + at, batch.labels[sequence, at + 1])


def check(batch: Batch, config: Config) -> None:
    """Raises MossError for what a model of this size cannot take."""
    ids, labels = batch
    if ids.ndim != 2 or not ids.size or labels.shape != ids.shape:
        raise MossError(f"a batch has ids {list(ids.shape)} and labels {list(labels.shape)}, expected two of (B, T)")
    if ids.shape[1] > config.n_ctx:
        raise MossError(f"{ids.shape[1]} tokens do not fit the model's context of {config.n_ctx}")
    for what, some in (("token id", ids), ("label", labels[labels != NO_LOSS])):
        bad = some[(some < 0) | (some >= config.vocab_size)]
        if len(bad):
            raise MossError(f"{what} {bad[0]} is not in the model's vocabulary of {config.vocab_size}")
