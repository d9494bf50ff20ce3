"""What is wrong with a folder is found before any work is done, and said in one line."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

from moss_jt import MossError, convert
from tests.checkpoints import random_state, small_config, store, torch_zip, write_official

CONFIG = small_config()
STATE = random_state(CONFIG)


@pytest.fixture
def refused(tmp_path):
    """Convert tmp_path/src, expect a refusal that leaves nothing behind, and return its line."""

    def convert_and_fail() -> str:
        with pytest.raises(MossError) as e:
            convert.weights(tmp_path / "src", tmp_path / "dst")
        assert not (tmp_path / "dst").exists() and not (tmp_path / "dst.partial").exists()
        assert str(e.value).isprintable()
        return str(e.value).replace(f"{tmp_path}/", "")

    return convert_and_fail


def test_missing_tensor(tmp_path, refused):
    state = {n: x for n, x in STATE.items() if n != "transformer.h.1.mlp.fc_in.bias"}
    write_official(tmp_path / "src", CONFIG, state)
    assert refused() == "src: tensor transformer.h.1.mlp.fc_in.bias is missing"


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_wrong_shape(tmp_path, refused, container):
    state = {**STATE, "transformer.h.0.attn.qkv_proj.weight": np.zeros((16, 48), np.float32)}
    write_official(tmp_path / "src", CONFIG, state, container)
    assert "tensor transformer.h.0.attn.qkv_proj.weight has shape [16, 48], config.json asks for [48, 16]" in refused()


def test_a_config_of_another_size(tmp_path, refused):
    write_official(tmp_path / "src", {**CONFIG, "vocab_size": 25}, STATE)
    assert "transformer.wte.weight has shape [24, 16], config.json asks for [25, 16]" in refused()


def test_unknown_tensor(tmp_path, refused):
    write_official(tmp_path / "src", CONFIG, {**STATE, "transformer.h.2.ln_1.bias": np.zeros(16)})
    assert refused() == "src/pytorch_model.bin: tensor transformer.h.2.ln_1.bias is not one of MOSS's"


@pytest.mark.parametrize("name", ["causal_mask", "masked_bias", "bias"])
def test_buffers_that_carry_nothing_are_dropped(tmp_path, name):
    state = {**STATE, f"transformer.h.1.attn.{name}": np.ones((1, 1, 3, 3))}
    write_official(tmp_path / "src", CONFIG, state, masks=False)
    convert.weights(tmp_path / "src", tmp_path / "dst")


def test_a_dtype_that_is_none_of_ours(tmp_path, refused):
    tensors = {name: store(x, "fp16") for name, x in STATE.items()}
    tensors["lm_head.bias"] = ("bool", np.zeros(24, bool))
    write_official(tmp_path / "src", CONFIG, STATE)
    (tmp_path / "src/pytorch_model.bin").write_bytes(torch_zip(tensors))
    assert "tensor lm_head.bias is BOOL, expected one of F16, BF16, F32" in refused()


def test_moss_base_7b(tmp_path, refused):
    write_official(tmp_path / "src", CONFIG, STATE)
    config = {"model_type": "moss", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 100}
    (tmp_path / "src/config.json").write_text(json.dumps(config))
    assert "moss-base-7b's architecture" in refused()


def test_another_architectures_tensors(tmp_path, refused):
    state = {"model.embed_tokens.weight": np.zeros((4, 4)), "model.layers.0.self_attn.q_proj.weight": np.zeros((4, 4))}
    write_official(tmp_path / "src", CONFIG, state, masks=False)
    assert "another architecture" in refused()


@pytest.mark.parametrize("container", ["zip", "safetensors"])
@pytest.mark.parametrize("index", [True, False])
def test_missing_shard(tmp_path, refused, container, index):
    src = write_official(tmp_path / "src", CONFIG, STATE, container, shards=3, index=index)
    (lost,) = src.glob("*-00002-of-00003.*")
    lost.unlink()
    assert refused().startswith(f"src/{lost.name}: missing")


def test_a_tensor_that_is_not_in_the_shard_that_the_index_names(tmp_path, refused):
    src = write_official(tmp_path / "src", CONFIG, STATE, shards=2)
    path = src / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.wte.weight"] = "pytorch_model-00002-of-00002.bin"
    path.write_text(json.dumps(index))
    assert "src/pytorch_model-00002-of-00002.bin: tensor transformer.wte.weight is missing" in refused()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../x.bin"}}',
        "[" * 100_000,
        "\x00",
    ],
)
def test_broken_index(tmp_path, refused, content):
    src = write_official(tmp_path / "src", CONFIG, STATE, shards=2)
    (src / "pytorch_model.bin.index.json").write_text(content)
    assert "index.json: damaged" in refused()


def test_one_tensor_in_two_shards(tmp_path, refused):
    src = write_official(tmp_path / "src", CONFIG, STATE)
    (src / "pytorch_model-2.bin").write_bytes((src / "pytorch_model.bin").read_bytes())
    assert "is in both pytorch_model-2.bin and pytorch_model.bin" in refused()


def test_no_weights(tmp_path, refused):
    src = write_official(tmp_path / "src", CONFIG, STATE)
    (src / "pytorch_model.bin").unlink()
    assert "no weights here" in refused()


def test_no_folder(tmp_path, refused):
    assert refused() == "src: no such folder"
    (tmp_path / "src").write_text("")
    assert refused() == "src: not a folder"


def test_already_converted(tmp_path, refused):
    write_official(tmp_path / "official", CONFIG, STATE)
    convert.weights(tmp_path / "official", tmp_path / "src")
    assert "already converted" in refused()


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_a_hostile_or_short_shard_among_good_ones(tmp_path, refused, container):
    src = write_official(tmp_path / "src", CONFIG, STATE, container, shards=3)
    (last,) = src.glob("*-00003-of-00003.*")
    last.write_bytes(last.read_bytes()[:-1])
    assert refused().startswith(f"src/{last.name}: ")


def test_safetensors_are_taken_where_there_are_both(tmp_path):
    write_official(tmp_path / "src", CONFIG, STATE, "safetensors")
    (tmp_path / "src/pytorch_model.bin").write_bytes(b"not to be opened")
    convert.weights(tmp_path / "src", tmp_path / "dst")


def test_no_tokenizer(tmp_path):
    src = write_official(tmp_path / "src", CONFIG, STATE)
    (src / "vocab.json").unlink()
    with pytest.raises(MossError, match=r"vocab\.json"):
        convert.weights(src, tmp_path / "dst")


def test_a_bad_number_names_its_tensor(tmp_path):
    state = {**STATE, "transformer.h.1.mlp.fc_out.weight": STATE["transformer.h.1.mlp.fc_out.weight"].copy()}
    state["transformer.h.1.mlp.fc_out.weight"][3, 5] = 1e6
    write_official(tmp_path / "src", CONFIG, state, dtype="fp32")
    with pytest.raises(MossError, match=r"tensor transformer\.h\.1\.mlp\.fc_out\.weight holds 1e\+06, beyond fp16's largest"):
        convert.weights(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_zip_bomb(tmp_path, refused):
    src = write_official(tmp_path / "src", CONFIG, STATE)
    path = src / "pytorch_model.bin"
    with zipfile.ZipFile(path) as z:
        entries = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in entries.items():
            z.writestr(name, data)
    assert "compressed or encrypted" in refused()


def test_unknown_dtype_asked_for(tmp_path):
    write_official(tmp_path / "src", CONFIG, STATE)
    with pytest.raises(MossError, match="dtype 'int3' is unknown"):
        convert.weights(tmp_path / "src", tmp_path / "dst", dtype="int3")
