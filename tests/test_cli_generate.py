from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
import time

import pytest

import moss_jt
from moss_jt.cli import generate as cli
from moss_jt.cli.chat_options import SETTINGS
from moss_jt.errors import MossError

from .conftest import ROOT
from .fake_moss import FakeMoss, runner

FAKE = [sys.executable, "-m", "tests.fake_moss"]


@pytest.fixture
def moss(monkeypatch):
    fake = FakeMoss()
    fake.loads = []
    monkeypatch.setattr(moss_jt, "load", lambda *a, **k: fake.loads.append(k) or fake, raising=False)
    return fake


def run(*args, stdin=b"", ok=True):
    result = runner().invoke(cli.command, ["-m", "folder", *args], input=stdin)
    if ok:
        assert result.exit_code == 0, result.output
    return result


def prompt(moss):
    return moss.tokenizer.decode(moss.prompts[-1])


def test_a_question_is_one_turn(moss):
    assert run("你好").stdout == "You said: 你好\n"
    assert prompt(moss).startswith("You are an AI assistant") and prompt(moss).endswith("\n<|Human|>: 你好<eoh>\n<|MOSS|>:")


def test_raw_is_continued_as_it_is(moss):
    moss.answer = lambda question: " and so on\n"
    assert run("--raw", " Once<eoh>\n").stdout == " and so on\n"
    assert moss.prompts[-1] == moss.tokenizer.encode(" Once<eoh>\n")
    run("--raw", stdin=b"kept\n\n")
    assert prompt(moss) == "kept\n\n"


def test_stats(moss):
    result = run("你好", "--stats")
    assert result.stdout == "You said: 你好\n" and result.stderr.count("tokens/s") == 2 and "KV cache" in result.stderr
    assert callable(moss.loads[-1]["planned"])
    assert run("你好").stderr == "" and moss.loads[-1]["planned"] is None


@pytest.mark.parametrize("args", [(), ("-",)])
def test_a_prompt_from_a_pipe(moss, args):
    assert run(*args, stdin="两\nlines \n\n".encode()).stdout == "You said: 两\nlines\n"
    assert run(*args, stdin=b"\xff!").stdout == "You said: \ufffd!\n"


def test_system(moss, tmp_path):
    file = tmp_path / "system.txt"
    file.write_text("From a file.", encoding="utf-8")
    for given, expected in (("Be brief.", "Be brief.\n"), (f"@{file}", "From a file.\n"), ("", "")):
        run("hi", "--system", given)
        assert prompt(moss) == f"{expected}<|Human|>: hi<eoh>\n<|MOSS|>:"
    file.write_bytes(b"\xff")
    for bad in (f"@{file}", "@/no/such/file"):
        error = run("hi", "--system", bad, ok=False).exception
        assert isinstance(error, MossError) and bad[1:] in str(error)


def test_settings_reach_the_model(moss):
    given = "--temperature 0.5 --top-p 0.9 --top-k 7 --repetition-penalty 1.1 --max-new-tokens 9 --seed 3 --greedy"
    run("hi", *given.split(), "--stop", "A", "--stop", "B")
    call = moss.calls[-1]
    assert set(call.pop("stop")) == {258, 260, "A", "B"}  # beside <eom> and <eoc>
    assert call == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "repetition_penalty": 1.1,
        "max_new_tokens": 9,
        "seed": 3,
        "greedy": True,
    }


def test_what_the_model_is_loaded_with(moss):
    run("hi")
    run("hi", "--context", "99", "--ram", "6GiB", "--device", "cpu", "--kv-cache", "int8", "--vram", "4GiB", "--swap", "host")
    assert moss.loads == [
        {
            "device": "auto",
            "context": 2048,
            "ram": None,
            "kv_cache": "fp16",
            "vram": None,
            "swap": "auto",
            "planned": None,
            "adapter": None,
        },
        {
            **{"device": "cpu", "context": 99, "ram": 6 << 30, "kv_cache": "int8", "vram": 4 << 30, "swap": "host"},
            **{"planned": None, "adapter": None},
        },
    ]
    defaults = inspect.signature(moss_jt.moss.load).parameters
    assert all(defaults[name].default == value for name, value in moss.loads[0].items())


