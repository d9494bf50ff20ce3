"""The products over a block's weights and lm_head's, each with all that happens to its result.

Weights are fp16 (N outputs, K inputs), everything else float32, sums are float32.
"""

from __future__ import annotations

from .kernel import check, run


def linear_in(x, weight, bias):
    """[q k v gelu_new(fc_in)] of the normed state: x weightᵀ, bias and gelu_new on the last I outputs.

    x (T, D), weight (3·D + I, D) float16, bias (I,). Returns (T, 3·D + I).
    """
    (tokens, d), (inner,) = x.shape, bias.shape
    n = 3 * d + inner
    expected = {"x": ("float32", (tokens, d)), "weight": ("float16", (n, d)), "bias": ("float32", (inner,))}
    check("linear_in", expected, x=x, weight=weight, bias=bias)
    call = """moss::linear_in(in0_p, (const moss::f16*)in1_p, in2_p, out_p, in0_shape0, in1_shape0, in1_shape1, in2_shape0);"""
    return run("linear.h", (tokens, n), [x, weight, bias], call)


def linear_out(attention, mlp, weight, bias, residual):
    """residual + [attention, mlp's last I columns] weightᵀ + bias: a block's new state.

    attention (T, D), mlp (T, 3·D + I) as linear_in returned it, weight (D, D + I) float16, bias (D,), residual (T, D).
    Returns (T, D).
    """
    (tokens, d), k = residual.shape, weight.shape[1]
    f32 = "float32"
    expected = {
        "attention": (f32, (tokens, d)),
        "mlp": (f32, (tokens, 2 * d + k)),
        "weight": ("float16", (d, k)),
        "bias": (f32, (d,)),
        "residual": (f32, (tokens, d)),
    }
    check("linear_out", expected, attention=attention, mlp=mlp, weight=weight, bias=bias, residual=residual)
    call = """moss::linear_out(in0_p, in1_p, (const moss::f16*)in2_p, in3_p, in4_p, out_p,
                               in0_shape0, in2_shape0, in0_shape1, in2_shape1 - in0_shape1, in1_shape1);"""
    return run("linear.h", (tokens, d), [attention, mlp, weight, bias, residual], call)


def linear_head(x, weight, bias):
    """x weightᵀ + bias: logits. x (T, D), weight (V, D) float16, bias (V,). Returns (T, V)."""
    (tokens, d), (v,) = x.shape, bias.shape
    expected = {"x": ("float32", (tokens, d)), "weight": ("float16", (v, d)), "bias": ("float32", (v,))}
    check("linear_head", expected, x=x, weight=weight, bias=bias)
    call = "moss::linear_head(in0_p, (const moss::f16*)in1_p, in2_p, out_p, in0_shape0, in1_shape0, in1_shape1);"
    return run("linear.h", (tokens, v), [x, weight, bias], call)
