from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest

import moss_jt
from moss_jt.chat import META_INSTRUCTION
from moss_jt.cli import chat as cli
from moss_jt.cli import plan, ui
from moss_jt.cli.chat_commands import COMMANDS, parse
from moss_jt.cli.chat_input import Lines
from moss_jt.errors import MossError

from .conftest import ROOT
from .fake_moss import FakeMoss, runner

FAKE = [sys.executable, "-m", "tests.fake_moss", "chat", "-m", "folder"]


@pytest.fixture
def moss(monkeypatch):
    fake = FakeMoss()
    monkeypatch.setattr(moss_jt, "load", lambda *a, **k: fake, raising=False)
    return fake


def run(text: str, *args: str):
    """A chat whose messages come from a pipe."""
    return runner().invoke(cli.command, ["-m", "folder", *args], input=text)


def answers(text: str, *args: str) -> str:
    result = run(text, *args)
    assert result.exit_code == 0, result.output
    return result.stdout


def questions(moss) -> list[str]:
    return re.findall(r"<\|Human\|>: (.*?)<eoh>", moss.tokenizer.decode(moss.prompts[-1]), re.DOTALL)


# -- messages and commands ------------------------------------------------------------------------------------------------


def test_each_line_is_a_message_and_only_answers_are_printed(moss):
    assert answers("one\n\n  二\r\nthree") == "You said: one\nYou said: 二\nYou said: three\n"
    assert questions(moss) == ["one", "二", "three"]


@pytest.mark.parametrize(
    ("raw", "messages"),
    [
        (b"a\\\nb\nc\n", ["a\nb", "c"]),
        (b"a\\\n\\\nb\\", ["a\n\nb\n"]),
        (b"\\\n\nx", ["\n", "x"]),
        (b"a \xff\r\n", ["a \ufffd"]),
        (b"", []),
    ],
)
def test_lines(raw, messages):
    lines = Lines(io.BytesIO(raw), False, nullcontext)
    for message in messages:
        assert lines.read() == message
    with pytest.raises(EOFError):
        lines.read()


@pytest.mark.parametrize(
    ("message", "command"),
    [
        ("/help", ("help", "")),
        ("/Set  seed 3 ", ("set", "seed 3")),
        ("/system two\nlines", ("system", "two\nlines")),
        (" clear ", ("clear", "")),
        ("stop", ("exit", "")),
        ("stop it", None),
        ("/usr/bin/env is what?", None),
        ("/* a comment */", None),
        (" /help", None),
        ("/", ("", "")),
        ("/?", ("?", "")),
    ],
)
def test_what_is_a_command(message, command):
    assert parse(message) == command


def test_clear_and_stop_are_those_of_the_official_demo(moss):
    assert answers("one\nclear\ntwo\nstop\nthree\n") == "You said: one\nYou said: two\n"
    assert questions(moss) == ["two"]


def test_undo_retry_exit(moss):
    assert answers("one\ntwo\n/undo\nthree\n/retry\n/exit\nnever\n").splitlines() == [
        "You said: one",
        "You said: two",
        "You said: three",
        "You said: three",
    ]
    assert questions(moss) == ["one", "three"]


def test_system(moss, tmp_path):
    file = tmp_path / "s.txt"
    file.write_text("From a file.\n")
    seen = []
    moss.answer = lambda question: seen.append(moss.tokenizer.decode(moss.prompts[-1]).split("<|Human|>")[0]) or " ok"
    answers(f"a\n/system Be\\\nbrief.\nb\n/system @{file}\nc\n/system default\nd\n", "--system", "Start.")
    assert seen == ["Start.\n", "Be\nbrief.\n", "From a file.\n", META_INSTRUCTION]
    assert "Be kind.\n" in run("/system\n", "--system", "Be kind.").stderr


def test_save_and_load(moss, tmp_path):
    file = tmp_path / "talk.json"
    answers(f"one\n/save {file}\ntwo\n/load {file}\nthree\n/save {file}")
    assert questions(moss) == ["one", "three"]
    answers("four", "--load", str(file))
    assert questions(moss) == ["one", "three", "four"]
    answers("four", "--load", str(file), "--system", "Else.")
    assert moss.tokenizer.decode(moss.prompts[-1]).startswith("Else.\n<|Human|>: one<eoh>")


