"""The model against float64, against transformers' CodeGen, and against what the official code gave."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import moss_jt
from moss_jt import MossError
from moss_jt.config import Config
from moss_jt.model import Model, Request
from moss_jt.weights import open_weights

from . import reference
from .checkpoints import random_state, small_config, write_official

SIZES = {
    "one block, one head group": {"n_layer": 1, "n_embd": 16, "n_head": 4, "rotary_dim": 4},
    "8 heads": {"n_embd": 64, "n_head": 8, "rotary_dim": 2},
    "12 heads, n_inner": {"n_layer": 3, "n_embd": 120, "n_head": 12, "n_inner": 77, "rotary_dim": 4},
    "whole head turns": {"n_embd": 96, "n_head": 4, "rotary_dim": 24},
}


def error(ours: np.ndarray, exact: np.ndarray) -> float:
    return np.linalg.norm(ours - exact) / np.linalg.norm(exact)


@pytest.fixture(scope="module", params=list(SIZES))
def random_model(request, tmp_path_factory):
    """A Model of freshly drawn weights, their official state, and its config."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    raw = small_config(n_ctx=40, n_positions=40, vocab_size=120, **SIZES[request.param])
    state = random_state(raw, seed)
    folder = tmp_path_factory.mktemp("model")
    write_official(folder / "official", raw, state)
    moss_jt.convert.weights(folder / "official", folder / "ours")
    return Model(open_weights(folder / "ours"), 40), state, Config.from_dict(raw)


@pytest.mark.parametrize("length", [1, 2, 9, 40])
def test_logits_are_the_reference_s(random_model, length):
    model, state, config = random_model
    ids = np.random.default_rng().integers(0, 120, length)
    model.sequence.truncate(0)
    exact = reference.logits(config, state, ids)
    assert error(model.logits(ids, last=length), exact) < 1e-3
    assert model.logits(ids).shape == (1, 120)


def test_logits_do_not_depend_on_how_the_tokens_came(random_model, monkeypatch):
    model, state, config = random_model
    ids = np.random.default_rng().integers(0, 120, 37)
    exact = reference.logits(config, state, ids)
    model.sequence.truncate(0)
    for end in (1, 2, 20, 37):
        assert error(model.logits(ids[:end], last=3), exact[max(0, end - 3) : end]) < 1e-3
    monkeypatch.setattr("moss_jt.model.CHUNK", 8)  # a prompt longer than a chunk
    model.sequence.truncate(0)
    assert error(model.logits(ids, last=20), exact[-20:]) < 1e-3


def test_a_common_beginning_is_not_evaluated_again_and_changes_nothing(random_model):
    model, state, config = random_model
    a = np.arange(30)
    b = np.concatenate([a[:12], a[20:28]])
    model.sequence.truncate(0)
    model.logits(a)
    reusable = model.sequence.reusable
    assert (reusable(a), reusable(a, last=5), reusable(b), reusable([])) == (29, 25, 12, 0)
    assert error(model.logits(b, last=2), reference.logits(config, state, b)[-2:]) < 1e-3
    assert model.sequence.length == len(b)
    assert error(model.logits(a, last=30), reference.logits(config, state, a)) < 1e-3


def test_several_sequences_share_sweeps(random_model, monkeypatch):
    model, state, config = random_model
    sequences = model.cache(places=3).sequences
    ids = [np.random.default_rng().integers(0, 120, n) for n in (40, 7, 23)]
    for parts in ((5, 6, 1), (20, 7, 2), (40, 7, 23)):  # each grows at its own pace, one not at all
        got = model.evaluate([Request(s, i[:n], 4) for s, i, n in zip(sequences, ids, parts)])
        for logits, i, n in zip(got, ids, parts):
            assert error(np.stack(logits), reference.logits(config, state, i[:n])[-4:]) < 1e-3
    monkeypatch.setattr("moss_jt.model.CHUNK", 16)
    for s in sequences:
        s.truncate(3)
    for logits, i in zip(model.evaluate([Request(s, i, 5) for s, i in zip(sequences[1:], ids[1:])]), ids[1:]):
        assert error(np.stack(logits), reference.logits(config, state, i)[-5:]) < 1e-3


