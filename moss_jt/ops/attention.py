"""Causal attention over a preallocated cache; rotary and the append to the cache are part of it."""

from __future__ import annotations

import numpy as np

from .kernel import check, run


def attention(qkv, angles, keys, values, start: int):
    """Attention of T new tokens over the ``start`` tokens cached before them and over themselves.

    qkv (T, ≥ 3·D): columns q, k, v come first, head by head. angles (2, C, rotary/2) from ``rotary_angles``.
    keys, values (H, C, S) float16: **written in place** at positions start … start + T - 1, k after rotary.
    Returns float32 (T, D), D = H·S. Raises ValueError where the tokens do not fit the cache's C positions.
    """
    (tokens, width), (heads, capacity, size), (_, _, pairs) = qkv.shape, keys.shape, angles.shape
    expected = {
        "qkv": ("float32", (tokens, max(width, 3 * heads * size))),
        "angles": ("float32", (2, capacity, pairs)),
        "keys": ("float16", (heads, capacity, size)),
        "values": ("float16", (heads, capacity, size)),
    }
    check("attention", expected, qkv=qkv, angles=angles, keys=keys, values=values)
    if start < 0 or start + tokens > capacity:
        raise ValueError(f"attention: {tokens} tokens after {start} do not fit a cache of {capacity}")
    call = """moss::attention(in0_p, in0_shape1, in1_p, (moss::f16*)in2_p, (moss::f16*)in3_p, out_p,
                              moss::Heads{in2_shape0, in2_shape2, 2 * in1_shape2, in2_shape1},
                              (int64_t)data["start"], in0_shape0);"""
    return run("attention.h", (tokens, heads * size), [qkv, angles, keys, values], call, start=start)


def rotary_angles(capacity: int, rotary_dim: int) -> np.ndarray:
    """cos, then sin, of position · 10000^(-2i / rotary_dim), in float32 (2, capacity, rotary_dim / 2).

    Pair i of a head is its entries 2i and 2i + 1 (Su et al., RoFormer, 2021, as in GPT-J).
    """
    angle = np.arange(capacity)[:, None] * 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)
