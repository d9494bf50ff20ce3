"""Keys and values in int8: against float64 with the same rounding, reuse of what is cached, chatting, and what it costs."""

from __future__ import annotations

import json

import numpy as np
import pytest

import moss_jt
from moss_jt import MossError, ops
from moss_jt.cache import parts_of
from moss_jt.config import Config
from moss_jt.model import Model, Request
from moss_jt.moss import Moss
from moss_jt.runtime import jittor
from moss_jt.weights import open_weights

from . import reference
from .checkpoints import random_state, small_config, write_official
from .fake_moss import FakeTokenizer
from .test_generate import Bytes
from .test_model import error
from .tokenizer_folders import official_folder

SIZES = {
    "heads of 4": {"n_embd": 16, "n_head": 4, "rotary_dim": 4},
    "12 heads of 10": {"n_layer": 3, "n_embd": 120, "n_head": 12, "rotary_dim": 4},
    "heads of 64": {"n_embd": 256, "n_head": 4, "rotary_dim": 32},
}
CONTEXT = 60


@pytest.fixture(scope="module", params=list(SIZES))
def random_model(request, tmp_path_factory):
    """(Model with an int8 cache, official state, config) of freshly drawn weights."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    raw = small_config(n_ctx=CONTEXT, n_positions=CONTEXT, vocab_size=120, **SIZES[request.param])
    state = random_state(raw, seed)
    folder = tmp_path_factory.mktemp("model")
    write_official(folder / "official", raw, state)
    weights = open_weights(moss_jt.convert.weights(folder / "official", folder / "ours"))
    return Model(weights, CONTEXT, kv_cache="int8"), state, Config.from_dict(raw)


def rounded(x: np.ndarray) -> np.ndarray:
    """Rows of 127 steps to their entry that is furthest from zero."""
    step = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / step) * step


@pytest.fixture
def exact(monkeypatch):
    """reference.logits with keys and values rounded as the cache rounds them."""
    attention = reference.attention

    def logits(config, state, ids):
        with monkeypatch.context() as m:
            m.setattr(reference, "attention", lambda q, k, v: attention(q, rounded(k), rounded(v)))
            return reference.logits(config, state, ids)

    return logits


def agree(got, expected) -> bool:
    """Whether nearly every row is the same; the last bit of a number can round it to the next step, which moves a few."""
    rows = [error(ours, exact) for ours, exact in zip(np.concatenate(got), np.concatenate(expected))]
    return np.median(rows) < 5e-4 and max(rows) < 5e-3


def test_logits_are_those_of_a_rounded_cache(random_model, exact):
    model, state, config = random_model
    ids = np.random.default_rng().integers(0, 120, CONTEXT)
    expected = exact(config, state, ids)
    assert error(reference.logits(config, state, ids), expected) > 8e-4  # without rounding, it would show
    model.sequence.truncate(0)
    # Products of many tokens round their inputs to 16 bits, so some numbers in the cache are another whole number.
    assert error(model.logits(ids, last=CONTEXT), expected) < 5e-3
    steps = []
    model.sequence.truncate(0)
    for n in range(CONTEXT):
        steps.append(model.logits(ids[: n + 1])[0])
    assert agree([steps], [expected])


def test_what_is_cached_is_used_again_and_what_is_not_is_replaced(random_model, exact, monkeypatch):
    model, state, config = random_model
    rng = np.random.default_rng()
    monkeypatch.setattr("moss_jt.model.CHUNK", 8)  # see above
    a = rng.integers(0, 120, 50)
    b = np.concatenate([a[:20], rng.integers(0, 120, 25)])
    b[20] = (a[20] + 1) % 120
    model.sequence.truncate(0)
    model.logits(a)
    assert (model.sequence.reusable(a), model.sequence.reusable(b)) == (49, 20)
    assert agree([model.logits(b, last=9)], [exact(config, state, b)[-9:]])
    model.sequence.truncate(7)
    assert agree([model.logits(a, last=10)], [exact(config, state, a)[-10:]])


def test_several_sequences(random_model, exact, monkeypatch):
    model, state, config = random_model
    monkeypatch.setattr("moss_jt.model.CHUNK", 8)  # see above
    sequences = model.cache(places=3).sequences
    ids = [np.random.default_rng().integers(0, 120, n) for n in (50, 7, 23)]
    got, expected = [], []
    for parts in ((5, 6, 1), (20, 7, 2), (50, 7, 23)):
        got += model.evaluate([Request(s, i[:n], 4) for s, i, n in zip(sequences, ids, parts)])
        expected += [exact(config, state, i[:n])[-4:] for i, n in zip(ids, parts)]
    assert agree(got, expected)


@pytest.mark.parametrize(("kv_cache", "row"), [("fp16", 2 * 12), ("int8", 12 + 4)])
def test_a_cache_takes_what_its_config_says(kv_cache, row):
    config = Config(3, 48, 4, 96, 4, 40, 100)
    sizes = [np.zeros(shape, dtype).nbytes for shape, dtype in parts_of(config, 40, 2, kv_cache)]
    assert sum(sizes) == 2 * 40 * config.cache_bytes_per_token(kv_cache) == 2 * 40 * 3 * 2 * 4 * row


def test_an_op_refuses_a_cache_of_another_shape(random_model):
    model, _, config = random_model
    layer = model.cache().layers[0]
    rows = ops.sequences(np.array([[0, 0, 0, 1]], np.int32), 1, 1, CONTEXT)
    x, angles, short = (
        jittor().array(np.zeros(shape, np.float32))
        for shape in ((1, config.n_embd), (2, CONTEXT, config.rotary_dim // 2), (1, config.n_head, CONTEXT - 1))
    )
    with model.device.weights.block(0) as tensors:
        block = ops.Block(tensors, 16, 1e-5)
        for wrong, name in (([*layer[:3], short], "value_scales"), ([layer[0], short, *layer[2:]], "values")):
            with pytest.raises(ValueError, match=f"^block: {name} is float32 .* expected"):
                block(x, angles, wrong, rows)
        with pytest.raises(ValueError, match=r"^block: keys is float32 .* expected float16"):
            block(x, angles, [jittor().array(np.zeros((1, 4, CONTEXT, 4), np.float32))] * 2, rows)


# ---- talking ----------------------------------------------------------------------------------------------------------------


class Tokenizer(FakeTokenizer):
    decoder = Bytes.decoder


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder that can be loaded, of random weights."""
    folder, config = tmp_path_factory.mktemp("chat"), small_config(n_ctx=256, n_positions=256, vocab_size=400, n_embd=64)
    write_official(folder / "official", config, random_state(config), masks=False)
    return moss_jt.convert.weights(official_folder(folder / "official"), folder / "ours")


