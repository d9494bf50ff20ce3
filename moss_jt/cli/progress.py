"""How far something has come, on stderr: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

import click

from .size import gigabytes

Progress = Callable[[int, int], None]  # (done, in all)
_EVERY = 10  # seconds
_PERIOD = 600  # seconds by which the time left is told: a step of GPTQ can take minutes


@contextmanager
def of_bytes(verb: str) -> Iterator[Progress]:
    """For bytes; ``verb``: what happened to those that are done."""
    if not _at_terminal():
        yield _lines(lambda done, total: f"{gigabytes(done)} of {gigabytes(total)} {verb}")
        return
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    with _bar(BarColumn(None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as update:
        yield update


@contextmanager
def of_tokens() -> Iterator[Progress]:
    """For tokens that have been evaluated."""
    if not _at_terminal():
        yield _lines(lambda done, total: f"{done:,} of {total:,} tokens")
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    with _bar(BarColumn(None), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn()) as update:
        yield update


def _at_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def _bar(*columns: Any) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=_PERIOD) as bar:
        task = None

        def update(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = bar.add_task("", total=total, completed=done)
            bar.update(task, completed=done)

        yield update


def _lines(text: Callable[[int, int], str]) -> Progress:
    due = time.monotonic() + _EVERY
    seen: deque[tuple[float, int]] = deque()

    def update(done: int, total: int) -> None:
        nonlocal due
        now = time.monotonic()
        seen.append((now, done))
        while seen[0][0] < now - _PERIOD:
            seen.popleft()
        if now >= due:
            due, (start, before) = now + _EVERY, seen[0]
            left = f", {remaining(now - start, done - before, total - done)} left" if done > before else ""
            click.echo(text(done, total) + left, err=True)

    return update


def remaining(seconds: float, done: int, left: int) -> str:
    """How long what is ``left`` takes where ``done``, at least one, took ``seconds``."""
    seconds *= left / done
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    return f"{hours} h" if minutes > 120 else f"{minutes} min" if minutes > 2 else f"{seconds:.0f} s"
