"""The first compile, with a Jittor made of a few lines in place of the real one: what it does when it is imported is given."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moss_jt import first_compile, machine
from moss_jt.errors import MossError

FINISH = "(cache / 'jit_utils_core.so').write_text('u'); (cache / 'jittor_core.so').write_text('core')\n"


class Fake:
    """A Jittor in a folder of its own. ``cache`` is where it compiles to, ``imports`` how often it was imported."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache, self.package = folder, folder / "cache", folder / "site/jittor"
        self.package.mkdir(parents=True)
        self.cache.mkdir()
        (self.package / "compiler.py").touch()
        (folder / "site/jittor_utils").mkdir()
        (folder / "site/jittor_utils/__init__.py").write_text("def get_total_mem(): return 0\n")
        (folder / "site/jittor_utils/install_cuda.py").touch()
        self.does(FINISH)

    def does(self, body: str) -> None:
        head = f"import pathlib, time, os, sys, subprocess, jittor_utils\ncache = pathlib.Path({str(self.cache)!r})\n"
        count = "open(cache / 'imports', 'a').write('x')\n"
        (self.package / "__init__.py").write_text(head + count + body)

    @property
    def imports(self) -> int:
        path = self.cache / "imports"
        return len(path.read_text()) if path.exists() else 0

    def ensure(self) -> None:
        first_compile.ensure(self.cache, self.package, cuda=False)

    def start(self, **options) -> subprocess.Popen:
        """The same in a process of its own."""
        code = "import sys, pathlib\nfrom moss_jt import first_compile\n"
        code += "first_compile.ensure(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), False)"
        env = {**os.environ, "PYTHONPATH": str(self.folder / "site"), "TERM": "xterm"}
        return subprocess.Popen([sys.executable, "-c", code, str(self.cache), str(self.package)], env=env, **options)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = Fake(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "site")
    for flag in first_compile._FLAGS:
        monkeypatch.delenv(flag, raising=False)
    return fake


def test_compiles_once_and_quietly(fake, capfd):
    fake.ensure()
    fake.ensure()
    assert fake.imports == 1 and capfd.readouterr() == ("", "")


def test_what_is_printed_stays_in_the_log(fake, capfd):
    fake.does("print('out'); print('err', file=sys.stderr)\n" + FINISH)
    fake.ensure()
    assert capfd.readouterr() == ("", "") and not list(fake.cache.glob("*.log"))


@pytest.mark.parametrize("change", ["flags", "jittor", "core", "stamp"])
def test_compiles_again_where_something_changed(fake, monkeypatch, change):
    fake.ensure()
    if change == "flags":
        monkeypatch.setenv("cc_flags", "-O1")
    elif change == "jittor":
        os.utime(fake.package / "compiler.py", (1, 1))
    elif change == "core":
        (fake.cache / "jittor_core.so").write_text("co")  # cut short
        fake.does("assert not (cache / 'jittor_core.so').exists()\n" + FINISH)
    else:
        (fake.cache / "moss-jt-cpu.json").write_text("{")
    fake.ensure()
    assert fake.imports == 2
    fake.ensure()
    assert fake.imports == 2


def test_runs_again_when_jittor_asks_for_it(fake):
    first = "(cache / 'jit_utils_core.so').touch(); sys.exit(0)"
    fake.does(f"if (cache / 'imports').read_text() == 'x': {first}\n{FINISH}")
    fake.ensure()
    assert fake.imports == 2


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            "print('x.cc:1: \\x1b[01;31m\\x1b[Kerror: \\x1b[m\\x1b[Kboom', flush=True); raise RuntimeError",
            "x.cc:1: error: boom",
        ),
        ("raise AssertionError('openmp library not found')", "AssertionError: openmp library not found"),
        ("os.kill(os.getpid(), 6)", "it was ended by SIGABRT"),
        ("sys.exit(0)", "it said nothing"),
    ],
)
def test_a_failure_in_one_line(fake, body, why):
    fake.does(body)
    with pytest.raises(MossError) as e:
        fake.ensure()
    log = fake.cache / f"moss-jt-{os.getpid()}.log"
    assert str(e.value) == f"Jittor cannot be compiled: {why} (all of it: {log}; to start afresh: rm -r '{fake.cache}')"
    fake.does(FINISH)
    fake.ensure()
    assert not list(fake.cache.glob("*.log"))


@pytest.mark.parametrize(
    ("logical", "quota", "available", "jobs"),
    [(64, None, 1 << 40, 16), (8, 2.5, 1 << 40, 3), (8, None, 2 << 30, 2), (8, None, 1 << 20, 1)],
)
def test_compilers_at_a_time(fake, monkeypatch, logical, quota, available, jobs):
    """Jittor starts as many as the memory it believes in has 3 GiB."""
    monkeypatch.setattr(first_compile, "cores", lambda: machine.Cores(logical, logical, quota))
    monkeypatch.setattr(first_compile, "memory", lambda: machine.Memory(1 << 40, available))
    fake.does("(cache / 'jobs').write_text(str(jittor_utils.get_total_mem() // 3 / 2**30))\n" + FINISH)
    fake.ensure()
    assert (fake.cache / "jobs").read_text() == f"{float(jobs)}"


def test_fraction(fake):
    (fake.cache / "obj_files").mkdir()
    assert first_compile._fraction(fake.cache, False) == 0
    for name in ["jit_utils_core.x.so.key", "data.md5", *(f"obj_files/{n}.o.key" for n in range(75)), "obj_files/9.o"]:
        (fake.cache / name).touch()
    assert first_compile._fraction(fake.cache, False) == pytest.approx((75 + 24) / (150 + 24))


SLOW = "time.sleep(0.5)\n" + FINISH


def test_two_lines_where_there_is_no_terminal(fake, monkeypatch, capfd):
    monkeypatch.setattr(first_compile, "_PATIENCE", 0)
    fake.does(SLOW)
    fake.ensure()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("moss-jt: compiling Jittor (first run only, about ")
    assert lines[1] in ("moss-jt: Jittor is compiled (1 s)", "moss-jt: Jittor is compiled (0 s)")


def test_a_bar_on_a_terminal(fake):
    objects = "(cache / 'obj_files').mkdir(); [(cache / f'obj_files/{n}.o.key').touch() for n in range(87)]\n"
    fake.does(objects + "time.sleep(3)\n" + FINISH)
    master, slave = pty.openpty()
    process = fake.start(stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 4096)
        except OSError:
            break
    assert process.wait() == 0
    assert b"compiling Jittor (first run only, about" in shown and b" 50%" in shown and b"Jittor is compiled (" in shown
    assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h")  # the cursor is back


def alive(path: Path) -> list[int]:
    """Processes, of those whose numbers a file holds, that run."""
    states = {pid: Path(f"/proc/{pid}/stat") for pid in map(int, path.read_text().split())}
    return [pid for pid, stat in states.items() if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)])
def test_leaves_nothing_running(fake, number, code):
    """Ctrl-C ends Jittor and its compilers at once; kill -9 ends Jittor, which ends its own."""
    compiler = "sleep 60" if number == signal.SIGINT else "true"
    fake.does(
        f"compiler = subprocess.Popen({compiler.split()!r})\n"
        "(cache / 'new').write_text(f'{os.getpid()} {compiler.pid}'); os.rename(cache / 'new', cache / 'pids')\n"
        "time.sleep(60)"
    )
    process = fake.start(stderr=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    pids, until = fake.cache / "pids", time.monotonic() + 10
    while not pids.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(5) == code
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pids)
    fake.does(FINISH)  # and the next start goes on
    fake.ensure()
