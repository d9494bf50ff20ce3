"""Drawing: what the user sees while a model loads and answers. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TextIO

import click

_LONGEST_RESULT = 200  # characters of it on the terminal
_ERASE_LINE = "\r\x1b[K"
# Control characters in a text could move the cursor or worse; on a terminal only newline and tab pass.
_CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], "\ufffd")
del _CONTROLS[ord("\n")], _CONTROLS[ord("\t")]


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()  # None: closed by whoever started us


def can_draw(stream: TextIO | None) -> bool:
    """Whether the cursor can be moved there."""
    return is_terminal(stream) and os.environ.get("TERM", "dumb") != "dumb"


def note(text: str) -> None:
    _say(text, dim=True)


def error(text: str) -> None:
    _say(text, fg="red")


def _say(text: str, **style: Any) -> None:
    coloured = can_draw(sys.stderr) and not os.environ.get("NO_COLOR")
    text = text.translate(_CONTROLS)
    click.echo(click.style(text, **style) if coloured else text, err=True)


@contextmanager
def waiting() -> Iterator[None]:
    """A sign on the terminal that something goes on, gone when it is over."""
    drawn = can_draw(sys.stdout)
    if drawn:
        _print("…\r")  # whatever else is written meanwhile takes its place
    try:
        yield
    finally:
        if drawn:
            _print(_ERASE_LINE)


def answer(pieces: Iterator[Any]) -> None:
    """Print pieces of text as they come, and end the line, also where the answer is interrupted."""
    sys.stdout.reconfigure(errors="replace")  # a locale without Chinese shows "?" instead of failing
    ended = True
    try:
        with waiting():
            first = next((piece.text for piece in pieces if piece.text), "")
        ended = False
        for text in chain([first], (piece.text for piece in pieces)):
            _print(text.translate(_CONTROLS) if is_terminal(sys.stdout) else text)
            ended = text.endswith("\n") if text else ended
    finally:
        if not ended:
            _print("\n")


def ran(command: str, result: str) -> None:
    """A line for a command that MOSS had run: ``Calculate("60/6") → 10.0``."""
    shown = ", ".join(result.strip("'").splitlines())
    note(f"{command} → {shown if len(shown) <= _LONGEST_RESULT else shown[: _LONGEST_RESULT - 1] + '…'}")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def stats(moss: Any) -> None:
    """Three lines about the last answer of a Moss."""
    s = moss.last_stats
    read = s.prompt_tokens - s.cached_tokens
    note(f"  prefill {read} tokens + {s.cached_tokens} cached, {s.prefill_seconds:.2f} s, {s.prefill_tokens_s:.1f} tokens/s")
    note(f"  decode {s.new_tokens} tokens, {s.decode_seconds:.2f} s, {s.decode_tokens_s:.1f} tokens/s")
    note(f"  KV cache {moss.cache_bytes / 1e6:.1f} MB in {moss.kv_cache}{_memory()}{_gpu_memory(moss)}")


def turns(count: int) -> str:
    return "1 turn" if count == 1 else f"{count} turns"


def _gpu_memory(moss: Any) -> str:
    return "" if moss.gpu_peak is None else f"; of the GPU's, peak {moss.gpu_peak / 1e9:.2f} GB"


def _memory() -> str:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            status = dict(line.split(":", 1) for line in file)
        now, peak = (int(status[name].split()[0]) * 1024 / 1e9 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError, ValueError):  # only Linux says
        return ""
    return f"; memory {now:.2f} GB, peak {peak:.2f} GB"
