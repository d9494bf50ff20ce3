"""CUDA toolkits without CUDA: folders of tiny files, with an nvcc that answers what is asked about it."""

from __future__ import annotations

from pathlib import Path

HEADERS = ("cuda_runtime.h", "driver_types.h", "crt/host_config.h", "cub/cub.cuh", "cublas_v2.h", "curand.h")
LIBRARIES = ("libcudart.so.12", "libcudadevrt.a", "libcublas.so.12", "libcublasLt.so.12", "libcurand.so.10")


def fill(folder: Path, names: tuple[str, ...], text: str = "") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or ("#if __GNUC__ > 99\n" if name.endswith("host_config.h") else f"// {name}\n"))


def nvcc(home: Path, release: str = "12.4", codes: str = "60 75 86 89 90", top: Path | None = None) -> Path:
    """An nvcc in home/bin that says it is of ``top``, or says nothing of where it looks. It prints any other arguments."""
    path = home / "bin/nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    said = f'echo "#\\$ TOP={top}"; echo "#\\$ INCLUDES=\\"-I{top}/targets/x86_64-linux/include\\""' if top else "exit 1"
    path.write_text(
        f"""#!/bin/sh
case $1 in
--version) echo 'Cuda compilation tools, release {release}, V{release}.48' ;;
--list-gpu-code) for code in {codes}; do echo sm_$code; done ;;
--dryrun) {said} ;;
*) for argument do echo "$argument"; done ;;
esac
"""
    )
    path.chmod(0o755)
    return path


def toolkit(home: Path, release: str = "12.4", **of_nvcc) -> Path:
    """A whole toolkit, as NVIDIA's installer lays one out; returns its nvcc."""
    fill(home / "include", HEADERS)
    fill(home / "lib64", LIBRARIES)
    return nvcc(home, release, **of_nvcc)
