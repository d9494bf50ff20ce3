"""`run`, with a Python that records what it is asked in place of the real one: nothing is installed or compiled."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moss_jt.requirements import PYTHONS

from .conftest import ROOT

TOOLS = ["sh", "dirname", "basename", "readlink", "cksum", "cut", "cat", "mkdir", "ln", "grep"]
COPIED = ["run", "setup.py", "moss_jt/__init__.py", "moss_jt/errors.py", "moss_jt/machine.py", "moss_jt/requirements.py"]
# Code goes to the real Python, after what the test wants changed there. Modules and scripts are only recorded, but venv makes
# a folder with this same file, and a conversion one that is converted.
PYTHON = f"""#!{sys.executable}
import json, os, pathlib, shutil, sys
args, change = sys.argv[1:], os.environ.get("CHANGE", "")
if args == ["-V"]:
    print("Python", os.environ.get("VERSION", "3.11.2"))
elif args == ["-c", "import pip"]:
    sys.exit("no pip" in os.environ.get("FAIL", ""))
elif args[0] == "-c":
    os.execv({sys.executable!r}, ["python", "-c", change + "\\n" + args[1]])
elif args == ["-B", "-"]:
    os.execv({sys.executable!r}, ["python", "-B", "-c", change + "\\n" + sys.stdin.read()])
else:
    line = " ".join(args)
    with open(os.environ["RECORD"], "a") as f:
        f.write(json.dumps([sys.argv[0], os.getcwd(), args]) + "\\n")
    if os.environ.get("FAIL", "nothing") in line:
        sys.exit(3)
    if args[:2] == ["-m", "venv"]:
        shutil.rmtree(args[-1], ignore_errors=True)
        os.makedirs(args[-1] + "/bin")
        shutil.copy(__file__, args[-1] + "/bin/python")
    if "convert" in args:
        print("said by the converter")
        os.makedirs(args[-1], exist_ok=True)
        pathlib.Path(args[-1], "config.json").write_text('{{"moss_jt": {{"format": 1}}}}')
