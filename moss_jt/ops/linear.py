"""The products over a block's weights and lm_head's, each with all that happens to its result.

Weights (N outputs, K inputs) come as ``Weight``: halves, or whole numbers of 8 or 4 bits with a scale and a zero for each
group of 128 inputs (docs/formats.md). All else is float32, sums too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .kernel import check, run

GROUP = 128  # inputs that share a scale and a zero


class Weight(NamedTuple):
    """A matrix as it is stored: bits 16 and ``q`` float16 (N, K), or bits 8 or 4, ``q`` uint8 (N, K·bits/8), ``scale``
    float16 (N, G) and ``zero`` uint8 (N, G), G = K / 128 rounded up."""

    bits: int
    q: Any
    scale: Any = None
    zero: Any = None

    @classmethod
    def of(cls, tensors: dict, name: str, bits: int) -> Weight:
        """From a file's tensors: NAME itself, or NAME.q, NAME.scale and NAME.zero."""
        if bits == 16:
            return cls(bits, tensors[name])
        return cls(bits, *(tensors[f"{name}.{part}"] for part in ("q", "scale", "zero")))

    @property
    def parts(self) -> list:
        return [self.q] if self.bits == 16 else [self.q, self.scale, self.zero]

    def expected(self, n: int, k: int) -> dict[str, tuple]:
        if self.bits == 16:
            return {"weight": ("float16", (n, k))}
        groups = -(-k // GROUP)
        return {
            "weight": ("uint8", (n, groups * GROUP * self.bits // 8)),
            "scale": ("float16", (n, groups)),
            "zero": ("uint8", (n, groups)),
        }

    def code(self, first: int, k: str) -> str:
        """C++ for the kernels' object over these parts, which are the op's inputs from number ``first`` on."""
        if self.bits == 16:
            return f"moss::WeightsF16{{(const moss::f16*)in{first}_p, {k}}}"
        return f"moss::WeightsGrouped<{self.bits}>{{in{first}_p, (const moss::f16*)in{first + 1}_p, in{first + 2}_p, {k}}}"


def linear_in(x, weight: Weight, bias):
    """[q k v gelu_new(fc_in)] of the normed state: x weightᵀ, bias and gelu_new on the last I outputs.

    x (T, D), weight (3·D + I, D), bias (I,). Returns (T, 3·D + I).
    """
    (tokens, d), (inner,) = x.shape, bias.shape
    n = 3 * d + inner
    _check("linear_in", weight, n, d, x=(x, tokens, d), bias=(bias, inner))
    call = f"moss::linear_in(in0_p, {weight.code(2, 'in0_shape1')}, in1_p, out_p, in0_shape0, in2_shape0, in1_shape0);"
    return run("linear.h", (tokens, n), [x, bias, *weight.parts], call)


def linear_out(attention, mlp, weight: Weight, bias, residual):
    """residual + [attention, mlp's last I columns] weightᵀ + bias: a block's new state.

    attention (T, D), mlp (T, 3·D + I) as linear_in returned it, weight (D, D + I), bias (D,), residual (T, D).
    Returns (T, D).
    """
    (tokens, d), width = residual.shape, mlp.shape[1]
    k = width - 2 * d
    vectors = {"attention": (attention, tokens, d), "mlp": (mlp, tokens, width), "bias": (bias, d)}
    _check("linear_out", weight, d, k, residual=(residual, tokens, d), **vectors)
    call = f"""moss::linear_out(in0_p, in1_p, {weight.code(4, "in1_shape1 - 2 * in0_shape1")}, in2_p, in3_p, out_p,
                               in0_shape0, in4_shape0, in0_shape1, in1_shape1);"""
    return run("linear.h", (tokens, d), [attention, mlp, bias, residual, *weight.parts], call)


def linear_head(x, weight: Weight, bias):
    """x weightᵀ + bias: logits. x (T, D), weight (V, D), bias (V,). Returns (T, V)."""
    (tokens, d), (v,) = x.shape, bias.shape
    _check("linear_head", weight, v, d, x=(x, tokens, d), bias=(bias, v))
    call = f"moss::linear_head(in0_p, {weight.code(2, 'in0_shape1')}, in1_p, out_p, in0_shape0, in2_shape0);"
    return run("linear.h", (tokens, v), [x, bias, *weight.parts], call)


def _check(op: str, weight: Weight, n: int, k: int, **floats: tuple) -> None:
    expected = {name: ("float32", shape) for name, (_, *shape) in floats.items()}
    given = dict(zip(weight.expected(n, k), weight.parts))
    check(op, {**expected, **weight.expected(n, k)}, **given, **{name: var for name, (var, *_) in floats.items()})