def test_numbers_of_the_caller_stay_as_precise_as_they_were():
    code = (
        "import numpy as np; from moss_jt import ops; from moss_jt.weights.layout import PLAIN; ops.prepare(PLAIN);"
        "assert np.float32(1e-30) * np.float32(1e-10) != 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # a subnormal product, in a process that loaded nothing else


def test_what_cannot_be_evaluated_is_said_and_changes_nothing(random_model):
    model, _, _ = random_model
    model.sequence.truncate(0)
    model.logits([1, 2, 3])
    for ids, text in (([], "no tokens"), ([120], "token id 120"), ([-1], "token id -1"), ([5] * 41, "fit the context of 40")):
        with pytest.raises(MossError, match=text):
            model.logits(ids)
    assert model.sequence.length == 3


def test_as_codegen_of_transformers(random_model):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, state, c = random_model
    sizes = {name: getattr(c, name) for name in ("vocab_size", "n_ctx", "n_embd", "n_layer", "n_head", "rotary_dim", "n_inner")}
    codegen = hf.CodeGenForCausalLM(hf.CodeGenConfig(**sizes, n_positions=c.n_ctx, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    missing, unexpected = codegen.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    assert not unexpected and all("causal_mask" in m or "embed_positions" in m for m in missing)
    ids = np.random.default_rng().integers(0, 120, 40)
    with torch.no_grad():
        theirs = codegen.eval()(torch.tensor(ids)[None]).logits[0].numpy()
    assert error(model.logits(ids, last=40), theirs) < 2e-3


@pytest.fixture(scope="module")
def trained(official_checkpoint, tmp_path_factory):
    """The trained small checkpoint, converted."""
    folder = tmp_path_factory.mktemp("trained") / "tiny"
    moss_jt.convert.weights(official_checkpoint("moss-tiny-sft"), folder)
    return moss_jt.load(folder)


def test_golden_logits(trained, golden):
    cases = np.load(golden / "logits_fp16.npz")
    names = [name for name in cases.files if name.startswith("ids")]
    assert names
    for name in names:
        exact = cases[name.replace("ids", "logits")]
        counts = exact > -5000  # the rest belongs to tokens that were never trained
        assert error(trained.logits(cases[name], last=len(exact))[counts], exact[counts]) < 2e-3


@pytest.mark.parametrize("file", ["dialogues.json", "turns.json"])
@pytest.mark.parametrize("pieces", [1, 4])
def test_golden_dialogues(trained, golden, file, pieces):
    for record in json.loads((golden / file).read_text()):
        prompt = record["prompt_ids"]
        trained.model.sequence.truncate(0)
        ends = np.cumsum([len(part) for part in np.array_split(prompt, pieces)])[:-1]
        for end in ends:
            trained.model.logits(prompt[:end])
        answer = list(trained.generate(prompt, greedy=True, max_new_tokens=400))
        assert [p.id for p in answer] == record["greedy_ids"]
        text = "".join(p.text for p in answer)
        assert text == trained.tokenizer.decode(record["greedy_ids"], skip_special=True)
        assert text.replace(" ", "") == record["text"].replace(" ", "")  # theirs leaves out the tokens for runs of spaces
        assert trained.last_stats.cached_tokens == (ends[-1] if pieces > 1 else 0)


def test_an_interrupted_answer_leaves_the_model_usable(trained, golden):
    first, second = json.loads((golden / "dialogues.json").read_text())[:2]
    stream = trained.generate(first["prompt_ids"], greedy=True)
    for _ in range(5):
        next(stream)
    stream.close()
    assert [p.id for p in trained.generate(second["prompt_ids"], greedy=True)] == second["greedy_ids"]
    a, b = (trained.generate(r["prompt_ids"], greedy=True) for r in (first, second))
    ids = [[], []]
    for _ in range(10):  # two answers at once, in turns
        ids[0].append(next(a).id)
        ids[1].append(next(b).id)
    assert ids == [first["greedy_ids"][:10], second["greedy_ids"][:10]]


@pytest.mark.parametrize("how", [{"greedy": True}, {"seed": 5, "temperature": 1.5, "top_p": 0.99}])
def test_drafts_and_batches_change_no_answer(trained, golden, how):
    prompts = [r["prompt_ids"] for r in json.loads((golden / "turns.json").read_text())[:4]]
    alone = [[p.id for p in trained.generate(prompt, **how)] for prompt in prompts]
    drafted, sweeps = [], 0
    for prompt in prompts:
        drafted.append([p.id for p in trained.generate(prompt, drafts=True, **how)])
        sweeps += trained.last_stats.sweeps
    assert drafted == alone and sweeps < sum(map(len, alone))
    together = [[] for _ in prompts]
    for i, piece in trained.generate_batch(prompts, drafts=True, **how):
        together[i].append(piece.id)
    assert together == alone
