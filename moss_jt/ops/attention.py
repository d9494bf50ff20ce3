"""Causal attention over preallocated caches; rotary and the append to the caches are part of it."""

from __future__ import annotations

import numpy as np

from ..runtime import jittor
from .kernel import check, run


def attention(qkv, angles, keys, values, sequences: np.ndarray):
    """Attention of T new tokens, of one or several sequences, over the tokens cached before them and over themselves.

    qkv (T, ≥ 3·D): columns q, k, v come first, head by head. angles (2, C, rotary/2) from ``rotary_angles``.
    keys, values (B, H, C, S) float16: the caches of B sequences; **written in place**, k after rotary.
    sequences: int32 (n, 4), a row each: its place in the caches, the tokens it has there, its first row in qkv, and how many.
    Returns float32 (T, D), D = H·S. Raises ValueError where tokens lie outside of qkv or do not fit the caches' C positions.
    """
    (tokens, width), (places, heads, capacity, size), (_, _, pairs) = qkv.shape, keys.shape, angles.shape
    expected = {
        "qkv": ("float32", (tokens, max(width, 3 * heads * size))),
        "angles": ("float32", (2, capacity, pairs)),
        "keys": ("float16", (places, heads, capacity, size)),
        "values": ("float16", (places, heads, capacity, size)),
    }
    check("attention", expected, qkv=qkv, angles=angles, keys=keys, values=values)
    place, start, first, count = np.asarray(sequences, np.int32).T
    if min(sequences.min(), count.min() - 1) < 0 or place.max() >= places or (first + count).max() > tokens:
        raise ValueError(f"attention: {sequences.tolist()} does not describe rows of {tokens} and {places} caches")
    if (start + count).max() > capacity:
        raise ValueError(f"attention: {(start + count).max()} tokens do not fit a cache of {capacity}")
    call = """moss::attention(in0_p, in0_shape1, in1_p, (moss::f16*)in2_p, (moss::f16*)in3_p, out_p,
                              moss::Heads{in2_shape1, in2_shape3, 2 * in1_shape2, in2_shape2},
                              (const moss::Sequence*)in4_p, in4_shape0);"""
    inputs = [qkv, angles, keys, values, jittor().array(np.ascontiguousarray(sequences, np.int32))]
    return run("attention.h", (tokens, heads * size), inputs, call)


def rotary_angles(capacity: int, rotary_dim: int) -> np.ndarray:
    """cos, then sin, of position · 10000^(-2i / rotary_dim), in float32 (2, capacity, rotary_dim / 2).

    Pair i of a head is its entries 2i and 2i + 1 (Su et al., RoFormer, 2021, as in GPT-J).
    """
    angle = np.arange(capacity)[:, None] * 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)
