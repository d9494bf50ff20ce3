"""Step after step: gradients, their clipping, the optimizer, evaluation, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable, Protocol, TypeVar

import numpy as np

from ..errors import MossError
from .batch import NO_LOSS, Measured
from .data import Conversations, Order, in_file_order
from .group import Group
from .schedule import cosine
from .settings import Settings

T = TypeVar("T")


@dataclass
class Position:
    """How far a training is. All else that it depends on is in the weights, the optimizer and the settings."""

    step: int = 0  # steps done
    evaluated: int = 0  # the last step after which there was an evaluation
    tokens: int = 0  # that went through the model
    dropout_state: int = 0


@dataclass(frozen=True)
class Step:
    """What a step was like. ``step`` counts from 1."""

    step: int
    loss: float  # mean over the tokens that count, nats
    acc: float
    lr: float
    gradient_norm: float  # before clipping
    tokens: int  # that went through the model, padding not counted
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """``val_loss``: the mean of the batches' means; ``val_acc``: the share of right tokens: the official SFTMetric's."""

    step: int
    val_loss: float
    val_acc: float
    seconds: float


class Watcher(Protocol):
    """Is told of everything, in order."""

    def step(self, done: Step) -> None: ...

    def evaluating(self, done: int, batches: int) -> None: ...

    def evaluation(self, done: Evaluation) -> None: ...


class Stopped(Exception):
    """The training was asked to stop, and what it has done is saved."""


class Training:
    """One, from wherever ``position`` is. ``save(position)`` writes a checkpoint; ``stopping()``: whether to stop. ``group``:
    the processes that share its batches; each has the same weights and takes the same steps.

    A step that was begun leaves no trace unless it is finished, so what is saved is always the state between two steps.
    """

    def __init__(
        self,
        settings: Settings,
        trainee: Any,
        optimizer: Any,
        train: Conversations,
        val: Conversations | None,
        save: Callable[[Position], None],
        watchers: list[Watcher],
        position: Position | None = None,
        stopping: Callable[[], bool] = lambda: False,
        group: Group | None = None,
    ):
        self._group = group or Group()
        self._settings, self._trainee, self._optimizer, self._train, self._val = settings, trainee, optimizer, train, val
        accumulated = settings.gradient_accumulation_steps * self._group.size
        self._order = Order(train.lengths, settings.train_bsz_per_gpu, accumulated, settings.seed)
        self.steps = settings.n_epochs * self._order.steps_per_epoch
        self.position, self._save, self._watchers, self._stopping = position or Position(), save, watchers, stopping
        self._saved = self.position.step

    def run(self) -> None:
        """To the end, and a checkpoint there. Raises Stopped, and MossError where numbers overflow or a disk is full."""
        at = self.position
        try:
            self._evaluate_if_due()  # an evaluation may have been interrupted
            while at.step < self.steps:
                self._take_step()
                self._evaluate_if_due()
                if at.step % self._settings.save_step == 0:
                    self._checkpoint()
        except Stopped:
            self._checkpoint()
            raise
        self._checkpoint()

    def _checkpoint(self) -> None:
        if self.position.step != self._saved:
            self.position.dropout_state = self._trainee.dropout_state
            self._save(self.position)
            self._saved = self.position.step

    def _mine(self, parts: list[T]) -> Iterator[tuple[int, T]]:
        """This process's ones, numbered among all. Raises Stopped, in all processes at once, where one is asked to stop."""
        for first in range(0, len(parts), self._group.size):
            if self._group.any(self._stopping()):
                raise Stopped
            if (number := first + self._group.rank) < len(parts):
                yield number, parts[number]

    # ---- a step --------------------------------------------------------------------------------------------------------------

    def _take_step(self) -> None:
        at, start = self.position, time.monotonic()
        measured = self._gradients(self._order.step(at.step))
        norm = self._trainee.gradient_norm()
        if not (math.isfinite(norm) and math.isfinite(measured.loss)):
            raise MossError(
                f"step {at.step + 1}: the loss or its gradient is beyond all numbers; "
                "a lower learning_rate, more warmup or a lower gradient_clipping may help"
            )
        if self._settings.gradient_clipping and norm > self._settings.gradient_clipping:
            self._trainee.scale_gradients(self._settings.gradient_clipping / norm)
        rate = self._settings.learning_rate * cosine(at.step, self.steps, self._settings.warmup_rates)
        self._optimizer.step(rate)
        tokens = int(self._train.lengths[np.concatenate(self._order.step(at.step))].sum())
        at.step, at.tokens = at.step + 1, at.tokens + tokens
        loss, acc = measured.loss / measured.tokens, measured.right / measured.tokens
        self._tell("step", Step(at.step, loss, acc, rate, norm, tokens, time.monotonic() - start))

    def _gradients(self, parts: list[np.ndarray]) -> Measured:
        """Those of the mean over all tokens of the step that count, however they fall on its batches. Returns sums."""
        trainee, start, most = self._trainee, self._trainee.dropout_state, self._settings.train_bsz_per_gpu
        batches = [self._train.batch(which) for which in parts]
        tokens = sum(int((batch.labels != NO_LOSS).sum()) for batch in batches)
        trainee.zero_gradients()
        total = Measured(0.0, 0, 0)
        try:
            for number, batch in self._mine(batches):
                trainee.dropout_state = start + number * most  # a batch is divided into so many at most
                found = trainee.train(batch, 1 / tokens)
                total = Measured(*(a + b for a, b in zip(total, found)))
        except Stopped:
            trainee.dropout_state = start
            raise
        trainee.dropout_state = start + len(parts) * most
        self._group.add(p.gradient for p in trainee.parameters.values())
        return Measured(*self._group.sums(*total))

    # ---- evaluation ----------------------------------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> None:
        at = self.position
        due = at.step and (at.step % self._settings.eval_step == 0 or at.step == self.steps)
        if self._val is not None and due and at.evaluated != at.step:
            self._tell("evaluation", self._evaluate(self._val))
            at.evaluated = at.step

    def _evaluate(self, val: Conversations) -> Evaluation:
        start, parts = time.monotonic(), list(in_file_order(len(val), self._settings.eval_bsz_per_gpu))
        found = []
        for number, which in self._mine(parts):
            found.append(self._trainee.measure(val.batch(which)))
            self._tell("evaluating", min(number + self._group.size, len(parts)), len(parts))
        sums = [sum(m.loss / m.tokens for m in found), sum(m.right for m in found), sum(m.tokens for m in found)]
        loss, right, tokens = self._group.sums(*sums)
        loss, acc = loss / len(parts), right / tokens
        return Evaluation(self.position.step, loss, acc, time.monotonic() - start)

    def _tell(self, what: str, *news: Any) -> None:
        for watcher in self._watchers:
            getattr(watcher, what)(*news)
