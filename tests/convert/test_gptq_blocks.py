"""Checkpoints quantised by GPTQ: what calibrates which block, the order of inputs, stopping and going on, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from moss_jt.convert import calibrate, hessian
from moss_jt.convert.job import REPORT
from moss_jt.convert.official import open_official
from moss_jt.convert.view import cast

from moss_jt import MossError, convert
from moss_jt.config import Config
from moss_jt.dialogues import read_dialogues
from moss_jt.tokenizer import load_tokenizer
from moss_jt.weights import open_weights
from moss_jt.weights.layout import Coding
from tests import reference
from tests.checkpoints import random_state, small_config, write_official
from tests.dequantise import official_state
from tests.dialogue_files import golden_dialogues, small_talk, write

CONFIG = small_config(n_layer=3)
STATE = random_state(CONFIG)


@pytest.fixture
def src(tmp_path) -> Path:
    return write_official(tmp_path / "src", CONFIG, STATE, shards=2)


@pytest.fixture
def talk(tmp_path) -> Path:
    return write(tmp_path / "talk.jsonl", small_talk())


@pytest.fixture(autouse=True)
def several_chunks_and_tiles(monkeypatch):
    monkeypatch.setattr(calibrate, "_CHUNK", 50)
    monkeypatch.setattr(hessian, "_TILE", 24)


class Stopped(Exception):
    pass


def stopped_at(partial: Path, whole: str):
    def progress(done: int, total: int) -> None:
        if (partial / whole).exists():
            raise Stopped

    return progress


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("dtype", "group"), [("int4", 128), ("int4", 8), ("int8", 24)])
def test_each_block_is_calibrated_by_the_quantised_ones_before_it(tmp_path, src, talk, dtype, group, act_order):
    """Stopped after the second block, what lies on the disk is what two blocks as they are stored make of the dialogues."""
    options = {"method": "gptq", "calibration": talk, "group_size": group, "act_order": act_order}
    partial = tmp_path / "dst.partial"
    with pytest.raises(Stopped):
        convert.weights(src, tmp_path / "dst", dtype, progress=stopped_at(partial, "block-01.safetensors"), **options)
    (spilled,) = (path for path in partial.iterdir() if path.name.startswith("inputs") and path.name.endswith(".spill"))
    found = np.fromfile(spilled, np.float32).reshape(-1, CONFIG["n_embd"])
    convert.weights(src, tmp_path / "dst", dtype, **options)

    weights = open_weights(tmp_path / "dst")
    assert weights.coding == Coding(dtype, "int8", group, act_order)
    state, at = official_state(weights, STATE), 0
    for dialogue in read_dialogues(talk, load_tokenizer(src)):
        ids = dialogue.ids[:32]
        expected = hidden(weights.config, state, ids, blocks=2)
        assert np.abs(found[at : at + len(ids)] - expected).max() < 1e-4
        at += len(ids)
    assert at == len(found)


def hidden(config: Config, state: dict, ids: np.ndarray, blocks: int) -> np.ndarray:
    """What so many blocks make of a sequence, (T, D): the reference's logits with one-hot rows for lm_head and no last norm."""
    d, x = config.n_embd, np.asarray(state["transformer.wte.weight"], np.float64)[ids]
    for i in range(blocks):
        b = f"transformer.h.{i}."

        def w(name: str, b: str = b) -> np.ndarray:
            return np.asarray(state[b + name], np.float64)

        h = reference.layer_norm(x, w("ln_1.weight"), w("ln_1.bias"), config.layer_norm_epsilon)
        q, k, v = reference.split_qkv(h @ w("attn.qkv_proj.weight").T, config.n_head)
        q, k = (reference.rotary(a, np.arange(len(ids)), config.rotary_dim) for a in (q, k))
        a = reference.attention(q, k, v).transpose(1, 0, 2).reshape(-1, d) @ w("attn.out_proj.weight").T
        f = reference.gelu_new(h @ w("mlp.fc_in.weight").T + w("mlp.fc_in.bias"))
        x = x + a + f @ w("mlp.fc_out.weight").T + w("mlp.fc_out.bias")
    return x


def test_most_active_inputs_first(tmp_path, src, talk):
    convert.weights(src, tmp_path / "dst", "int8", method="gptq", calibration=talk, act_order=True)
    block, d = open_weights(tmp_path / "dst").block(0), CONFIG["n_embd"]
    config, squares = Config.from_dict(CONFIG), np.zeros(d)
    for dialogue in read_dialogues(talk, load_tokenizer(src)):
        x = STATE["transformer.wte.weight"][dialogue.ids[:32]].astype(np.float64)
        norm = (STATE[f"transformer.h.0.ln_1.{name}"] for name in ("weight", "bias"))
        squares += (reference.layer_norm(x, *norm, config.layer_norm_epsilon) ** 2).sum(0)
    for order in block["in.weight.order"]:
        assert (np.diff(squares[order]) <= 1e-3).all()
    (order,) = block["out.weight.order"]
    assert sorted(order[:d]) == list(range(d)) and sorted(order[d:]) == list(range(d, 5 * d))


