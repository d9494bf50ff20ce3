"""Which files a converted checkpoint has, and what each holds, in order. docs/formats.md is the specification."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Config

FORMAT = 1
METADATA = {"format": f"moss-jt {FORMAT}"}  # in the header of every file
ALIGN = 4096  # bytes; where the data region of every file starts: a page, and a unit of O_DIRECT
BITS = {"fp16": 16, "int8": 8, "int4": 4}  # of a weight, by the name of a checkpoint's dtype
GROUP = 128  # inputs that share a scale and a zero in int8 and int4
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def block_file(i: int) -> str:
    return f"block-{i:02d}.safetensors"


WTE_FILE = "wte.safetensors"
HEAD_FILE = "head.safetensors"


def matrix(name: str, n: int, k: int, dtype: str) -> list[Tensor]:
    """How a matrix of N outputs x K inputs is stored: itself in fp16; else numbers, scales and zeros of groups of inputs."""
    if dtype == "fp16":
        return [Tensor(name, "F16", (n, k))]
    groups = -(-k // GROUP)
    return [
        Tensor(f"{name}.q", "U8", (n, groups * GROUP * BITS[dtype] // 8)),
        Tensor(f"{name}.scale", "F16", (n, groups)),
        Tensor(f"{name}.zero", "U8", (n, groups)),
    ]


def block_tensors(config: Config, dtype: str) -> list[Tensor]:
    """A block's tensors in the order in which it reads them. N outputs x K inputs, rows contiguous."""
    d, inner = config.n_embd, config.n_inner
    return [
        Tensor("ln_1.weight", "F32", (d,)),
        Tensor("ln_1.bias", "F32", (d,)),
        *matrix("in.weight", 3 * d + inner, d, dtype),  # rows: q, k, v (each head by head), fc_in
        Tensor("in.bias", "F32", (inner,)),  # fc_in's; q, k and v have none
        *matrix("out.weight", d, d + inner, dtype),  # columns: out_proj, fc_out
        Tensor("out.bias", "F32", (d,)),  # fc_out's; out_proj has none
    ]


def wte_tensors(config: Config) -> list[Tensor]:
    return [Tensor("wte.weight", "F16", (config.vocab_size, config.n_embd))]


def head_tensors(config: Config, dtype: str) -> list[Tensor]:
    d, v = config.n_embd, config.vocab_size
    return [
        Tensor("ln_f.weight", "F32", (d,)),
        Tensor("ln_f.bias", "F32", (d,)),
        *matrix("lm_head.weight", v, d, dtype),
        Tensor("lm_head.bias", "F32", (v,)),
    ]


def files_of(config: Config, dtype: str = "fp16", head_dtype: str = "fp16") -> dict[str, list[Tensor]]:
    """Every weights file of a checkpoint -> its tensors in stored order; in the order in which a token meets them."""
    files = {WTE_FILE: wte_tensors(config)}
    for i in range(config.n_layer):
        files[block_file(i)] = block_tensors(config, dtype)
    files[HEAD_FILE] = head_tensors(config, head_dtype)
    return files
