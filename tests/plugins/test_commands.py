"""Commands as models write them, well or badly, and their results as they are trained to read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_jt.errors import MossError
from moss_jt.plugins import Plugin, built_in
from moss_jt.plugins.commands import LONGEST_RESULT, MOST_COMMANDS, parse, run, written

BOTH = built_in("calculator,solver")


class Echo(Plugin):
    name, api = "Echo", "Say(text)"

    def run(self, argument: str) -> str:
        return f"<{argument}>"


class Images(Plugin):
    name, api, echo = "Text-to-image", "Text2Image(description)", False

    def run(self, argument: str) -> str:
        return "Image generated successfully."


class Broken(Plugin):
    name, api = "Broken", "Break(it)"

    def run(self, argument: str) -> str:
        raise OSError("no\nnetwork")


@pytest.mark.parametrize("text", ["None", " None ", "none.", "None, since none is needed", "", "\n", "…"])
def test_none(text):
    assert parse(text) == [] and written(run([], BOTH)) == " None"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('Say("60/6")', ["60/6"]),
        ('Say("a"), Say("b")', ["a", "b"]),
        ('Say("a")，Say("b")；Say("c")。', ["a", "b", "c"]),
        ('Say("a")Say("b") and Say("c")\nSay("d")', ["a", "b", "c", "d"]),
        ("Say('a')", ["a"]),
        ("Say(“a”)", ["a"]),
        ("Say（「a」）", ["a"]),
        ("say( 'a' )", ["a"]),
        ("Say(a)", ["a"]),
        ("Say(f(a, 1), (2))", ["f(a, 1), (2)"]),
        ('Say("the "best" one")', ['the "best" one']),
        ('Say("f("a")b"), Say("c")', ['f("a")b', "c"]),
        (r'Say("the \"best\" one")', ['the "best" one']),
        ('Say("(1+2)*3"), Say("4")', ["(1+2)*3", "4"]),
        ('Say("a, b"), Say("c")', ["a, b", "c"]),
        ('Say("a', ["a"]),
        ('Say("a)', ["a"]),
        ("Say(", [""]),
        ('Say("a"))', ["a"]),
    ],
)
def test_arguments(text, arguments):
    results = run(parse(text), [Echo()])
    assert [result.text for result in results] == [f"<{argument}>" for argument in arguments]


def test_results_as_in_the_official_dialogues():
    def of(text):
        return written(run(parse(text), [*BOTH, Images()]))

    assert of('Calculate("60/6")') == "\nCalculate(\"60/6\") => '10.0'\n"
    assert of('Solve("x+y=3;x-y=1")') == '\nSolve("x+y=3;x-y=1") =>\nx = 2\ny = 1\n'
    assert of('Calculate("1+1"), Solve("2x=6")') == '\nCalculate("1+1") => \'2\'\nSolve("2x=6") =>\nx = 3\n'
    assert of('Text2Image("a fox")') == " Image generated successfully."


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ('Search("x")', "No result: there is no Search; write Calculate(expression) or Solve(equation)."),
        ("please add 3 and 4", "No result: this is not a command; write Calculate(expression) or Solve(equation)."),
        ('Calculate("1/0")', "'No result: division by zero.'"),
        ('Calculate("x")', "'No result.'"),
    ],
)
def test_what_is_wrong_is_said(text, result):
    assert written(run(parse(text), BOTH)) == f"\n{text} => {result}\n"


def test_a_plugin_that_fails():
    assert run(parse('Break("a")'), [Broken()])[0].text == "No result: no network."


def test_what_is_too_long_is_cut_and_said():
    (result,) = run(parse(f'Say("{"a" * 3000}")'), [Echo()])
    assert len(result.text) == 3002
    shown = result.written(LONGEST_RESULT)
    assert shown.endswith(f"a … (cut off after {LONGEST_RESULT} of 3002 characters)") and len(shown) < LONGEST_RESULT + 400


def test_too_many_commands():
    told = []
    results = run(parse(", ".join(['Say("a")'] * 50)), [Echo()], lambda *what: told.append(what))
    assert len(results) == MOST_COMMANDS + 1 and results[-1].text == "No result: only 8 commands are run at a time."
    assert told == [('Say("a")', "<a>")] * MOST_COMMANDS + [('Say("a")', results[-1].text)]


def test_no_time_left(monkeypatch):
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    texts = [result.text for result in run(parse('Say("a"), Say("b"), Say("c")'), [Echo()])]
    assert texts == ["<a>", "No result: there was no time left.", "No result: there was no time left."]


def test_built_in():
    assert [p.api for p in built_in(" Solver, calculator,solver")] == ["Solve(equation)", "Calculate(expression)"]
    with pytest.raises(MossError, match="no plugin search; there are calculator, solver"):
        built_in(["search"])


PIECES = ["Say(", "say（", "Nope(", *"\"'“”\\)）,，\n a中", "None", "and", "=>", "<eor>"]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
def test_whatever_is_written_there_are_results(text):
    commands = parse(text)
    assert len(commands) <= MOST_COMMANDS + 1
    shown = written(run(commands, [Echo(), Broken()]))
    assert shown == " None" or (shown.startswith("\n") and shown.endswith("\n"))


def test_a_lot_of_text_is_read_in_linear_time():
    assert len(parse('Say("' * 100_000)) >= 1
    assert len(parse('Say(a) "' * 100_000)) == 2
