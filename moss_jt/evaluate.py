"""How good a model is, and how far from another one, by what it would say in dialogues whose answers are known.

Each token of the answers is predicted from the true tokens before it; nothing else of a dialogue counts.
"""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Callable

import numpy as np

from .dialogues import Dialogue
from .errors import MossError

AT_ONCE = 256  # positions whose logits are held together; at MOSS's vocabulary 110 MB
_ROWS = 16  # of them, in float64 at a time

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


@dataclass
class Score:
    """How well the answers' tokens were predicted."""

    tokens: int = 0
    right: int = 0  # tokens that were the likeliest
    total_loss: float = 0.0  # of -log p, in nats

    def add(self, log_p: np.ndarray, targets: np.ndarray) -> None:
        """log_p (n, V): the logarithm of each token's probability; targets (n,): the tokens that came."""
        self.tokens += len(targets)
        self.right += int((log_p.argmax(1) == targets).sum())
        self.total_loss -= float(log_p[np.arange(len(targets)), targets].sum())

    @property
    def loss(self) -> float:
        """Mean of -log p, in nats."""
        return self.total_loss / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        return self.right / self.tokens


@dataclass(frozen=True)
class Place:
    """A token of a dialogue, and what each model finds likeliest in its place."""

    line: int  # of the dialogue, in its file
    position: int  # in the dialogue's ids
    token: int
    reference: int
    other: int


@dataclass
class Comparison:
    """The other model beside the reference, on the same tokens. KL is that of the reference's distribution from the other's:
    sum of p (log p - log q), in nats."""

    reference: Score = field(default_factory=Score)
    other: Score = field(default_factory=Score)
    agreed: int = 0  # tokens where both find the same one likeliest
    total_kl: float = 0.0
    max_kl: float = 0.0
    max_kl_at: Place | None = None
    first_divergence: Place | None = None

    @property
    def agreement(self) -> float:
        return self.agreed / self.other.tokens

    @property
    def mean_kl(self) -> float:
        return self.total_kl / self.other.tokens

    def add(self, line: int, positions: np.ndarray, targets: np.ndarray, log_p: np.ndarray, log_q: np.ndarray) -> None:
        """Count some positions of a dialogue; log_p, log_q (n, V) are the reference's and the other's."""
        self.reference.add(log_p, targets)
        self.other.add(log_q, targets)
        kl = (np.exp(log_p) * (log_p - log_q)).sum(1)
        ours, theirs = log_p.argmax(1), log_q.argmax(1)

        def place(i: int) -> Place:
            return Place(line, *(int(x[i]) for x in (positions, targets, ours, theirs)))

        self.agreed += int((ours == theirs).sum())
        self.total_kl += float(kl.sum())
        if self.max_kl_at is None or kl.max() > self.max_kl:
            self.max_kl, self.max_kl_at = float(kl.max()), place(int(kl.argmax()))
        if self.first_divergence is None and (ours != theirs).any():
            self.first_divergence = place(int((ours != theirs).argmax()))


def perplexity(moss: Any, dialogues: list[Dialogue], progress: Progress | None = None) -> Score:
    """Score the answers in dialogues, which fit the model's context. Raises MossError where there are none."""
    _check(dialogues)
    score = Score()
    for _, targets, logits in _predictions(moss, dialogues, _Steps(dialogues, 1, progress)):
        score.add(_log_softmax(logits), targets)
    return score


def compare(
    reference: Callable[[], Any], other: Callable[[], Any], dialogues: list[Dialogue], progress: Progress | None = None
) -> Comparison:
    """Compare two models on the answers in dialogues, which fit the context of both.

    ``reference`` and ``other`` load them: one is in memory at a time, and the first one's logits wait in a temporary file,
    4 V bytes a token. Raises MossError where there are no answers, the vocabularies differ, or there is no room for the file.
    """
    _check(dialogues)
    steps = _Steps(dialogues, 2, progress)
    with tempfile.TemporaryFile(prefix="moss-jt-") as file:
        vocabulary = _spill(reference(), dialogues, file, steps)
        gc.collect()
        file.seek(0)
        return _beside(other(), vocabulary, dialogues, file, steps)


def _spill(moss: Any, dialogues: list[Dialogue], file: IO[bytes], steps: _Steps) -> int:
    """Write the logits of all answers; returns V."""
    needed, folder = 4 * moss.config.vocab_size * sum(int(d.answers.sum()) for d in dialogues), tempfile.gettempdir()
    if needed > (free := shutil.disk_usage(folder).free):
        raise MossError(
            f"{folder}: {needed / 1e9:.2f} GB are needed for the reference's logits, and {free / 1e9:.2f} GB are free; "
            "set TMPDIR to a folder on another disk, or compare on fewer dialogues"
        )
    try:
        for _, _, logits in _predictions(moss, dialogues, steps):
            file.write(np.ascontiguousarray(logits).data)
        file.flush()
    except OSError as e:
        raise MossError(f"{folder}: the reference's logits cannot be kept there: {e.strerror}; set TMPDIR") from None
    return moss.config.vocab_size


def _beside(moss: Any, vocabulary: int, dialogues: list[Dialogue], file: IO[bytes], steps: _Steps) -> Comparison:
    if moss.config.vocab_size != vocabulary:
        raise MossError(f"the models have vocabularies of {vocabulary} and {moss.config.vocab_size}: nothing to compare")
    found = Comparison()
    for (line, positions), targets, logits in _predictions(moss, dialogues, steps):
        known = np.empty(logits.shape, np.float32)
        file.readinto(known)
        found.add(line, positions, targets, _log_softmax(known), _log_softmax(logits))
    return found


def _predictions(moss: Any, dialogues: list[Dialogue], steps: _Steps) -> Iterator[tuple]:
    """((line, positions), their tokens, float32 logits (n, V) that predict them), for all answers in order, _ROWS at a time."""
    for dialogue in dialogues:
        for positions in _answers(dialogue):
            logits = moss.logits(dialogue.ids[: positions[-1]], last=len(positions))
            for i in range(0, len(positions), _ROWS):
                some = positions[i : i + _ROWS]
                yield (dialogue.line, some), dialogue.ids[some], logits[i : i + _ROWS]
        steps.advance(len(dialogue.ids))


def _answers(dialogue: Dialogue) -> Iterator[np.ndarray]:
    """Positions of answers that follow each other, up to AT_ONCE of them."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], dialogue.answers, [False]]).astype(np.int8)))
    for start, end in edges.reshape(-1, 2):
        for first in range(start, end, AT_ONCE):
            yield np.arange(first, min(first + AT_ONCE, end))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    x -= np.log(np.exp(x).sum(1, keepdims=True))
    return x


def _check(dialogues: list[Dialogue]) -> None:
    if not any(d.answers.any() for d in dialogues):
        raise MossError("there are no answers to measure in these dialogues")


class _Steps:
    """Counts tokens for a Progress, over several rounds of all dialogues."""

    def __init__(self, dialogues: list[Dialogue], rounds: int, progress: Progress | None):
        self._done, self._total = 0, rounds * sum(len(d.ids) for d in dialogues)
        self._progress = progress or (lambda done, total: None)
        self._progress(0, self._total)

    def advance(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)
