from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

from moss_jt.tokenizer import load_tokenizer

from .conftest import ROOT
from .tokenizer_folders import official_folder

TEXT = "  你好\tthe\r\n<eoh>\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return official_folder(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def ids(folder):
    return load_tokenizer(folder).encode(TEXT)


@pytest.fixture(scope="module")
def run(folder):
    def run(*args: str | bytes, stdin: bytes = b"", model=folder, env=None) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, ROOT / "cli.py", "tokenize", "-m", model, *args]
        return subprocess.run(command, input=stdin, capture_output=True, env={**os.environ, **(env or {})})

    return run


def test_ids_are_one_line_of_json(run, ids):
    for given in (run(TEXT), run("-", stdin=TEXT.encode()), run(stdin=TEXT.encode())):
        assert given.stdout.endswith(b"]\n") and given.stdout.count(b"\n") == 1
        assert json.loads(given.stdout) == ids


def test_count(run, ids):
    assert run("--count", TEXT).stdout == b"%d\n" % len(ids)


def test_decode_prints_the_text_and_nothing_else(run, folder, ids):
    text = load_tokenizer(folder).decode(ids).encode()
    listed = json.dumps(ids)
    assert run("--decode", listed).stdout == text
    assert run("--decode", stdin=listed.encode() + b"\n", env={"LC_ALL": "C", "PYTHONUTF8": "0"}).stdout == text
    assert run("--decode", "[]").stdout == b""


def test_a_terminal_gets_a_newline(folder, ids):
    main, terminal = pty.openpty()
    command = [sys.executable, ROOT / "cli.py", "tokenize", "-m", folder, "--decode", json.dumps(ids[:1])]
    subprocess.run(command, stdout=terminal, check=True)
    os.close(terminal)
    assert os.read(main, 100) == b"  \r\n"
    os.close(main)


def test_a_terminal_is_not_read(folder):
    main, terminal = pty.openpty()
    done = subprocess.run([sys.executable, ROOT / "cli.py", "tokenize", "-m", folder], stdin=terminal, capture_output=True)
    assert done.returncode == 2 and b"no TEXT given and nothing piped in" in done.stderr
    os.close(main)
    os.close(terminal)


@pytest.mark.parametrize(
    ("args", "stdin", "says"),
    [
        ((b"ab\xff",), b"", "the text is not UTF-8: byte 2 is 0xFF"),
        ((), b"ab\xe4\xbd", "the text is not UTF-8: byte 2 is 0xE4"),
        (("--decode", "[1, 2"), b"", "takes a JSON list of ids"),
        (("--decode", "[1, 2.0]"), b"", "takes a JSON list of ids"),
        (("--decode", "[true]"), b"", "takes a JSON list of ids"),
        (("--decode",), b"5", "takes a JSON list of ids"),
        (("--decode",), b"[" * 100_000, "takes a JSON list of ids"),
    ],
)
def test_bad_input_is_one_line(run, args, stdin, says):
    done = run(*args, stdin=stdin)
    assert done.returncode == 2 and not done.stdout
    assert says in done.stderr.decode() and done.stderr.count(b"\n") == 1


def test_a_folder_without_a_tokenizer(run, tmp_path):
    done = run("x", model=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(b"moss-jt: ") and done.stderr.count(b"\n") == 1
