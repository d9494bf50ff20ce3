"""What every op shares: finding the kernels' headers and calling them through ``jt.code``."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ..runtime import jittor


@cache
def header(name: str) -> str:
    """The text that includes kernels_cpu/NAME. In angle brackets, because Jittor looks for quoted files in its own
    folders only; with a digest of all kernels, because it compiles an op again when this text changes."""
    folder = Path(find_spec("moss_jt.kernels_cpu").origin).parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.h")):
        digest.update(path.read_bytes())
    return f"#include <{folder / name}>\n// {digest.hexdigest()}"


def run(kernels: str, shape: tuple[int, ...], inputs: list, call: str, **data: float):
    """A float32 Var of the given shape, filled by ``call``: a C++ statement that may use what kernels_cpu/KERNELS declares.

    It finds the result at ``out_p``, the inputs at ``in0_p``, ``in1_p``, …, and ``data`` (numbers) at ``data["name"]``.
    """
    return jittor().code(shape, "float32", inputs, cpu_header=header(kernels), cpu_src=call, data=data)


def check(name: str, expected: dict[str, tuple], **given) -> None:
    """Compare Vars with (dtype, shape). Raises ValueError naming the op, the argument and both shapes."""
    for argument, (dtype, shape) in expected.items():
        var = given[argument]
        if str(var.dtype) != dtype or tuple(var.shape) != tuple(shape):
            raise ValueError(f"{name}: {argument} is {var.dtype} {list(var.shape)}, expected {dtype} {list(shape)}")
