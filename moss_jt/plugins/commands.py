"""What the model wrote as its commands, run, and what becomes of that in the dialogue."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Callable

from .base import NO_RESULT, Plugin

MOST_COMMANDS = 8  # in one turn
LONGEST_RESULT = 1000  # characters
_SECONDS = 5.0  # after so long, the rest of a turn's commands are not run
_LONGEST_COMMAND = 300  # characters of it that are repeated before its result

Told = Callable[[str, str], None]  # of a command and its result, as soon as there is one

_QUOTES = "\"'`“”‘’「」『』＂＇"
_CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*[(（]")
# A quoted argument ends at a quote that a bracket follows, and then nothing or the next command, so it may hold quotes itself.
_QUOTED = re.compile(rf"\s*[{_QUOTES}](.*?)(?<!\\)[{_QUOTES}]\s*[)）](?=\s*(?:$|[,，、;；]|[A-Za-z_]\w*[(（]))", re.DOTALL)
_BETWEEN = re.compile(r"[\s,，、;；]+")
_NOTHING = re.compile(r"\s*(none\b.*)?\W*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """``text`` as it was written; ``function`` is empty where it is no call."""

    text: str
    function: str = ""
    argument: str = ""


def parse(text: str) -> list[Command]:
    """The commands in what the model wrote after ``<|Commands|>:``; none for ``None``. Takes any text."""
    return [] if _NOTHING.fullmatch(text) else list(_commands(text.strip()))


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


def run(commands: list[Command], plugins: Sequence[Plugin], told: Told | None = None) -> str:
    """What stands between ``<|Results|>:`` and ``<eor>``. Whatever is wrong with a command is said in its result."""
    if not commands:
        return " None"
    started, parts, echoed = time.monotonic(), [], False
    for number, command in enumerate(commands):
        plugin = _plugin(command, plugins)
        if number >= MOST_COMMANDS:
            parts.append(f"No result: only {MOST_COMMANDS} commands are run at a time.")
            break
        late = time.monotonic() - started > _SECONDS
        result = "No result: there was no time left." if late else _result(command, plugin, plugins)
        if told is not None:
            told(_one_line(command.text), result)
        echoed |= plugin is None or plugin.echo
        between = "\n" if plugin is not None and plugin.own_line else " "
        parts.append(f"{_one_line(command.text)} =>{between}{result}" if plugin is None or plugin.echo else result)
    return "\n" + "\n".join(parts) + "\n" if echoed else " " + "\n".join(parts)


def _plugin(command: Command, plugins: Sequence[Plugin]) -> Plugin | None:
    return next((p for p in plugins if p.function.lower() == command.function.lower()), None)


def _result(command: Command, plugin: Plugin | None, plugins: Sequence[Plugin]) -> str:
    if plugin is None:
        wrong = f"there is no {command.function}" if command.function else "this is not a command"
        return f"No result: {wrong}; write {' or '.join(p.api for p in plugins)}."
    try:
        result = plugin.run(command.argument)
    except Exception as e:  # whatever a plugin of the user's does, the conversation goes on
        result = f"No result: {_one_line(str(e)) or type(e).__name__}."
    if len(result) > LONGEST_RESULT:
        result = f"{result[:LONGEST_RESULT]} … (cut off after {LONGEST_RESULT} of {len(result)} characters)"
    return result or NO_RESULT


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_COMMAND else line[: _LONGEST_COMMAND - 1] + "…"
