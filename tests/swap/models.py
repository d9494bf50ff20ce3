"""Converted checkpoints of random weights, and budgets for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moss_jt.swap import Plan, make_plan, smallest
from moss_jt.weights import Weights, files_of, open_weights
from moss_jt.weights.header import header_bytes
from moss_jt.weights.layout import BITS, FORMAT, METADATA, Coding, Tensor
from tests.checkpoints import small_config

CONTEXT = 40
# Relative error of the GPU's logits, by the cache: a number that one side rounds up and the other down is a whole step off.
MOST = {"fp16": 3e-3, "int8": 3e-2}


def write(folder: Path, dtype: str = "fp16", head_dtype: str = "fp16", seed: int = 0, **sizes) -> Weights:
    """A model of 5 blocks whose lm_head is larger than a block; ``sizes`` replace those of its config."""
    from moss_jt.config import Config

    raw = small_config(**{"n_layer": 5, "n_embd": 64, "vocab_size": 2100, "n_ctx": 512, "n_positions": 512, **sizes})
    folder.mkdir(parents=True, exist_ok=True)
    coding = Coding(dtype, head_dtype)
    (folder / "config.json").write_text(json.dumps({"moss_jt": {"format": FORMAT, **coding.to_dict()}, **raw}))
    rng = np.random.default_rng(seed)
    for name, tensors in files_of(Config.from_dict(raw), coding).items():
        with (folder / name).open("wb") as file:
            file.write(header_bytes(tensors, METADATA))
            for tensor in tensors:
                file.write(_values(tensor, coding, rng))
    return open_weights(folder)


def _values(tensor: Tensor, coding: Coding, rng: np.random.Generator) -> bytes:
    """Weights of standard deviation 0.05 in every coding: larger ones make a model that its own roundings upset."""
    count, name = int(np.prod(tensor.shape)), tensor.name
    steps = 1 << BITS[coding.head_dtype if name.startswith("lm_head") else coding.dtype]
    if tensor.dtype == "U8":
        return rng.integers(0, steps if name.endswith(".zero") else 256, count, np.uint8).tobytes()
    values = rng.standard_normal(count, np.float32) * 0.05
    if name.endswith(".scale"):
        values = np.abs(values) / (steps * (2 / 12) ** 0.5)  # of two uniform numbers' difference
    return (values + ("ln_" in name and name.endswith("weight"))).astype({"F16": "f2", "F32": "f4"}[tensor.dtype]).tobytes()


def plan(weights: Weights, share: float, context: int = CONTEXT) -> Plan:
    """The plan for the smallest budget that works, and this share of what is missing from there to everything."""
    model = (weights.config, weights.coding, context)
    least, most = smallest(*model), make_plan(*model, 1 << 50).peak
    return make_plan(*model, least + int(share * (most - least)))