def test_set(moss):
    answers("/set temperature 1.5\n/set greedy on\n/set max_new_tokens 30\nx\n/set temperature default\ny\n", "--top-k", "5")
    assert [call["temperature"] for call in moss.calls] == [1.5, 0.7]
    assert all(call["greedy"] is True and call["top_k"] == 5 and call["max_new_tokens"] == 30 for call in moss.calls)
    shown = run("/set\n", "--seed", "7").stderr
    assert (
        re.search(r"seed +7\n", shown)
        and re.search(r"repetition_penalty +default\n", shown)
        and re.search(r"greedy +off\n", shown)
    )


def test_a_seed_repeats_the_session_but_not_the_answer(moss):
    answers("x\ny\n/retry\n", "--seed", "7")
    assert [call["seed"] for call in moss.calls] == [7, 8, 9]
    answers("x\n")
    assert moss.calls[-1]["seed"] is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/hepl", "no command /hepl; did you mean /help?"),
        ("/quux", "no command /quux; /help lists them"),
        ("/", "no command /; /help"),
        ("/clear all", "/clear takes nothing"),
        ("/set heat 3", "no setting heat; there are temperature, "),
        ("/set temperature hot", "temperature: 'hot' is not a valid float"),
        ("/set temperature", "temperature: '' is not"),
        ("/set temperature -1", "temperature is -1.0, it must be"),
        ("/set max_new_tokens 0", "max_new_tokens: 0 is not in the range"),
        ("/stats maybe", "/stats takes on or off"),
        ("/save", "/save needs a file's name"),
        ("/load /no/such", "/no/such: cannot be read"),
        ("/system @/no/such", "/no/such: cannot be read"),
        ("/undo", "no turn"),
        ("/retry", "no turn"),
    ],
)
def test_mistakes_are_one_line_and_end_a_pipe(moss, line, said):
    result = run(f"{line}\nnever\n")
    assert isinstance(result.exception, MossError) and said in str(result.exception) and "\n" not in str(result.exception)
    assert not moss.prompts


# -- plugins --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calculating(moss):
    """Divides where it may."""
    moss.thinks = lambda question: ' divide<eot>\n<|Commands|>: Calculate("60/6"), Solve("x+y=3;x-y=1")<eoc>'
    return moss


def test_answers_on_stdout_and_commands_beside_them(calculating):
    result = run("one\n/retry\n", "--plugins", "calculator,solver")
    assert result.stdout == "You said: one\n" * 2
    assert result.stderr == 'Calculate("60/6") → 10.0\nSolve("x+y=3;x-y=1") → x = 2, y = 1\n' * 2


def test_which_plugins(calculating):
    on = "- Calculator: enabled. API: Calculate(expression)\n"
    calculating.meta_instruction = f"Hi.\n{on}"
    seen = []
    calculating.answer = lambda question: seen.append("Calculate(" in run_before(calculating)) or " ok"
    answers("a\n/plugins off\nb\n/system Brief.\nc\n/plugins calculator\nd\n/system default\ne\n/plugins default\nf\n")
    answers("g\n", "--no-plugins")
    answers("h\n", "--system", "Brief.")
    answers("i\n", "--system", f"Brief.\n{on}")
    assert seen == [True, False, False, True, True, True, False, False, True]
    shown = run("/plugins\n").stderr
    assert re.search(r"calculator +Calculate\(expression\) +on\n +solver +Solve\(equation\) +off\n", shown)


def run_before(moss) -> str:
    """What came between the last question and its answer."""
    return moss.tokenizer.decode(moss.prompts[-1]).rsplit("<eoh>", 1)[1]


def test_plugins_of_a_saved_conversation(calculating, tmp_path):
    file = tmp_path / "talk.json"
    answers(f"one\n/save {file}\n", "--plugins", "calculator")
    answers("two\n", "--load", str(file))
    assert "Calculate(" in run_before(calculating)
    answers(f"/load {file}\ntwo\n", "--no-plugins")
    assert "Calculate(" not in run_before(calculating) and "Calculate(" in calculating.tokenizer.decode(calculating.prompts[-1])