def test_the_report(tmp_path, src, talk):
    convert.weights(src, tmp_path / "dst", "int4", method="gptq", calibration=talk, group_size=8)
    report = json.loads((tmp_path / "dst" / REPORT).read_text())
    tokens = sum(min(len(d.ids), 32) for d in read_dialogues(talk, load_tokenizer(src)))
    assert report["dialogues"] == 8 and report["tokens"] == tokens and report["group_size"] == 8
    assert [b["block"] for b in report["blocks"]] == [0, 1, 2]
    weights = open_weights(tmp_path / "dst")
    state = official_state(weights, STATE)
    rtn = official_state(open_weights(convert.weights(src, tmp_path / "rtn", "int4", group_size=8)), STATE)
    x = np.concatenate([STATE["transformer.wte.weight"][d.ids[:32]] for d in read_dialogues(talk, load_tokenizer(src))]).astype(
        np.float64
    )
    h = reference.layer_norm(x, *(STATE[f"transformer.h.0.ln_1.{name}"] for name in ("weight", "bias")), 1e-5)
    for name in ("attn.qkv_proj", "mlp.fc_in"):
        w = STATE[f"transformer.h.0.{name}.weight"]
        for method, quantised in (("rtn", rtn), ("gptq", state)):
            lacks = w - quantised[f"transformer.h.0.{name}.weight"]
            expected = np.linalg.norm(h @ lacks.T) / np.linalg.norm(h @ w.T)
            assert report["blocks"][0]["errors"][name][method] == pytest.approx(expected, rel=1e-3)
    for block in report["blocks"]:
        for errors in block["errors"].values():
            assert 0 < errors["gptq"] < errors["rtn"] < 0.5


# Converts argv[1] by argv[3] to argv[2] and kills itself once the file argv[4] is there.
KILLED = """
import os, pathlib, signal, sys
from moss_jt import convert
src, dst, talk, whole = map(pathlib.Path, sys.argv[1:5])
def progress(done, total):
    if (dst.with_name(dst.name + ".partial") / whole).exists():
        os.kill(os.getpid(), signal.SIGKILL)
convert.weights(src, dst, "int4", method="gptq", calibration=talk, act_order=True, progress=progress)
"""


@pytest.mark.parametrize(
    "whole", ["inputs-00.spill", "inputs-01.spill", "block-00.safetensors", "products.spill", "block-02.safetensors"]
)
def test_kill_9_and_again(tmp_path, src, talk, whole, monkeypatch):
    monkeypatch.undo()  # the process that is killed has the usual chunks and tiles
    dst = tmp_path / "dst"
    killed = subprocess.run([sys.executable, "-c", KILLED, src, dst, talk, whole], capture_output=True, text=True)
    assert killed.returncode == -9 and not dst.exists(), killed.stderr
    options = {"method": "gptq", "calibration": talk, "act_order": True}
    convert.weights(src, dst, "int4", **options)
    whole_one = convert.weights(src, tmp_path / "whole", "int4", **options)
    names = sorted(p.name for p in dst.iterdir())
    assert names == sorted(p.name for p in whole_one.iterdir()) and not [n for n in names if "spill" in n]
    for name in set(names) - {REPORT}:
        assert (dst / name).read_bytes() == (whole_one / name).read_bytes(), name
    reports = [json.loads((folder / REPORT).read_text()) for folder in (dst, whole_one)]
    for report in reports:
        assert all(block.pop("seconds") >= 0 for block in report["blocks"])
    assert reports[0] == reports[1]


def test_progress_counts_every_byte(tmp_path, src, talk):
    seen = []
    options = {"method": "gptq", "calibration": talk}
    dst = convert.weights(src, tmp_path / "dst", "int4", progress=lambda *x: seen.append(x), **options)
    total = sum(p.stat().st_size for p in dst.glob("*.safetensors"))
    assert {t for _, t in seen} == {total} and seen[0] == (0, total) and seen[-1] == (total, total)
    assert seen == sorted(seen) and len(seen) > 50
    before = {p: p.stat().st_mtime_ns for p in dst.iterdir()}
    assert convert.weights(src, dst, "int4", **options) == dst
    assert before == {p: p.stat().st_mtime_ns for p in dst.iterdir()}


def test_room_is_needed_for_activations_too(tmp_path, src, talk, monkeypatch):
    plain, job = (
        convert.plan_weights(src, tmp_path / "dst", "int4", **o) for o in ({}, {"method": "gptq", "calibration": talk})
    )
    assert job.files == plain.files and job.spilled > 0
    needed = sum(plain.files.values()) + (32 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, needed))
    plain.check()
    with pytest.raises(MossError, match="are still to be written, but only"):
        job.check()


