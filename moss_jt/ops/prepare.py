"""Compiling all ops before the first answer needs them."""

from __future__ import annotations

import numpy as np

from ..runtime import compiling, float_environment_kept, jittor
from .attention import attention, rotary_angles
from .kernel import header
from .layer_norm import layer_norm
from .linear import Weight, linear_head, linear_in, linear_out


def prepare(bits: int, head_bits: int) -> None:
    """Run every op once, on a model of a few bytes with blocks of ``bits`` and an lm_head of ``head_bits`` bits a weight.

    The first time on a machine this compiles, for seconds, and says so. Raises MossError where a kernel does not compile.
    """
    jt = jittor()
    sources = [header(name) for name in ("layer_norm.h", "linear.h", "attention.h")]
    # Lazily, so that Jittor sees all ops at once and compiles them side by side.
    lazily = jt.flag_scope(lazy_execution=1, use_parallel_op_compiler=8, no_grad=1)
    with float_environment_kept(), compiling(*sources, f"{bits} {head_bits}"), lazily:
        d, inner, heads = 8, 8, 4
        x, cache = _zeros(1, d), [_zeros(1, heads, 1, d // heads, dtype="float16") for _ in range(2)]
        y = linear_in(layer_norm(x, _zeros(d), _zeros(d), 1e-5), _weight(bits, 3 * d + inner, d), _zeros(inner))
        a = attention(y, jt.array(rotary_angles(1, 2)), *cache, np.array([[0, 0, 0, 1]], np.int32))
        x = linear_out(a, y, _weight(bits, d, d + inner), _zeros(d), x)
        linear_head(x, _weight(head_bits, 1, d), _zeros(1)).sync()


def _zeros(*shape: int, dtype: str = "float32"):
    return jittor().array(np.zeros(shape, dtype))


def _weight(bits: int, n: int, k: int) -> Weight:
    shapes = Weight(bits, None).expected(n, k).values()
    return Weight(bits, *(_zeros(*shape, dtype=dtype) for dtype, shape in shapes))
