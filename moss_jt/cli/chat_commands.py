"""The slash commands of `moss-jt chat`."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable

import click

from ..chat import Conversation
from ..errors import MossError
from ..plugins import BUILT_IN, built_in
from . import ui
from .chat_options import SETTINGS, check_settings, system_text

if TYPE_CHECKING:
    from .chat import Session


@dataclass(frozen=True)
class Command:
    argument: str  # as /help shows it
    help: str
    run: Callable[[Session, str], None]


# Alone on a line, as in the official demo.
WORDS = {"clear": "clear", "stop": "exit"}


def parse(message: str) -> tuple[str, str] | None:
    """(name, argument) where a message is a command, else None. A space before the slash makes it a message."""
    if message.strip() in WORDS:
        return WORDS[message.strip()], ""
    # Not /usr/bin or /* … */: a command's name is letters and ends at a space.
    found = re.fullmatch(r"/([A-Za-z_?]*)(?:\s+(.*))?", message, re.DOTALL)
    return (found[1].lower(), (found[2] or "").strip()) if found else None


def run(session: Session, name: str, argument: str) -> None:
    """Raises MossError where there is no such command or it cannot be done, EOFError to leave."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean /{near[0]}?" if near else "/help lists them"
        raise MossError(f"no command /{name}; {meant} (put a space first to send it)")
    if argument and not COMMANDS[name].argument:
        raise MossError(f"/{name} takes nothing after it")
    COMMANDS[name].run(session, argument)


def _help(session: Session, argument: str) -> None:
    rows = [(f"/{name} {command.argument}".rstrip(), command.help) for name, command in COMMANDS.items()]
    rows.append(("clear, stop", "alone on a line: as /clear and /exit"))
    width = max(len(usage) for usage, _ in rows)
    for usage, text in rows:
        ui.note(f"  {usage:<{width}}  {text}")
    ui.note("A \\ at a line's end, or Alt-Enter, continues the message.")
    ui.note("Ctrl-C stops an answer, Ctrl-D leaves.")


def _clear(session: Session, argument: str) -> None:
    session.conversation.clear()
    ui.note("The conversation begins anew.")


def _undo(session: Session, argument: str) -> None:
    ui.note(f"Taken back: {_shortened(session.conversation.undo().human)}")


def _retry(session: Session, argument: str) -> None:
    session.answer(session.conversation.retry(told=ui.ran, **session.sampling()))


def _system(session: Session, argument: str) -> None:
    if not argument:
        ui.note(session.conversation.system.rstrip("\n"))
        return
    session.conversation.system = None if argument == "default" else system_text(argument)
    ui.note("From the next answer on; the conversation so far stays (/clear forgets it).")


def _plugins(session: Session, argument: str) -> None:
    if argument:
        session.plugins = None if argument == "default" else [] if argument == "off" else built_in(argument)
        session.conversation.plugins = session.plugins
    on = session.conversation.plugins
    for name, plugin in BUILT_IN.items():
        ui.note(f"  {name:<10}  {plugin.api:<21}  {'on' if plugin in on else 'off'}")


def _save(session: Session, argument: str) -> None:
    path = _path(argument, "save")
    session.conversation.save(path)
    ui.note(f"Saved {ui.turns(len(session.conversation.turns))} to {path}.")


def _load(session: Session, argument: str) -> None:
    session.conversation = Conversation.load(session.moss, _path(argument, "load"), session.plugins)
    session.show_loaded()


def _set(session: Session, argument: str) -> None:
    if not argument:
        for key, value in session.settings.items():
            ui.note(f"  {key:<18}  {_shown(value)}")
        return
    name, text = [*argument.split(None, 1), ""][:2]
    if name not in SETTINGS:
        raise MossError(f"no setting {name}; there are {', '.join(SETTINGS)}")
    value = _converted(name, text)
    check_settings({**session.settings, name: value})
    session.settings[name] = value
    ui.note(f"  {name}  {_shown(value)}")


def _converted(name: str, text: str) -> object:
    setting = SETTINGS[name]
    if text == "default":
        return setting.default
    try:
        return setting.type.convert(text, None, None)
    except click.BadParameter as e:
        raise MossError(f"{name}: {e.message.rstrip('.')}") from None


def _stats(session: Session, argument: str) -> None:
    if argument not in ("", "on", "off"):
        raise MossError("/stats takes on or off, or nothing for the last answer's")
    if argument:
        session.show_stats = argument == "on"
        ui.note(f"Figures after each answer: {argument}.")
    elif session.moss.last_stats.new_tokens:
        ui.stats(session.moss)
    else:
        ui.note("No answer yet.")


def _exit(session: Session, argument: str) -> None:
    raise EOFError


def _path(argument: str, command: str) -> str:
    if not argument:
        raise MossError(f"/{command} needs a file's name")
    return os.path.expanduser(argument)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


def _shown(value: object) -> str:
    if value is None:
        return "default"
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


COMMANDS = {
    "help": Command("", "this list", _help),
    "clear": Command("", "forget the conversation", _clear),
    "undo": Command("", "take back the last question and its answer", _undo),
    "retry": Command("", "answer the last question again", _retry),
    "system": Command("[TEXT|@FILE|default]", "show or replace the opening text", _system),
    "plugins": Command("[NAMES|off|default]", "show or change what MOSS may call", _plugins),
    "save": Command("FILE", "save the conversation", _save),
    "load": Command("FILE", "go on with a saved one", _load),
    "set": Command("[NAME VALUE|default]", "show or change settings", _set),
    "stats": Command("[on|off]", "speeds and memory, now or after each answer", _stats),
    "exit": Command("", "leave", _exit),
}
