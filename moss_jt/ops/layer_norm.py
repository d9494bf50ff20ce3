"""Layer norm over the last axis."""

from __future__ import annotations

from .kernel import check, run


def layer_norm(x, weight, bias, eps: float):
    """(x - mean) / sqrt(var + eps) * weight + bias for each row.

    x (T, D), weight (D,), bias (D,), all float32. Returns float32 (T, D).
    """
    tokens, d = x.shape
    f32 = "float32"
    check("layer_norm", {"x": (f32, (tokens, d)), "weight": (f32, (d,)), "bias": (f32, (d,))}, x=x, weight=weight, bias=bias)
    call = 'moss::layer_norm(in0_p, in1_p, in2_p, out_p, in0_shape0, in0_shape1, (float)data["eps"]);'
    return run("layer_norm.h", (tokens, d), [x, weight, bias], call, eps=eps)
