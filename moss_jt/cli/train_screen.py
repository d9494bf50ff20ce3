"""How far a training is, on stderr: a bar on a terminal, elsewhere a line every ten seconds; what is worth keeping in both."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..machine import peak_memory
from . import ui
from .progress import remaining
from .size import gigabytes

if TYPE_CHECKING:
    from ..train.loop import Evaluation, Step
    from ..train.sft import Begun

_EVERY = 10  # seconds


class Screen:
    """A Watcher of a training."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._due = time.monotonic() + _EVERY
        self._steps = 0

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def began(self, begun: Begun) -> None:
        at, self._steps = begun.position, begun.steps
        where = f"from step {at.step:,} on" if at.step else "from the beginning"
        self._note(f"Training {begun.parameters:,} numbers, {begun.steps:,} steps, {where}.")
        if not begun.tensorboard:
            self._note("Without TensorBoard logs; pip install tensorboardX brings them.")
        self._start, self._first = time.monotonic(), at.step
        if ui.is_terminal(sys.stderr):
            self._bar = _bar(self._steps, at.step)

    def step(self, done: Step) -> None:
        speed = done.tokens / done.seconds
        text = f"loss {done.loss:.4f}, acc {done.acc:.1%}, lr {done.lr:.2e}, {speed:,.0f} tokens/s, {gigabytes(peak_memory())}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done.step, text=text)
        elif time.monotonic() >= self._due:
            self._due = time.monotonic() + _EVERY
            left = remaining(time.monotonic() - self._start, done.step - self._first, self._steps - done.step)
            self._note(f"step {done.step:,} of {self._steps:,}: {text}, {left} left")

    def evaluating(self, done: int, batches: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], text=f"evaluating: {done:,} of {batches:,} batches")

    def evaluation(self, done: Evaluation) -> None:
        self._note(f"step {done.step:,}: val_loss {done.val_loss:.4f}, val_acc {done.val_acc:.2%}")

    def saved(self, checkpoint: Path) -> None:
        self._note(f"saved {checkpoint}")

    def publishing(self, done: int, total: int) -> None:
        self.close()
        if not done:
            self._note("writing the model")

    def _note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            click.echo(text, err=True)


def _bar(steps: int, first: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn()]
    bar = Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=600)
    bar.add_task("", total=steps, completed=first, text="")
    bar.start()
    return bar
