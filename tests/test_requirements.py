from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moss_jt import requirements
from moss_jt.errors import MossError
from moss_jt.requirements import OK, PROBLEM, WARNING


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JITTOR_HOME", raising=False)
    return tmp_path


def start(tmp_path: Path, **env: str) -> subprocess.CompletedProcess:
    """What a program that wants Jittor says in such an environment."""
    code = (
        "import sys\n"
        "from moss_jt import errors, runtime\n"
        "try:\n    runtime.jittor()\n"
        "except errors.MossError as e:\n    print(e)\n"
        "print([name for name in sys.modules if name.startswith('jittor')])\n"
    )
    env = {**os.environ, "HOME": str(tmp_path), **env}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_without_a_compiler(tmp_path):
    done = start(tmp_path, PATH=str(tmp_path))
    line, imported = done.stdout.splitlines()
    assert (
        line == ("a C++ compiler (g++) is missing, and Jittor compiles everything it runs: sudo apt-get install g++")
        and imported == "[]"
    )
    assert done.stderr == "" and list(tmp_path.iterdir()) == []


def test_with_numpy_2(tmp_path):
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy/__init__.py").write_text("__version__ = '2.1.0'\n")
    line, imported = start(tmp_path, PYTHONPATH=str(tmp_path)).stdout.splitlines()
    assert line.startswith("numpy 2.1.0 is installed, and with numpy 2 Jittor computes garbage") and imported == "[]"
    assert line.endswith("-m pip install 'numpy<2'")


def test_with_a_space_in_a_path_that_jittor_gives_to_a_shell(tmp_path):
    (tmp_path / "my packages/jittor").mkdir(parents=True)
    (tmp_path / "my packages/jittor/__init__.py").touch()
    line, imported = start(tmp_path, PYTHONPATH=str(tmp_path / "my packages")).stdout.splitlines()
    assert line.startswith(f"Jittor cannot compile where a path has a space or the like: {tmp_path}/my packages/jittor")
    assert imported == "[]"


def test_with_a_home_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    line, imported = start(tmp_path, HOME=str(tmp_path / "file")).stdout.splitlines()
    assert line.startswith(f"{tmp_path}/file is not a folder: set HOME") and imported == "[]"


def test_everything_is_here(home):
    assert {finding.verdict for finding in requirements.findings()} <= {OK, WARNING}
    requirements.require()


def test_the_first_problem_in_one_line(monkeypatch):
    monkeypatch.setattr(requirements.shutil, "which", lambda name: None)
    monkeypatch.setattr(requirements.platform, "system", lambda: "Darwin")
    with pytest.raises(MossError, match=r"^this is Darwin, and moss-jt runs on Linux only$"):
        requirements.require()


@pytest.mark.parametrize(("version", "verdict"), [((3, 8), PROBLEM), ((3, 9), OK), ((3, 12), OK), ((3, 13), PROBLEM)])
def test_python(monkeypatch, version, verdict):
    monkeypatch.setattr(requirements, "sys", SimpleNamespace(version_info=(*version, 1), executable="/p/python"))
    assert requirements.python().verdict == verdict


@pytest.mark.parametrize(
    ("name", "verdict"),
    [("g++-12", OK), ("clang++", OK), ("x86_64-linux-gnu-g++", OK), ("c++", PROBLEM), ("missing", PROBLEM)],
)
def test_compiler_that_cc_path_names(tmp_path, monkeypatch, name, verdict):
    path = tmp_path / name
    if name != "missing":
        path.touch(0o755)
    monkeypatch.setenv("cc_path", str(path))
    assert requirements.compiler().verdict == verdict
    assert verdict == OK or f"{path}" in requirements.compiler().text


@pytest.mark.parametrize(
    ("name", "answer", "version"),
    [("g++-11", "echo 11", 11), ("x86_64-linux-gnu-g++", "echo 12.2.0", 12), ("clang++", "echo 14", 0), ("g++", "exit 1", 0)],
)
def test_version_of_gcc(tmp_path, monkeypatch, name, answer, version):
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    monkeypatch.setenv("cc_path", str(path))
    assert requirements.gcc() == version
    path.write_text("#!/nowhere\n")
    assert requirements.gcc() == 0
    path.unlink()
    assert requirements.gcc() == 0


def test_jittor_missing_or_another(monkeypatch):
    monkeypatch.setattr(requirements.importlib.metadata, "version", lambda name: "1.3.9")
    assert requirements.jittor().verdict == WARNING and "1.3.9" in requirements.jittor().text
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    assert requirements.jittor().verdict == PROBLEM and "pip install jittor==" in requirements.jittor().fix


def test_headers_missing(tmp_path, monkeypatch):
    python = f"python3.{sys.version_info[1]}"
    (tmp_path / "bin").mkdir()
    config = tmp_path / "bin" / f"{python}-config"
    monkeypatch.setattr(requirements.sysconfig, "get_path", lambda name: str(tmp_path / "include"))
    monkeypatch.setattr(requirements, "python_config", lambda: config)
    finding = requirements.headers()
    assert (finding.verdict, finding.fix) == (PROBLEM, f"sudo apt-get install {python}-dev") and "Python.h" in finding.text
    (tmp_path / "include" / python).mkdir(parents=True)
    (tmp_path / "include" / python / "Python.h").touch()
    assert requirements.headers().verdict == OK
    monkeypatch.setattr(requirements, "python_config", lambda: None)
    (tmp_path / "include/Python.h").touch()
    assert requirements.headers().verdict == PROBLEM and f"{python}-config" in requirements.headers().text


def test_python_config_is_the_one_jittor_finds(tmp_path, monkeypatch):
    """Another one would give other compiler flags, and so compile Jittor again for every change between them."""
    named = tmp_path / "config"
    named.touch()
    monkeypatch.setenv("python_config_path", str(named))
    assert requirements.python_config() == named


def test_cache_folder_is_jittors(home):
    assert requirements.cache_folder() == home / ".cache/jittor"
    (home / ".cache/jittor").mkdir(parents=True)
    remembered = home / ".cache/jittor/config.json"
    remembered.write_text(json.dumps({"JITTOR_HOME": str(home / "other")}))
    assert requirements.cache_folder() == home / "other/.cache/jittor"
    remembered.write_text("{")
    with pytest.raises(MossError, match=f"rm {remembered}"):
        requirements.cache_folder()


def test_cache_folder_that_the_environment_names(home, monkeypatch):
    monkeypatch.setenv("JITTOR_HOME", str(home / "here"))
    assert requirements.cache_folder() == home / "here/.cache/jittor"
    (home / "here").touch()
    assert requirements.cache().verdict == PROBLEM and "JITTOR_HOME" in requirements.cache().text


def test_cache_not_writable(home, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert requirements.cache().verdict == PROBLEM and f"{home} is not writable" in requirements.cache().text


def test_cache_where_nothing_may_run(home, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert requirements.cache().verdict == PROBLEM and "noexec" in requirements.cache().text


def test_disk_full(home, monkeypatch):
    monkeypatch.setattr(requirements, "disk_free", lambda place: 50 << 20)
    finding = requirements.cache()
    assert finding.verdict == PROBLEM and "has 50 MiB free, compiling needs 200: make room" in finding.text
    core = home / f".cache/jittor/jt1.3.11/g++12/py{requirements.platform.python_version()}/a/b/c/default"
    core.mkdir(parents=True)
    (core / "jittor_core.so.key").touch()
    assert requirements.cache().verdict == OK  # what is left to compile is little


def test_no_home(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    assert requirements.cache().verdict == PROBLEM and "set HOME" in requirements.cache().text
