"""What an op gives to Jittor; test_cuda_stub.py has it compiled."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from moss_jt.ops import kernel


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A kernels_cuda/ in place of the real one."""
    (tmp_path / "__init__.py").touch()
    (tmp_path / "twice.cuh").write_text("// first")
    spec = importlib.util.spec_from_file_location("moss_jt.kernels_cuda", tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, "moss_jt.kernels_cuda", importlib.util.module_from_spec(spec))
    kernel.header.cache_clear()
    yield tmp_path
    kernel.header.cache_clear()


@pytest.fixture
def given(monkeypatch):
    """What Jittor's ``code`` was last called with."""
    last = {}
    monkeypatch.setattr(kernel, "jittor", lambda: SimpleNamespace(code=lambda *args, **named: last.update(named)))
    return last


def test_an_op_for_the_host_alone(given):
    kernel.run("simd.h", (3,), [], "host();", eps=1.0)
    assert given["cpu_src"] == "host();" and given["data"] == {"eps": 1.0} and "kernels_cpu/simd.h>" in given["cpu_header"]
    assert not [name for name in given if name.startswith("cuda")]


def test_an_op_with_a_body_for_the_device(given, kernels):
    kernel.run("simd.h", (3,), [], "host();", ("twice.cuh", "device();"), eps=1.0)
    assert given["cuda_src"] == "device();" and given["cuda_header"].startswith(f"#include <{kernels}/twice.cuh>\n// ")
    assert given["cpu_src"] == "host();" and given["data"] == {"eps": 1.0}


def test_a_changed_kernel_changes_the_text(kernels):
    """Jittor compiles an op again only when that does, and looks into no file that it includes."""
    before = kernel.header("twice.cuh", "kernels_cuda")
    (kernels / "other.cuh").write_text("// what twice.cuh might include")
    kernel.header.cache_clear()
    assert kernel.header("twice.cuh", "kernels_cuda") != before