def test_defaults_are_the_librarys():
    parameters = inspect.signature(moss_jt.Moss.generate).parameters
    for name, setting in SETTINGS.items():
        if name != "max_new_tokens":
            assert setting.default == parameters[name].default, name


@pytest.mark.parametrize(
    "args",
    [
        ["--raw", "--system", "x", "hi"],
        ["--temperature", "0", "hi"],
        ["--top-p", "1.5", "hi"],
        ["--top-k", "-1", "hi"],
        ["--max-new-tokens", "0", "hi"],
        ["--seed", "x", "hi"],
        ["--kv-cache", "int4", "hi"],
        ["hi", "there"],
    ],
)
def test_wrong_usage(moss, args):
    result = run(*args, ok=False)
    assert result.exit_code == 2 and not moss.prompts


@pytest.mark.parametrize("args", [["  "], ["--raw", ""], []])
def test_an_empty_prompt(moss, args):
    assert str(run(*args, ok=False).exception) == "the prompt is empty"


def test_json(moss):
    result = json.loads(run("--json", "hé").stdout)
    assert result["text"] == "You said: hé"
    assert result["ids"] == [*" You said: hé".encode(), 258]
    assert result["prompt_tokens"] == len(moss.prompts[-1])
    assert result["new_tokens"] == len(result["ids"])
    assert result["stop"] == "stop"
    assert result["prefill"] == {"seconds": 0.01, "tokens_s": pytest.approx(result["prompt_tokens"] / 0.01)}
    assert result["decode"]["tokens_s"] == pytest.approx(100)
    assert set(result) == {"text", "ids", "prompt_tokens", "new_tokens", "stop", "prefill", "decode"}
    assert json.loads(run("--json", "--max-new-tokens", "3", "hi").stdout)["stop"] == "length"


def test_interrupted_json():
    endless = ["generate", "-m", "x", "--json", "endless", "--context", "99999", "--max-new-tokens", "90000"]
    process = subprocess.Popen([*FAKE, *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stderr.readline() == b"answering\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    result = json.loads(process.communicate(timeout=20)[0])
    assert (result["stop"], process.returncode) == ("interrupted", 130)
    assert 0 < result["new_tokens"] == len(result["ids"])


def test_a_reader_that_leaves():
    command = f"{sys.executable} -m tests.fake_moss generate -m x endless | head -c 5"
    result = subprocess.run(["bash", "-c", command], capture_output=True, cwd=ROOT, timeout=30)
    assert (result.stdout, result.stderr) == (b"01234", b"answering\n")


def test_nothing_heavy_is_imported_for_help():
    code = "import sys; from moss_jt.cli import chat, generate; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert not {"numpy", "jittor", "rich", "prompt_toolkit", "tokenizers"} & set(loaded)


def test_the_guide_names_every_option_and_command():
    from moss_jt.cli import chat
    from moss_jt.cli.chat_commands import COMMANDS

    guide = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    options = [
        option for command in (chat.command, cli.command) for p in command.params for option in p.opts if option[0] == "-"
    ]
    rows = [f"`/{name} {command.argument}".rstrip().replace("|", "\\|") + "`" for name, command in COMMANDS.items()]
    assert [word for word in options if f"`{word}" not in guide] == []
    assert [row for row in rows if row not in guide] == []
    defaults = {s.default for s in SETTINGS.values() if s.default and s.default is not True}
    assert all(f"| {value} |" in guide for value in defaults)


def test_plugins(moss):
    moss.thinks = lambda question: ' divide<eot>\n<|Commands|>: Calculate("60/6")<eoc>'
    result = run("how many?", "--plugins", "calculator")
    assert (result.stdout, result.stderr) == ("You said: how many?\n", 'Calculate("60/6") → 10.0\n')
    found = json.loads(run("how many?", "--plugins", "calculator", "--json").stdout)
    assert found["text"] == "You said: how many?"
    written = moss.thinks("") + " You said: how many?<eom>"
    assert found["ids"] == moss.tokenizer.encode(written) and found["new_tokens"] == len(found["ids"])
    assert "--plugins belongs to the dialogue format" in run("--raw", "x", "--plugins", "solver", ok=False).stderr
