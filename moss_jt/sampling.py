"""Choosing the next token from logits: the official semantics, in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .errors import MossError


@dataclass(frozen=True)
class Sampling:
    """How to choose. The defaults are those of MOSS's authors; greedy ignores temperature, top_k and top_p.

    repetition_penalty None means 1.02 when sampling and none when greedy. top_k 0 and top_p 1 switch those off.
    """

    greedy: bool = False
    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.8
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises MossError naming the value that makes no sense."""
        _require("temperature", self.temperature, self.temperature > 0, "above 0 (use greedy to always take the likeliest)")
        _require("top_k", self.top_k, self.top_k >= 0, "0 or more")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, penalty is None or penalty > 0, "above 0")
        _require("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more")

    @property
    def penalty(self) -> float:
        if self.repetition_penalty is None:
            return 1.0 if self.greedy else 1.02
        return self.repetition_penalty

    @property
    def enough(self) -> int:
        """How many of the likeliest tokens are all that matters; 0: every token may."""
        return 1 if self.greedy else self.top_k


def _require(name: str, value, ok: bool, wanted: str) -> None:
    if not ok:
        raise MossError(f"{name} is {value}, it must be {wanted}")


class Likeliest(NamedTuple):
    """The highest logits of a position, highest first, the repetition penalty taken into account: what a device gives where
    those are ``enough``."""

    ids: np.ndarray  # int (k,)
    logits: np.ndarray  # float32 (k,)


class Sampler:
    """Chooses token after token of one answer."""

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)

    def choose(self, logits: np.ndarray | Likeliest, seen: np.ndarray) -> int:
        """The next id. logits: float32 (V,), left as they are, or the likeliest; seen: the ids of prompt and answer so far.

        The order is that of the official code: repetition penalty, temperature, top_k, top_p.
        """
        s = self._sampling
        if not isinstance(logits, Likeliest):
            logits = likeliest(logits if s.penalty == 1 else penalised(logits, seen, s.penalty), s.enough)
        if s.greedy:
            return int(logits.ids[0])
        ids, p = distribution(logits, s.temperature, s.top_p)
        at = np.searchsorted(np.cumsum(p), self._rng.random(), side="right")
        return int(ids[min(at, len(ids) - 1)])  # a sum of probabilities may end below 1


def penalised(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Logits of the ids seen, divided by the penalty where positive, multiplied where negative (Keskar et al., CTRL, 2019)."""
    logits = logits.copy()
    ids = np.unique(seen)
    logits[ids] = np.where(logits[ids] < 0, logits[ids] * penalty, logits[ids] / penalty)
    return logits


def likeliest(logits: np.ndarray, count: int) -> Likeliest:
    """The ``count`` highest of logits (V,), all if 0; of equal ones the lower ids first."""
    if count == 1:
        best = logits.argmax()
        return Likeliest(np.array([best]), logits[[best]])
    k = min(count or len(logits), len(logits))
    ids = np.sort(np.argpartition(logits, len(logits) - k)[len(logits) - k :])
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return Likeliest(ids, logits[ids])


def distribution(likely: Likeliest, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The ids that may follow and their probabilities, likeliest first.

    top_p keeps the smallest set of likeliest ids whose probability passes top_p (Holtzman et al., 2019), at least one.
    """
    scaled = likely.logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    if top_p < 1:
        p = p[: np.searchsorted(np.cumsum(p), top_p, side="right") + 1]
    return likely.ids[: len(p)], p / p.sum()
