"""``moss-jt info``: official and converted folders, whole and broken."""

from __future__ import annotations

import json
import re

import pytest

from moss_jt import convert
from moss_jt.cli import main
from moss_jt.errors import MossError
from tests.checkpoints import random_state, small_config, write_official
from tests.gptq_checkpoints import random_gptq

CONFIG = small_config(n_layer=5)
STATE = random_state(CONFIG)
PARAMETERS = sum(x.size for x in STATE.values())


@pytest.fixture
def info(capsys):
    """Run ``moss-jt info``; returns (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as e:
            main(["info", *map(str, args)])
        return (e.value.code or 0, *capsys.readouterr())

    return call


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_official(tmp_path, info, container, dtype):
    src = write_official(tmp_path / "src", CONFIG, STATE, container, shards=2, dtype=dtype)
    code, stdout, stderr = info("--json", src)
    found = json.loads(stdout)
    assert code == 0 and stderr == "" and found["problems"] == []
    assert found["kind"] == "official" and found["parameters"] == PARAMETERS
    assert found["container"] == {"zip": "torch zip", "legacy": "torch legacy"}.get(container, container)
    assert found["dtypes"] == {"BF16" if dtype == "bf16" else "F16": len(STATE)}
    assert {f["name"]: f["bytes"] for f in found["files"]} == {p.name: p.stat().st_size for p in src.glob("*-of-*")}
    assert sum(f["tensors"] for f in found["files"]) == len(STATE)
    assert {n: tuple(t["shape"]) for n, t in found["tensors"].items()} == {n: x.shape for n, x in STATE.items()}


def test_converted(tmp_path, info):
    write_official(tmp_path / "src", CONFIG, STATE)
    dst = convert.weights(tmp_path / "src", tmp_path / "dst")
    code, stdout, _ = info("--json", dst)
    found = json.loads(stdout)
    assert code == 0 and found["problems"] == []
    assert (found["kind"], found["format"], found["dtype"], found["head_dtype"]) == ("converted", 3, "fp16", "fp16")
    assert found["parameters"] == PARAMETERS
    assert found["bytes"] == sum(p.stat().st_size for p in dst.glob("*.safetensors")) == sum(f["bytes"] for f in found["files"])
    assert found["cache_bytes_per_token"] == {"fp16": 5 * 2 * 16 * 2, "int8": 5 * 2 * (16 + 4 * 4)}
    assert found["cache_bytes_at_n_ctx"] == {kv: 32 * size for kv, size in found["cache_bytes_per_token"].items()}
    block = next(f for f in found["files"] if f["name"] == "block-04.safetensors")
    assert block["tensors"][2] == {"name": "in.weight", "dtype": "F16", "shape": [112, 16]}


def test_a_quantised_one(tmp_path, info):
    write_official(tmp_path / "src", CONFIG, STATE)
    dst = convert.weights(tmp_path / "src", tmp_path / "dst", "int4")
    code, stdout, _ = info("--json", dst)
    found = json.loads(stdout)
    assert code == 0 and found["problems"] == [] and found["parameters"] == PARAMETERS
    assert (found["dtype"], found["head_dtype"]) == ("int4", "int8")
    assert found["bytes"] == sum(p.stat().st_size for p in dst.glob("*.safetensors"))
    block = next(f for f in found["files"] if f["name"] == "block-04.safetensors")
    assert block["tensors"][2] == {"name": "in.weight.q", "dtype": "U8", "shape": [7, 1, 16, 64]}
    code, stdout, _ = info(dst)
    assert code == 0 and "format 3, int4, lm_head in int8, groups of 128" in " ".join(stdout.split())


def test_what_people_see(tmp_path, info):
    src = write_official(tmp_path / "src", CONFIG, STATE, shards=2)
    code, stdout, _ = info(src)
    assert code == 0
    for text in (
        f"{PARAMETERS:,}",
        "torch zip",
        f"{len(STATE)} tensors F16",
        "pytorch_model-00002-of-00002.bin",
        "It can be converted",
    ):
        assert text in stdout
    code, stdout, _ = info(convert.weights(src, tmp_path / "dst"))
    assert code == 0
    for text in (
        "format 3, fp16, lm_head in fp16",
        "320 bytes a token in fp16",
        "block-00.safetensors",
        "3 more blocks",
        "block-04",
        "Nothing is wrong",
    ):
        assert text in stdout
    assert "block-02" not in stdout and "\x1b" not in stdout


CALCULATOR = "- Calculator: enabled. API: Calculate(expression)\n"


@pytest.mark.parametrize(
    ("text", "plugins"), [("Hi.\n", []), (f"Hi.\n{CALCULATOR}- Equation solver: enabled.\n", ["calculator", "solver"])]
)
def test_a_system_text_of_its_own(tmp_path, info, text, plugins):
    src = write_official(tmp_path / "src", CONFIG, STATE)
    assert json.loads(info("--json", src)[1])["meta_instruction"] is None
    (src / "meta_instruction.txt").write_text(text, encoding="utf-8")
    dst = convert.weights(src, tmp_path / "dst")
    assert (dst / "meta_instruction.txt").read_text(encoding="utf-8") == text
    for folder in (src, dst):
        assert json.loads(info("--json", folder)[1])["meta_instruction"] == {"characters": len(text), "plugins": plugins}
        stdout = " ".join(info(folder)[1].split())
        assert f"its own, {len(text)} characters, with {', '.join(plugins) or 'no plugins'}" in stdout
    again = convert.export(dst, tmp_path / "again")
    assert (again / "meta_instruction.txt").read_text(encoding="utf-8") == text


def test_a_system_text_that_is_none(tmp_path, info):
    src = write_official(tmp_path / "src", CONFIG, STATE)
    (src / "meta_instruction.txt").write_bytes(b"\xff")
    code, stdout, _ = info("--json", src)
    assert code == 1 and json.loads(stdout)["problems"] == [f"{src / 'meta_instruction.txt'}: not UTF-8 text"]
    with pytest.raises(MossError, match="not UTF-8 text"):
        convert.weights(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_problems_are_listed_and_the_code_is_1(tmp_path, info):
    state = {n: x for n, x in STATE.items() if "h.3.ln_1" not in n}
    state["transformer.h.1.mlp.fc_in.bias"] = STATE["transformer.ln_f.bias"]
    src = write_official(tmp_path / "src", CONFIG, state)
    code, stdout, _ = info("--json", src)
    problems = json.loads(stdout)["problems"]
    assert code == 1 and len(problems) == 3
    assert "transformer.h.3.ln_1.weight is missing" in problems[0] and "has shape [16]" in problems[2]
    code, stdout, _ = info(src)
    assert code == 1 and all(p.split(": ", 1)[1] in stdout for p in problems) and "can be converted" not in stdout


def test_a_shard_that_cannot_be_opened(tmp_path, info):
    src = write_official(tmp_path / "src", CONFIG, STATE, shards=2)
    (src / "pytorch_model-00001-of-00002.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    code, stdout, _ = info(src)
    assert code == 1 and "os.system" in stdout and "cannot be opened" in stdout
    code, stdout, _ = info("--json", src)
    assert code == 1 and len(json.loads(stdout)["files"]) == 2


def test_a_broken_converted_one(tmp_path, info):
    write_official(tmp_path / "src", CONFIG, STATE)
    dst = convert.weights(tmp_path / "src", tmp_path / "dst")
    (dst / "block-02.safetensors").unlink()
    code, stdout, _ = info(dst)
    assert code == 1 and "block-02.safetensors: missing; convert the checkpoint again" in stdout
    assert re.search("converted, format 3 *\n", stdout) and "None" not in stdout


def test_the_quantised_ones(official_checkpoint, info):
    code, stdout, _ = info("--json", official_checkpoint("moss-tiny-sft-int4"))
    found = json.loads(stdout)
    assert code == 0 and not found["problems"] and found["dtypes"]["I32"] == 6 * 4 * 3
    assert found["gptq"] == {"dtype": "int4", "group_size": 128, "act_order": False, "notes": []}


def test_gptq(tmp_path, info):
    made = random_gptq(small_config(n_embd=64), 8, 32, act_order=True)
    made.config["wbits"] = 4
    src = made.write(tmp_path / "src")
    code, stdout, _ = info(src)
    assert code == 0 and "GPTQ in int8, groups of 32, act-order" in " ".join(stdout.split()) and "It can be converted" in stdout
    assert "config.json: says 4 bits, but the tensors are in 8; the tensors are right" in stdout
    code, stdout, _ = info("--json", convert.weights(src, tmp_path / "dst"))
    found = json.loads(stdout)
    assert code == 0 and (found["dtype"], found["group_size"], found["act_order"]) == ("int8", 32, True)
    made.stored.pop("transformer.h.1.mlp.fc_in.scales")
    code, stdout, _ = info(made.write(tmp_path / "src"))
    assert code == 1 and "tensor transformer.h.1.mlp.fc_in.scales is missing" in stdout


def test_no_models_folder(tmp_path, info):
    for folder, says in ((tmp_path, "no config.json"), (tmp_path / "no", "no such folder")):
        code, stdout, stderr = info(folder)
        assert code == 1 and stdout == "" and says in stderr and stderr.count("\n") == 1
