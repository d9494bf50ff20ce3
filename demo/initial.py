"""The demo model before it has learned anything: an official checkpoint's folder with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SIZES = {"n_layer": 8, "n_embd": 128, "n_head": 4, "n_inner": None, "rotary_dim": 16, "n_ctx": 512, "n_positions": 512}
DEVIATION = 0.02  # of all matrices, GPT-2's; of those that add to the residual stream 1/sqrt(2 n_layer) of it


def write(folder: Path, vocabulary: int, bos: int, eos: int, seed: int) -> None:
    """``config.json`` and ``model.safetensors``, in fp16."""
    config = {
        "model_type": "moss", "activation_function": "gelu_new", **SIZES, "vocab_size": vocabulary, "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False, "bos_token_id": bos, "eos_token_id": eos, "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(weights(vocabulary, seed), folder / "model.safetensors", {"format": "pt"})


def weights(vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    """Official name -> float16 array."""
    d, layers = SIZES["n_embd"], SIZES["n_layer"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocabulary, d)}
    for i in range(layers):
        block = {
            "ln_1.weight": (d,), "ln_1.bias": (d,), "attn.qkv_proj.weight": (3 * d, d), "attn.out_proj.weight": (d, d),
            "mlp.fc_in.weight": (4 * d, d), "mlp.fc_in.bias": (4 * d,),
            "mlp.fc_out.weight": (d, 4 * d), "mlp.fc_out.bias": (d,),
        }  # fmt: skip
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
    shapes |= {"lm_head.weight": (vocabulary, d), "lm_head.bias": (vocabulary,)}
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            found[name] = np.full(shape, ".ln_" in name and name.endswith("weight"), np.float16)
        else:
            residual = "out_proj" in name or "fc_out" in name
            deviation = DEVIATION / np.sqrt(2 * layers) if residual else DEVIATION
            found[name] = rng.normal(0, deviation, shape).astype(np.float16)
    return found