def test_no_such_plugin(moss):
    result = run("", "--plugins", "search")
    assert result.exit_code == 2 and "no plugin search; there are calculator, solver" in result.stderr
    assert str(run("/plugins search\n").exception) == "no plugin search; there are calculator, solver"


def test_long_results_are_short_on_the_terminal(capsys):
    ui.ran('Calculate("9^999")', f"'{9**999}'")
    assert len(capsys.readouterr().err) < 240


# -- settings -------------------------------------------------------------------------------------------------------------


def test_a_wrong_setting_leaves_the_old_one(moss):
    session = cli.Session(moss, None, None, {"temperature": 0.7, "seed": None}, False)
    for bad in ("temperature 0", "temperature x", "seed -1"):
        with pytest.raises(MossError):
            COMMANDS["set"].run(session, bad)
    assert session.settings == {"temperature": 0.7, "seed": None}


def test_help_names_every_command(moss):
    shown = run("/help\n").stderr
    assert all(f"/{name}" in shown for name in COMMANDS)
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_stats(moss):
    once, always = run("one\n/stats\ntwo\n").stderr, run("one\n/stats off\ntwo\n/stats on\nthree\n", "--stats").stderr
    assert once.count("decode") == 1 and always.count("decode") == 2
    tokens = len(b" You said: one") + 1
    assert f"prefill {len(moss.prompts[0])} tokens + 0 cached, 0.01 s, " in once
    assert f"decode {tokens} tokens, {(tokens - 1) / 100:.2f} s, 100.0 tokens/s\n  KV cache 12.3 MB in int8; memory " in once
    assert "No answer yet" in run("/stats\n").stderr or moss.prompts


def test_stats_begin_with_the_plan(moss, monkeypatch):
    """Before anything is loaded."""
    told = []
    monkeypatch.setattr(plan, "in_short", lambda folder, planned: [f"  plan of {planned} in {folder}"])

    def load(folder, planned, **options):
        told.append(planned)
        if planned:
            planned("a model")
        raise MossError("not loaded")

    monkeypatch.setattr(moss_jt, "load", load)
    assert run("one\n", "--stats").stderr == "  plan of a model in folder\n"
    assert run("one\n").stderr == "" and told[1] is None


def test_what_was_cut_off_is_said(moss):
    assert "(cut off after 4 tokens; /set max_new_tokens" in run("one\n", "--max-new-tokens", "4").stderr
    moss.context = 60
    result = run("one\n" * 2, "--system", "")
    assert result.stderr == "(the context is full: MOSS no longer sees the first 1 turn)\n"
    moss.answer = lambda question: " long" * 20
    assert run("one\n", "--system", "").stderr == "(cut off: the context is full)\n"


def test_control_characters_do_not_reach_a_terminal(moss, monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    moss.answer = lambda question: " a\x1b]0;b\x07\x9bc\td\r\n"
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Terminal(raw, encoding="utf-8"))
    monkeypatch.setenv("TERM", "dumb")
    ui.answer(moss.chat().send("x"))
    assert raw.getvalue().decode() == "a\ufffd]0;b\ufffd\ufffdc\td\ufffd\n"


def test_a_locale_without_chinese():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    result = subprocess.run(FAKE, input="你\n".encode(), capture_output=True, env=environment, cwd=ROOT, timeout=30)
    assert (result.returncode, result.stdout) == (0, b"You said: ?\n")


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        ("<&-", 1, b"moss-jt: standard input is closed"),
        ("<<< hi >&-", 1, b"moss-jt: stdout is closed"),
        ("<<< hi 2>&-", 0, b"You said: hi\n"),
        ("<<< /nope", 1, b"moss-jt: no command /nope"),
        ("</dev/null", 0, b""),
        ("<<< $'hi\\nendless' | head -1", 0, b"You said: hi\n"),
    ],
)
def test_closed_streams(redirect, code, said):
    result = subprocess.run(["bash", "-c", f"{' '.join(FAKE)} {redirect}"], capture_output=True, cwd=ROOT, timeout=30)
    output = result.stdout + result.stderr
    assert result.returncode == code and output.startswith(said) and b"Traceback" not in output
    assert said or not output
