"""A block's arithmetic in numpy, float32, a few sequences at a time: what calibration needs of a model."""

from __future__ import annotations

import numpy as np

from ..config import Config

_ELEMENTS = 1 << 18  # at a time, where numpy makes several passes: what a core's cache holds


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    """x (T, D), weight and bias (D,)."""
    y = x - x.mean(1, keepdims=True)
    variance = np.einsum("td,td->t", y, y)[:, None] / np.float32(x.shape[1])
    y *= 1 / np.sqrt(variance + np.float32(epsilon))
    y *= weight
    y += bias
    return y


def gelu(x: np.ndarray) -> None:
    """gelu_new, the tanh form, in place. x (T, I), contiguous."""
    flat = x.reshape(-1)
    for at in range(0, len(flat), _ELEMENTS):
        part = flat[at : at + _ELEMENTS]
        y = part * part
        y *= np.float32(0.044715)
        y += 1
        y *= part
        y *= np.float32(np.sqrt(2 / np.pi))
        np.tanh(y, out=y)
        y += 1
        y *= np.float32(0.5)
        part *= y


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, config: Config) -> np.ndarray:
    """One sequence's q, k and v (T, D), head by head: nobody sees what comes later. Returns (T, D)."""
    q, k, v = (x.reshape(len(x), config.n_head, -1).transpose(1, 0, 2) for x in (q, k, v))  # (H, T, S)
    out = np.empty((q.shape[1], config.n_head, config.head_size), np.float32)
    later = np.triu(np.ones((len(out), len(out)), bool), 1)
    turn = _turns(len(out), config.rotary_dim)
    for h in range(config.n_head):
        scores = _rotated(q[h], turn) @ _rotated(k[h], turn).T
        scores *= np.float32(config.head_size**-0.5)
        scores[later] = -np.inf
        scores -= scores.max(1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(1, keepdims=True)
        out[:, h] = scores @ v[h]
    return out.reshape(len(out), -1)


def _turns(tokens: int, rotary_dim: int) -> np.ndarray:
    """complex64 (T, rotary_dim / 2)."""
    angles = np.arange(tokens)[:, None] * 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.exp(1j * angles).astype(np.complex64)


def _rotated(x: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """x (T, S) with its first entries turned: pairs (0, 1), (2, 3), ... are complex numbers."""
    y = np.array(x, np.float32, order="C")
    count = 2 * turn.shape[1]
    pairs = np.ascontiguousarray(y[:, :count]).view(np.complex64)
    y[:, :count] = (pairs * turn).view(np.float32)
    return y
