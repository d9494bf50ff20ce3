"""`moss-jt chat`: a conversation in the terminal, or through a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from ..chat import Conversation
from ..errors import MossError
from ..plugins import Plugin
from . import chat_commands, ui
from .chat_options import check_options, load_model, shared_options, system_text


@click.command("chat")
@shared_options
@click.option("--load", "saved", metavar="FILE", help="Go on with a conversation that /save wrote.")
@click.option("--stats", is_flag=True, help="Show the plan, and speeds and memory after each answer.")
def command(
    model: str,
    adapter: str | None,
    system: str | None,
    plugins: list[Plugin] | None,
    no_plugins: bool,
    context: int,
    kv_cache: str,
    vram: int | None,
    swap: str,
    ram: int | None,
    device: str,
    saved: str | None,
    stats: bool,
    **settings: Any,
) -> None:
    """Talk with MOSS. Without a terminal, each line of standard input is a message, and only answers are printed."""
    if sys.stdin is None:
        raise MossError("standard input is closed, so there is no message to answer")
    check_options(settings)
    plugins = [] if no_plugins else plugins
    system = None if system is None else system_text(system)
    moss = load_model(model, device, context, ram, kv_cache, vram, swap, stats, adapter)
    session = Session(moss, system, saved, settings, stats, plugins)
    if session.interactive:
        ui.note(f"MOSS · {Path(model).resolve().name} · context {moss.context}")
        ui.note("/help lists the commands, Ctrl-D leaves.")
    if saved is not None:
        session.show_loaded()
    session.run()


class _Interrupts:
    """Ctrl-C, made safe for a session that goes on after it: one press is one KeyboardInterrupt, and only inside ``allowed``.

    So a second press cannot break what puts the answer so far away, and none of them can end the session.
    """

    def __init__(self) -> None:
        self._armed = False
        signal.signal(signal.SIGINT, self._pressed)

    def _pressed(self, *_: Any) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        self._armed = True
        try:
            yield
        finally:
            self._armed = False


class Session:
    """One chat: a conversation, its settings, and where messages come from."""

    def __init__(
        self,
        moss: Any,
        system: str | None,
        saved: str | None,
        settings: dict[str, Any],
        show_stats: bool,
        plugins: list[Plugin] | None = None,
    ):
        self.moss, self.settings, self.show_stats = moss, settings, show_stats
        self.plugins = plugins  # None: those that the system text enables
        self.conversation = moss.chat(system, plugins) if saved is None else Conversation.load(moss, saved, plugins)
        if saved is not None and system is not None:
            self.conversation.system = system
        self.interactive = ui.is_terminal(sys.stdin)
        # From a pipe, Ctrl-C ends the program as it does any other.
        self._interruptible = _Interrupts().allowed if self.interactive else nullcontext
        self._asked = 0

    def run(self) -> None:
        """Until the input ends. From a pipe, the first error ends it, too: MossError, KeyboardInterrupt."""
        from .chat_input import open_input

        messages = open_input(self._interruptible)
        while True:
            try:
                self._handle(messages.read())
            except EOFError:
                return
            except MossError as e:
                if not self.interactive:
                    raise
                ui.error(str(e))
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                ui.note("(Ctrl-D or /exit leaves)")

    def _handle(self, message: str) -> None:
        command = chat_commands.parse(message)
        if command:
            chat_commands.run(self, *command)
        elif message.strip():
            self.answer(self.conversation.send(message.strip(), told=ui.ran, **self.sampling()))

    def answer(self, pieces: Any) -> None:
        """Print an answer as it comes, and what there is to say about it. Ctrl-C stops it and keeps what there is."""
        dropped = self.conversation.dropped
        try:
            with closing(pieces), self._interruptible():
                ui.answer(pieces)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            ui.note("(stopped)")
        else:
            self._note_cut()
        if self.conversation.dropped > dropped:
            ui.note(f"(the context is full: MOSS no longer sees the first {ui.turns(self.conversation.dropped)})")
        if self.show_stats:
            ui.stats(self.moss)
        if self.interactive:
            ui.note("")

    def _note_cut(self) -> None:
        stats = self.moss.last_stats
        if stats.stopped:
            return
        if stats.new_tokens < self.settings["max_new_tokens"]:
            ui.note("(cut off: the context is full)")
        else:
            ui.note(f"(cut off after {stats.new_tokens} tokens; /set max_new_tokens N allows more)")

    def sampling(self) -> dict[str, Any]:
        """The settings for the next answer. A seed counts up, so that one seed repeats a session but /retry differs."""
        seed = self.settings["seed"]
        self._asked += 1
        return {**self.settings, "seed": None if seed is None else seed + self._asked - 1}

    def show_loaded(self) -> None:
        """Where a loaded conversation was."""
        turns = self.conversation.turns
        if self.interactive:
            ui.note(f"Loaded {ui.turns(len(turns))}." + (" The last one:" if turns else ""))
        if self.interactive and turns:
            ui.note(f"> {turns[-1].human}\n{turns[-1].answer}")
