from __future__ import annotations

import json

import numpy as np
import pytest

from moss_jt.dialogues import META, WRITTEN, read_dialogues
from moss_jt.errors import MossError

from .fake_moss import FakeTokenizer

TURN = {
    "Human": "<|Human|>: 1+1?<eoh>\n",
    "Inner Thoughts": "<|Inner Thoughts|>: sum<eot>\n",
    "Commands": '<|Commands|>: Calculate("1+1")<eoc>\n',
    "Tool Responses": "<|Results|>:\nCalculate(\"1+1\") => '2'\n<eor>\n",
    "MOSS": "<|MOSS|>: 2<eom>\n",
}
PLAIN = {"Human": "<|Human|>: 你好<eoh>\n", "MOSS": "<|MOSS|>: 您好！<eom>\n"}


def conversation(*turns: dict, meta: str = "You are MOSS.\n", **changes) -> dict:
    chat = {f"turn_{i}": turn for i, turn in enumerate(turns, 1)}
    return {"conversation_id": 1, "meta_instruction": meta, "num_turns": len(turns), "chat": chat, **changes}


@pytest.fixture
def write(tmp_path):
    def to_file(*lines: dict | str | bytes):
        as_bytes = [x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines]
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"\n".join(as_bytes) + b"\n")
        return path

    return to_file


def read(path, **options):
    return list(read_dialogues(path, FakeTokenizer(), **options))


def text(ids) -> str:
    return FakeTokenizer().decode(ids)


def test_ids_are_the_values_one_after_another(write):
    (dialogue,) = read(write(conversation(TURN, PLAIN)))
    values = ["You are MOSS.\n", *TURN.values(), *PLAIN.values()]
    assert text(dialogue.ids) == "".join(values)
    assert dialogue.ids.dtype == np.int32
    assert [span.role for span in dialogue.spans] == [META, *TURN, *PLAIN]
    assert [text(dialogue.ids[span.start : span.end]) for span in dialogue.spans] == values


def test_each_value_is_encoded_by_itself(write):
    class Counting(FakeTokenizer):
        def encode(self, text):
            return [len(text)]

    (dialogue,) = read_dialogues(write(conversation(PLAIN)), Counting())
    assert dialogue.ids.tolist() == [len("You are MOSS.\n"), *map(len, PLAIN.values())]


def test_answers_are_what_the_model_writes_up_to_its_end_token(write):
    (dialogue,) = read(write(conversation(TURN, PLAIN)))
    first = TURN["Inner Thoughts"] + TURN["Commands"]
    assert text(dialogue.ids[dialogue.answers]) == (first + TURN["MOSS"] + PLAIN["MOSS"]).replace("<eoc>\n", "<eoc>").replace(
        "<eom>\n", "<eom>"
    )
    given = [span for span in dialogue.spans if span.role not in WRITTEN]
    assert not any(dialogue.answers[span.start : span.end].any() for span in given)


def test_an_answer_without_an_end_token_counts_whole(write):
    (dialogue,) = read(write(conversation({**PLAIN, "MOSS": "cut off\n"})))
    assert text(dialogue.ids[dialogue.answers]) == "cut off\n"


@pytest.mark.parametrize("length", [1, 5, 6, 7, 8, 9, 40])
def test_the_official_mask(write, length):
    """finetune_moss.py gives no label to the meta instruction, nor to [5:-2] of the tool's responses."""
    (dialogue,) = read(write(conversation({**TURN, "Tool Responses": "x" * length}, TURN)))
    expected = []
    for span in dialogue.spans:
        n = span.end - span.start
        if span.role == "Tool Responses":
            expected += [not 5 <= t < n - 2 for t in range(n)]
        else:
            expected += [span.role != META] * n
    assert dialogue.trained.tolist() == expected


def test_a_turn_that_passes_the_limit_and_all_after_it_are_left_out(write):
    long = {**PLAIN, "MOSS": "x" * 2100}
    path = write(conversation(PLAIN, TURN, long, PLAIN), conversation(long, PLAIN), conversation(PLAIN))
    told = []
    first, last = read(path, left_out=lambda line, turns: told.append((line, turns)))
    assert [span.role for span in first.spans] == [META, *PLAIN, *TURN]
    assert (first.line, last.line) == (1, 3)
    assert told == [(1, 2), (2, 2)]


def test_a_turn_that_just_fits_is_kept(write):
    path = write(conversation(PLAIN))
    (whole,) = read(path)
    assert len(read(path, limit=len(whole.ids))) == 1
    assert read(path, limit=len(whole.ids) - 1) == []


def test_blank_lines_and_a_byte_order_mark_are_no_matter(write):
    line = json.dumps(conversation(PLAIN)).encode()
    assert [d.line for d in read(write(b"\xef\xbb\xbf" + line + b"\r", b"", b"  ", line))] == [1, 4]


def without(turn: dict, role: str) -> dict:
    return {key: value for key, value in turn.items() if key != role}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        (b"\xff", "not UTF-8"),
        ("[1]", "not a conversation"),
        (json.dumps({"meta_instruction": "x", "num_turns": 1}), "not a conversation"),
        (conversation(PLAIN, meta=""), '"meta_instruction" is missing'),
        (conversation(PLAIN, num_turns=0), '"num_turns"'),
        (conversation(PLAIN, num_turns=True), '"num_turns"'),
        (conversation(PLAIN, num_turns=2), '"turn_2" is missing'),
        (conversation({**PLAIN, "Moss": "x"}), '"turn_1" has the key "Moss"'),
        (conversation(PLAIN, without(PLAIN, "MOSS")), '"turn_2" has no "MOSS"'),
        (conversation(without(PLAIN, "Human")), '"turn_1" has no "Human"'),
        (conversation({**PLAIN, "Human": 7}), '"Human" of "turn_1" is empty, or is no text'),
        (conversation({**PLAIN, "Human": ""}), '"Human" of "turn_1" is empty, or is no text'),
    ],
)
def test_errors_name_file_and_line(write, line, said):
    path = write(conversation(PLAIN), "", line)
    with pytest.raises(MossError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert said in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(MossError, match=r"no\.jsonl: cannot be read: No such file"):
        read(tmp_path / "no.jsonl")
