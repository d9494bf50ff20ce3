"""Ours to the official quantised layout: what came from it comes back bit for bit, what did not keeps every weight."""

from __future__ import annotations

import filecmp
import json

import numpy as np
import pytest

from moss_jt import MossError, convert
from moss_jt.weights import open_weights
from tests import dequantise
from tests.checkpoints import random_state, small_config, write_official
from tests.gptq_checkpoints import random_gptq

from .test_export import assert_same_tensors, tensors
from .test_gptq import SIZES, assert_exact

FORMATS = {"gptq": "pytorch_model.bin", "gptq-safetensors": "model.safetensors"}


def assert_one_file(out, format: str) -> None:
    assert [p.name for p in out.glob("*model*")] == [FORMATS[format]]


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_what_came_from_gptq_comes_back(tmp_path, bits, group, act_order, format):
    made = random_gptq(small_config(**{**SIZES["whole groups"], "n_layer": 2}), bits, group, act_order)
    src = made.write(tmp_path / "src")
    job = convert.plan_export(convert.weights(src, tmp_path / "ours"), tmp_path / "out", format)
    assert not job.notes
    job.run()
    assert_one_file(job.dst, format)
    assert_same_tensors(tensors(src), tensors(job.dst))
    for name in ("config.json", "vocab.json", "merges.txt", "added_tokens.json"):
        assert filecmp.cmp(src / name, job.dst / name, shallow=False), name


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("group", [96, 128, 256, -1])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("less_one", [0, 1])
def test_groups_that_were_cut_keep_every_weight(tmp_path, group, act_order, size, less_one):
    made = random_gptq(small_config(**SIZES[size]), 4, group, act_order, less_one)
    ours = convert.weights(made.write(tmp_path / "src"), tmp_path / "ours")
    out = convert.export(ours, tmp_path / "out", "gptq")
    config = json.loads((out / "config.json").read_text())
    assert (config["wbits"], config["groupsize"]) == (4, open_weights(ours).coding.group)
    if not less_one:
        assert config["quantization_config"]["checkpoint_format"] == "gptq"
    assert_exact(made, convert.weights(out, tmp_path / "again"))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("n_embd", [256, 80])
def test_what_was_rounded_here_comes_back_as_it_is(tmp_path, dtype, n_embd):
    config = small_config(n_embd=n_embd, n_head=4)
    state = random_state(config)
    state["transformer.h.0.mlp.fc_in.weight"][3] = np.abs(state["transformer.h.0.mlp.fc_in.weight"][3])  # stored mirrored
    src = write_official(tmp_path / "src", config, state)
    ours = convert.weights(src, tmp_path / "ours", dtype)
    job = convert.plan_export(ours, tmp_path / "out", "gptq-safetensors")
    assert job.notes == [f"{ours}: lm_head is in int8, GPTQ's layout has it in fp16: rounded"]
    job.run()
    assert_one_file(job.dst, "gptq-safetensors")
    said = json.loads((job.dst / "config.json").read_text())
    assert said == {**config, "wbits": int(dtype[3:]), "groupsize": 128}
    again = open_weights(convert.weights(job.dst, tmp_path / "again"))
    first, second = (dequantise.official_state(w, state) for w in (open_weights(ours), again))
    for name in first.keys() - {"lm_head.weight"}:
        assert np.array_equal(first[name], second[name]), name
    assert np.array_equal(first["lm_head.weight"].astype(np.float16), second["lm_head.weight"])
    if n_embd == 256:
        for name in ("block-00.safetensors", "block-01.safetensors"):
            assert filecmp.cmp(ours / name, tmp_path / "again" / name, shallow=False)


def test_torch_opens_it(tmp_path):
    torch = pytest.importorskip("torch")
    made = random_gptq(small_config(n_embd=64), 4, 32, True)
    out = convert.export(convert.weights(made.write(tmp_path / "src"), tmp_path / "ours"), tmp_path / "out", "gptq")
    found = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert_same_tensors({name: x.numpy() for name, x in found.items()}, tensors(out))


@pytest.mark.parametrize("name", ["moss-tiny-sft-int8", "moss-tiny-sft-int4", "moss-tiny-sft-int4-actorder"])
def test_the_trained_checkpoints(official_checkpoint, tmp_path, name):
    src = official_checkpoint(name)
    out = convert.export(convert.weights(src, tmp_path / "ours"), tmp_path / "out", "gptq")
    assert_same_tensors(tensors(src), tensors(out))
    same = [p.name for p in src.iterdir() if not p.name.startswith("pytorch_model")]
    assert filecmp.cmpfiles(src, out, same, shallow=False) == (same, [], [])


def test_refusals(tmp_path):
    def ours(name: str, dtype: str, **sizes) -> object:
        config = small_config(**sizes)
        src = write_official(tmp_path / f"{name}-src", config, random_state(config))
        return convert.weights(src, tmp_path / name, dtype)

    def changed(name: str, tensor: str, value: bytes, file: str = "block-01.safetensors") -> object:
        """One in act-order whose second block's ``tensor``, or another file's, starts with other bytes."""
        made = random_gptq(small_config(n_embd=64), 4, 32, True)
        folder = convert.weights(made.write(tmp_path / f"{name}-src"), tmp_path / name, head_dtype="int8")
        region = open_weights(folder).regions[file]
        at = [t.name for t in region.tensors].index(tensor)
        with region.path.open("r+b") as f:
            f.seek(region.start + sum(t.nbytes for t in region.tensors[:at]))
            f.write(value)
        return folder

    int4 = ours("int4", "int4")
    order, zero = changed("order", "out.weight.order", bytes(8)), changed("zero", "in.weight.zero", b"\x10")
    nan, vast = changed("nan", "in.weight.scale", b"\0\x7e"), changed("vast", "out.weight.scale", b"\xff\x7b" * 16)
    head = changed("head", "lm_head.weight.scale", b"\0\x7c", "head.safetensors")
    cases = [
        (ours("fp16", "fp16"), "gptq", "fp16: its blocks are in fp16; GPTQ's layout is for int8 and int4"),
        (ours("odd", "int4", n_embd=20), "gptq", "qkv_proj is 60 x 20; GPTQ's layout needs multiples of 8"),
        (int4, "pytorch", "is in int4, lm_head in int8, and only fp16 is exported so; "),
        (int4, "gptq2", "format 'gptq2' is unknown; choose one of pytorch, safetensors, gptq, gptq-safetensors"),
        (order, "gptq", r"block-01\.safetensors: tensor out\.weight\.order is damaged: it does not hold every input once"),
        (nan, "gptq", r"block-01\.safetensors: tensor in\.weight\.scale holds NaN"),
        (nan, "gguf-f16", r"block-01\.safetensors: tensor in\.weight holds NaN"),
        (vast, "gguf-q8_0", r"block-01\.safetensors: tensor out\.weight holds -?\d.*, beyond fp16's largest number"),
        (head, "gptq", r"head\.safetensors: tensor lm_head\.weight\.scale holds infinity"),
        (int4, "gguf-q4_0", "gguf-q4_0 is one file, whatever its size; leave the shard size out"),
        (zero, "gptq", r"transformer\.h\.1\.attn\.qkv_proj has a zero of 17, more than GPTQ's layout holds"),
    ]
    for i, (src, format, says) in enumerate(cases):
        out = tmp_path / f"out-{i}.gguf"
        with pytest.raises(MossError, match=says) as e:
            convert.export(src, out, format, 1000 if format == "gguf-q4_0" else None)
        assert str(e.value).isprintable() and not out.exists()
