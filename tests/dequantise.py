"""What int8 and int4 folders hold, read as docs/formats.md says and independently of the program; float64."""

from __future__ import annotations

import numpy as np

PANEL = 16


def unpack(q: np.ndarray, bits: int) -> np.ndarray:
    """Stored bytes (P, G, C, 64) -> whole numbers (16·P, G, S): each row has 4 bytes of a chunk, a little-endian number whose
    lowest bits are the first input."""
    panels, groups, chunks, _ = q.shape
    words = np.ascontiguousarray(q).view("<u4").astype(np.int64)  # (P, G, C, 16)
    numbers = np.stack([words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)], -1)
    return numbers.transpose(0, 3, 1, 2, 4).reshape(PANEL * panels, groups, chunks * 32 // bits)


def dequantise(q: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int, n: int, k: int) -> np.ndarray:
    """The matrix (n, k) of three stored tensors, its inputs in stored order."""
    rows = [x.transpose(0, 2, 1).reshape(-1, x.shape[1], 1) for x in (scale.astype(np.float64), zero.astype(np.int64) + 1)]
    return ((unpack(q, bits) - rows[1]) * rows[0]).reshape(len(rows[0]), -1)[:n, :k]


def matrix(tensors: dict, name: str, n: int, k: int, bits: int) -> np.ndarray:
    """(n, k), its inputs in stored order."""
    if name in tensors:
        return np.asarray(tensors[name], np.float64)
    return dequantise(*(np.asarray(tensors[f"{name}.{part}"]) for part in ("q", "scale", "zero")), bits, n, k)


def in_order(w: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Column j of w is input order[j]."""
    if order is None:
        return w
    found = np.empty_like(w)
    found[:, order] = w
    return found


def official_state(weights, state: dict) -> dict:
    """``state`` (official name -> array) with its matrices replaced by those that the opened ``weights`` hold."""
    c, found = weights.config, dict(state)
    d, inner, bits = c.n_embd, c.n_inner, {"fp16": 16, "int8": 8, "int4": 4}
    for i in range(c.n_layer):
        block, name = weights.block(i), f"transformer.h.{i}."
        rows = matrix(block, "in.weight", 3 * d + inner, d, bits[weights.coding.dtype])
        columns = matrix(block, "out.weight", d, d + inner, bits[weights.coding.dtype])
        if weights.coding.ordered:
            first, second = block["in.weight.order"]
            rows = np.concatenate([in_order(rows[: 3 * d], first), in_order(rows[3 * d :], second)])
            columns = in_order(columns, block["out.weight.order"][0])
        q, k, v = (np.split(part, 4) for part in np.split(rows[: 3 * d], 3))  # of a quarter of the heads each
        found[name + "attn.qkv_proj.weight"] = np.concatenate([x for parts in zip(q, v, k) for x in parts])
        found[name + "mlp.fc_in.weight"] = rows[3 * d :]
        found[name + "attn.out_proj.weight"], found[name + "mlp.fc_out.weight"] = columns[:, :d], columns[:, d:]
    found["lm_head.weight"] = matrix(weights.head(), "lm_head.weight", c.vocab_size, d, bits[weights.coding.head_dtype])
    return found
