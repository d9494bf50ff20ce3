"""What every op shares: finding the kernels' headers and calling them through ``jt.code``."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ..runtime import jittor


@cache
def header(name: str, folder: str = "kernels_cpu") -> str:
    """The text that includes a file of kernels_cpu/ or kernels_cuda/. In angle brackets, because Jittor looks for quoted files
    in its own folders only; with a digest of all of the folder's, because it compiles an op again when this text changes."""
    place = Path(find_spec(f"moss_jt.{folder}").origin).parent
    digest = hashlib.sha256()
    for path in sorted([*place.glob("*.h"), *place.glob("*.cuh")]):
        digest.update(path.read_bytes())
    return f"#include <{place / name}>\n// {digest.hexdigest()}"


def run(kernels: str, shape: tuple[int, ...], inputs: list, call: str, cuda: tuple[str, str] | None = None, **data: float):
    """A float32 Var of the given shape, filled by ``call``: a C++ statement that may use what kernels_cpu/KERNELS declares.

    It finds the result at ``out_p``, the inputs at ``in0_p``, ``in1_p``, …, and ``data`` (numbers) at ``data["name"]``.
    cuda: the same for a device, a file of kernels_cuda/ and a statement; its pointers are the device's, and it launches on
    stream 0. It is what runs wherever Jittor's use_cuda is on, and then the inputs move to the device (docs/cuda.md).
    """
    device = {"cuda_header": header(cuda[0], "kernels_cuda"), "cuda_src": cuda[1]} if cuda else {}
    return jittor().code(shape, "float32", inputs, cpu_header=header(kernels), cpu_src=call, data=data, **device)


def check(name: str, expected: dict[str, tuple], **given) -> None:
    """Compare Vars with (dtype, shape). Raises ValueError naming the op, the argument and both shapes."""
    for argument, (dtype, shape) in expected.items():
        var = given[argument]
        if str(var.dtype) != dtype or tuple(var.shape) != tuple(shape):
            raise ValueError(f"{name}: {argument} is {var.dtype} {list(var.shape)}, expected {dtype} {list(shape)}")
