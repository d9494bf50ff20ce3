"""The driver is a libcuda.so.1 compiled here, so that no GPU is needed; each question is asked in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moss_jt import cuda
from moss_jt.cuda import Device, Driver, Toolkit, unusable

# Each function as CUDA's own libcuda has it; INIT is what cuInit answers, DEVICES how many there are.
LIBCUDA = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>
extern "C" {
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int* v) { *v = 12040; return 0; }
int cuDeviceGetCount(int* n) { *n = DEVICES; return 0; }
int cuDeviceGet(int* d, int i) { *d = i + 40; return i < DEVICES ? 0 : 101; }
int cuDeviceGetName(char* s, int n, int d) { snprintf(s, n, "Card %d", d - 40); return 0; }
int cuDeviceTotalMem_v2(size_t* n, int d) { *n = (size_t)(d - 39) << 33; return 0; }
int cuDeviceGetAttribute(int* v, int what, int d) { *v = what == 75 ? 8 : what == 76 ? 6 : -1; return 0; }
int cuGetErrorString(int code, const char** s) { *s = code == 100 ? "no CUDA device" : "unknown"; return 0; }
int cuCtxCreate_v2(void** c, unsigned flags, int d) { *c = (void*)8; return d >= 40 ? 0 : 101; }
int cuCtxDestroy_v2(void* c) { if (c != (void*)8) abort(); return 0; }
int cuMemHostAlloc(void** p, size_t n, unsigned flags) { *p = (void*)((size_t)1 << 40); return n == 256 << 20 ? 0 : 1; }
int cuMemAlloc_v2(size_t* p, size_t n) { *p = (size_t)3 << 40; return FULL ? 2 : 0; }
int cuMemcpyHtoD_v2(size_t to, void* from, size_t n) { usleep(20000); return to == (size_t)3 << 40 ? 0 : 1; }
int cuMemcpyDtoH_v2(void* to, size_t from, size_t n) { usleep(40000); return from == (size_t)3 << 40 ? 0 : 1; }
}
"""

ASK = """
import dataclasses, json
from moss_jt import cuda, errors

def attempt(what):
    try:
        return what()
    except errors.MossError as e:
        return str(e)

"""


@pytest.fixture
def ask(tmp_path):
    """Call with an expression and the library's macros: what the expression gives in a process that has this driver."""
    if not shutil.which("g++"):
        pytest.skip("needs g++ to compile the driver")

    def run(expression: str, **macros: int):
        (tmp_path / "cuda.cc").write_text(LIBCUDA)
        flags = [f"-D{name}={value}" for name, value in {"INIT": 0, "DEVICES": 1, "FULL": 0, **macros}.items()]
        library = ["-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1")]
        subprocess.run(["g++", *flags, str(tmp_path / "cuda.cc"), *library], check=True)
        env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
        command = [sys.executable, "-c", f"{ASK}print(json.dumps({expression}))"]
        return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)

    return run


def test_devices(ask):
    found = ask("dataclasses.asdict(cuda.driver())", DEVICES=2)
    cards = [{"name": f"Card {i}", "memory": (i + 1) << 33, "capability": [8, 6]} for i in range(2)]
    assert found == {"version": [12, 4], "devices": cards, "problem": ""}


def test_a_driver_without_a_device(ask):
    found = ask("dataclasses.asdict(cuda.driver())", DEVICES=0)
    assert found == {"version": [12, 4], "devices": [], "problem": "the NVIDIA driver finds no device"}


def test_a_driver_that_fails(ask):
    found = ask("dataclasses.asdict(cuda.driver())", INIT=100)
    assert found["devices"] == [] and found["version"] == [12, 4]
    assert found["problem"] == "the NVIDIA driver answers no CUDA device (100) to cuInit"


def test_no_driver(monkeypatch):
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert cuda.driver() == Driver(problem="no NVIDIA driver (libcuda.so.1) is installed")


def test_link_bandwidth(ask):
    to_device, to_host = ask("cuda.link_bandwidth()")
    assert to_device == pytest.approx((256 << 20) / 0.020, rel=0.3) and to_host == pytest.approx((256 << 20) / 0.040, rel=0.3)


def test_link_bandwidth_of_a_full_device(ask):
    assert ask("attempt(cuda.link_bandwidth)", FULL=1) == "the NVIDIA driver answers unknown (2) to cuMemAlloc_v2"


def test_link_bandwidth_of_no_device(ask):
    assert ask("attempt(lambda: cuda.link_bandwidth(1))") == "the NVIDIA driver answers unknown (101) to cuDeviceGet"


def nvcc(folder: Path, release: str, complete: bool = True) -> Path:
    """A toolkit's folder; returns its nvcc."""
    for name in [*cuda._LIBRARIES, *cuda._HEADERS] if complete else []:
        path = folder / ("include" if name.endswith(".h") else "lib64") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path = folder / "bin/nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.48'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def only(monkeypatch):
    """Call with paths: nvcc is looked for there and nowhere else."""
    monkeypatch.delenv("nvcc_path", raising=False)
    return lambda *paths: monkeypatch.setattr(cuda, "_NVCC", tuple(map(str, paths)))


def test_toolkit(tmp_path, only):
    path = nvcc(tmp_path / "cuda", "12.2")
    link = tmp_path / "nvcc"
    link.symlink_to(path)  # Jittor looks beside what the link leads to
    only(tmp_path / "missing", link)
    assert cuda.toolkit() == Toolkit(str(link), (12, 2), ())


def test_a_complete_toolkit_is_preferred(tmp_path, only, monkeypatch):
    bare, whole = nvcc(tmp_path / "a", "11.8", complete=False), nvcc(tmp_path / "b", "12.2")
    only(bare, whole)
    assert cuda.toolkit().nvcc == str(whole)
    only(bare)
    assert cuda.toolkit().missing[0] == str(tmp_path / "a/lib64/libcudart.so")
    monkeypatch.setenv("nvcc_path", str(whole))
    assert cuda.toolkit().nvcc == str(whole)


def test_no_toolkit(tmp_path, only):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho nonsense\n")
    broken.chmod(0o755)
    only(broken, tmp_path / "missing")
    assert cuda.toolkit() is None


GPU = Driver((12, 4), (Device("Card", 1 << 33, (8, 6)),))


@pytest.mark.parametrize(
    ("driver", "kit", "why"),
    [
        (GPU, Toolkit("/c/bin/nvcc", (12, 4), ()), ""),
        (GPU, Toolkit("/c/bin/nvcc", (11, 8), ()), ""),
        (Driver(problem="no driver"), Toolkit("/c/bin/nvcc", (12, 4), ()), "no driver"),
        (GPU, None, "there is no nvcc: install"),
        (GPU, Toolkit("/c/bin/nvcc", (13, 0), ()), "CUDA 13.0, and Jittor takes 11 and 12"),
        (GPU, Toolkit("/c/bin/nvcc", (12, 4), ("/c/lib64/libcublas.so",)), "there is no libcublas.so (/c/lib64/libcublas.so)"),
        (
            GPU,
            Toolkit("/c/bin/nvcc", (12, 6), ()),
            "driver runs CUDA up to 12.4, and /c/bin/nvcc is 12.6: update the driver",
        ),
    ],
)
def test_unusable(driver, kit, why):
    assert why in unusable(driver, kit) and bool(why) == bool(unusable(driver, kit))