"""


class Bench:
    """A checkout, a user's folder, and a PATH that holds nothing but what a test puts there."""

    def __init__(self, place: Path, name: str):
        self.root, self.here, self.bin = place / name / "moss-jt", place / "some where", place / "bin"
        self.record, self.home = place / "record", place / "home"
        for file in COPIED:
            (self.root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, self.root / file)
        for folder in (self.here, self.bin, self.home):
            folder.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.put("python3", PYTHON)
        self.put("g++")
        self.config = self.put("python-config")
        headers = place / f"include/python3.{sys.version_info[1]}"
        headers.mkdir(parents=True)
        (headers / "Python.h").touch()

    def put(self, name: str, script: str = "#!/bin/sh\n") -> Path:
        path = self.bin / name
        path.write_text(script)
        path.chmod(0o755)
        return path

    def run(self, *args: object, code: int = 0, **environment: str) -> tuple[str, list[str]]:
        """Call it; returns what it said on stderr, and the commands that Python was given, paths shortened."""
        self.record.write_text("")
        basic = {"PATH": self.bin, "HOME": self.home, "RECORD": self.record, "python_config_path": self.config}
        found = subprocess.run(
            [self.root / "run", *map(str, args)],
            cwd=self.here,
            env={**{name: str(value) for name, value in basic.items()}, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert found.returncode == code, found.stderr
        self.stdout = found.stdout
        self.calls = [json.loads(line) for line in self.record.read_text().splitlines()]
        return found.stderr, [" ".join(args).replace(str(self.root), "ROOT") for _, _, args in self.calls]


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path, "plain")


@pytest.fixture
def converted(bench) -> Path:
    folder = bench.here / "a model-jt"
    folder.mkdir()
    (folder / "config.json").write_text('{\n  "moss_jt": {"format": 3, "dtype": "fp16"}}')
    return folder


@pytest.fixture
def official(bench) -> Path:
    folder = bench.here.parent / "elsewhere" / "a model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


SETTING_UP = ["-m venv --clear ROOT/.venv", "-m pip install -q pip>=21.3", "-m pip install -q -e ROOT"]


# ---- usage ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["chatt"], ["chat", ""]])
def test_wrong_usage(bench, args):
    said, calls = bench.run(*args, code=2)
    assert "usage: ./run chat [MODEL]" in said and not calls and not bench.stdout
    assert not (bench.root / ".venv").exists()


def test_help(bench):
    assert bench.run("--help") == ("", []) and bench.stdout.startswith("usage: ./run chat [MODEL]")


# ---- setting up -------------------------------------------------------------------------------------------------------------


def test_sets_up_once(bench, converted):
    said, calls = bench.run("chat", converted.name)
    assert calls == [*SETTING_UP, "ROOT/cli.py chat -m a model-jt"]
    assert said.count("\n") == 1 and "setting up" in said and "Python 3.11.2" in said
    assert bench.run("chat", converted.name) == ("", calls[-1:])


def test_sets_up_again_where_setup_py_has_changed(bench, converted):
    bench.run("chat", converted)
    with (bench.root / "setup.py").open("a") as f:
        f.write("# changed\n")
    assert bench.run("chat", converted)[1][:-1] == SETTING_UP[1:]  # in the same venv
    assert len(bench.run("chat", converted)[1]) == 1


def test_sets_up_again_where_it_was_moved_or_python_has_changed(bench, converted):
    bench.run("chat", converted)
    bench.root = bench.root.rename(bench.root.with_name("moved"))
    assert bench.run("chat", converted)[1][:-1] == SETTING_UP[1:]
    assert len(bench.run("chat", converted)[1]) == 1
    assert bench.run("chat", converted, VERSION="3.12.0", FAIL="no pip")[1][:-1] == SETTING_UP


def test_without_a_model_the_demo_model_answers(bench):
    _, calls = bench.run("chat")
    assert calls == [*SETTING_UP, "ROOT/cli.py chat"]
    assert bench.run("chat", "--greedy", "--seed", "1") == ("", ["ROOT/cli.py chat --greedy --seed 1"])


def test_what_failed_is_tried_again(bench, converted):
    _, calls = bench.run("chat", converted, FAIL="install -q -e", code=3)
    assert calls == SETTING_UP
    assert bench.run("chat", converted)[1][:-1] == SETTING_UP[1:]


def test_a_venv_that_does_not_work_is_made_anew(bench, converted):
    bench.run("chat", converted)
    python = bench.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to("nowhere")
    assert bench.run("chat", converted)[1][:-1] == SETTING_UP


def test_everything_missing_is_named_before_anything_is_made(bench, converted):
    (bench.bin / "g++").unlink()
    no_headers = "import sysconfig; sysconfig.get_path = lambda name: '/nowhere'"
    no_venv = "import sys, importlib.util as u; sys.base_prefix = sys.prefix; u.find_spec = lambda name: None"
    config = bench.home / "bin/python-config"
    config.parent.mkdir()
    config.touch()
    said, calls = bench.run("chat", converted, CHANGE=f"{no_headers}; {no_venv}", python_config_path=str(config), code=1)
    version = f"3.{sys.version_info[1]}"
    advice = [line.rpartition(": ")[2] for line in said.splitlines()]
    assert advice == [f"sudo apt-get install {package}" for package in ("g++", f"python{version}-dev", f"python{version}-venv")]
    assert not calls and not (bench.root / ".venv").exists()


def test_another_python_than_python3(bench, converted):
    script = PYTHON.replace(
        "args, change = sys.argv[1:], ", "args, change = sys.argv[1:], 'import sys; sys.version_info = (3, 13);' + "
    )
    bench.put("python3", script)
    bench.put("python3.12", PYTHON)
    assert len(bench.run("chat", converted)[1]) == 4
    assert bench.calls[0][0] == str(bench.bin / "python3.12") and bench.calls[-1][0] == str(bench.root / ".venv/bin/python")


@pytest.mark.parametrize(
    "known, advice",
    [
        ("python3.12", "here is Python 3.13.5: sudo apt-get install python3.12-venv python3.12-dev"),
        ("python3.9", "here is Python 3.13.5: sudo apt-get install python3.9-venv python3.9-dev"),
        ("none", "here is Python 3.13.5, and apt-get has none"),
    ],
)
def test_no_python_in_range(bench, converted, known, advice):
    bench.put("apt-cache", f'#!/bin/sh\n[ "$2" = {known} ]\n')
    said, calls = bench.run("chat", converted, CHANGE="import sys; sys.version_info = (3, 13)", VERSION="3.13.5", code=1)
    assert advice in said and said.count("\n") == 1 and not calls


def test_no_python_at_all(bench, converted):
    (bench.bin / "python3").unlink()
    bench.put("apt-cache", '#!/bin/sh\n[ "$2" = python3.11 ]\n')
    said, _ = bench.run("chat", converted, code=1)
    assert "here is no python3: sudo apt-get install python3.11-venv python3.11-dev" in said


def test_the_pythons_are_those_of_setup_py_and_requirements():
    (a, b), (c, d) = PYTHONS
    assert f'python_requires=">={a}.{b},<{c}.{d + 1}"' in (ROOT / "setup.py").read_text()
    script = (ROOT / "run").read_text()
    assert f"not ({a}, {b}) <= sys.version_info[:2] <= ({c}, {d})" in script
    tried = [
        tuple(map(int, name)) for name in re.findall(r"python(\d)\.(\d+)", script.partition("for name in")[2].splitlines()[0])
    ]
    assert tried == [(3, n) for n in range(d, b - 1, -1)]


# ---- awkward paths ----------------------------------------------------------------------------------------------------------


def test_jittor_sees_no_space(tmp_path):
    bench = Bench(tmp_path, "a space and 'quotes'")
    (bench.here / "model").mkdir()
    (bench.here / "model/config.json").write_text('{"moss_jt": 1}')
    bench.run("chat", "model")
    for python, _, args in bench.calls[1:]:
        assert python.startswith(str(bench.home / ".cache/moss-jt/")) and " " not in python
        assert Path(python).samefile(bench.root / ".venv/bin/python")
        assert not any(str(bench.root) in arg for arg in args)
    assert len(bench.run("chat", "model")[1]) == 1


def test_refuses_where_every_path_has_a_space(tmp_path):
    bench = Bench(tmp_path, "a space")
    said, calls = bench.run("chat", "model", XDG_CACHE_HOME=str(tmp_path / "another space"), code=1)
    assert "move this folder" in said and not calls


def test_through_a_link(bench, converted):
    script = bench.root / "run"
    bench.root = bench.bin  # where it is called
    (bench.bin / "run").symlink_to(script)
    assert bench.run("chat", converted)[1][-1] == f"{script.parent}/cli.py chat -m {converted}"


# ---- chat -------------------------------------------------------------------------------------------------------------------


def test_an_official_folder_is_converted_where_the_user_stands(bench, official):
    said, calls = bench.run("chat", official, "--greedy", "--system", "two words")
    assert calls[-2:] == [
        f"ROOT/cli.py convert weights {official} a model-jt",
        "ROOT/cli.py chat -m a model-jt --greedy --system two words",
    ]
    assert bench.calls[-1][2][-2:] == ["--system", "two words"] and bench.calls[-1][1] == str(bench.here)
    assert f"converting {official} into a model-jt" in said
    assert bench.stdout == ""  # that is the chat's
    assert bench.run("chat", official) == (
        "",
        [calls[-2], "ROOT/cli.py chat -m a model-jt"],
    )  # the converter sees that it is done


def test_the_folder_may_be_named_in_any_way(bench, official):
    for name in (f"{official}/", "../elsewhere/a model", "../elsewhere/a model/."):
        assert bench.run("chat", name)[1][-2:] == [
            f"ROOT/cli.py convert weights {name} a model-jt",
            "ROOT/cli.py chat -m a model-jt",
        ]
    bench.here = official
    assert bench.run("chat", ".")[1][-2] == "ROOT/cli.py convert weights . a model-jt"


def test_a_hub_id_is_fetched_once(bench):
    _, calls = bench.run("chat", "fnlp/moss-moon-003-sft")
    assert calls[-2:] == [
        "ROOT/cli.py convert weights fnlp/moss-moon-003-sft moss-moon-003-sft-jt",
        "ROOT/cli.py chat -m moss-moon-003-sft-jt",
    ]
    assert bench.run("chat", "fnlp/moss-moon-003-sft") == ("", calls[-1:])


def test_a_source_that_was_deleted_is_not_needed(bench, official):
    calls = bench.run("chat", official)[1]
    shutil.rmtree(official)
    assert bench.run("chat", official)[1] == calls[-1:]


def test_no_chat_without_a_conversion(bench, official):
    assert bench.run("chat", official, FAIL="convert", code=3)[1][-1].startswith("ROOT/cli.py convert")


# ---- test and lint ----------------------------------------------------------------------------------------------------------

PARITY = "-m pip install -q torch==2.13.0+cpu -e ROOT[parity]"


def test_tests_run_in_the_checkout(bench):
    said, calls = bench.run("test", "-k", "two words")
    assert calls[2:] == [
        "-m pip install -q -e ROOT[test]",
        PARITY,
        "ROOT/cli.py doctor --quick --import",
        "-m pytest -k two words",
    ]
    assert bench.calls[-1][1] == str(bench.root) and said.count("\n") == 1
    assert bench.run("test")[1] == ["ROOT/cli.py doctor --quick --import", "-m pytest"]
    assert bench.run("chat", "a/b")[1][:1] == ["ROOT/cli.py convert weights a/b b-jt"]  # which needs no more than the tests


def test_tests_run_without_pytorch(bench):
    said, calls = bench.run("test", FAIL="torch==")
    assert PARITY in calls and calls[-1] == "-m pytest"
    assert said.splitlines()[1].startswith("run: PyTorch") and said.count("\n") == 2


def test_exit_code_is_pytest_s(bench):
    bench.run("test", FAIL="pytest", code=3)


def test_no_tests_where_the_doctor_finds_a_problem(bench):
    said, calls = bench.run("test", FAIL="cli.py doctor", code=1)
    assert "the tests cannot run here" in said and "-m pytest" not in calls


def test_pytorch_is_the_version_of_setup_py():
    version = re.search(r'"torch==([\d.]+)"', (ROOT / "setup.py").read_text())[1]
    assert f"'torch=={version}+cpu'" in (ROOT / "run").read_text() and f"PyTorch {version} " in (ROOT / "run").read_text()


def test_lint(bench):
    assert bench.run("lint")[1][-2:] == ["-m ruff check .", "-m ruff format --check ."]
    bench.run("lint", FAIL="ruff check", code=3)
    bench.run("lint", FAIL="format", code=3)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    assert not subprocess.run(["shellcheck", ROOT / "run", ROOT / ".ci/run"], capture_output=True, text=True).stdout


def test_scripts_can_be_executed():
    assert all(os.access(ROOT / script, os.X_OK) for script in ("run", ".ci/run"))
