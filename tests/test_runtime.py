from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from moss_jt import cuda, requirements, runtime, toolkit
from moss_jt.cuda import Choice, Device, Driver, Toolkit
from moss_jt.errors import MossError
from moss_jt.machine import Cores

# Imports Jittor as a program would, and says what that did to the process.
PROGRAM = r"""
import ctypes, json, os, signal, ssl, subprocess, sys, threading

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        raise RuntimeError(f"{event} {args}")

sys.addaudithook(refuse)
before = dict(os.environ), signal.getsignal(signal.SIGINT), ssl._create_default_https_context, sys.getrecursionlimit()
from moss_jt import runtime
jt = runtime.jittor("cpu")
after = dict(os.environ), signal.getsignal(signal.SIGINT), ssl._create_default_https_context, sys.getrecursionlimit()
answer = {"same": before == after, "again": runtime.jittor() is jt, "cuda": bool(jt.has_cuda)}
answer["numbers"] = jt.array([[1.5, -2.0], [3.25, 0.0]]).numpy().tolist()
answer["threads"] = [ctypes.CDLL(None).omp_get_max_threads()]
runtime.jittor(threads=3)
answer["threads"].append(ctypes.CDLL(None).omp_get_max_threads())
child = subprocess.Popen(["sleep", "60"])
child.kill()
answer["killed"] = child.wait()
answer["children"] = open(f"/proc/self/task/{os.getpid()}/children").read()
try:
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(5)
except KeyboardInterrupt:
    answer["interrupt"] = True
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def compiled():
    """Jittor's first compile, where it has not been on this machine, happens here."""
    subprocess.run([sys.executable, "-c", "from moss_jt import runtime; runtime.jittor('cpu')"], check=True)


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run([sys.executable, "-c", code], env={**environment, **env}, capture_output=True, text=True)


def test_jittor(compiled):
    done = run(PROGRAM)
    assert done.stderr == "" and done.returncode == 0
    line, empty = done.stdout.split("\n")  # nothing but the answer
    answer = json.loads(line)
    assert answer.pop("threads")[1] == 3 and empty == ""
    assert answer == {
        "same": True,  # environment, signals, certificates of https, recursion
        "again": True,
        "cuda": False,
        "numbers": [[1.5, -2.0], [3.25, 0.0]],
        "killed": -9,  # and not this process
        "children": "",  # no pool of compilers
        "interrupt": True,
    }


@pytest.mark.parametrize(("env", "threads"), [({"OMP_NUM_THREADS": "5"}, 5), ({}, None)])
def test_threads(compiled, env, threads):
    from moss_jt.machine import cores

    code = "from moss_jt import runtime; import ctypes; runtime.jittor('cpu'); print(ctypes.CDLL(None).omp_get_max_threads())"
    assert int(run(code, **env).stdout) == (threads or cores().usable)


def test_jittor_imported_by_the_program_itself(compiled):
    code = (
        "import os\n"
        "os.environ.update(log_silent='1', nvcc_path='', use_mkl='0')\n"
        "import jittor\nfrom moss_jt import runtime\nprint(runtime.jittor() is jittor)"
    )
    assert run(code).stdout == "True\n"


