"""Compiling all ops before the first answer needs them."""

from __future__ import annotations

import numpy as np

from ..config import Config
from ..runtime import compiling, float_environment_kept, jittor
from ..weights.layout import BITS, Coding, block_tensors, head_tensors
from .block import Block, LowRank, sequences
from .head import Head
from .kernel import header
from .rotary import rotary_angles

_DTYPES = {"F32": "float32", "F16": "float16", "U8": "uint8", "I32": "int32"}


def prepare(coding: Coding, kv_cache: str = "fp16", low_rank: tuple[bool, ...] = (False, False)) -> None:
    """Run every op once, on a model of a few bytes whose weights and cache are stored alike. ``low_rank``: whether each of
    a block's matrices has a low-rank term.

    The first time on a machine this compiles, for seconds, and says so. Raises MossError where a kernel does not compile.
    """
    jt = jittor()
    # Lazily, so that Jittor sees all ops at once and compiles them side by side.
    lazily = jt.flag_scope(lazy_execution=1, use_parallel_op_compiler=8, no_grad=1)
    with float_environment_kept(), compiling(header("block.h"), str(coding.to_dict()), kv_cache, str(low_rank)), lazily:
        config = Config(n_layer=1, n_embd=16, n_head=4, n_inner=8, rotary_dim=2, n_ctx=1, vocab_size=1)
        block = Block(_tensors(block_tensors(config, coding)), BITS[coding.dtype], 1e-5)
        head = Head(_tensors(head_tensors(config, coding)), BITS[coding.head_dtype], 1e-5)
        cache = [_zeros((1, 4, 1, 4), "int8" if kv_cache == "int8" else "float16") for _ in range(2)]
        if kv_cache == "int8":
            cache += [_zeros((1, 4, 1), "float32") for _ in range(2)]
        rows = sequences(np.array([[0, 0, 0, 1]], np.int32), 1, 1, 1)
        more = LowRank(*(_low_rank(*shape) if has else () for has, shape in zip(low_rank, ((56, 16), (16, 24)))))
        head(block(_zeros((1, 16), "float32"), jt.array(rotary_angles(1, 2)), cache, rows, more)).sync()


def _tensors(tensors: list) -> dict:
    return {t.name: _zeros(t.shape, _DTYPES[t.dtype]) for t in tensors}


def _low_rank(n: int, k: int) -> tuple:
    return _zeros((1, k), "float32"), _zeros((n, 1), "float32")


def _zeros(shape: tuple[int, ...], dtype: str):
    return jittor().array(np.zeros(shape, dtype))