def test_chat(converted):
    def moss() -> Moss:
        return Moss(Model(open_weights(converted), 256, kv_cache="int8"), Tokenizer())

    talking = moss()
    conversation = talking.chat("Be kind.\n")
    for question in ("one", "two", "three"):
        prompt = conversation.prompt_ids(question)
        answer = [p.id for p in conversation.send(question, greedy=True, max_new_tokens=9)]
        assert talking.last_stats.cached_tokens > 0 or question == "one"
        assert answer == [p.id for p in moss().generate(prompt, greedy=True, max_new_tokens=9)]
    assert talking.cache_bytes == talking.model.sequence.length * talking.config.cache_bytes_per_token("int8") > 0
    drafted = [p.id for p in moss().generate(prompt, greedy=True, max_new_tokens=40, drafts=True)]
    assert drafted == [p.id for p in moss().generate(prompt, greedy=True, max_new_tokens=40)]
    both = [[], []]
    for i, piece in moss().generate_batch([prompt, prompt[:-3]], greedy=True, max_new_tokens=9):
        both[i].append(piece.id)
    assert both[0] == drafted[:9]


def test_load(converted):
    assert moss_jt.load(converted).kv_cache == "fp16"
    m = moss_jt.load(converted, kv_cache="int8")
    assert m.kv_cache == "int8" and m.cache_bytes == 0
    m.logits([1, 2, 3])
    assert m.cache_bytes == 3 * m.config.cache_bytes_per_token("int8")
    with pytest.raises(MossError, match=r"^kv_cache is 'int4', it must be fp16 or int8$"):
        moss_jt.load(converted, kv_cache="int4")


# ---- what it costs in accuracy, on the trained small checkpoint -------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(official_checkpoint, tmp_path_factory):
    folder = moss_jt.convert.weights(official_checkpoint("moss-tiny-sft"), tmp_path_factory.mktemp("trained") / "tiny")
    return {kv_cache: moss_jt.load(folder, kv_cache=kv_cache) for kv_cache in ("fp16", "int8")}


@pytest.mark.parametrize("file", ["dialogues.json", "turns.json"])
def test_golden_dialogues(trained, golden, file):
    for record in json.loads((golden / file).read_text()):
        answer = trained["int8"].generate(record["prompt_ids"], greedy=True, max_new_tokens=400)
        assert [piece.id for piece in answer] == record["greedy_ids"]


def test_logits_and_likelihoods_hardly_change(trained, golden):
    changes, likelihoods = [], {"fp16": [], "int8": []}
    for record in json.loads((golden / "dialogues.json").read_text())[:8]:
        answer, found = record["greedy_ids"], {}
        for kv_cache, m in trained.items():
            logits = m.logits(record["prompt_ids"] + answer, last=len(answer) + 1)[:-1].astype(np.float64)
            found[kv_cache] = logits
            shifted = logits - logits.max(-1, keepdims=True)
            of_answer = shifted[np.arange(len(answer)), answer] - np.log(np.exp(shifted).sum(-1))
            likelihoods[kv_cache].append(-of_answer.mean())
        learned = found["fp16"] > -5000
        changes.append(error(found["int8"][learned], found["fp16"][learned]))
    assert 1e-4 < max(changes) < 1e-2
    assert abs(np.mean(likelihoods["int8"]) - np.mean(likelihoods["fp16"])) < 5e-6
