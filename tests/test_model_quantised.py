"""Models in int8 and int4: against float64 on the very weights that their files hold, and on the golden dialogues."""

from __future__ import annotations

import json

import numpy as np
import pytest

import moss_jt
from moss_jt.config import Config
from moss_jt.model import Model
from moss_jt.weights import open_weights

from . import dequantise, reference
from .checkpoints import random_state, small_config, write_official
from .gptq_checkpoints import random_gptq
from .test_model import error

SIZES = {
    "less than a group": {"n_layer": 1, "n_embd": 16, "n_head": 4, "rotary_dim": 4},
    "two groups, n_inner": {"n_embd": 160, "n_head": 8, "n_inner": 300, "rotary_dim": 4},
    "whole groups": {"n_embd": 256, "n_head": 4, "rotary_dim": 32},
}
DTYPES = [("int8", "int8"), ("int4", "int8"), ("fp16", "int4")]


@pytest.fixture(scope="module", params=list(SIZES))
def official(request, tmp_path_factory):
    """(folder, state) of a freshly drawn model."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    raw = small_config(n_ctx=40, n_positions=40, vocab_size=120, **SIZES[request.param])
    state = random_state(raw, seed)
    return write_official(tmp_path_factory.mktemp("model") / "official", raw, state), state


@pytest.mark.parametrize(("dtype", "head_dtype"), DTYPES)
def test_logits_are_those_of_the_stored_weights(official, tmp_path, dtype, head_dtype):
    folder, state = official
    weights = open_weights(moss_jt.convert.weights(folder, tmp_path / "ours", dtype, head_dtype))
    stored = dequantise.official_state(weights, state)
    ids = np.random.default_rng().integers(0, 120, 30)
    exact = reference.logits(Config.read(folder), stored, ids)
    assert error(reference.logits(Config.read(folder), state, ids), exact) > 2e-3  # it would show if others were computed with
    model = Model(weights, 40)
    steps = [model.logits(ids[: n + 1])[0] for n in range(len(ids))]
    assert error(np.array(steps), exact) < 1e-3
    for n in (8, 30):
        model.sequence.truncate(0)
        assert error(model.logits(ids[:n], last=n), exact[:n]) < 1e-3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("act_order", [False, True])
def test_logits_are_those_of_a_gptq_checkpoints_weights(tmp_path, bits, act_order):
    raw = small_config(n_ctx=40, n_positions=40, vocab_size=120, n_embd=160, n_head=8, n_inner=304, rotary_dim=4)
    made = random_gptq(raw, bits, 64, act_order)
    folder = moss_jt.convert.weights(made.write(tmp_path / "official"), tmp_path / "ours")
    config, ids = Config.read(folder), np.random.default_rng().integers(0, 120, 30)
    fp16 = {name: x.astype(np.float64) for name, (dtype, x) in made.stored.items() if dtype == "fp16"}
    exact = reference.logits(config, {**fp16, **made.weights}, ids)
    model = Model(open_weights(folder), 40)
    assert error(np.array([model.logits(ids[: n + 1])[0] for n in range(8)]), exact[:8]) < 1e-3
    model.sequence.truncate(0)
    assert error(model.logits(ids, last=30), exact) < 1e-3


# What is rounded here, and what GPTQ has rounded: official folder, dtype, golden logits.
TRAINED = {
    "int8": ("moss-tiny-sft", "int8", None),
    "int4": ("moss-tiny-sft", "int4", None),
    "GPTQ int8": ("moss-tiny-sft-int8", None, "logits_int8.npz"),
    "GPTQ int4": ("moss-tiny-sft-int4", None, "logits_int4.npz"),
    "GPTQ int4, act-order": ("moss-tiny-sft-int4-actorder", None, "logits_int4-actorder.npz"),
}


@pytest.fixture(scope="module", params=list(TRAINED))
def trained(request, official_checkpoint, tmp_path_factory):
    """A trained small checkpoint, converted; and the file of its golden logits."""
    name, dtype, logits = TRAINED[request.param]
    folder = moss_jt.convert.weights(official_checkpoint(name), tmp_path_factory.mktemp("trained") / "ours", dtype)
    return moss_jt.load(folder), logits


def test_golden_logits(trained, golden):
    model, file = trained
    if file is None:
        pytest.skip("the official code's logits are of weights that GPTQ has rounded")
    data = np.load(golden / file)
    for i in range(len(data.files) // 2):
        exact = data[f"logits{i}"]
        trained_for = exact > -5000  # the rest of the vocabulary has a bias of -10000
        ours = model.logits(data[f"ids{i}"], last=len(exact))
        assert error(ours[trained_for], exact[trained_for]) < 3e-3


def test_golden_dialogues(trained, golden):
    model, _ = trained
    for file in ("dialogues.json", "turns.json"):
        for record in json.loads((golden / file).read_text()):
            answer = model.generate(record["prompt_ids"], greedy=True, max_new_tokens=400)
            assert [piece.id for piece in answer] == record["greedy_ids"]
