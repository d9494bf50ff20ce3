"""Official checkpoints to ours: every tensor in its place, whatever they are stored as."""

from __future__ import annotations

import numpy as np
import pytest

from moss_jt import convert
from moss_jt.weights import open_weights
from tests.checkpoints import random_state, small_config, write_official


def expected_block(config: dict, state: dict, i: int) -> dict[str, np.ndarray]:
    """A block as docs/formats.md specifies it, row by row."""
    block = {name.split(".", 3)[3]: x for name, x in state.items() if name.startswith(f"transformer.h.{i}.")}
    d, heads = config["n_embd"], config["n_head"]
    size = d // heads
    rows = {"q": [], "v": [], "k": []}
    for c, name in enumerate("qvk"):
        for h in range(heads):
            for s in range(size):
                part, r = h // (heads // 4), (h % (heads // 4)) * size + s
                rows[name].append(block["attn.qkv_proj.weight"][part * 3 * d // 4 + c * d // 4 + r])
    return {
        "ln_1.weight": block["ln_1.weight"],
        "ln_1.bias": block["ln_1.bias"],
        "in.weight": np.concatenate([rows["q"], rows["k"], rows["v"], block["mlp.fc_in.weight"]]),
        "in.bias": block["mlp.fc_in.bias"],
        "out.weight": np.concatenate([block["attn.out_proj.weight"], block["mlp.fc_out.weight"]], axis=1),
        "out.bias": block["mlp.fc_out.bias"],
    }


def assert_converted(folder, config: dict, state: dict) -> None:
    opened = open_weights(folder)
    for i in range(config["n_layer"]):
        ours = opened.block(i)
        for name, x in expected_block(config, state, i).items():
            np.testing.assert_array_equal(ours[name], x, err_msg=f"block {i}: {name}")
    np.testing.assert_array_equal(opened.wte()["wte.weight"], state["transformer.wte.weight"])
    head = {"lm_head.weight": "lm_head.weight", "lm_head.bias": "lm_head.bias"}
    head.update({f"ln_f.{x}": f"transformer.ln_f.{x}" for x in ("weight", "bias")})
    for name, official in head.items():
        np.testing.assert_array_equal(opened.head()[name], state[official])


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_container_and_dtype(tmp_path, container, dtype):
    config = small_config(n_head=8, n_embd=32, n_inner=40)
    state = random_state(config, 1)
    src = write_official(tmp_path / "src", config, state, container, dtype=dtype)
    convert.weights(src, tmp_path / "dst")
    assert_converted(tmp_path / "dst", config, state)
