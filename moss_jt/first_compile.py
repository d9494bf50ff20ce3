"""Jittor's first compile, in a process of its own, with its progress shown.

Jittor compiles its core (150 files, two minutes on two cores) inside ``import jittor``, without a word, holding the
interpreter, and ending the process on Ctrl-C. So where the core is not there yet, another process imports it first, while
this one watches its cache folder grow. That also keeps a failure there from taking this process with it.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

from .errors import MossError
from .machine import MIB, cores, memory

# Of Jittor 1.3.11 with g++ 12: objects in its core, the time of what comes before and after them, and their time in all.
_OBJECTS, _SERIAL_SECONDS, _OBJECT_SECONDS = 150, 25, 165
_STEPS_BEFORE = 12  # each of two things made before the objects takes about as long as this many of them
_PATIENCE = 2  # seconds
_JOB_MEMORY = 768 * MIB  # the largest compiler process took 450 MB

# prctl(PR_SET_PDEATHSIG, SIGKILL): never outlives moss-jt. Jittor starts one compiler for each 3 GiB of the machine's
# memory, whatever its cores and limits are, so it is told the memory that gives the right number. It leaves with 0, and
# nothing imported, after its first step in some cases, asking to be run again; so what went well gets a code of its own.
# A toolkit that it once downloaded (jtcuda) would have it start the process anew.
_IMPORTED = 42
_CHILD = f"""
import ctypes, json, sys
ctypes.CDLL(None).prctl(1, 9)
sys.path[:] = json.loads(sys.argv[1])
import jittor_utils.install_cuda
jittor_utils.install_cuda.has_installation = lambda: False
jittor_utils.get_total_mem = lambda: int(sys.argv[2]) * 3 << 30
import jittor
sys.exit({_IMPORTED})
"""

# Environment variables that change what is compiled.
_FLAGS = ("cc_flags", "nvcc_path", "nvcc_flags", "kernel_flags", "debug", "enable_lto", "python_config_path")


def ensure(cache: Path, jittor: Path, cuda: bool, what: str = "Jittor") -> None:
    """Compile Jittor's core unless ``cache``, its own folder below ~/.cache/jittor, has it; ``jittor``: where it is installed.
    ``what``: as what it is shown.

    Raises MossError, naming the log, where it cannot be compiled. Ctrl-C ends it at once; the next start goes on with it.
    """
    stamp = cache / ("moss-jt-cuda.json" if cuda else "moss-jt-cpu.json")
    before = _read(stamp)
    if before == _state(cache, jittor):
        return
    if before and before["libraries"] != _libraries(cache):  # cut short after they were complete: to be linked afresh
        for name in before["libraries"]:
            (cache / name).unlink(missing_ok=True)
    _compile(cache, cuda, what)
    stamp.write_text(json.dumps(_state(cache, jittor)))


def _state(cache: Path, jittor: Path) -> dict:
    """What the compiled core depends on and Jittor's choice of a folder does not, and what it consists of."""
    flags = {name: os.environ[name] for name in _FLAGS if os.environ.get(name)}
    return {"flags": flags, "jittor": (jittor / "compiler.py").stat().st_mtime, "libraries": _libraries(cache)}


def _libraries(cache: Path) -> dict:
    found = sorted(cache.glob("jit*_core*.so")) + sorted(cache.glob("cu*/jit*_core*.so"))
    return {str(path.relative_to(cache)): path.stat().st_size for path in found}


def _read(stamp: Path) -> dict | None:
    try:
        return json.loads(stamp.read_text())
    except (OSError, ValueError):
        return None


def _compile(cache: Path, cuda: bool, what: str) -> None:
    log = cache / f"moss-jt-{os.getpid()}.log"  # others may be waiting for the same
    jobs = _jobs()
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(jobs)]
    with _shown(what, _SERIAL_SECONDS + _OBJECT_SECONDS / jobs) as show:
        for _ in range(3):
            code = _run(command, log, lambda: show(_fraction(cache, cuda)))
            if code:
                break
        if code != _IMPORTED:
            why = f"it was ended by {signal.Signals(-code).name}" if code < 0 else reason(log)
            raise MossError(f"Jittor cannot be compiled: {why} (all of it: {log}; to start afresh: rm -r '{cache}')")
    log.unlink()


def _jobs() -> int:
    here = cores()
    return max(1, min(here.logical, math.ceil(here.quota or here.logical), memory().available // _JOB_MEMORY, 16))


def _run(command: list[str], log: Path, watch: Callable[[], None]) -> int:
    """Run in a session of its own, so that leaving early ends the compilers too. Returns the exit code."""
    # Not mpirun's: to MPI, this process is the one that was started.
    left_out = ("DISABLE_MULTIPROCESSING", "OMPI_", "PMIX_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        while True:
            try:
                return process.wait(0.3)
            except subprocess.TimeoutExpired:
                watch()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            log.unlink()


def _fraction(cache: Path, cuda: bool) -> float:
    """How much of the core is there."""
    folder = max(cache.glob("cu*"), key=os.path.getmtime, default=cache) if cuda else cache
    begun = sum(any(cache.glob(name)) for name in ("jit_utils_core*.so.key", "data.md5", "cu*/data.md5"))
    done = len(list(folder.glob("obj_files/*.o.key"))) + _STEPS_BEFORE * begun
    return min(1.0, done / (_OBJECTS + 2 * _STEPS_BEFORE))


def reason(log: Path) -> str:
    """The line of a compiler's output that says most."""
    lines = [re.sub(r"\x1b\[[0-9;]*[mK]", "", line).strip() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    return next((line for line in lines if "error: " in line.lower()), lines[-1] if lines else "it said nothing")


@contextmanager
def _shown(what: str, seconds: float) -> Iterator[Callable[[float], None]]:
    """Gives a function to call with the fraction done, often. What takes less than _PATIENCE is not worth a word."""
    about = "about a minute" if seconds < 90 else f"about {seconds / 60:.0f} minutes"
    title, start, bar = f"compiling {what} (first run only, {about})", time.monotonic(), None

    def show(fraction: float) -> None:
        nonlocal bar
        if bar is None and time.monotonic() - start > _PATIENCE:
            bar = _Bar(title)
        if bar:
            bar.update(fraction)

    try:
        yield show
    finally:
        if bar:
            bar.close()
    if bar:  # and nothing was raised
        print(f"moss-jt: {what} is compiled ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)


class _Bar:
    """A progress bar on a terminal; elsewhere one line."""

    def __init__(self, title: str) -> None:
        self._progress = None
        if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
            print(f"moss-jt: {title} ...", file=sys.stderr, flush=True)
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn

        columns = ("{task.description}", BarColumn(None), TaskProgressColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, expand=True)
        self._task = self._progress.add_task(title, total=1.0)
        self._progress.start()

    def update(self, fraction: float) -> None:
        if self._progress:
            self._progress.update(self._task, completed=fraction)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
