"""The equation solver: ``Solve("x+y=35;x-y=11") =>``, newline, ``x = 23``, newline, ``y = 12``."""

from __future__ import annotations

import importlib.util
import json
import select
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

from .arithmetic import LONGEST
from .base import Plugin

_START_SECONDS = 60.0  # to import sympy, which takes one on an idle machine
_SECONDS = 10.0  # for an answer. The process itself gives up long before, unless others keep it from its work
_CODE = "import sys; sys.path[:] = sys.argv[1:]; from moss_jt.plugins.solving import serve; serve()"


class Solver(Plugin):
    """Solves with sympy, in a process of its own that starts with the first equation and is ended where one takes too long."""

    name, api, own_line = "Equation solver", "Solve(equation)", True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, argument: str) -> str:
        if importlib.util.find_spec("sympy") is None:
            return "No result: the equation solver needs sympy, which is not installed."
        if len(argument) > LONGEST:  # before anything is sent
            return f"No result: longer than {LONGEST} characters."
        with self._lock:
            return self._ask(argument)

    def _ask(self, argument: str) -> str:
        process = self._running()
        answered = None
        try:
            process.stdin.write(json.dumps(argument).encode() + b"\n")
            process.stdin.flush()
            answered = _line(process, _SECONDS)
        except BrokenPipeError:  # it was ended from outside
            pass
        finally:  # also where Ctrl-C ended the wait
            if answered is None:
                self._end()
                self._process = None
        return "No result: it takes too long to solve." if answered is None else json.loads(answered)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = _start()
            self._end = weakref.finalize(self, _end, self._process)
        return self._process


def _start() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C at the terminal is for the answer
    )
    try:
        ready = _line(process, _START_SECONDS)
    except BaseException:
        _end(process)
        raise
    if ready is None:
        _end(process)
        raise RuntimeError("the equation solver does not start")
    return process


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """Its next line; None where it ended or there was none in time. It writes a line at once, so nothing of it is missing."""
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    line = process.stdout.readline() if ready else b""
    return line if line.endswith(b"\n") else None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # what was not written yet
            stream.close()
