"""All headers of kernels_cuda/ through nvcc, for each architecture it knows, as Jittor compiles them. Needs no GPU."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from ..conftest import ROOT


def load():
    spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "benchmarks" / "cuda_resources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_resources = load()
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc on the PATH")


@needs_nvcc
def test_all_headers_compile():
    archs = cuda_resources.architectures("nvcc")
    found = cuda_resources.resources("nvcc", cuda_resources.headers(), archs)
    kernels = {entry["kernel"] for entry in found}
    assert len(found) == len(kernels) * len(archs) and any("layer_norm_kernel" in name for name in kernels)
    assert all(0 < entry["registers"] <= 255 for entry in found)


@needs_nvcc
def test_an_error_is_what_nvcc_says(tmp_path, monkeypatch):
    (tmp_path / "broken.cuh").write_text("__global__ void broken() { missing(); }\n")
    monkeypatch.setattr(cuda_resources, "KERNELS", tmp_path)
    with pytest.raises(RuntimeError, match='identifier "missing" is undefined'):
        cuda_resources.resources("nvcc", ["broken.cuh"], [80])


def test_what_ptxas_says_is_read(monkeypatch):
    monkeypatch.setattr(cuda_resources, "demangled", lambda names: names)
    said = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'b' for 'sm_80'
ptxas info    : Function properties for b
    96 bytes stack frame, 84 bytes spill stores, 100 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 96 bytes stack, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    names = ("kernel", "arch", "registers", "spilled_bytes", "stack_bytes", "shared_bytes")
    expected = [("a", 90, 8, 0, 0, 0), ("b", 80, 128, 84, 96, 2048)]
    found = cuda_resources.parsed(said)
    assert found == [dict(zip(names, entry)) for entry in expected]
    assert [cuda_resources.cell(entry) for entry in found] == ["8 / 0", "128 + 84 / 2048"]
    assert cuda_resources.table(found).row_count == 2
