from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from moss_jt import cuda, doctor, machine, requirements, runtime
from moss_jt.cli.doctor import command
from moss_jt.cuda import Choice, Device, Driver, Toolkit
from moss_jt.errors import MossError
from moss_jt.requirements import Finding

GIB = 1 << 30


def run(*args: str, **env: str):
    return CliRunner().invoke(command, list(args), env=env)


def as_json(*args: str) -> dict:
    """The findings by name, and the verdict and exit code of all."""
    result = run("--json", *args)
    answer = json.loads(result.stdout)
    assert (result.exit_code == 1) == (answer["verdict"] == "problem")
    return {"verdict": answer["verdict"], **{finding["name"]: finding for finding in answer["findings"]}}


def test_everything_measured_in_time(tmp_path):
    start = time.monotonic()
    found = as_json("-m", str(tmp_path))
    assert time.monotonic() - start < 15
    names = ["system", "Python", "numpy", "Jittor", "compiler", "headers", "cache", "CPU", "cores", "memory", "CUDA"]
    assert list(found)[1 : 1 + len(names)] == names
    assert found["memory read"]["bytes_per_second"] > 1e8 and found["disk read"]["bytes_per_second"] > 1e6
    assert str(tmp_path) in found["disk read"]["text"] and list(tmp_path.iterdir()) == []
    assert found["cores"]["usable"] == machine.cores().usable and found["memory"]["total"] == machine.memory().total
    assert found["compiler"]["version"] and found["cache"]["path"] == str(requirements.cache_folder())


def test_quick_measures_nothing(monkeypatch):
    monkeypatch.setattr(machine, "memory_bandwidth", lambda: pytest.fail("measured"))
    monkeypatch.setattr(machine, "disk_bandwidth", lambda folder: pytest.fail("measured"))
    assert "disk read" not in as_json("--quick")


