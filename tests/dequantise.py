"""What int8 and int4 folders hold, read as docs/formats.md says and independently of the program; float64."""

from __future__ import annotations

import numpy as np

GROUP = 128


def unpack(q: np.ndarray, bits: int) -> np.ndarray:
    """Stored bytes (N, G·16·bits) -> whole numbers (N, 128·G), byte by byte."""
    if bits == 8:
        return q.astype(np.int64)
    numbers = np.empty((len(q), 2 * q.shape[1]), np.int64)
    for at in range(q.shape[1]):
        group, j = divmod(at, 64)
        numbers[:, GROUP * group + j] = q[:, at] % 16
        numbers[:, GROUP * group + 64 + j] = q[:, at] // 16
    return numbers


def dequantise(q: np.ndarray, scale: np.ndarray, zero: np.ndarray, k: int) -> np.ndarray:
    """A matrix of k inputs, (N, K), from its three tensors."""
    numbers = unpack(q, 8 * q.shape[1] // (GROUP * scale.shape[1]))
    group = np.arange(numbers.shape[1]) // GROUP
    return ((numbers - zero.astype(np.int64)[:, group]) * scale.astype(np.float64)[:, group])[:, :k]


def matrix(tensors: dict, name: str, k: int) -> np.ndarray:
    if name in tensors:
        return np.asarray(tensors[name], np.float64)
    return dequantise(*(np.asarray(tensors[f"{name}.{part}"]) for part in ("q", "scale", "zero")), k)


def official_state(weights, state: dict) -> dict:
    """``state`` (official name -> array) with its matrices replaced by those that the opened ``weights`` hold."""
    c, found = weights.config, dict(state)
    d = c.n_embd
    for i in range(c.n_layer):
        block, name = weights.block(i), f"transformer.h.{i}."
        rows, columns = matrix(block, "in.weight", d), matrix(block, "out.weight", d + c.n_inner)
        q, k, v = (np.split(part, 4) for part in np.split(rows[: 3 * d], 3))  # of a quarter of the heads each
        found[name + "attn.qkv_proj.weight"] = np.concatenate([x for parts in zip(q, v, k) for x in parts])
        found[name + "mlp.fc_in.weight"] = rows[3 * d :]
        found[name + "attn.out_proj.weight"], found[name + "mlp.fc_out.weight"] = columns[:, :d], columns[:, d:]
    found["lm_head.weight"] = matrix(weights.head(), "lm_head.weight", d)
    return found
