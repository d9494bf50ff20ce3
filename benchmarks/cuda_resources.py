"""What the compiler gives each CUDA kernel: registers, spilled bytes, shared memory, by architecture. Needs nvcc, and no GPU.

    python benchmarks/cuda_resources.py                       # every header of kernels_cuda/, every architecture nvcc knows
    python benchmarks/cuda_resources.py norm.cuh --arch 80

Prints a table and writes benchmarks/results/DATE-cuda-resources.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
KERNELS = Path(find_spec("moss_jt.kernels_cuda").origin).parent
ARCHITECTURES = (60, 61, 70, 75, 80, 86, 89, 90)
# As Jittor calls it.
FLAGS = ["-std=c++14", "--use_fast_math", "-Werror=all-warnings"]


def headers() -> list[str]:
    return sorted(path.name for path in KERNELS.glob("*.cuh"))


def architectures(nvcc: str) -> list[int]:
    """Those of ``ARCHITECTURES`` that this nvcc knows: 75 for sm_75."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in ARCHITECTURES if f"sm_{arch}" in known]


def resources(nvcc: str, names: list[str], archs: list[int]) -> list[dict]:
    """Compile headers; one entry for each kernel and architecture: ``kernel``, ``arch``, ``registers``, ``spilled_bytes``,
    ``stack_bytes``, ``shared_bytes`` (of arrays of fixed size). Raises RuntimeError with what nvcc says."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with tempfile.TemporaryDirectory() as where:
        source = Path(where, "kernels.cu")
        source.write_text("".join(f'#include "{name}"\n' for name in names))
        command = [
            nvcc,
            *FLAGS,
            *targets,
            "--threads=0",
            "-Xptxas=-v",
            f"-I{KERNELS}",
            "-c",
            str(source),
            "-o",
            f"{where}/kernels.o",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return parsed(done.stderr)


def parsed(said: str) -> list[dict]:
    """What ptxas -v says, for each kernel."""
    found = []
    for part in said.split("Compiling entry function '")[1:]:

        def number(pattern: str, part: str = part) -> int:
            match = re.search(pattern, part)
            return int(match[1]) if match else 0

        found.append(
            {
                "kernel": part.partition("'")[0],
                "arch": number(r"for 'sm_(\d+)"),
                "registers": number(r"Used (\d+) registers"),
                "spilled_bytes": number(r"(\d+) bytes spill stores"),
                "stack_bytes": number(r"(\d+) bytes stack frame"),
                "shared_bytes": number(r"(\d+) bytes smem"),
            }
        )
    names = demangled([entry["kernel"] for entry in found])
    return sorted(({**entry, "kernel": name} for entry, name in zip(found, names)), key=lambda e: (e["kernel"], e["arch"]))


def demangled(names: list[str]) -> list[str]:
    """``top_kernel<float>`` for ``_ZN9moss_cuda10top_kernelIfEE…``, where binutils are installed."""
    if not names or not shutil.which("c++filt"):
        return names
    whole = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^void |\(.*$|moss_cuda::|\((?:int|bool|unsigned int)\)", "", name) for name in whole]


def table(found: list[dict]) -> Table:
    archs = sorted({entry["arch"] for entry in found})
    shown = Table(box=box.SIMPLE_HEAD, title="registers + spilled bytes / shared bytes")
    shown.add_column("kernel")
    for arch in archs:
        shown.add_column(f"sm_{arch}", justify="right")
    by_kernel: dict[str, dict[int, dict]] = {}
    for entry in found:
        by_kernel.setdefault(entry["kernel"], {})[entry["arch"]] = entry
    for kernel, of_arch in by_kernel.items():
        shown.add_row(kernel, *(cell(of_arch[arch]) if arch in of_arch else "–" for arch in archs))
    return shown


def cell(entry: dict) -> str:
    spilled = f" + {entry['spilled_bytes']}" if entry["spilled_bytes"] else ""
    return f"{entry['registers']}{spilled} / {entry['shared_bytes']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("headers", nargs="*", help="of kernels_cuda/; all by default")
    parser.add_argument("--arch", type=int, nargs="+", help="75 for sm_75; all that nvcc knows by default")
    parser.add_argument("--nvcc", default="nvcc")
    args = parser.parse_args()
    if not shutil.which(args.nvcc):
        sys.exit(f"cuda_resources: there is no {args.nvcc}")
    try:
        found = resources(args.nvcc, args.headers or headers(), args.arch or architectures(args.nvcc))
    except RuntimeError as e:
        sys.exit(f"cuda_resources: nvcc failed:\n{e}")
    Console(width=max(80, shutil.get_terminal_size().columns)).print(table(found))
    version = subprocess.run([args.nvcc, "--version"], capture_output=True, text=True).stdout.splitlines()[-1]
    path = HERE / "results" / f"{time.strftime('%Y-%m-%d')}-cuda-resources.json"
    path.write_text(json.dumps({"nvcc": version, "kernels": found}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
