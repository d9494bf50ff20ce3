"""The driver is a libcuda.so.1 compiled here, so that no GPU is needed; each question is asked in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from moss_jt import cuda
from moss_jt.cuda import Choice, Device, Driver, Toolkit, arithmetic, choose

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


GPU = Driver((12, 4), (Device("Card", 1 << 33, (8, 6)),))
OLD_GPU, NEW_GPU = Driver((13, 0), (Device("Old", 1 << 33, (6, 1)),)), Driver((12, 8), (Device("New", 1 << 33, (12, 0)),))
CODES = (50, 60, 75, 86, 90)


def kit(version: tuple = (12, 4), codes: tuple = CODES, **more) -> Toolkit:
    return Toolkit("/c/bin/nvcc", version, codes, **more)


@pytest.fixture
def there(monkeypatch):
    """Call with toolkits: those are all that this machine has. Its g++ is 12."""
    monkeypatch.setattr(cuda.requirements, "gcc", lambda: 12)
    monkeypatch.delenv("nvcc_path", raising=False)
    return lambda *kits: monkeypatch.setattr(cuda, "toolkits", lambda: iter(kits))


@pytest.mark.parametrize(
    ("driver", "found"),
    [
        (GPU, kit()),
        (GPU, kit((11, 8))),
        (GPU, kit((12, 9))),  # within one major version, an older driver runs what is compiled for its device
        (GPU, kit(codes=())),
        (GPU, kit(newest_gcc=12)),
        (OLD_GPU, kit()),
        (Driver((13, 0), (Device("Card", 1 << 33, (12, 0)),)), kit((12, 4))),  # the driver translates
        (Driver((13, 0), (Device("Card", 1 << 33, (12, 0)),)), kit((13, 0), (75, 120))),
    ],
)
def test_a_toolkit_that_will_do(there, driver, found):
    there(found)
    assert choose(driver) == Choice(found) and choose(driver).reason == ""


@pytest.mark.parametrize(
    ("driver", "found", "why", "fix"),
    [
        (GPU, None, "there is no nvcc", "sudo apt-get install nvidia-cuda-toolkit"),
        (
            Driver((13, 1), GPU.devices),
            None,
            "there is no nvcc",
            "-m pip install 'cuda-toolkit[nvcc,cccl,cublas,curand]==13.*'",
        ),
        (OLD_GPU, None, "there is no nvcc", "sudo apt-get install nvidia-cuda-toolkit"),  # CUDA 13 is not for it
        (
            OLD_GPU,
            kit((13, 0), (75, 86)),
            "nvcc 13.0 at /c/bin/nvcc compiles for compute capability 7.5 and up, and this has 6.1",
            "sudo apt-get install nvidia-cuda-toolkit",
        ),
        (
            Driver((11, 4), (Device("Card", 1 << 33, (3, 5)),)),
            kit(),
            "the kernels need compute capability 6.0, and this has 3.5",
            "",
        ),
        (GPU, kit((10, 2)), "nvcc 10.2 at /c/bin/nvcc is too old for Jittor", "sudo apt-get install nvidia-cuda-toolkit"),
        (
            GPU,
            kit((13, 0), (75, 86)),
            "the driver runs CUDA up to 12.4, and nvcc 13.0 at /c/bin/nvcc is newer: update the driver",
            "sudo apt-get install nvidia-cuda-toolkit",
        ),
        (NEW_GPU, kit((12, 9)), "nvcc 12.9 at /c/bin/nvcc is older than this device and newer than the driver: update", ""),
        (
            GPU,
            kit(newest_gcc=11),
            "nvcc 12.4 at /c/bin/nvcc takes g++ up to 11, and this is g++ 12",
            "sudo apt-get install g++-11; export cc_path=g++-11",
        ),
        (
            GPU,
            kit(missing=("cublas_v2.h", "libcurand")),
            "nvcc 12.4 at /c/bin/nvcc has no cublas_v2.h and no libcurand",
            "-m pip install 'cuda-toolkit[cudart,cccl,cublas,curand]==12.*'",
        ),
        (GPU, kit((11, 8), missing=("curand.h",)), "has no curand.h", "nvidia-cublas-cu11 nvidia-curand-cu11"),
    ],
)
def test_what_keeps_the_device_from_computing(there, driver, found, why, fix):
    there(*filter(None, [found]))
    choice = choose(driver)
    assert choice.kit == found and why in choice.why and choice.fix.endswith(fix) and bool(fix) == bool(choice.fix)
    assert choice.reason == (f"{choice.why}: {choice.fix}" if fix else choice.why)


def test_the_first_that_will_do(there):
    unfit, fit = kit((13, 0)), kit((12, 2))
    there(unfit, kit(missing=("curand.h",)), fit)
    assert choose(GPU) == Choice(fit)
    there(unfit, kit(missing=("curand.h",)))
    assert choose(GPU).kit == unfit and "is newer" in choose(GPU).why  # the first one's reason is the one given


def test_an_nvcc_path_that_leads_nowhere(there, monkeypatch):
    there()
    monkeypatch.setenv("nvcc_path", "/missing/nvcc")
    assert choose(GPU).reason == "nvcc_path names /missing/nvcc, which is no nvcc: unset nvcc_path"


def test_no_device(there):
    there(kit())
    assert choose(Driver(problem="no driver")) == Choice(kit(), "no driver")


@pytest.mark.parametrize(
    ("capability", "used"),
    [
        ((6, 1), "plain CUDA cores"),
        ((7, 0), "plain CUDA cores"),
        ((7, 5), "tensor cores (m16n8k8)"),
        ((8, 0), "tensor cores (m16n8k16 and cp.async)"),
        ((12, 0), "tensor cores (m16n8k16 and cp.async)"),
    ],
)
def test_arithmetic(capability, used):
    assert arithmetic(capability) == used
