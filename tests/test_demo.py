"""The demo model: its dialogues are what they say they are, and the model in the package does what it is there for."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import re
import sys
from itertools import islice

import click
import pytest

import moss_jt
from moss_jt import demo
from moss_jt.cli import chat_commands, group
from moss_jt.dialogues import read_dialogues
from moss_jt.plugins import Calculator, Solver
from moss_jt.tokenizer import load_tokenizer

from .conftest import ROOT

sys.path.insert(0, str(ROOT / "demo"))
arithmetic, conversations, templates = (importlib.import_module(n) for n in ("arithmetic", "conversations", "templates"))


@pytest.fixture(scope="module")
def some() -> list[dict]:
    author = conversations.Author(1, frozenset(map(conversations.normalised, conversations.held_out())))
    return list(islice(iter(author.conversation, None), 600))


@pytest.fixture(scope="module")
def moss():
    return moss_jt.load(demo.FOLDER, device="cpu")


def answers(language: str) -> list[str]:
    topics = templates.Topics(language)
    return [answer for subject in topics.tool + topics.talk for answer in subject.answers]


# ---- the dialogues ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_dialogues(some):
    author = conversations.Author(1, frozenset(map(conversations.normalised, conversations.held_out())))
    assert [author.conversation() for _ in range(20)] == some[:20]
    assert conversations.Author(2).conversation() != some[0]


def test_dialogues_are_in_the_official_format_and_every_text_comes_back(some, tmp_path):
    conversations.write(tmp_path / "some.jsonl", some)
    tokenizer = load_tokenizer(demo.FOLDER)
    for raw, read in zip(some, read_dialogues(tmp_path / "some.jsonl", tokenizer)):
        parts = [raw["meta_instruction"], *(part for turn in raw["chat"].values() for part in turn.values())]
        assert tokenizer.decode(read.ids) == "".join(parts)


def test_no_held_out_question_is_in_the_dialogues(some):
    held_out = set(map(conversations.normalised, conversations.held_out()))
    assert len(held_out) == 40
    asked = {turn["Human"][len("<|Human|>: ") : -len("<eoh>\n")] for c in some for turn in c["chat"].values()}
    assert len(asked) > 500 and not held_out & set(map(conversations.normalised, asked))


def test_a_forbidden_question_is_not_asked():
    every = [turn["Human"] for _ in range(40) for turn in conversations.Author(5).conversation()["chat"].values()]
    forbidden = conversations.normalised(every[0][len("<|Human|>: ") : -len("<eoh>\n")])
    author = conversations.Author(5, frozenset([forbidden]))
    now = [turn["Human"] for _ in range(40) for turn in author.conversation()["chat"].values()]
    assert every[0] not in now


@pytest.mark.parametrize("language", ["en", "zh"])
def test_results_in_the_dialogues_are_the_plugins(language):
    rng, calculator = random.Random(7), Calculator()
    for task in (arithmetic.calculation(rng, language) for _ in range(300)):
        assert calculator.run(task.argument) == f"'{task.result}'", task
    assert calculator.run("5/0") == f"'{arithmetic.NO_RESULT}'"
    if importlib.util.find_spec("sympy") is None:
        pytest.skip("sympy is not installed")
    solver = Solver()
    for task in (arithmetic.equation(rng, language) for _ in range(60)):
        if task.result not in arithmetic.UNSOLVED:
            assert solver.run(task.argument) == task.result, task


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_the_answers_name_is_there(language):
    """Options, commands of the chat, commands of moss-jt, and files."""
    options, commands = {"--help", "--version"}, set()

    def walk(command: click.Command, name: str) -> None:
        commands.add(name)
        options.update(o for p in command.params for o in (*p.opts, *p.secondary_opts))
        for sub in command.list_commands(None) if isinstance(command, click.Group) else ():
            walk(command.get_command(None, sub), f"{name} {sub}".strip())

    walk(group, "")
    for answer in answers(language):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", answer)) <= options, answer
        named = re.findall(r"(?<![\w./~-])/([a-z]+)(?![\w/.])", answer)
        assert set(named) <= set(chat_commands.COMMANDS), answer
        for first, second in re.findall(r"moss-jt (convert|eval|train) ([a-z]+)", answer):
            assert f"{first} {second}" in commands, answer
        for file in re.findall(r"docs/\w+\.md|README\w*\.md|CHANGELOG\.md|moss_jt/demo|demo/make\.py", answer):
            assert (ROOT / file).exists(), answer


# ---- the model --------------------------------------------------------------------------------------------------------------


def test_it_is_small_and_has_its_own_system_text():
    assert sum(p.stat().st_size for p in demo.FOLDER.iterdir() if p.is_file()) < 4_000_000
    assert (demo.FOLDER / "meta_instruction.txt").read_text("utf-8") == conversations.meta_instruction()
    assert json.loads((demo.FOLDER / "config.json").read_text("utf-8"))["moss_jt"]["dtype"] == "int8"


@pytest.mark.parametrize(
    "question, command, result",
    [("what is 1234*56?", 'Calculate("1234*56")', "69104"), ("计算 875-198", 'Calculate("875-198")', "677")],
)
def test_it_calculates(moss, question, command, result):
    conversation, told = moss.chat(), []
    for _ in conversation.send(question, greedy=True, told=lambda *said: told.append(said)):
        pass
    assert told == [(command, f"'{result}'")] and result in conversation.turns[-1].answer


def test_it_knows_moss_jt(moss):
    for question, part in (("what is moss-jt?", "Fudan"), ("怎么退出？", "Ctrl-D")):
        conversation = moss.chat()
        for _ in conversation.send(question, greedy=True):
            pass
        assert part in conversation.turns[-1].answer
