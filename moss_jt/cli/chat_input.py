"""Where the messages of a chat come from: a line editor at a terminal, or plain lines.

Both have ``read()``: the next message, which may have several lines. It raises EOFError at the end of input and
KeyboardInterrupt for Ctrl-C.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Callable

from . import ui
from .chat_commands import COMMANDS
from .chat_options import SETTINGS, as_utf8

PROMPT, CONTINUED = "> ", ". "


def open_input(interruptible: Callable[[], AbstractContextManager[None]]) -> Editor | Lines:
    """The line editor where both ends are a terminal that can move the cursor, else plain lines.

    ``interruptible`` gives a context in which Ctrl-C has its effect.
    """
    if ui.is_terminal(sys.stdin) and ui.can_draw(sys.stdout):
        return Editor()
    return Lines(sys.stdin.buffer, ui.is_terminal(sys.stdin), interruptible)


class Lines:
    """Messages from a stream, one a line; a backslash at a line's end continues the message on the next."""

    def __init__(self, stream: BinaryIO, prompt: bool, interruptible: Callable[[], AbstractContextManager[None]]):
        self._stream, self._prompt, self._interruptible = stream, prompt, interruptible

    def read(self) -> str:
        message = ""
        while True:
            raw = self._readline(CONTINUED if message else PROMPT)
            if not raw and not message:
                raise EOFError
            message += as_utf8(raw).rstrip("\r\n")
            if not raw or not message.endswith("\\"):
                return message
            message = message[:-1] + "\n"

    def _readline(self, prompt: str) -> bytes:
        if not self._prompt:
            return self._stream.readline()
        raw = b""
        try:
            with self._interruptible():
                print(prompt, end="", file=sys.stderr, flush=True)
                raw = self._stream.readline()
        finally:
            if not raw.endswith(b"\n"):  # Ctrl-C or Ctrl-D: the cursor is still behind the prompt
                print(file=sys.stderr)
        return raw


class Editor:
    """Line editing, history and completion at a terminal. Ctrl-C is a key to it, so it needs no signal."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.shortcuts import CompleteStyle
        from prompt_toolkit.styles import Style

        self._session: Any = PromptSession(
            [("class:prompt", PROMPT)],
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: "  " if wrapped else CONTINUED,
            key_bindings=_keys(),
            history=_history(),
            completer=_completer(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
            style=Style.from_dict({"prompt": "ansigreen bold"}),
        )

    def read(self) -> str:
        try:
            return as_utf8(self._session.prompt(pre_run=self._put_terminal_back_at_sigterm, handle_sigint=False))
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _put_terminal_back_at_sigterm(self) -> None:
        app = self._session.app
        stop = SystemExit(128 + signal.SIGTERM)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: app.is_done or app.exit(exception=stop))


def _keys() -> Any:
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not a search in the history

    @keys.add("enter", filter=typing)
    def _send(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    @keys.add("escape", "c-j", filter=typing)  # what it is when typed ahead, during an answer
    def _new_line(event: Any) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def history_file() -> Path:
    """Where messages are remembered, by the XDG base directory specification."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "moss-jt" / "chat_history"


def _history() -> Any:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # only the user may read what was said
    except OSError as e:
        ui.note(f"Messages are not remembered: {path}: {e.strerror}")
        return InMemoryHistory()

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk is no reason to stop talking
                super().store_string(string)

    return History(str(path))


def _completer() -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Commands(Completer):
        """Names of commands after a slash, of settings after /set, of files after /save and /load."""

        paths = PathCompleter(expanduser=True)

        def get_completions(self, document: Any, event: Any) -> Iterable[Any]:
            line = document.text_before_cursor
            name, space, argument = line[1:].partition(" ")
            if not line.startswith("/"):
                return
            if name in ("save", "load") and space:
                yield from self.paths.get_completions(Document(argument), event)
            names = SETTINGS if name == "set" and space else COMMANDS if not space else ()
            for word in names:
                typed = argument if space else name
                if word.startswith(typed):
                    yield Completion(word, -len(typed))

    return Commands()
