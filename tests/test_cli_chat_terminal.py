"""The chat at a pseudo-terminal: keys, Ctrl-C, signals, what is drawn."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import sys
import termios
import time

import pytest

from .conftest import ROOT
from .fake_moss import FakeMoss

FAKE = [sys.executable, "-m", "tests.fake_moss", "chat", "-m", "folder"]


class Terminal:
    """The chat at a pseudo-terminal. ``expect`` waits for a text and gives what came before it, without escape sequences."""

    def __init__(self, tmp_path, *args, **environment):
        inherited = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        state = {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            os.execve(FAKE[0], [*FAKE, *args], {**inherited, **state, **environment})
        self.seen = ""
        self._raw = b""

    def expect(self, text: str, seconds: float = 20) -> str:
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert self._read(end), f"{text!r} did not come; there is {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before

    def _read(self, end: float) -> bool:
        if not select.select([self.fd], [], [], max(0.0, end - time.monotonic()))[0]:
            return False
        try:
            new = os.read(self.fd, 4096)
        except OSError:  # Linux's end of file at a pseudo-terminal
            return False
        self._raw += new
        text = self._raw.decode("utf-8", "ignore")
        self.seen, self._raw = self.seen + re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text), b""
        return bool(new)

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def cooked(self) -> bool:
        """Whether the terminal edits lines itself: an answer is being given, or the chat has left."""
        return bool(termios.tcgetattr(self.fd)[3] & termios.ICANON)

    def type(self, text: str) -> None:
        """Send once the line editor is there."""
        end = time.monotonic() + 20
        while self.cooked():
            assert time.monotonic() < end, f"no line editor after {self.seen!r}"
            time.sleep(0.01)
        self.send(text)

    def say(self, text: str) -> None:
        self.type(text + "\r")
        self.expect(f"You said: {text}\n")

    def leave(self) -> int:
        """The exit code, negative for a signal."""
        while self._read(time.monotonic() + 10):
            pass
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.fd)
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def start(*args, **environment):
        opened.append(Terminal(tmp_path, *args, **environment))
        return opened[-1]

    yield start
    for one in opened:
        try:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_a_session(terminal, tmp_path):
    t = terminal()
    t.say("你好")
    t.type("endless\r")
    t.expect("0123456789012345")
    t.send("\x03")
    t.expect("(stopped)")
    t.say("on we go")
    t.type("not sent\x03")
    t.expect("(Ctrl-D or /exit leaves)")
    t.type(f"/save {tmp_path}/talk.json\r")
    t.expect("Saved 3 turns")
    t.type("\x04")
    assert t.leave() == 0
    turns = json.loads((tmp_path / "talk.json").read_text())["turns"]
    assert [turn["human"] for turn in turns] == ["你好", "endless", "on we go"]
    assert turns[1]["answer"].startswith("0123456789012345")
    history = tmp_path / "state" / "moss-jt" / "chat_history"
    assert "+你好" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


def test_several_lines(terminal):
    t = terminal()
    t.type("\x1b[200~one\ntwo 二\n\nfour\nfive\x1b[201~")  # pasted
    t.send("\r")
    t.expect("You said: one\ntwo 二\n\nfour\nfive\n")
    t.type("with \\\ra backslash\r")
    t.expect("You said: with \na backslash\n")
    t.type("with\x1b\rAlt-Enter\r")
    t.expect("You said: with\nAlt-Enter\n")


def test_editing_and_history(terminal):
    t = terminal()
    t.type("你好吗\x1b[D\x7f们\r")  # left, backspace
    t.expect("You said: 你们吗\n")
    t.type("\x1b[A\r")  # up
    t.expect("You said: 你们吗\n")
    t.type("/he\t\r")
    t.expect("/system [TEXT|@FILE|default]")
    t.type("/set tem\t 0.25\r")
    t.expect("temperature  0.25\n")
    t.type("/hepl\r")
    t.expect("did you mean /help?")
    t.say("still here")


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_without_colour(terminal, environment):
    t = terminal("--stats", **environment)
    t.send("hi\n")
    output = b""
    while b"tokens/s" not in output:
        assert select.select([t.fd], [], [], 20)[0], output
        output += os.read(t.fd, 4096)
    assert b"You said: hi" in output
    assert not re.search(rb"\x1b\[(3|9)[0-7]", output) and b"\x1b[2m" not in output
    if environment.get("TERM") == "dumb":
        assert b"\x1b" not in output


def test_a_dumb_terminal(terminal):
    t = terminal(TERM="dumb")
    t.expect("> ")
    t.send("you\\\n")
    t.expect(". ")
    t.send("and me\n")
    t.expect("You said: you\nand me\n")
    t.send("endless\n")
    t.expect("0123456789012345")
    t.send("\x03")
    t.expect("(stopped)")
    t.expect("> ")
    t.send("\x03")
    t.expect("(Ctrl-D or /exit leaves)")
    t.send("\x04")
    assert t.leave() == 0


@pytest.mark.parametrize("busy", [False, True])
def test_terminated(terminal, busy):
    t = terminal()
    t.type("endless\r" if busy else "typing")
    t.expect("01234" if busy else "typing")
    assert t.cooked() == busy
    os.kill(t.pid, signal.SIGTERM)
    while t._read(time.monotonic() + 10):
        pass
    assert t.cooked() and "Traceback" not in t.seen
    assert t.leave() == (-signal.SIGTERM if busy else 128 + signal.SIGTERM)


def test_a_history_that_cannot_be_written(terminal):
    t = terminal(XDG_STATE_HOME="/proc/nowhere")
    t.say("hi")
    t.type("\x1b[A\r")
    t.expect("You said: hi\n")


def test_a_loaded_conversation_shows_where_it_was(terminal, tmp_path):
    conversation = FakeMoss().chat()
    list(conversation.send("remember me"))
    conversation.save(tmp_path / "talk.json")
    t = terminal("--load", str(tmp_path / "talk.json"))
    t.expect("Loaded 1 turn. The last one:\n> remember me\nYou said: remember me\n")
    t.type("/exit\r")
    assert t.leave() == 0
