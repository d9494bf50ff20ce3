"""MOSS in float64 and plain numpy, written from the official description, on the official tensors. Slow and obvious."""

from __future__ import annotations

import numpy as np


def layer_norm(x, weight, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotary(x, positions, dim):
    """x (..., T, S): pairs (2i, 2i+1) of the first ``dim`` entries, as complex numbers, turn by position · 10000^(-2i/dim)."""
    turn = np.exp(1j * positions[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim))
    z = (x[..., 0:dim:2] + 1j * x[..., 1:dim:2]) * turn
    x = x.copy()
    x[..., 0:dim:2], x[..., 1:dim:2] = z.real, z.imag
    return x


def attention(q, k, v):
    """q (H, T, S), k and v (H, L, S): the last T of L positions ask; none sees later ones. Returns (H, T, S)."""
    (_, t, size), n = q.shape, k.shape[1]
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(size)
    scores[:, np.arange(n)[None] > np.arange(n - t, n)[:, None]] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


def heads(x, n_head):
    """(T, D) -> (H, T, S)."""
    return x.reshape(len(x), n_head, -1).transpose(1, 0, 2)


def split_qkv(y, n_head):
    """The official fused projection (T, 3D): four parts, each Q, V, K of a quarter of the heads. Returns q, k, v (H, T, S)."""
    parts = np.split(y, 4, axis=1)
    q, v, k = (np.concatenate([np.split(part, 3, axis=1)[i] for part in parts], axis=1) for i in range(3))
    return heads(q, n_head), heads(k, n_head), heads(v, n_head)


def logits(config, state, ids):
    """Logits of every position, (T, V). ``state``: official name -> array, used as float64."""

    def w(name):
        return np.asarray(state[name], np.float64)

    x, positions = w("transformer.wte.weight")[ids], np.arange(len(ids))
    for i in range(config.n_layer):
        b = f"transformer.h.{i}."
        h = layer_norm(x, w(b + "ln_1.weight"), w(b + "ln_1.bias"), config.layer_norm_epsilon)
        q, k, v = split_qkv(h @ w(b + "attn.qkv_proj.weight").T, config.n_head)
        q, k = (rotary(a, positions, config.rotary_dim) for a in (q, k))
        a = attention(q, k, v).transpose(1, 0, 2).reshape(x.shape) @ w(b + "attn.out_proj.weight").T
        m = gelu_new(h @ w(b + "mlp.fc_in.weight").T + w(b + "mlp.fc_in.bias"))
        x = x + a + m @ w(b + "mlp.fc_out.weight").T + w(b + "mlp.fc_out.bias")
    x = layer_norm(x, w("transformer.ln_f.weight"), w("transformer.ln_f.bias"), config.layer_norm_epsilon)
    return x @ w("lm_head.weight").T + w("lm_head.bias")
