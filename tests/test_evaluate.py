from __future__ import annotations

import errno
import io
import shutil
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest

from moss_jt import MossError, evaluate
from moss_jt.dialogues import Dialogue
from moss_jt.evaluate import Place, compare, perplexity

V = 11


class Predictor:
    """Logits that depend on the last two ids and the position, as a model's depend on all: float32 from float64 tables."""

    def __init__(self, seed: int, vocabulary: int = V):
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self._table = np.random.default_rng(seed).standard_normal((3, vocabulary, vocabulary)) * 2
        self.held = 0

    def at(self, ids, position: int) -> np.ndarray:
        """The logits after ids[position], float32 (V,)."""
        before = ids[position - 1] if position else 0
        return (self._table[0, ids[position]] + self._table[1, before] + self._table[2, position % V]).astype(np.float32)

    def logits(self, ids, last: int = 1) -> np.ndarray:
        self.held = max(self.held, last)
        return np.array([self.at(ids, position) for position in range(len(ids) - last, len(ids))])


def dialogue(line: int, length: int, *answers: tuple[int, int]) -> Dialogue:
    ids = np.random.default_rng(line).integers(0, V, length).astype(np.int32)
    mask = np.zeros(length, bool)
    for start, end in answers:
        mask[start:end] = True
    return Dialogue(line, ids, (), ~mask, mask)


DIALOGUES = [dialogue(1, 30, (4, 9), (12, 30)), dialogue(3, 7, (1, 2)), dialogue(4, 5), dialogue(6, 90, (10, 80))]
PLACES = [(d, t) for d in DIALOGUES for t in np.flatnonzero(d.answers)]


def log_p(model: Predictor, d: Dialogue, t: int) -> np.ndarray:
    x = model.at(d.ids, t - 1).astype(np.float64)
    return x - np.log(np.exp(x).sum())


@pytest.mark.parametrize("at_once", [1, 7, 16, 256])
def test_perplexity_counts_answers_and_nothing_else(monkeypatch, at_once):
    monkeypatch.setattr(evaluate, "AT_ONCE", at_once)
    model = Predictor(1)
    score = perplexity(model, DIALOGUES)
    losses = [-log_p(model, d, t)[d.ids[t]] for d, t in PLACES]
    assert score.tokens == len(PLACES) == 94
    assert score.loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert score.perplexity == pytest.approx(np.exp(np.mean(losses)))
    assert score.accuracy == np.mean([log_p(model, d, t).argmax() == d.ids[t] for d, t in PLACES])
    assert model.held <= at_once


def test_a_loss_beyond_all_numbers():
    class Certain(Predictor):
        def at(self, ids, position):
            return np.where(np.arange(V) == ids[position + 1] if position + 1 < len(ids) else 0, -1e4, 0).astype(np.float32)

        def logits(self, ids, last=1):
            whole = DIALOGUES[1].ids
            return np.array([self.at(whole, position) for position in range(len(ids) - last, len(ids))])

    assert perplexity(Certain(1), DIALOGUES[1:2]).perplexity == np.inf


@pytest.mark.parametrize("at_once", [1, 7, 256])
def test_compare(monkeypatch, at_once):
    monkeypatch.setattr(evaluate, "AT_ONCE", at_once)
    a, b = Predictor(1), Predictor(1)
    b._table = b._table + np.random.default_rng(2).standard_normal(b._table.shape) * 0.3
    found = compare(lambda: a, lambda: b, DIALOGUES)
    p, q = (np.array([log_p(model, d, t) for d, t in PLACES]) for model in (a, b))
    kl = (np.exp(p) * (p - q)).sum(1)
    differ = p.argmax(1) != q.argmax(1)
    assert found.agreement == 1 - differ.mean() and 0 < found.agreed < len(PLACES)
    assert (found.mean_kl, found.max_kl) == (pytest.approx(kl.mean()), pytest.approx(kl.max()))

    def place(i: int) -> Place:
        d, t = PLACES[i]
        return Place(d.line, int(t), int(d.ids[t]), int(p[i].argmax()), int(q[i].argmax()))

    assert found.max_kl_at == place(int(kl.argmax()))
    assert found.first_divergence == place(int(differ.argmax()))
    alone = perplexity(b, DIALOGUES)
    assert (found.other.loss, found.other.right, found.other.tokens) == (pytest.approx(alone.loss), alone.right, alone.tokens)
    assert found.reference.loss == pytest.approx(perplexity(a, DIALOGUES).loss)


def test_a_model_does_not_differ_from_itself():
    found = compare(lambda: Predictor(1), lambda: Predictor(1), DIALOGUES)
    assert (found.agreement, found.mean_kl, found.max_kl, found.first_divergence) == (1, 0, 0, None)


def test_one_model_at_a_time():
    """The second one is loaded when the first one is gone."""
    import gc
    import weakref

    alive = []

    def load(seed: int):
        gc.collect()
        assert not any(ref() for ref in alive)
        model = Predictor(seed)
        alive.append(weakref.ref(model))
        return model

    compare(lambda: load(1), lambda: load(2), DIALOGUES)
    assert len(alive) == 2


def test_progress_reaches_its_end():
    seen = []
    perplexity(Predictor(1), DIALOGUES, lambda *x: seen.append(x))
    total = sum(len(d.ids) for d in DIALOGUES)
    assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)
    seen.clear()
    compare(lambda: Predictor(1), lambda: Predictor(2), DIALOGUES, lambda *x: seen.append(x))
    assert seen[-1] == (2 * total, 2 * total)


def test_a_disk_that_is_full(monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(MossError, match="the reference's logits cannot be kept there: No space left on device; set TMPDIR"):
        compare(lambda: Predictor(1), lambda: 1 / 0, DIALOGUES)


def test_what_cannot_be_measured(monkeypatch):
    with pytest.raises(MossError, match="no answers to measure"):
        perplexity(Predictor(1), [DIALOGUES[2]])
    with pytest.raises(MossError, match="no answers to measure"):
        compare(lambda: 1 / 0, lambda: 1 / 0, [])
    with pytest.raises(MossError, match="vocabularies of 11 and 12"):
        compare(lambda: Predictor(1), lambda: Predictor(1, 12), DIALOGUES)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=94 * V * 4 - 1))
    with pytest.raises(MossError, match=r"0\.00 GB are needed for the reference's logits, .* set TMPDIR"):
        compare(lambda: Predictor(1), lambda: Predictor(2), DIALOGUES)


def test_the_trained_checkpoint_knows_its_answers(official_checkpoint, golden, shared, tmp_path):
    """The greedy answers that the official code recorded, and which bits of a model matter to them how much."""
    import moss_jt
    from moss_jt.dialogues import read_dialogues

    from .test_benchmarks import program

    program("golden_dialogues").main(str(golden), str(shared / "moss_tokenizer"), str(tmp_path / "data.jsonl"))
    for dtype in ("fp16", "int4"):
        moss_jt.convert.weights(official_checkpoint("moss-tiny-sft"), tmp_path / dtype, dtype)
    loaded = {dtype: moss_jt.load(tmp_path / dtype) for dtype in ("fp16", "int4")}
    dialogues = list(read_dialogues(tmp_path / "data.jsonl", loaded["fp16"].tokenizer))[:5]
    found = compare(lambda: loaded["fp16"], lambda: loaded["int4"], dialogues)
    assert found.agreement == found.reference.accuracy == found.other.accuracy == 1
    assert found.reference.perplexity < 1.001 and found.other.perplexity < 1.001
    assert 0 < found.mean_kl < 1e-4
