"""What is installed: a source distribution and a wheel of the project hold all of the program, and it works from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .checkpoints import random_state, small_config, write_official
from .conftest import ROOT

# Where the sources lie, and where they are installed.
FOLDERS = {
    "moss_jt": "moss_jt",
    "convert": "moss_jt/convert",
    "kernels_cpu": "moss_jt/kernels_cpu",
    "kernels_cuda": "moss_jt/kernels_cuda",
}
FILES = ["setup.py", "pyproject.toml", "README.md", "LICENSE"]


def sources(folder: str) -> set[str]:
    found = {p for end in ("py", "h", "cuh") for p in (ROOT / folder).rglob(f"*.{end}")}
    found |= {p for p in (ROOT / folder / "demo").glob("*") if p.is_file()}
    return {str(p.relative_to(ROOT)) for p in found}


def build(kind: str, source: Path, out: Path) -> Path:
    """Build ``kind`` (wheel or sdist) of the project in ``source``; returns the file."""
    out.mkdir()
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Unpacked. Built from a copy, since building leaves files behind."""
    place = tmp_path_factory.mktemp("sdist")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, place / "copy" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, place / "copy" / file)
    subprocess.run(["tar", "-xf", build("sdist", place / "copy", place / "built")], cwd=place, check=True)
    return next(place.glob("moss*-*"))


@pytest.fixture(scope="module")
def installed(sdist, tmp_path_factory) -> Path:
    """A wheel built from the source distribution, unpacked: what would be in site-packages."""
    place = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("wheel", sdist, place / "built")) as z:
        z.extractall(place / "installed")
    return place / "installed"


def test_source_distribution_is_complete(sdist):
    expected = set(FILES).union(*map(sources, FOLDERS))
    assert {file for file in expected if not (sdist / file).is_file()} == set()


def test_wheel_holds_everything_in_one_package(installed):
    expected = {name.replace(folder, inside, 1) for folder, inside in FOLDERS.items() for name in sources(folder)}
    assert {"moss_jt/kernels_cpu/simd.h", "moss_jt/kernels_cuda/device.cuh"} <= expected and "moss_jt/cli/chat.py" in expected
    assert {f"moss_jt/demo/{name}" for name in ("tokenizer.model", "meta_instruction.txt", "head.safetensors")} <= expected
    found = {str(p.relative_to(installed)) for p in installed.rglob("*") if p.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == expected
    assert list(installed.glob("*.dist-info/**/LICENSE"))


def test_it_works_from_there(installed, tmp_path):
    config = small_config()
    write_official(tmp_path / "official", config, random_state(config))
    code = (
        "import sys, moss_jt, moss_jt.cli; assert moss_jt.__file__.startswith(sys.argv[1]), moss_jt.__file__;"
        "from moss_jt.ops.kernel import header; assert sys.argv[1] in header('linear.h');"
        "moss_jt.cli.main(sys.argv[2:])"
    )
    run = [sys.executable, "-c", code, str(installed), "convert", "weights", "official", "converted"]
    done = subprocess.run(run, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "converted/head.safetensors").exists()