def test_damaged_after_its_compile(tmp_path):
    """A Jittor that was compiled well and does not load now."""
    (tmp_path / "jittor_utils").mkdir()
    (tmp_path / "jittor_utils/__init__.py").write_text(f"cache_path = {str(tmp_path)!r}\n")
    (tmp_path / "jittor_utils/install_cuda.py").touch()
    (tmp_path / "jittor").mkdir()
    (tmp_path / "jittor/compiler.py").touch()
    body = "import sys\nif 'moss_jt.runtime' in sys.modules: raise ImportError('file too short')\n"
    (tmp_path / "jittor/__init__.py").write_text(body)
    code = "from moss_jt import errors, runtime\ntry: runtime.jittor('cpu')\nexcept errors.MossError as e: print(e)"
    done = run(code, PYTHONPATH=str(tmp_path), HOME=str(tmp_path))
    assert done.stderr == "" and done.stdout == (
        f"Jittor cannot be imported (ImportError: file too short); to compile it afresh: rm -r '{tmp_path}'\n"
    )


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has not imported Jittor; importing it gives the nvcc it was imported with."""
    monkeypatch.setattr(runtime, "_module", None)

    def imported(nvcc, threads, save_mem):
        flags = runtime._core(nvcc, save_mem).get("cc_flags", "")
        return SimpleNamespace(nvcc=nvcc, has_cuda=bool(nvcc), flags=SimpleNamespace(cc_flags=f" -Wall {flags} "))

    monkeypatch.setattr(runtime, "_import", imported)
    monkeypatch.setattr(toolkit, "assemble", lambda kit, capabilities: f"{kit.nvcc} for {capabilities}")
    monkeypatch.delenv("nvcc_path", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "jittor"]:
        monkeypatch.delitem(sys.modules, name)


NO_GPU, GPU = Driver(problem="no NVIDIA driver is installed"), Driver((12, 4), (Device("Card", 1 << 33, (8, 6)),))
FIT, UNFIT = Choice(Toolkit("/c/nvcc", (12, 2))), Choice(Toolkit("/c13/nvcc", (13, 0)), "it is newer", "sudo mend it")
USED = "/c/nvcc for [(8, 6)]"


def machine(monkeypatch, driver: Driver, choice: Choice) -> None:
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    monkeypatch.setattr(cuda, "choose", lambda found: choice if found.devices else Choice(choice.kit, found.problem))


@pytest.mark.parametrize(
    ("device", "driver", "choice", "nvcc", "said"),
    [
        ("auto", NO_GPU, FIT, "", ""),  # nvcc alone says nothing
        ("auto", GPU, FIT, USED, ""),
        ("cuda", GPU, FIT, USED, ""),
        ("cpu", GPU, FIT, "", ""),
        ("auto", GPU, UNFIT, "", "moss-jt: using the CPU, not the Card: it is newer: sudo mend it\n"),
        ("auto", GPU, Choice(None, "there is no nvcc"), "", "moss-jt: using the CPU, not the Card: there is no nvcc\n"),
        ("cuda", GPU, UNFIT, None, "device cuda: it is newer: sudo mend it"),
        ("cuda", NO_GPU, FIT, None, "device cuda: no NVIDIA driver is installed"),
        ("gpu", NO_GPU, FIT, None, "device is 'gpu', expected auto, cpu or cuda"),
    ],
)
def test_device(fresh, monkeypatch, capsys, device, driver, choice, nvcc, said):
    machine(monkeypatch, driver, choice)
    if nvcc is None:
        with pytest.raises(MossError) as e:
            runtime.jittor(device)
        assert str(e.value) == said
        return
    assert runtime.jittor(device).nvcc == nvcc
    assert capsys.readouterr().err == said


def test_cuda_that_the_environment_turns_off(fresh, monkeypatch):
    machine(monkeypatch, GPU, FIT)
    monkeypatch.setenv("nvcc_path", "")
    assert runtime.jittor().nvcc == ""


def test_cuda_that_does_not_compile(fresh, monkeypatch, capsys):
    def fail(nvcc, threads, save_mem):
        if nvcc:
            raise MossError("Jittor cannot be compiled: boom")
        return SimpleNamespace(has_cuda=0)

    machine(monkeypatch, GPU, FIT)
    monkeypatch.setattr(runtime, "_import", fail)
    with pytest.raises(MossError, match="boom"):
        runtime.jittor("cuda")
    assert runtime.jittor().has_cuda == 0
    assert capsys.readouterr().err == "moss-jt: using the CPU, because with CUDA: Jittor cannot be compiled: boom\n"


@pytest.mark.parametrize(("choice", "why"), [(FIT, "start a new process for it"), (UNFIT, "it is newer: sudo mend it")])
def test_cuda_asked_after_the_cpu(fresh, monkeypatch, choice, why):
    machine(monkeypatch, GPU, choice)
    runtime.jittor("cpu")
    with pytest.raises(MossError, match=f"imported without CUDA in this process: {why}$"):
        runtime.jittor("cuda")


def test_its_own_swapping(fresh, monkeypatch):
    """Only in the process whose Jittor was compiled with it."""
    machine(monkeypatch, GPU, FIT)
    jt = runtime.jittor(save_mem=True)
    assert jt.nvcc == USED and runtime.jittor() is runtime.jittor(save_mem=True) is jt
    monkeypatch.setattr(runtime, "_module", None)
    runtime.jittor("cuda")
    with pytest.raises(MossError, match="without its own swapping in this process: start a new process for it"):
        runtime.jittor("cuda", save_mem=True)
    monkeypatch.setattr(runtime, "_module", None)
    machine(monkeypatch, NO_GPU, FIT)
    with pytest.raises(MossError, match="device cuda: no NVIDIA driver is installed"):
        runtime.jittor(save_mem=True)


def test_each_core_has_a_cache(monkeypatch):
    for name in ("cache_name", "cc_flags"):
        monkeypatch.delenv(name, raising=False)
    assert runtime._core("", False) == {"cache_name": "default"}
    assert runtime._core("/c/nvcc", False) == {"cache_name": "cuda"}
    assert runtime._core("/c/nvcc", True) == {"cache_name": "save-mem", "cc_flags": "-DJT_SAVE_MEM=1"}
    monkeypatch.setenv("cache_name", "mine")
    monkeypatch.setenv("cc_flags", "-g")
    assert runtime._core("/c/nvcc", False) == {"cache_name": "mine"}
    assert runtime._core("/c/nvcc", True) == {"cache_name": "mine-save-mem", "cc_flags": "-g -DJT_SAVE_MEM=1"}


def test_a_jittor_that_computes_garbage_is_not_taken_over(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "jittor", SimpleNamespace(has_cuda=0))
    monkeypatch.setattr(requirements, "numpy", lambda: requirements.Finding("numpy", "problem", "numpy 2", "pip"))
    with pytest.raises(MossError, match="numpy 2: pip"):
        runtime.jittor()


def test_environment_of_the_import(monkeypatch):
    monkeypatch.setenv("use_mkl", "1")  # the user's choice
    monkeypatch.setenv("nvcc_path", "/c13/bin/nvcc")  # where there is no device it would end the process
    monkeypatch.delenv("log_silent", raising=False)
    before = dict(os.environ)
    with runtime._environment({"nvcc_path": ""}):
        seen = dict(os.environ)
        os.environ.update(cc_path="set by Jittor")
    assert (seen["use_mkl"], seen["nvcc_path"], seen["log_silent"], seen["use_cutt"]) == ("1", "", "1", "0")
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("started_here", "logical", "threads"),
    [(None, 8, 4), (2, 8, 2), (3, 8, 1), (16, 8, 1), (2, 2, 1), (2, 4, 2)],  # bound where fewer than the machine's 8
)
def test_processes_of_one_machine_share_its_cores(monkeypatch, started_here, logical, threads):
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_SIZE", raising=False)
    if started_here:
        monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", str(started_here))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(runtime, "cores", lambda: Cores(logical, logical // 2, None))
    assert runtime._threads() == threads


def test_started_by_mpirun(monkeypatch):
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("mpicc_path", raising=False)
    assert runtime._mpi() == {}
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(MossError, match=r"mpicc.*is missing: sudo apt-get install libopenmpi-dev"):
        runtime._mpi()
    monkeypatch.setenv("mpicc_path", "/opt/mpi/bin/mpicc")
    assert runtime._mpi() == {"use_mpi": "1"}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    flags = SimpleNamespace(cache_path=str(tmp_path))
    monkeypatch.setattr(runtime, "_module", SimpleNamespace(flags=flags, has_cuda=0))
    return tmp_path


def test_compiling_is_said_once(cache, capfd):
    for sources in [("a", "b"), ("a", "b"), ("a", "c"), ("ab",)]:
        with runtime.compiling(*sources):
            pass
    said = ["moss-jt: compiling kernels (first run only) ...", "moss-jt: kernels are compiled (0 s)"]
    assert capfd.readouterr().err.splitlines() == said * 3


def test_noise_of_a_compiler_is_not_seen(cache, capfd):
    with runtime.compiling("a"):
        os.system("echo noise >&2")
    assert "noise" not in capfd.readouterr().err and not list(cache.glob("*.log"))


def test_compiling_in_another_thread(cache, capfd):
    def compile():
        with runtime.compiling("a"):
            pass

    thread = threading.Thread(target=compile)
    thread.start()
    thread.join()
    assert len(list(cache.glob("*.compiled"))) == 1


def test_a_kernel_that_does_not_compile(cache, capfd):
    with pytest.raises(MossError) as e, runtime.compiling("a"):
        os.system("echo 'In function f:' >&2; echo 'f.cc:3:1: error: no such thing' >&2")
        raise RuntimeError("[f 1124 log.cc:605] Check failed: Run cmd failed: g++ ...\n[more]\nlines")
    log = next(cache.glob("*.log"))
    assert str(e.value) == f"a kernel cannot be compiled: f.cc:3:1: error: no such thing (all of it: {log})"
    assert "In function f" in log.read_text() and "no such thing" not in capfd.readouterr().err
    assert not list(cache.glob("*.compiled"))


@pytest.mark.parametrize("error", [ValueError("shape"), RuntimeError("shape"), MossError("full")])
def test_other_errors_pass(cache, error):
    with pytest.raises(type(error), match=str(error)), runtime.compiling("a"):
        raise error
    assert not list(cache.glob("*.compiled"))


def test_an_interrupt_comes_when_stderr_is_back(cache, capfd):
    """Jittor's error, of a compiler that Ctrl-C ended, gives way to it."""
    with pytest.raises(KeyboardInterrupt), runtime.compiling("a"):
        os.kill(os.getpid(), 2)
        raise RuntimeError("Run cmd failed")
    print("seen", file=sys.stderr)
    assert "seen" in capfd.readouterr().err and not list(cache.glob("*.compiled"))
