"""What the model wrote as its commands, run, and what becomes of that in the dialogue."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Callable

from .base import NO_RESULT, Plugin

MOST_COMMANDS = 8  # in one turn
LONGEST_RESULT = 1000  # characters that the model sees, where they fit
_SECONDS = 5.0  # after so long, the rest of a turn's commands are not run
_LONGEST_TEXT = 4000  # characters of commands that are looked at
_LONGEST_COMMAND = 300  # characters of it that are repeated before its result

Told = Callable[[str, str], None]  # of a command and its result, as soon as there is one

_QUOTES = "\"'`“”‘’「」『』＂＇"
_CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*[(（]")
# A quoted argument ends at a quote that a bracket follows, and then nothing or the next command, so it may hold quotes itself.
_NEXT = r"(?=\s*(?:$|[,，、;；.。]|and\b|[A-Za-z_]\w*[(（]))"
_QUOTED = re.compile(rf"\s*[{_QUOTES}](.*?)(?<!\\)[{_QUOTES}]\s*[)）]{_NEXT}", re.DOTALL)
_BETWEEN = re.compile(r"(?:[\s,，、;；.。!！)）]|and\b)+")
_NOTHING = re.compile(r"\s*(none\b.*)?\W*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """``text`` as it was written; ``function`` is empty where it is no call."""

    text: str
    function: str = ""
    argument: str = ""


def parse(text: str) -> list[Command]:
    """The commands in what the model wrote after ``<|Commands|>:``; none for ``None``. Takes any text."""
    text = text[:_LONGEST_TEXT].strip()
    return [] if _NOTHING.fullmatch(text) else list(islice(_commands(text), MOST_COMMANDS + 1))


def _commands(text: str) -> Iterator[Command]:
    at = 0
    while at < len(text):
        call = _CALL.match(text, at)
        if call is None:
            yield Command(text[at:])
            return
        quoted = _QUOTED.match(text, call.end())
        if quoted:
            end, argument = quoted.end(), re.sub(rf"\\([{_QUOTES}])", r"\1", quoted[1])
        else:
            end = _closing(text, call.end())
            argument = re.sub(r"[)）]$", "", text[call.end() : end]).strip().strip(_QUOTES)
        yield Command(text[at:end].strip(), call[1], argument)
        between = _BETWEEN.match(text, end)
        at = between.end() if between else end


def _closing(text: str, start: int) -> int:
    """Behind the bracket that closes what was opened before start; the end of the text where none does."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] in "(（") - (text[i] in ")）")
        if depth == 0:
            return i + 1
    return len(text)


@dataclass(frozen=True)
class Result:
    """What running a command gave. ``plugin`` is None where there is none for it."""

    command: Command
    plugin: Plugin | None
    text: str

    @property
    def echoed(self) -> bool:
        return self.plugin is None or self.plugin.echo

    def written(self, longest: int) -> str:
        text = self.text
        if len(text) > longest:
            text = f"{text[:longest]} … (cut off after {longest} of {len(text)} characters)"
        between = "\n" if self.plugin is not None and self.plugin.own_line else " "
        return f"{one_line(self.command.text)} =>{between}{text}" if self.echoed else text


def run(wanted: list[Command], plugins: Sequence[Plugin], told: Told | None = None) -> list[Result]:
    """Run them in order. Whatever is wrong with one is said in its result."""
    started, results = time.monotonic(), []
    for number, command in enumerate(wanted):
        plugin = next((p for p in plugins if p.function.lower() == command.function.lower()), None)
        if number == MOST_COMMANDS:
            text = f"No result: only {MOST_COMMANDS} commands are run at a time."
        elif time.monotonic() - started > _SECONDS:
            text = "No result: there was no time left."
        else:
            text = _run(command, plugin, plugins)
        results.append(Result(command, plugin, text))
        if told is not None:
            told(one_line(command.text), text)
    return results


def written(results: list[Result], longest: int = LONGEST_RESULT) -> str:
    """What stands between ``<|Results|>:`` and ``<eor>``; ``longest``: characters of a result."""
    if not results:
        return " None"
    lines = "\n".join(result.written(longest) for result in results)
    return f"\n{lines}\n" if any(result.echoed for result in results) else f" {lines}"


def _run(command: Command, plugin: Plugin | None, plugins: Sequence[Plugin]) -> str:
    if plugin is None:
        wrong = f"there is no {command.function}" if command.function else "this is not a command"
        return f"No result: {wrong}; write {' or '.join(p.api for p in plugins)}."
    try:
        return plugin.run(command.argument) or NO_RESULT
    except Exception as e:  # whatever a plugin of the user's does, the conversation goes on
        return f"No result: {one_line(str(e)) or type(e).__name__}."


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_COMMAND else line[: _LONGEST_COMMAND - 1] + "…"
