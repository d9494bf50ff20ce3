"""Which files a converted checkpoint has, and what each holds, in order. docs/formats.md is the specification."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Config
from ..errors import MossError

FORMAT = 3
METADATA = {"format": f"moss-jt {FORMAT}"}  # in the header of every file
ALIGN = 4096  # bytes; where the data region of every file starts: a page, and a unit of O_DIRECT
BITS = {"fp16": 16, "int8": 8, "int4": 4}  # of a weight, by the name of a checkpoint's dtype
GROUP = 128  # inputs that share a scale and a zero in int8 and int4, unless a checkpoint says otherwise
PANEL = 16  # rows of an int8 or int4 matrix that lie together
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


@dataclass(frozen=True)
class Coding:
    """How a checkpoint's large matrices are stored: the blocks' in ``dtype`` (fp16, int8 or int4), lm_head in ``head_dtype``.

    ``group``: inputs of a block's matrix that share a scale, a multiple of 8, at most 128. ``ordered``: inputs are not in order
    there (act-order); a tensor beside each matrix says where each one comes from.
    """

    dtype: str = "fp16"
    head_dtype: str = "fp16"
    group: int = GROUP
    ordered: bool = False

    def __post_init__(self) -> None:
        for dtype in (self.dtype, self.head_dtype):
            if dtype not in BITS:
                raise MossError(f"dtype {dtype!r} is unknown; choose one of {', '.join(BITS)}")
        if type(self.group) is not int or self.group % 8 or not 8 <= self.group <= GROUP or type(self.ordered) is not bool:
            raise MossError(f"group_size is {self.group!r}, it must be a multiple of 8, at most {GROUP}")

    @classmethod
    def from_dict(cls, raw: dict) -> Coding:
        """From the ``moss_jt`` key of a config.json. Raises MossError for what this version does not know."""
        dtype = raw.get("dtype")
        return cls(dtype, raw.get("head_dtype", dtype), raw.get("group_size", GROUP), raw.get("act_order", False))

    def to_dict(self) -> dict:
        """For the ``moss_jt`` key: what is as usual is left out."""
        found = {"dtype": self.dtype}
        if self.head_dtype != self.dtype:
            found["head_dtype"] = self.head_dtype
        if self.group != GROUP:
            found["group_size"] = self.group
        return {**found, "act_order": True} if self.ordered else found

    @property
    def is_fp16(self) -> bool:
        return self.dtype == self.head_dtype == "fp16"

    def __str__(self) -> str:
        return self.dtype if self.head_dtype == self.dtype else f"{self.dtype}, lm_head in {self.head_dtype}"


PLAIN = Coding()


def block_file(i: int) -> str:
    return f"block-{i:02d}.safetensors"


WTE_FILE = "wte.safetensors"
HEAD_FILE = "head.safetensors"


def matrix(name: str, n: int, k: int, dtype: str, group: int = GROUP, orders: int = 0) -> list[Tensor]:
    """How a matrix of N outputs x K inputs is stored: itself in fp16; else in panels of 16 rows, as numbers, scales and zeros
    of groups of inputs, and ``orders`` lists of which input is where."""
    if dtype == "fp16":
        return [Tensor(name, "F16", (n, k))]
    panels, groups, chunks = -(-n // PANEL), -(-k // group), group * BITS[dtype] // 32
    return [
        Tensor(f"{name}.q", "U8", (panels, groups, chunks, 4 * PANEL)),
        Tensor(f"{name}.scale", "F16", (panels, groups, PANEL)),
        Tensor(f"{name}.zero", "U8", (panels, groups, PANEL)),
        *([Tensor(f"{name}.order", "I32", (orders, k))] if orders else []),
    ]


def block_tensors(config: Config, coding: Coding) -> list[Tensor]:
    """A block's tensors in the order in which it reads them. N outputs x K inputs."""
    d, inner, (dtype, group, ordered) = config.n_embd, config.n_inner, (coding.dtype, coding.group, coding.ordered)
    return [
        Tensor("ln_1.weight", "F32", (d,)),
        Tensor("ln_1.bias", "F32", (d,)),
        *matrix("in.weight", 3 * d + inner, d, dtype, group, 2 * ordered),  # rows: q, k, v (each head by head), fc_in
        Tensor("in.bias", "F32", (inner,)),  # fc_in's; q, k and v have none
        *matrix("out.weight", d, d + inner, dtype, group, 1 * ordered),  # columns: out_proj, fc_out
        Tensor("out.bias", "F32", (d,)),  # fc_out's; out_proj has none
    ]


def wte_tensors(config: Config) -> list[Tensor]:
    return [Tensor("wte.weight", "F16", (config.vocab_size, config.n_embd))]


def head_tensors(config: Config, coding: Coding) -> list[Tensor]:
    d, v = config.n_embd, config.vocab_size
    return [
        Tensor("ln_f.weight", "F32", (d,)),
        Tensor("ln_f.bias", "F32", (d,)),
        *matrix("lm_head.weight", v, d, coding.head_dtype),
        Tensor("lm_head.bias", "F32", (v,)),
    ]


def files_of(config: Config, coding: Coding = PLAIN) -> dict[str, list[Tensor]]:
    """Every weights file of a checkpoint -> its tensors in stored order; in the order in which a token meets them."""
    files = {WTE_FILE: wte_tensors(config)}
    for i in range(config.n_layer):
        files[block_file(i)] = block_tensors(config, coding)
    files[HEAD_FILE] = head_tensors(config, coding)
    return files
