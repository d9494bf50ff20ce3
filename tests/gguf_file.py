"""GGUF files read as their specification says, and phi2 computed from them, both independently of the program."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import reference

_NUMBERS = {4: "I", 5: "i", 6: "f", 7: "?"}
_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34)}  # type -> numbers in a block, its bytes


class Gguf(NamedTuple):
    metadata: dict[str, Any]
    types: dict[str, int]
    raw: dict[str, np.ndarray]  # uint8 (N, bytes of a row)
    tensors: dict[str, np.ndarray]  # float64


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def unpack(self, form: str) -> Any:
        found = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found if len(found) > 1 else found[0]

    def text(self) -> str:
        length = self.unpack("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == 9:
            kind, count = self.unpack("IQ")
            return [self.value(kind) for _ in range(count)]
        return self.text() if kind == 8 else self.unpack(_NUMBERS[kind])


def read_gguf(path: Path) -> Gguf:
    data = path.read_bytes()
    r = _Reader(data)
    magic, version, tensors, pairs = r.unpack("4sIQQ")
    assert (magic, version) == (b"GGUF", 3)
    metadata = {}
    for _ in range(pairs):
        key = r.text()
        metadata[key] = r.value(r.unpack("I"))
    infos = []
    for _ in range(tensors):
        name = r.text()
        dims = [r.unpack("Q") for _ in range(r.unpack("I"))]
        infos.append((name, tuple(reversed(dims)), *r.unpack("IQ")))
    start, end = -(-r.at // 32) * 32, 0
    found = Gguf(metadata, {}, {}, {})
    for name, shape, kind, offset in infos:
        block, nbytes = _BLOCKS[kind]
        size = int(np.prod(shape)) // block * nbytes
        assert offset % 32 == 0 and offset == end
        end = offset + -(-size // 32) * 32
        raw = np.frombuffer(data, np.uint8, size, start + offset)
        found.types[name], found.raw[name] = kind, raw.reshape(shape[0], -1)
        found.tensors[name] = _decode(raw.reshape(-1, nbytes), kind).reshape(shape)
    assert start + end == len(data)
    return found


def _decode(blocks: np.ndarray, kind: int) -> np.ndarray:
    if kind < 2:
        return blocks.view(("<f4", "<f2")[kind]).astype(np.float64)
    scale, q = blocks[:, :2].copy().view("<f2").astype(np.float64), blocks[:, 2:]
    numbers = q.view(np.int8) if kind == 8 else np.concatenate([q & 15, q >> 4], axis=1).astype(np.int64) - 8
    return scale * numbers


def logits(found: Gguf, ids: np.ndarray) -> np.ndarray:
    """What phi2 computes, (T, V): biases everywhere, q, k and v one after the other, entry i turning with i + R/2."""
    m, w = {k.removeprefix("phi2."): v for k, v in found.metadata.items()}, found.tensors
    n_head, turned, eps = (m[k] for k in ("attention.head_count", "rope.dimension_count", "attention.layer_norm_epsilon"))
    x, positions = w["token_embd.weight"][ids], np.arange(len(ids))
    for i in range(m["block_count"]):

        def linear(x, name, b=f"blk.{i}."):
            return x @ w[f"{b}{name}.weight"].T + w[f"{b}{name}.bias"]

        h = reference.layer_norm(x, w[f"blk.{i}.attn_norm.weight"], w[f"blk.{i}.attn_norm.bias"], eps)
        q, k, v = (reference.heads(part, n_head) for part in np.split(linear(h, "attn_qkv"), 3, axis=1))
        q, k = (_neox(a, positions, turned, m["rope.freq_base"]) for a in (q, k))
        attended = reference.attention(q, k, v).transpose(1, 0, 2).reshape(x.shape)
        x = x + linear(attended, "attn_output") + linear(reference.gelu_new(linear(h, "ffn_up")), "ffn_down")
    x = reference.layer_norm(x, w["output_norm.weight"], w["output_norm.bias"], eps)
    return x @ w["output.weight"].T + w["output.bias"]


def _neox(x: np.ndarray, positions: np.ndarray, dim: int, base: float) -> np.ndarray:
    angle = positions[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    a, b = x[..., : dim // 2], x[..., dim // 2 : dim]
    turned = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
    return np.concatenate([*turned, x[..., dim:]], axis=-1)