def test_the_room_that_activations_take(tmp_path, src, talk):
    partial, most = tmp_path / "dst.partial", 0
    job = convert.plan_weights(src, tmp_path / "dst", "int4", method="gptq", calibration=talk)

    def progress(done: int, total: int) -> None:
        nonlocal most
        most = max(most, sum(p.stat().st_size for p in partial.glob("*.spill*")))

    job.run(progress)
    assert 0.7 * job.spilled < most <= job.spilled


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "awq"}, "method 'awq' is unknown; choose one of rtn, gptq"),
        ({"method": "gptq"}, "gptq needs dialogues to calibrate with"),
        ({"calibration": "talk"}, "rtn uses no calibration"),
        ({"act_order": True}, "rtn has no order of inputs"),
        ({"method": "gptq", "calibration": "talk", "dtype": "fp16"}, "fp16 is not quantised"),
        ({"group_size": 64, "dtype": "fp16"}, "fp16 is not quantised"),
        ({"group_size": 100}, "group_size is 100, it must be a multiple of 8, at most 128"),
        ({"group_size": 0}, "group_size is 0, it must be a multiple of 8, at most 128"),
        ({"method": "gptq", "calibration": "no such"}, "no such.jsonl: cannot be read: No such file or directory"),
        ({"method": "gptq", "calibration": "empty"}, "empty.jsonl: holds no dialogue"),
        ({"method": "gptq", "calibration": "broken"}, "broken.jsonl, line 1: not JSON"),
    ],
)
def test_refused(tmp_path, src, talk, options, says):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text("{")
    if "calibration" in options:
        options = {**options, "calibration": tmp_path / f"{options['calibration']}.jsonl"}
    with pytest.raises(MossError) as e:
        convert.plan_weights(src, tmp_path / "dst", **{"dtype": "int4", **options})
    assert says in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.glob("dst*"))


def test_tokens_beyond_the_vocabulary(tmp_path, talk):
    config = small_config(vocab_size=6)
    src = write_official(tmp_path / "src", config, random_state(config))
    with pytest.raises(MossError, match=r"talk\.jsonl: has the token 6, but the model's vocabulary ends at 6"):
        convert.plan_weights(src, tmp_path / "dst", "int4", method="gptq", calibration=talk)


def test_other_dialogues_or_another_method_do_not_go_on(tmp_path, src, talk):
    with pytest.raises(Stopped):
        progress = stopped_at(tmp_path / "dst.partial", "block-00.safetensors")
        convert.weights(src, tmp_path / "dst", "int4", progress=progress, method="gptq", calibration=talk)
    talk.write_text(talk.read_text().splitlines()[0] + "\n")
    for options in ({}, {"method": "gptq", "calibration": talk}):
        with pytest.raises(MossError, match="begun from another source or with other settings"):
            convert.weights(src, tmp_path / "dst", "int4", **options)


def test_activations_that_were_removed(tmp_path, src, talk):
    progress = stopped_at(tmp_path / "dst.partial", "block-01.safetensors")
    with pytest.raises(Stopped):
        convert.weights(src, tmp_path / "dst", "int4", progress=progress, method="gptq", calibration=talk)
    for path in (tmp_path / "dst.partial").glob("*.spill"):
        path.unlink()
    with pytest.raises(MossError, match=r"inputs-02\.spill: missing; delete .*dst\.partial and start anew"):
        convert.weights(src, tmp_path / "dst", "int4", method="gptq", calibration=talk)


def test_a_checkpoint_whose_activations_overflow(tmp_path, talk):
    state = {**STATE, "transformer.h.0.ln_1.weight": np.full(CONFIG["n_embd"], 3e38, np.float32)}
    src = write_official(tmp_path / "src", CONFIG, state, dtype="fp32")
    with pytest.raises(MossError, match="not finite"), np.errstate(all="ignore"):
        convert.weights(src, tmp_path / "dst", "int4", method="gptq", calibration=talk)


# ---- the trained checkpoint -------------------------------------------------------------------------------------------------


def test_nearer_to_fp16_than_rounding_on_dialogues_not_calibrated_with(tmp_path, golden, official_checkpoint):
    """The Kullback-Leibler divergence of the answers of every second golden dialogue, calibrated with the others."""
    src = official_checkpoint("moss-tiny-sft")
    tokenizer = load_tokenizer(src)
    found = golden_dialogues(golden, tokenizer)
    calibration = write(tmp_path / "calibration.jsonl", found[0::2])
    held_out = list(read_dialogues(write(tmp_path / "held-out.jsonl", found[1::2]), tokenizer))
    official = open_official(src)
    state = {name: cast(view.read(), view, "F32") for name, view in official.tensors.items()}
    expected = answers(official.config, state, held_out)
    divergence = {}
    for method, options in (("rtn", {}), ("gptq", {"calibration": calibration})):
        weights = open_weights(convert.weights(src, tmp_path / method, "int4", method=method, **options))
        quantised = answers(weights.config, official_state(weights, state), held_out)
        divergence[method] = float((np.exp(expected) * (expected - quantised)).sum(1).mean())
    assert 0 < divergence["gptq"] < 0.5 * divergence["rtn"]


def answers(config: Config, state: dict, found: list) -> np.ndarray:
    """log p at every position of the answers, of the tokens that the checkpoint was trained with."""
    known = np.flatnonzero(state["lm_head.bias"] > -5000)
    state = {**state, **{name: state[name][known] for name in ("lm_head.weight", "lm_head.bias")}}
    logits = [reference.logits(config, state, d.ids)[np.flatnonzero(d.answers) - 1] for d in found]
    x = np.concatenate(logits)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))
