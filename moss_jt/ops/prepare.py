"""Compiling all ops before the first answer needs them."""

from __future__ import annotations

import numpy as np

from ..runtime import compiling, jittor
from .attention import attention, rotary_angles
from .kernel import header
from .layer_norm import layer_norm
from .linear import linear_head, linear_in, linear_out


def prepare() -> None:
    """Run every op once, on a model of a few bytes. The first time on a machine this compiles, for seconds, and says so.

    Raises MossError where a kernel does not compile.
    """
    jt = jittor()
    sources = [header(name) for name in ("layer_norm.h", "linear.h", "attention.h")]
    # Lazily, so that Jittor sees all ops at once and compiles them side by side.
    with compiling(*sources), jt.flag_scope(lazy_execution=1, use_parallel_op_compiler=8, no_grad=1):
        d, inner, heads = 8, 8, 4

        def zeros(*shape, dtype=np.float32):
            return jt.array(np.zeros(shape, dtype))

        x, half = zeros(1, d), np.float16
        cache = [zeros(heads, 1, d // heads, dtype=half) for _ in range(2)]
        y = linear_in(layer_norm(x, zeros(d), zeros(d), 1e-5), zeros(3 * d + inner, d, dtype=half), zeros(inner))
        a = attention(y, jt.array(rotary_angles(1, 2)), *cache, 0)
        x = linear_out(a, y, zeros(d, d + inner, dtype=half), zeros(d), x)
        linear_head(x, zeros(1, d, dtype=half), zeros(1)).sync()
