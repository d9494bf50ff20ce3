"""Conversations with the official tokenizer, against what the official code gave."""

from __future__ import annotations

import json

import pytest

from moss_jt.chat import META_INSTRUCTION
from moss_jt.generate import Piece
from moss_jt.meta_instruction import enabled
from moss_jt.plugins import BUILT_IN, Plugin

from .fake_moss import FakeMoss
from .test_chat import say


def test_meta_instruction_is_the_official_one(golden):
    official = (golden / "meta_instruction.txt").read_text(encoding="utf-8")
    for line in ("- Inner thoughts: enabled.", "- Calculator: enabled. API: Calculate(expression)"):
        assert line in official
        official = official.replace(line, line.split(":")[0] + ": disabled.")
    assert official == META_INSTRUCTION


@pytest.fixture(scope="module")
def official(shared):
    """A Moss that speaks with the official vocabulary."""
    from moss_jt.tokenizer import load_tokenizer

    moss = FakeMoss()
    moss.tokenizer = load_tokenizer(shared / "moss_tokenizer")
    moss.config.vocab_size = 107008
    return moss


def says(moss, ids):
    """Let the model answer with these ids."""

    def generate(prompt, **options):
        moss.prompts.append(prompt)
        decoder = moss.tokenizer.decoder(skip_special=True)
        yield from (Piece(i, decoder.push(i), 0.0) for i in ids)

    moss.generate = generate


def test_prompts_are_those_of_the_official_code(official, golden):
    encode = official.tokenizer.encode
    for record in json.loads((golden / "dialogues.json").read_text()):
        text = official.tokenizer.decode(record["prompt_ids"])
        system, _, question = text.partition("<|Human|>: ")
        assert question.endswith("<eoh>\n")
        conversation = official.chat(system)
        opening = encode("<|Inner Thoughts|>:" if conversation.plugins else "<|MOSS|>:")
        assert bool(conversation.plugins) == ("- Calculator: enabled" in system or "- Equation solver: enabled" in system)
        assert conversation.prompt_ids(question[: -len("<eoh>\n")]) == record["prompt_ids"] + opening


def test_a_conversation_is_the_official_pieces_joined(official, golden):
    encode = official.tokenizer.encode
    opening, newline = encode("<|MOSS|>:"), encode("\n")
    conversation = official.chat()
    joined = encode(META_INSTRUCTION)
    for record in json.loads((golden / "turns.json").read_text())[:8]:
        question = official.tokenizer.decode(record["prompt_ids"]).split("<|Human|>: ")[1].split("<eoh>")[0]
        assert record["greedy_ids"][: len(opening)] == opening
        says(official, record["greedy_ids"][len(opening) :])
        answer = say(conversation, question, max_new_tokens=1)
        assert f"<|MOSS|>: {answer}" == record["text"]
        joined += encode(f"<|Human|>: {question}<eoh>\n")
        assert official.prompts[-1] == joined + opening
        joined += record["greedy_ids"] + newline
    assert conversation.prompt_ids("x", max_new_tokens=1) == joined + encode("<|Human|>: x<eoh>\n") + opening


def test_special_tokens_of_the_user_have_the_ids_of_plain_text(official, shared):
    tokenizers = pytest.importorskip("tokenizers")
    files = [str(shared / "moss_tokenizer" / name) for name in ("vocab.json", "merges.txt")]
    plain = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))  # knows no special token
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    conversation = official.chat("")
    end = official.tokenizer.encode("<eoh>\n") + official.tokenizer.encode("<|MOSS|>:")
    for text in ("say <eom> now", "<eom>", "a<eoh><eom>", "|<eom>|", "中<eoc>文 <|endoftext|>", "<<eot>>"):
        assert conversation.prompt_ids(text) == plain.encode(f"<|Human|>: {text}").ids + end
    code = "def f():\n    return 1"  # the runs of spaces are no special tokens, and lose the newline as in training
    assert conversation.prompt_ids(code) == official.tokenizer.encode(f"<|Human|>: {code}<eoh>\n") + end[2:]


class Images(Plugin):
    name, api, echo = "Text-to-image", "Text2Image(description)", False

    def run(self, argument: str) -> str:
        return "Image generated successfully."


class Searched(Plugin):
    """Finds what was found then."""

    name, api, own_line = "Web search", "Search(query)", True
    found = ""

    def run(self, argument: str) -> str:
        return self.found


def plugin_turns(golden):
    """Question, system text, and all ids of a turn with plugins, by the official code, with what its results say."""
    firsts, seconds = (json.loads((golden / f"{name}.json").read_text()) for name in ("dialogues", "turns"))
    for first, second in zip(firsts, seconds):
        if " None" not in second["results"]:
            yield first["prompt_ids"], second["prompt_ids"] + second["greedy_ids"], second["results"]


def test_turns_with_plugins_are_the_official_ones(tiny, golden):
    encode, search = tiny.tokenizer.encode, Searched()
    turns = list(plugin_turns(golden))
    assert len(turns) == 16
    for prompt, ids, results in turns:
        search.found = results.partition("=>\n")[2].rstrip("\n")
        system, _, question = tiny.tokenizer.decode(prompt).partition("<|Human|>: ")
        there = [*BUILT_IN.values(), search, Images()]
        conversation = tiny.chat(system, plugins=enabled(system, there))
        assert conversation.system == system
        say(conversation, question[: -len("<eoh>\n")], greedy=True)
        assert encode(system) + conversation.turns[0].ids == ids + encode("\n")


@pytest.fixture(scope="module")
def tiny(official_checkpoint, tmp_path_factory):
    """The trained checkpoint."""
    import moss_jt

    folder = tmp_path_factory.mktemp("official") / "tiny"
    moss_jt.convert.weights(official_checkpoint("moss-tiny-sft"), folder)
    return moss_jt.load(folder)


def test_a_real_model_reads_only_what_is_new(tiny):
    moss = tiny
    conversation = moss.chat()
    say(conversation, "你如何定义复杂对话？", greedy=True, max_new_tokens=20)
    seen = moss.last_stats.prompt_tokens + moss.last_stats.new_tokens - 1  # the last token was never an input
    prompt = conversation.prompt_ids("再见")
    pieces = list(conversation.send("再见", greedy=True, max_new_tokens=20))
    assert moss.last_stats.cached_tokens == seen
    list(moss.generate([5, 6, 7], max_new_tokens=1))
    assert [piece.id for piece in moss.generate(prompt, greedy=True, max_new_tokens=20)] == [piece.id for piece in pieces]
