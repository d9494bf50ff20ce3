"""Toolkits of tiny files in every layout there is; which is found, what of it is missing, and the folder made for Jittor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from moss_jt import toolkit
from moss_jt.errors import MossError

from . import toolkits
from .toolkits import HEADERS, LIBRARIES, fill


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """A machine without any CUDA, whose /usr/local and /opt are below tmp_path."""
    for name in ("nvcc_path", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "JITTOR_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin") + ":/usr/bin:/bin")
    monkeypatch.setattr(toolkit, "_PLACES", (f"{tmp_path}/local/cuda", f"{tmp_path}/local/cuda-*", f"{tmp_path}/opt/cuda"))
    monkeypatch.setattr(toolkit, "_wheels", lambda: [])


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """The folder that PyPI's nvidia-* wheels go into."""
    folder = tmp_path / "site-packages/nvidia"
    folder.mkdir(parents=True)
    monkeypatch.setattr(toolkit, "_wheels", lambda: [folder])
    return folder


def found() -> list[str]:
    return [kit.nvcc for kit in toolkit.toolkits()]


def test_nothing():
    assert found() == []


def test_the_order_of_places(tmp_path, monkeypatch):
    names = ["home", "path", "local/cuda-12.4", "local/cuda-11.8", "conda", "opt/cuda"]
    nvccs = {name: str(toolkits.toolkit(tmp_path / name)) for name in names}
    (tmp_path / "local/cuda").symlink_to(tmp_path / "local/cuda-11.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "home"))
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    monkeypatch.setenv("PATH", f"{tmp_path}/path/bin")
    linked = str(tmp_path / "local/cuda/bin/nvcc")  # what cuda-11.8 would give again
    expected = [nvccs["home"], nvccs["path"], linked, nvccs["local/cuda-12.4"], nvccs["opt/cuda"], nvccs["conda"]]
    assert found() == expected
    monkeypatch.setenv("nvcc_path", nvccs["conda"])
    assert found() == [nvccs["conda"]]


def test_what_jittor_downloaded(tmp_path):
    nvcc = toolkits.toolkit(tmp_path / "home/.cache/jittor/jtcuda/cuda12.2_cudnn8_linux", "12.2")
    assert found() == [str(nvcc)]


def test_a_cache_that_cannot_be_found(tmp_path):
    nvcc = toolkits.toolkit(tmp_path / "opt/cuda")
    (tmp_path / "home/.cache/jittor").mkdir(parents=True)
    (tmp_path / "home/.cache/jittor/config.json").write_text("{")
    assert found() == [str(nvcc)]


@pytest.mark.parametrize("body", ["#!/bin/sh\necho nonsense\n", "#!/nowhere\n", ""])
def test_an_nvcc_that_is_none(tmp_path, body):
    path = toolkits.toolkit(tmp_path / "local/cuda")
    path.write_text(body)
    assert found() == []
    path.chmod(0o644)
    assert found() == []


def test_what_a_toolkit_says(tmp_path):
    nvcc = toolkits.toolkit(tmp_path / "local/cuda", "11.8", codes="90 75 86")
    fill(tmp_path / "local/cuda/include", ("crt/host_config.h",), "#if __GNUC__ > 11\n#error -- unsupported GNU version!\n")
    (kit,) = toolkit.toolkits()
    assert (kit.nvcc, kit.version, kit.codes, kit.newest_gcc, kit.missing) == (str(nvcc), (11, 8), (75, 86, 90), 11, ())


@pytest.mark.parametrize("name", [*HEADERS, *LIBRARIES])
def test_what_is_missing(tmp_path, name):
    toolkits.toolkit(tmp_path / "local/cuda")
    next((tmp_path / "local/cuda").glob(f"*/{name}")).unlink()
    (kit,) = toolkit.toolkits()
    assert kit.missing == (name if name in HEADERS else name.split(".")[0],)


def test_a_script_that_calls_nvcc(tmp_path):
    """Beside it there is nothing; nvcc itself says where its toolkit is."""
    fill(tmp_path / "there/targets/x86_64-linux/include", HEADERS)
    fill(tmp_path / "there/lib", LIBRARIES)
    toolkits.nvcc(tmp_path, top=tmp_path / "there/bin/..")
    fill(tmp_path / "include", ("other.h",))
    (kit,) = toolkit.toolkits()
    assert kit.missing == () and kit.headers == (tmp_path / "there/targets/x86_64-linux/include",)


def test_debians_own(tmp_path, monkeypatch):
    """Headers are where the compiler finds them by itself, so none is linked."""
    monkeypatch.setattr(toolkit, "_SYSTEM", tmp_path / "usr")
    home = tmp_path / "usr/lib/nvidia-cuda-toolkit"
    fill(tmp_path / "usr/include", (*HEADERS, "stdlib.h"))
    fill(tmp_path / "usr/lib/x86_64-linux-gnu", ("libcudart.so", *LIBRARIES))
    toolkits.nvcc(home, "11.8", top=home / "bin/..")
    monkeypatch.setenv("CUDA_HOME", str(home))
    (kit,) = toolkit.toolkits()
    assert kit.missing == ()
    folder = toolkit.assemble(kit, [(8, 6)]).parent.parent
    assert [path.name for path in (folder / "include").iterdir()] == ["npp.h"]
    assert (folder / "lib64/libcublas.so").exists()


# Where PyPI's wheels for CUDA 12 put what Jittor needs.
WHEELS_12 = {
    "cuda_runtime/include": ("cuda_runtime.h", "driver_types.h"),
    "cuda_runtime/lib": ("libcudart.so.12", "libcudadevrt.a"),
    "cuda_nvcc/include": ("crt/host_config.h",),
    "cuda_cccl/include": ("cub/cub.cuh",),
    "cublas/include": ("cublas_v2.h",),
    "cublas/lib": ("libcublas.so.12", "libcublasLt.so.12"),
    "curand/include": ("curand.h",),
    "curand/lib": ("libcurand.so.10",),
}


def test_wheels_complete_an_nvcc(tmp_path, wheels):
    for folder, names in WHEELS_12.items():
        fill(wheels / folder, names)
    nvcc = toolkits.nvcc(tmp_path)
    (kit,) = toolkit.toolkits()
    assert kit.nvcc == str(nvcc) and kit.missing == ()
    toolkits.nvcc(tmp_path, "13.0")  # which those wheels are not for
    (kit,) = toolkit.toolkits()
    assert len(kit.missing) == len(HEADERS) + len(LIBRARIES) and kit.headers == ()


def test_wheels_alone(tmp_path, wheels):
    """CUDA 13 has nvcc, too, and all in one folder, without unversioned names, CCCL's headers apart."""
    home = wheels / "cu13"
    fill(home / "include", [name for name in HEADERS if not name.startswith("cub/")])
    fill(home / "include/cccl", ("cub/cub.cuh", "nv/target"))
    fill(home / "lib", [name.replace(".so.12", ".so.13") for name in LIBRARIES])
    fill(wheels / "cublas/lib", ("libcublas.so.12",))  # of CUDA 12, installed beside
    nvcc = toolkits.nvcc(home, "13.0", "75 80 90 120", top=home / "bin/..")
    (kit,) = toolkit.toolkits()
    assert kit.nvcc == str(nvcc) and kit.missing == () and kit.libraries == (home / "lib",)
    folder = toolkit.assemble(kit, [(12, 0)]).parent.parent
    assert (folder / "lib64/libcublas.so").resolve() == home / "lib/libcublas.so.13"
    assert (folder / "lib64/libcudart.so.13").exists() and (folder / "include/cccl/nv/target").exists()


def test_the_folder(tmp_path):
    home = tmp_path / "local/cuda"
    toolkits.toolkit(home)
    fill(home / "include", ("npp.h", "cub/more/deep.cuh"))
    fill(home / "lib64", ("libcudart.so.12.4.127", "libcudart.so", "libunrelated.so", "stubs/libcuda.so"))
    (kit,) = toolkit.toolkits()
    nvcc = toolkit.assemble(kit, [(8, 6)])
    folder = nvcc.parent.parent
    assert folder.parent == tmp_path / "home/.cache/jittor/moss-jt-cuda" and folder.name.startswith("12.4-")
    assert all((folder / "include" / name).samefile(home / "include" / name) for name in (*HEADERS, "cub/more/deep.cuh"))
    assert "NPP_MAX_64U" in (folder / "include/npp.h").read_text() and (home / "include/npp.h").read_text() == "// npp.h\n"
    assert {path.name for path in (folder / "lib64").iterdir()} == {
        *LIBRARIES,
        *("libcudart.so.12.4.127", "libcudart.so", "libcublas.so", "libcublasLt.so", "libcurand.so"),
    }
    assert (folder / "include/driver_types.h").is_symlink()  # only CUDA 13's is bridged
    before = nvcc.stat().st_mtime_ns
    assert toolkit.assemble(kit, [(8, 6)]) == nvcc and nvcc.stat().st_mtime_ns == before
    assert toolkit.assemble(kit, [(9, 0)]) != nvcc  # compiles for another device
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_headers_of_one_folder_in_several_places(tmp_path, wheels):
    for folder, names in WHEELS_12.items():
        fill(wheels / folder, names)
    fill(wheels / "cuda_runtime/include", ("crt/other.h", "both.h"), "runtime")
    fill(wheels / "cublas/include", ("both.h",), "cublas")
    toolkits.nvcc(tmp_path)
    (kit,) = toolkit.toolkits()
    include = toolkit.assemble(kit, [(8, 6)]).parent.parent / "include"
    assert (include / "crt/other.h").exists() and (include / "crt/host_config.h").exists()
    assert (include / "both.h").read_text() == "cublas"  # the first by name


def test_the_nvcc_of_the_folder(tmp_path, monkeypatch):
    """It calls the real one, for the devices here whatever Jittor asks, and finds headers and libraries in the folder."""
    (tmp_path / "with space").mkdir()
    toolkits.toolkit(tmp_path / "with space/cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "with space/cuda"))
    (kit,) = toolkit.toolkits()
    nvcc = toolkit.assemble(kit, [(8, 6), (7, 5), (8, 6)])
    arguments = ["a file.cc", "-std=c++14", "-arch=compute_75", "-code=sm_75", "-code=sm_86", "-DX='a b'", "-o", "out"]
    said = subprocess.check_output([nvcc, *arguments], text=True).splitlines()
    folder = nvcc.parent.parent
    own = [f"-I{folder}/include", "-isystem", f"{folder}/include/cccl", f"-L{folder}/lib64"]
    codes = ["-gencode=arch=compute_75,code=sm_75", "-gencode=arch=compute_86,code=sm_86"]
    assert said == [*own, *codes, "a file.cc", "-std=c++14", "-DX='a b'", "-o", "out"]


def test_the_language_that_the_cub_of_cuda_13_wants(tmp_path):
    toolkits.toolkit(tmp_path / "local/cuda", "13.0")
    (kit,) = toolkit.toolkits()
    said = subprocess.check_output([toolkit.assemble(kit, [(8, 6)]), "-std=c++14", "a.cc"], text=True).splitlines()
    assert said[-2:] == ["-std=c++17", "a.cc"]


@pytest.mark.parametrize(
    ("codes", "capabilities", "options"),
    [
        ((75, 86, 90), [(8, 6)], "-gencode=arch=compute_86,code=sm_86"),
        ((75, 86, 90), [(12, 0)], "-gencode=arch=compute_90,code=compute_90"),  # the driver makes the rest
        ((75, 86, 90), [(6, 1), (9, 0)], "-gencode=arch=compute_90,code=sm_90"),
        ((75, 86, 90), [(6, 1)], ""),
        ((), [(6, 1)], "-gencode=arch=compute_61,code=sm_61"),  # it does not say
    ],
)
def test_what_is_compiled_for(codes, capabilities, options):
    assert toolkit.targets(toolkit.Toolkit("nvcc", (12, 4), codes), capabilities) == options


def test_a_cache_that_cannot_be_written(tmp_path):
    toolkits.toolkit(tmp_path / "local/cuda")
    (kit,) = toolkit.toolkits()
    (tmp_path / "home/.cache/jittor").mkdir(parents=True)
    (tmp_path / "home/.cache/jittor/moss-jt-cuda").touch()
    with pytest.raises(MossError, match=r"moss-jt-cuda/12.4-\w+: the CUDA toolkit for Jittor cannot be laid out: "):
        toolkit.assemble(kit, [(8, 6)])


def test_the_real_search_for_wheels(tmp_path):
    """In a process that has such a package."""
    (tmp_path / "nvidia/cublas").mkdir(parents=True)
    code = "from moss_jt import toolkit; print(*toolkit._wheels(), sep='\\n')"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    said = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    assert str(tmp_path / "nvidia") in said.splitlines()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_the_headers_that_stand_in(tmp_path):
    """What Jittor asks of CUDA 13 and of its image library, which is not here, in the language standard that it uses."""
    toolkits.toolkit(tmp_path / "local/cuda", "13.0", codes="75 120")
    fill(tmp_path / "local/cuda/include", ("cuda_runtime.h",), '#include "driver_types.h"\n')
    fill(tmp_path / "local/cuda/include", ("driver_types.h",), "struct cudaDeviceProp { int major, tccDriver; };\n")
    (kit,) = toolkit.toolkits()
    include = toolkit.assemble(kit, [(7, 5)]).parent.parent / "include"
    (tmp_path / "a.cc").write_text(
        "#include <cuda_runtime.h>\n#include <driver_types.h>\n#include <npp.h>\nstruct CUdevprop { int clockRate; };\n"
        'static_assert(NPP_MIN_32S < 0 && NPP_MAX_32S > 0 && NPP_MIN_32U == 0 && NPP_MAX_32U == 0xffffffffu, "");\n'
        'static_assert(NPP_MIN_64S < NPP_MIN_32S && NPP_MAX_64U / 2 == NPP_MAX_64S && NPP_MIN_64U == 0, "");\n'
        "int main() { cudaDeviceProp p{7, 0}; return p.computeMode == 2 ? 1 : p.clockRate * p.major; }\n"
    )
    command = ["g++", "-std=c++14", "-Wall", "-Werror", f"-I{include}", str(tmp_path / "a.cc"), "-o", str(tmp_path / "a")]
    subprocess.run(command, check=True)
    assert subprocess.run([str(tmp_path / "a")]).returncode == 0
