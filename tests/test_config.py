"""Sizes from config.json, and what is refused."""

from __future__ import annotations

import json

import pytest

from moss_jt.config import Config
from moss_jt.errors import MossError

OFFICIAL = {
    "model_type": "moss", "activation_function": "gelu_new", "n_layer": 34, "n_embd": 6144, "n_head": 24, "n_inner": None,
    "rotary_dim": 64, "n_ctx": 2048, "n_positions": 2048, "vocab_size": 107008, "layer_norm_epsilon": 1e-05,
    "tie_word_embeddings": False, "bos_token_id": 106028, "eos_token_id": 106068,
}  # fmt: skip


def test_the_official_model():
    config = Config.from_dict(OFFICIAL)
    assert (config.n_layer, config.n_embd, config.n_head, config.rotary_dim) == (34, 6144, 24, 64)
    assert config.n_inner == 24576 and config.head_size == 256
    assert (config.n_ctx, config.vocab_size, config.eos_token_id) == (2048, 107008, 106068)
    assert config.cache_bytes_per_token() == config.cache_bytes_per_token("fp16") == 835_584
    assert config.cache_bytes_per_token("int8") == 424_320
    with pytest.raises(MossError, match=r"^kv_cache is 'int4', it must be fp16 or int8$"):
        config.cache_bytes_per_token("int4")


def test_n_inner_and_n_positions():
    raw = {**OFFICIAL, "n_inner": 1000, "n_positions": 512}
    del raw["n_ctx"]
    assert Config.from_dict(raw).n_inner == 1000 and Config.from_dict(raw).n_ctx == 512


def test_keys_that_may_be_missing():
    raw = {k: OFFICIAL[k] for k in ("n_layer", "n_embd", "n_head", "rotary_dim", "n_ctx", "vocab_size")}
    config = Config.from_dict(raw)
    assert config.n_inner == 4 * 6144 and config.layer_norm_epsilon == 1e-5 and config.eos_token_id is None


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "n_head", "rotary_dim", "n_ctx", "vocab_size", "n_inner"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "6", True, [], 1 << 40])
def test_sizes_that_are_none(key, value):
    with pytest.raises(MossError, match=f"^here: {key} is "):
        Config.from_dict({**OFFICIAL, key: value}, "here")


@pytest.mark.parametrize("key", ["n_layer", "n_head", "vocab_size"])
def test_a_missing_size_is_named(key):
    with pytest.raises(MossError, match=f"{key} is None"):
        Config.from_dict({k: v for k, v in OFFICIAL.items() if k != key})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_head": 6}, "n_head 6 is not a multiple of 4"),
        ({"n_head": 28}, "n_embd 6144 is not a multiple of n_head 28"),
        ({"rotary_dim": 63}, "rotary_dim 63 must be even and at most 256"),
        ({"rotary_dim": 258}, "rotary_dim 258 must be even and at most 256"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"model_type": "gptj"}, "model_type is 'gptj'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    ],
)
def test_what_is_no_moss(change, says):
    with pytest.raises(MossError) as e:
        Config.from_dict({**OFFICIAL, **change})
    assert says in str(e.value)


def test_moss_base_7b():
    raw = {"model_type": "moss", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 100}
    with pytest.raises(MossError, match="moss-base-7b's architecture"):
        Config.from_dict(raw)


def test_another_model():
    with pytest.raises(MossError, match="n_embd and rotary_dim missing: not a moss-moon-003 model"):
        Config.from_dict({"model_type": "llama", "hidden_size": 4096})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[1]", "holds a list, expected an object"),
        (None, "no config.json here"),
    ],
)
def test_broken_files(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(MossError) as e:
        Config.read(tmp_path)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
    assert Config.read(tmp_path) == Config.from_dict(OFFICIAL)
    assert Config.read(str(tmp_path)) == Config.from_dict(OFFICIAL)


def test_the_trained_checkpoint(official_checkpoint):
    config = Config.read(official_checkpoint("moss-tiny-sft"))
    assert (config.n_layer, config.n_embd, config.n_head, config.n_inner) == (6, 256, 4, 1024)
