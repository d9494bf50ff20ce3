"""GPTQ checkpoints of random numbers, packed as the official int4 and int8 ones are, independently of the converter.

made = random_gptq(small_config(n_embd=64), bits=4, group=32, act_order=True)
made.write(folder)                    # an official folder
made.weights["transformer.h.0.mlp.fc_in.weight"]  # (q - zero) * scale, exact in float64
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoints import WRITERS, random_state, store, write_tokenizer_files

_NAMES = {"zip": "pytorch_model.bin", "legacy": "pytorch_model.bin", "safetensors": "model.safetensors"}


@dataclass
class Made:
    config: dict
    stored: dict[str, tuple[str, np.ndarray]]  # official name -> (dtype, array)
    weights: dict[str, np.ndarray]  # official name -> float64, the quantised matrices alone

    def write(self, folder: Path, container: str = "zip", name: str | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2), encoding="utf-8")
        write_tokenizer_files(folder)
        (folder / (name or _NAMES[container])).write_bytes(WRITERS[container](self.stored))
        return folder

    @property
    def matrices(self) -> list[str]:
        return [name[: -len(".weight")] for name in self.weights]

    def set(self, name: str, x: np.ndarray, dtype: str | None = None) -> None:
        self.stored[name] = (dtype or self.stored[name][0], x)


def random_gptq(
    config: dict, bits: int = 4, group: int = 128, act_order: bool = False, less_one: int = 1, seed: int | None = None
) -> Made:
    """``group``: -1 is one for all inputs. ``less_one``: what is taken off zeros when they are stored; 0 in gptq_v2."""
    seed = np.random.SeedSequence().entropy if seed is None else seed
    print(f"random_gptq(seed={seed})")  # pytest shows it when a test fails
    rng = np.random.default_rng(seed)
    stored, weights = {}, {}
    for name, x in random_state(config, seed).items():
        if x.ndim != 2 or ".h." not in name:
            stored[name] = store(x, "fp16")
            continue
        n, k = x.shape
        size = k if group == -1 else group
        g_idx = np.arange(k) // size
        if act_order:
            g_idx = rng.permutation(g_idx)
        groups = -(-k // size)
        q = rng.integers(0, 2**bits, (k, n))
        zero = rng.integers(0, 2**bits, (groups, n)) + less_one
        scale = (rng.uniform(0.2, 2, (groups, n)) / 2**bits / np.sqrt(k)).astype(np.float16)
        weights[name] = ((q - zero[g_idx]) * scale[g_idx].astype(np.float64)).T
        matrix = name[: -len("weight")]
        stored[matrix + "qweight"] = ("int32", packed(q, bits))
        stored[matrix + "qzeros"] = ("int32", packed((zero - less_one).T, bits).T.copy())
        stored[matrix + "scales"] = ("fp16", scale)
        stored[matrix + "g_idx"] = ("int32", g_idx.astype(np.int32))
    config = {**config, "wbits": bits, "groupsize": group}
    if less_one == 0:
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "checkpoint_format": "gptq_v2",
        }
    return Made(config, stored, weights)


def packed(x: np.ndarray, bits: int) -> np.ndarray:
    """Along the first axis, low bits first, as int32."""
    per = 32 // bits
    words = sum(x[j::per].astype(np.uint64) << np.uint64(bits * j) for j in range(per))
    return words.astype(np.uint32).view(np.int32)