def test_from_the_command_line():
    """Jittor is not imported, nothing goes to stderr, a pipe gets no colours."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('imported', [m for m in sys.modules if m.startswith('jittor')]))\n"
        "from moss_jt.cli import main\nmain(['doctor', '--quick'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "MOSS can run here." in done.stdout and done.stdout.endswith("imported []\n") and "\x1b" not in done.stdout


def test_fits_a_terminal(monkeypatch):
    long = Finding("numpy", "ok", "a long text of many words " * 9), Finding("cache", "problem", "no", "sudo fix it")
    monkeypatch.setattr(requirements, "findings", lambda: [Finding("system", "ok", "Linux"), *long])
    result = run("--quick", COLUMNS="80")
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines) and result.exit_code == 1
    assert lines[1].startswith("ok       numpy       a long text") and lines[2].startswith(" " * 21)
    at = lines.index("problem  cache       no")
    assert lines[at + 1].strip() == "sudo fix it" and lines[-1] == "MOSS cannot run here before this is mended."


def test_a_problem_is_found_and_named(tmp_path):
    """No compiler on the PATH; the rest is still said."""
    code = "from moss_jt.cli import main\nmain(['doctor', '--quick', '--json'])"
    env = {**os.environ, "PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1 and findings["compiler"]["fix"] == "sudo apt-get install g++"
    assert findings["cache"]["compiled"] is False and "CPU" in findings


def test_nothing_but_requirements_on_another_system(monkeypatch):
    monkeypatch.setattr(requirements.platform, "system", lambda: "Darwin")
    found = as_json()
    assert found["verdict"] == "problem" and "CPU" not in found and "compiler" in found


def test_a_cache_that_cannot_be_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache/jittor").mkdir(parents=True)
    (tmp_path / ".cache/jittor/config.json").write_text("{")
    monkeypatch.setattr(machine, "memory_bandwidth", lambda: 2.5e9)
    found = as_json()
    assert found["cache"]["verdict"] == "problem" and "2.5 GB/s" in found["memory read"]["text"]
    assert found["disk read"]["verdict"] == "warning" and "not measured" in found["disk read"]["text"]


@pytest.mark.parametrize(("weights", "verdict", "text"), [(4 * GIB, "warning", "4.0 GiB"), (GIB, "ok", "1.0 GiB of")])
def test_whether_a_checkpoint_fits(tmp_path, monkeypatch, weights, verdict, text):
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(8 * GIB, 3 * GIB))
    with open(tmp_path / "block-00.safetensors", "wb") as file:
        file.truncate(weights)
    found = as_json("--quick", "-m", str(tmp_path))["memory"]
    assert found["verdict"] == verdict and text in found["text"] and found["weights"] == weights


def test_no_such_checkpoint(tmp_path):
    assert run("--quick", "-m", str(tmp_path / "missing")).exit_code == 2


GPU = Driver((12, 4), (Device("Card", 8 << 30, (8, 6)),))
KIT = Toolkit("/c/bin/nvcc", (12, 2))
CARD = "Card (8.0 GiB, compute capability 8.6: tensor cores (m16n8k16 and cp.async)); driver for CUDA up to 12.4; "


@pytest.mark.parametrize(
    ("driver", "choice", "verdict", "text", "fix"),
    [
        (GPU, Choice(KIT), "ok", CARD + "nvcc 12.2 at /c/bin/nvcc", ""),
        (
            GPU,
            Choice(None, "there is none", "get it"),
            "warning",
            CARD + "no nvcc; the CPU computes, because there is none",
            "get it",
        ),
        (
            Driver(problem="-"),
            Choice(KIT, "no driver"),
            "ok",
            "none, so the CPU computes: no driver; nvcc 12.2 at /c/bin/nvcc",
            "",
        ),
        (Driver((12, 4), problem="-"), Choice(None, "it fails"), "warning", "none, so the CPU computes: it fails; no nvcc", ""),
    ],
)
def test_cuda(monkeypatch, driver, choice, verdict, text, fix):
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    monkeypatch.setattr(cuda, "choose", lambda found: choice)
    found = as_json("--quick")["CUDA"]
    assert (found["verdict"], found["text"], found["fix"]) == (verdict, text, fix)


def test_links_of_each_device(monkeypatch):
    def link(index):
        if index:
            raise MossError("it is full")
        return 12.5e9, 13e9

    monkeypatch.setattr(cuda, "driver", lambda: Driver((12, 4), GPU.devices * 2))
    monkeypatch.setattr(cuda, "link_bandwidth", link)
    monkeypatch.setattr(machine, "memory_bandwidth", lambda: 1e9)
    monkeypatch.setattr(machine, "disk_bandwidth", lambda folder: 1e9)
    links = [finding for finding in doctor.findings() if finding.name == "link"]
    assert [finding.verdict for finding in links] == ["ok", "warning"] and links[0].values["to_device"] == 12_500_000_000
    assert "12.5 GB/s to it, 13.0 GB/s from it" in links[0].text and "it is full" in links[1].text


@pytest.mark.parametrize(("version", "verdict"), [("13.6.0", "ok"), ("14.0.1", "warning")])
def test_cupy(monkeypatch, version, verdict):
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version if name == "cupy-cuda12x" else real(name))
    found = as_json("--quick")["cupy"]
    assert found["verdict"] == verdict and f"cupy-cuda12x {version}" in found["text"]


class Numbers(list):
    """As much of a Jittor array as the check needs; ``wrong`` computes as Jittor does with numpy 2."""

    wrong = False

    def __add__(self, other):
        return Numbers(0 if self.wrong else x + other for x in self)

    def numpy(self):
        return SimpleNamespace(tolist=lambda: list(self))


@pytest.mark.parametrize("wrong", [False, True])
def test_import(monkeypatch, wrong):
    monkeypatch.setattr(Numbers, "wrong", wrong)
    monkeypatch.setattr(runtime, "jittor", lambda: SimpleNamespace(array=Numbers))
    assert as_json("--quick", "--import")["import"]["verdict"] == ("problem" if wrong else "ok")


def test_import_that_fails(monkeypatch):
    def fail():
        raise MossError("Jittor cannot be compiled: boom")

    monkeypatch.setattr(runtime, "jittor", fail)
    found = as_json("--quick", "--import")
    assert found["verdict"] == "problem" and found["import"]["text"] == "Jittor cannot be compiled: boom"
