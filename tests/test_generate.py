"""The loop from logits to text, on a model and a tokenizer made of a few lines."""

from __future__ import annotations

import codecs

import numpy as np
import pytest

from moss_jt import MossError
from moss_jt.drafts import Drafts
from moss_jt.generate import Answer, Stats, generate
from moss_jt.sampling import Sampling
from moss_jt.stopping import Stop

EOM, EOC = 256, 257


class Bytes:
    """Token = byte, and two special ones."""

    special_ids = frozenset((EOM, EOC))

    def token_id(self, token):
        return {"<eom>": EOM, "<eoc>": EOC, "x": ord("x")}.get(token)

    def decoder(self, skip_special):
        return Decoder()


class Decoder:
    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token):
        return "" if token >= EOM else self._utf8.decode(bytes([token]))

    def finish(self):
        return self._utf8.decode(b"", True)


class Script:
    """A model that says a text, whatever it is asked; keeps what it was given."""

    def __init__(self, answer: bytes, end: int = EOM, prompt: int = 2):
        self._answer, self._prompt = [*answer, end], prompt
        self.asked = []

    def reusable(self, ids):
        return 1

    def evaluate(self, requests):
        self.asked += [list(request.ids) for request in requests]
        return [self._logits(len(request.ids), request.last) for request in requests]

    def _logits(self, length, last):
        logits = np.zeros((last, 258), np.float32)
        for i in range(last):
            said = length - last + 1 + i - self._prompt
            logits[i, self._answer[min(said, len(self._answer) - 1)]] = 9
        return logits


def run(model, stop=None, max_new_tokens=50, prompt=(1, 2), context=100, drafts=None):
    stats, limit = Stats(), min(len(prompt) + max_new_tokens, context)
    answer = Answer(Bytes(), list(prompt), Stop.of(stop, Bytes(), EOM), Sampling(greedy=True), limit, drafts, stats)
    return [piece for _, piece in generate(model, [answer], [model])], stats


def test_pieces_until_the_stop_token_which_is_included():
    model = Script("aé中".encode())
    pieces, stats = run(model)
    assert [p.id for p in pieces] == [*"aé中".encode(), EOM]
    assert [p.text for p in pieces] == ["a", "", "é", "", "", "中", ""]
    assert stats.stopped and (stats.prompt_tokens, stats.cached_tokens, stats.new_tokens) == (2, 1, 7)
    assert model.asked[0] == [1, 2] and model.asked[-1] == [1, 2, *"aé中".encode()]
    assert stats.prefill_seconds == pieces[0].seconds
    assert stats.decode_seconds == pytest.approx(sum(p.seconds for p in pieces[1:]))


def test_commands_end_stops_too_unless_stops_are_given():
    assert run(Script(b"ab", EOC))[0][-1].id == EOC
    assert run(Script(b"ab", EOC), stop="<eom>", max_new_tokens=9)[1].new_tokens == 9


def test_limits_end_an_answer_with_what_the_decoder_holds():
    pieces, stats = run(Script("中文".encode()), max_new_tokens=4)
    assert "".join(p.text for p in pieces) == "中\ufffd" and not stats.stopped
    pieces, _ = run(Script(b"x" * 50), context=10)
    assert len(pieces) == 8  # prompt and answer fill the context


@pytest.mark.parametrize(
    "stop, shown", [("cd", "ab"), (["cd", "b"], "a"), ("abcdefgh", ""), ("zz", "abcdefgh"), ("ef", "abcd")]
)
def test_stop_strings_are_not_shown_wherever_tokens_end(stop, shown):
    pieces, stats = run(Script(b"abcdefgh"), stop=stop, max_new_tokens=8)
    assert "".join(p.text for p in pieces) == shown
    assert stats.stopped == (shown != "abcdefgh")


def test_what_only_begins_a_stop_string_comes_late_not_never():
    pieces, _ = run(Script(b"abab!"), stop=["abc"], max_new_tokens=5)
    assert [p.text for p in pieces] == ["", "", "ab", "", "ab!"]


def test_what_stops():
    assert Stop.of(None, Bytes(), 7) == Stop(frozenset((7, EOM, EOC)))
    assert Stop.of(["<eom>", 5, "x", "end"], Bytes(), 7) == Stop(frozenset((EOM, 5)), ("x", "end"))
    assert Stop.of([], Bytes(), 7) == Stop()
    with pytest.raises(MossError, match="empty stop"):
        Stop.of("", Bytes(), 7)


def test_drafts_come_true_in_fewer_sweeps_and_change_nothing():
    text = b"one two three, one two three, one two three, one two three."
    plain, _ = run(Script(text), max_new_tokens=80)
    drafted, stats = run(Script(text), max_new_tokens=80, drafts=Drafts())
    assert [(p.id, p.text) for p in drafted] == [(p.id, p.text) for p in plain]
    assert stats.new_tokens == len(plain) and stats.sweeps < 0.6 * len(plain)


def test_several_answers_share_sweeps():
    models = [Script(b"abc"), Script(b"wxyz!", end=EOC)]

    class Both:
        def evaluate(self, requests):
            return [request.sequence.evaluate([request])[0] for request in requests]

    stop, stats = Stop.of(None, Bytes(), EOM), [Stats(), Stats()]
    answers = [Answer(Bytes(), [1, 2], stop, Sampling(greedy=True), 40, None, s) for s in stats]
    got = list(generate(Both(), answers, models))
    assert ["".join(p.text for i, p in got if i == n) for n in (0, 1)] == ["abc", "wxyz!"]
    assert [i for i, _ in got] == [0, 1, 0, 1, 0, 1, 0, 1, 1, 1]
    assert [s.sweeps for s in stats] == [4, 6]
