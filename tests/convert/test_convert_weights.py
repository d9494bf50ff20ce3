"""Official checkpoints to ours: every tensor in its place, whatever they are stored as."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from moss_jt.convert import copy
from safetensors import safe_open

from moss_jt import convert
from moss_jt.weights import open_weights
from tests.checkpoints import pickled, random_state, shapes, small_config, tensor, write_official, zip_container


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


SIZES = [
    {},
    {"n_head": 12, "n_embd": 24, "n_layer": 1, "rotary_dim": 2},
    {"n_head": 16, "n_embd": 32, "rotary_dim": 2, "n_inner": 1},
    {"n_layer": 11, "vocab_size": 1},
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shards", [1, 4])
def test_odd_sizes_and_several_shards(tmp_path, sizes, shards):
    config = small_config(**sizes)
    state = random_state(config, 2)
    src = write_official(tmp_path / "src", config, state, shards=shards)
    convert.weights(src, tmp_path / "dst")
    assert_converted(tmp_path / "dst", config, state)


@pytest.mark.parametrize("index", [True, False])
def test_with_and_without_an_index(tmp_path, index):
    config = small_config()
    state = random_state(config)
    convert.weights(write_official(tmp_path / "src", config, state, shards=3, index=index), tmp_path / "dst")
    assert_converted(tmp_path / "dst", config, state)


@pytest.mark.parametrize("chunk", [1, 100, 1000, 1 << 20])
def test_chunks_of_any_size_give_the_same(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(copy, "CHUNK", chunk)
    config = small_config(n_inner=24)
    state = random_state(config)
    convert.weights(write_official(tmp_path / "src", config, state, dtype="bf16"), tmp_path / "dst")
    assert_converted(tmp_path / "dst", config, state)


@pytest.mark.parametrize("chunk", [100, 1 << 20])
def test_transposed_and_shared_storages(tmp_path, monkeypatch, chunk):
    """All matrices transposed, all vectors parts of one storage, one tensor the same row again and again."""
    monkeypatch.setattr(copy, "CHUNK", chunk)
    config = small_config(n_inner=24)
    state = random_state(config)
    state["lm_head.weight"] = np.broadcast_to(state["lm_head.weight"][3], (24, 16))
    src = write_official(tmp_path / "src", config, state, masks=False)
    vectors = np.concatenate([x for x in state.values() if x.ndim == 1]).astype(np.float16)
    storages, tensors, at = {"v": vectors.tobytes()}, {}, 0
    for name, x in state.items():
        if x.ndim == 1:
            tensors[name] = tensor("v", "HalfStorage", vectors.size, at, x.shape, (1,))
            at += x.size
        elif name == "lm_head.weight":
            storages[name] = x[0].astype(np.float16).tobytes()
            tensors[name] = tensor(name, "HalfStorage", 16, 0, x.shape, (0, 1))
        else:
            storages[name] = x.T.astype(np.float16).tobytes()
            tensors[name] = tensor(name, "HalfStorage", x.size, 0, x.shape, (1, len(x)))
    (src / "pytorch_model.bin").write_bytes(zip_container(pickled(tensors), storages))
    convert.weights(src, tmp_path / "dst")
    assert_converted(tmp_path / "dst", config, state)


def test_norms_and_biases_of_fp32_keep_every_bit(tmp_path):
    config = small_config()
    state = {**random_state(config), "transformer.h.0.ln_1.weight": np.linspace(0.1, 1e6, 16, dtype=np.float32)}
    convert.weights(write_official(tmp_path / "src", config, state, dtype="fp32"), tmp_path / "dst")
    np.testing.assert_array_equal(open_weights(tmp_path / "dst").block(0)["ln_1.weight"], state["transformer.h.0.ln_1.weight"])


def test_fp32_is_rounded_to_the_nearest_fp16(tmp_path):
    config = small_config()
    state = random_state(config)
    state["transformer.wte.weight"] = np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32) * 1e-3
    convert.weights(write_official(tmp_path / "src", config, state, dtype="fp32"), tmp_path / "dst")
    x, y = state["transformer.wte.weight"], open_weights(tmp_path / "dst").wte()["wte.weight"]
    for other in (np.nextafter(y, np.float16(1)), np.nextafter(y, np.float16(-1))):
        assert (np.abs(x - y.astype(np.float64)) <= np.abs(x - other.astype(np.float64))).all()


def test_every_file_is_as_specified_byte_by_byte(tmp_path):
    config = small_config(n_inner=24)
    state = random_state(config)
    convert.weights(write_official(tmp_path / "src", config, state), tmp_path / "dst")
    order = ["ln_1.weight", "ln_1.bias", "in.weight", "in.bias", "out.weight", "out.bias"]
    data = (tmp_path / "dst/block-01.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length + 8 == 4096
    header = json.loads(data[8 : 8 + length])
    assert data[8 : 8 + length].rstrip(b" ").endswith(b"}")
    assert header.pop("__metadata__") == {"format": "moss-jt 3"}
    assert list(header) == order
    at = 0
    for name, x in expected_block(config, state, 1).items():
        stored = x.astype("<f2" if name in ("in.weight", "out.weight") else "<f4").tobytes()
        assert header[name]["data_offsets"] == [at, at + len(stored)]
        assert data[4096 + at : 4096 + at + len(stored)] == stored, name
        at += len(stored)
    assert len(data) == 4096 + at


def test_the_safetensors_library_opens_every_file(tmp_path):
    config = small_config()
    state = random_state(config)
    convert.weights(write_official(tmp_path / "src", config, state), tmp_path / "dst")
    for path in (tmp_path / "dst").glob("block-*.safetensors"):
        i = int(path.stem[6:])
        with safe_open(str(path), "numpy") as f:
            for name, x in expected_block(config, state, i).items():
                np.testing.assert_array_equal(f.get_tensor(name), x)


def test_config_and_small_files(tmp_path):
    config = small_config(note="字")
    src = write_official(tmp_path / "src", config, random_state(config))
    (src / "generation_config.json").write_text('{"top_p": 0.8}')
    (src / "modeling_moss.py").write_text("raise SystemExit")
    dst = convert.weights(src, tmp_path / "dst")
    assert json.loads((dst / "config.json").read_text()) == {**config, "moss_jt": {"format": 3, "dtype": "fp16"}}
    assert (dst / "generation_config.json").read_text() == '{"top_p": 0.8}'
    names = {p.name for p in dst.iterdir()}
    assert {"tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"} <= names
    assert "modeling_moss.py" not in names and not [n for n in names if n.endswith((".tmp", ".bin"))]


def test_the_trained_checkpoint(official_checkpoint, tmp_path):
    src = official_checkpoint("moss-tiny-sft")
    convert.weights(src, tmp_path / "dst")
    config = json.loads((src / "config.json").read_text())
    state = {}
    for shard in sorted(src.glob("*.bin")):
        state.update(read_plain_zip(shard))
    assert_converted(tmp_path / "dst", config, state)


def read_plain_zip(path) -> dict[str, np.ndarray]:
    """A checkpoint's fp16 tensors, read in the simplest way: names from the pickle's text, storages in their order."""
    with zipfile.ZipFile(path) as z:
        root = z.namelist()[0].split("/")[0]
        names = re.findall(rb"X....((?:transformer|lm_head)\.[\w.]+)q", z.read(f"{root}/data.pkl"), re.DOTALL)
        data = [np.frombuffer(z.read(f"{root}/data/{i}"), np.float16) for i in range(len(names))]
    state = {name.decode(): x for name, x in zip(names, data) if b"causal_mask" not in name}
    width = {"wte.weight": 256, "lm_head.weight": 256, "proj.weight": 256, "fc_in.weight": 256, "fc_out.weight": 1024}
    columns = {name: next((w for end, w in width.items() if name.endswith(end)), None) for name in state}
    return {name: x.reshape(-1, columns[name]) if columns[name] else x for name, x in state.items()}


# Converts argv[1] to argv[2] and prints by how many bytes the process grew at most. VmHWM, because ru_maxrss would begin with
# what the parent had.
MEASURED = """
import re, sys
from moss_jt import convert
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
job = convert.plan_weights(*sys.argv[1:])
before = peak()
job.run()
print(peak() - before)
"""


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how much memory a process had")
def test_memory_does_not_grow_with_the_model(tmp_path, dtype):
    """Tensors of 64 MB: what is held at once is a few chunks of 2 MiB."""
    config = small_config(n_embd=512, vocab_size=64_000, n_layer=1, n_inner=16)
    state = {name: np.zeros(shape, np.float32) for name, shape in shapes(config).items()}
    src = write_official(tmp_path / "src", config, state, dtype=dtype)
    grown = int(subprocess.check_output([sys.executable, "-c", MEASURED, src, tmp_path / "dst"]))
    assert grown < 32 << 20
