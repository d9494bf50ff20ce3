"""Small random models to train, and their float64 reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moss_jt import convert
from moss_jt.config import Config
from moss_jt.train import Batch
from moss_jt.weights import Weights, open_weights

from .. import reference
from ..checkpoints import random_state, small_config, write_official

SIZES = {
    "one block": {"n_layer": 1, "n_embd": 16, "n_head": 4, "rotary_dim": 4},
    "8 heads": {"n_embd": 64, "n_head": 8, "rotary_dim": 2},
    "12 heads, n_inner": {"n_layer": 3, "n_embd": 120, "n_head": 12, "n_inner": 77, "rotary_dim": 4},
}


def model(folder: Path, seed: int, dtype: str = "fp16", **sizes) -> tuple[Weights, dict, Config]:
    """A converted checkpoint of random weights, its official state, and its config."""
    raw = small_config(**{"n_ctx": 300, "n_positions": 300, "vocab_size": 90, **sizes})
    state = random_state(raw, seed)
    write_official(folder / "official", raw, state)
    convert.weights(folder / "official", folder / "ours", dtype=dtype)
    return open_weights(folder / "ours"), state, Config.from_dict(raw)


def batch(rng: np.random.Generator, vocab: int, lengths: list[int], counted: float = 0.6) -> Batch:
    """Sequences of these lengths, padded on the right, of which about so many labels count."""
    ids = rng.integers(0, vocab, (len(lengths), max(lengths))).astype(np.int32)
    labels = np.where(rng.random(ids.shape) < counted, ids, -100).astype(np.int32)
    for row, length in zip(labels, lengths):
        row[length:] = -100
        row[length - 1] = ids[0, 0]
    return Batch(ids, labels)


def loss(config: Config, state: dict, batch: Batch) -> tuple[float, int, int]:
    """The sum of -log p of the labels that count, how many, and how many were the likeliest, in float64."""
    total, count, right = 0.0, 0, 0
    for ids, labels in zip(batch.ids, batch.labels):
        x = reference.logits(config, state, ids)
        x = x - x.max(1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        for t in range(1, len(ids)):
            if labels[t] != -100:
                total -= log_p[t - 1, labels[t]]
                count += 1
                right += int(log_p[t - 1].argmax() == labels[t])
    return total, count, right
