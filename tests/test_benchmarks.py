"""benchmarks/: programs that take turns, on a small shape; the arithmetic of what is written."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from moss_jt.bench import Shape
from moss_jt.config import Config
from moss_jt.dialogues import read_dialogues
from moss_jt.tokenizer import load_tokenizer
from moss_jt.weights.layout import Coding

from .checkpoints import random_state, small_config, write_official
from .conftest import ROOT
from .dialogue_files import small_talk, write
from .test_dialogues import TURN
from .tokenizer_folders import official_folder

SMALL = Config(n_layer=2, n_embd=256, n_head=4, n_inner=1024, rotary_dim=8, n_ctx=64, vocab_size=300)
ASK = {"config": asdict(SMALL), "dtype": "int4", "head_dtype": "int8", "threads": 2, "used": 20}

# A program that says how often it was asked for what.
FAKE = """
from serving import asked, serve
counts = []

def sample(name):
    return lambda *given: counts.append(name) or len(counts) + sum(given)

serve({name: sample(name) for name in ("decode", "memory", "prefill")}, bytes_per_token=10, **asked())
"""


def program(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def peers():
    return program("peers")


@pytest.fixture
def fakes(peers, tmp_path, monkeypatch):
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs/serving.py").write_text((ROOT / "benchmarks/programs/serving.py").read_text())
    (tmp_path / "programs/fake.py").write_text(FAKE)
    monkeypatch.setattr(peers, "HERE", tmp_path)
    monkeypatch.setattr(peers, "SCRIPTS", {"moss-jt": "fake.py", "llama.cpp": "fake.py", "broken": "missing.py"})
    return tmp_path


def test_programs_take_turns(peers, fakes, capfd):
    (fakes / "meanwhile").mkdir()
    names = {"moss-jt": sys.executable, "llama.cpp": sys.executable}
    with peers.started(names, {"version": "1", "folder": str(fakes / "meanwhile")}) as programs:
        assert len(list((fakes / "meanwhile").iterdir())) == 1 and programs[0].facts["version"] == "1"
        # Each count rises with every sample: memory is asked of the first program, before each round.
        assert peers.rounds(programs, "decode", 3) == {
            "memory read": [1, 3, 5],
            "moss-jt": [2, 4, 6],
            "llama.cpp": [1, 2, 3],
        }
        assert programs[1].sample("prefill 100") == 104
    assert list((fakes / "meanwhile").iterdir()) == [] and all(p._process.poll() is not None for p in programs)


def test_a_program_that_breaks_is_named(peers, fakes, capfd):
    with (
        pytest.raises(SystemExit, match=r"peers: broken has ended \(2\)"),
        peers.started({"moss-jt": sys.executable, "broken": sys.executable}, {"folder": str(fakes)}),
    ):
        pass
    assert not list(fakes.glob("moss-jt-peers-*"))


def test_ratios_are_those_of_the_same_round(peers):
    samples = {"memory read": [100.0, 200.0, 200.0], "moss-jt": [8.0, 6.0, 9.0], "PyTorch": [1.0, 2.0, 1.0]}
    found = peers.compared(samples)
    assert found["PyTorch"] == {"tokens_s": [1, 2, 1], "median": 1, "times": 8, "times_samples": [8, 3, 9]}
    assert found["moss-jt"]["times_samples"] == [1, 1, 1]
    facts = {"moss-jt": {"bytes_per_token": 10}, "PyTorch": {"bytes_per_token": 20}}
    assert peers.shares(samples, facts) == {"moss-jt": 0.45, "PyTorch": 0.2}


def test_a_peer_that_is_not_there_is_left_out(peers, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--llama-python", "/no/such/python", "--without", "PyTorch"])
    assert peers.available(peers.options()) == {"moss-jt": sys.executable}
    assert "without llama.cpp: /no/such/python" in capsys.readouterr().err
    monkeypatch.setitem(peers.NEEDS, "PyTorch", ("json", "no_such_module"))
    assert peers.missing("PyTorch", sys.executable) == "no_such_module"


@pytest.mark.parametrize(
    ("name", "needs"), [("moss-jt", []), ("llama.cpp", ["llama_cpp", "gguf"]), ("PyTorch", ["torch", "transformers"])]
)
def test_the_real_programs(peers, tmp_path, name, needs):
    for module in needs:
        pytest.importorskip(module)
    with peers.started({name: sys.executable}, {**ASK, "folder": str(tmp_path)}) as (program,):
        assert program.sample("decode") > 0 and program.sample("prefill 30") > 0
        if name == "moss-jt":
            assert program.sample("memory") > 1e7
            assert program.facts["bytes_per_token"] == Shape(SMALL, Coding("int4", "int8")).token_bytes
        assert program.facts["version"] and json.dumps(program.facts)


@pytest.fixture
def golden_dialogues():
    return program("golden_dialogues")


def test_golden_turns_become_conversations(golden_dialogues, tmp_path):
    """Reading what was written gives the ids back, and a newline that ends the turn."""
    tokenizer = load_tokenizer(official_folder(tmp_path))
    ids = [i for value in ("You are MOSS.\n", *TURN.values()) for i in tokenizer.encode(value)]
    ids = ids[: -len(tokenizer.encode("\n"))]  # greedy decoding stops at <eom>
    (tmp_path / "turns.json").write_text(json.dumps([{"prompt_ids": ids[:-9], "greedy_ids": ids[-9:]}] * 2))
    golden_dialogues.main(str(tmp_path), str(tmp_path), str(tmp_path / "out.jsonl"))
    first, second = read_dialogues(tmp_path / "out.jsonl", tokenizer)
    assert first.ids.tolist() == second.ids.tolist() == [*ids, *tokenizer.encode("\n")]
    assert [span.role for span in first.spans] == ["meta_instruction", *TURN]


def test_golden_turns_that_would_change_are_refused(golden_dialogues, tmp_path):
    tokenizer = load_tokenizer(official_folder(tmp_path))
    ids = [i for value in TURN.values() for i in tokenizer.encode(value)]
    split = [i for character in "hello" for i in tokenizer.encode(character)]  # which encoding would merge
    with pytest.raises(ValueError, match="encoding gives other ids"):
        golden_dialogues.conversation(split + ids[:-1], tokenizer)


def test_the_golden_turns(golden_dialogues, golden, shared, tmp_path):
    golden_dialogues.main(str(golden), str(shared / "moss_tokenizer"), str(tmp_path / "out.jsonl"))
    records = json.loads((golden / "turns.json").read_text())
    found = list(read_dialogues(tmp_path / "out.jsonl", load_tokenizer(shared / "moss_tokenizer")))
    for record, dialogue in zip(records, found):
        assert dialogue.ids[:-1].tolist() == record["prompt_ids"] + record["greedy_ids"]
        assert dialogue.ids[dialogue.answers][-len(record["greedy_ids"]) :].tolist() == record["greedy_ids"]
    assert len(found) == len(records)


def test_gptq(tmp_path, monkeypatch, capsys):
    gptq = program("gptq")
    monkeypatch.setattr(gptq, "moon", lambda blocks: Config(blocks, 256, 4, 512, 8, 64, 24))
    model = write_official(tmp_path / "model", small_config(), random_state(small_config()))
    talk = write(tmp_path / "talk.jsonl", small_talk())
    (tmp_path / "dir").mkdir()
    args = ["--model", model, "--calibration", talk, "--layers", 2, "--act-order", "--dir", tmp_path / "dir", "--json"]
    monkeypatch.setattr(sys, "argv", ["gptq.py", *map(str, args)])
    gptq.main()
    found = json.loads(capsys.readouterr().out)
    assert len(found["seconds_a_block"]) == 2 and found["tokens"] > 100 and found["act_order"]
    assert found["spilled_bytes"] == found["tokens"] * 4 * (3 * 256 + 512) and found["peak_memory_bytes"] > 1e7
    assert list((tmp_path / "dir").iterdir()) == []


@pytest.mark.parametrize("budget", [[], ["--ram", "600MiB"]])
def test_lora(tmp_path, monkeypatch, capsys, budget):
    lora = program("lora")
    monkeypatch.setattr(lora, "moon", lambda blocks: Config(blocks, 256, 4, 512, 8, 64, 24))
    sizes = {"--layers": 3, "--dtype": "int4", "--rank": 2, "--tokens": 40, "--steps": 2, "--dir": tmp_path}
    args = ["--json", *budget, *(word for option in sizes.items() for word in option)]
    monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, args)])
    lora.main()
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 3 * 2 * (4 * 256 + 2 * 256 + 2 * (256 + 512)) and found["blocks"] == 3
    assert len(found["seconds_a_step"]) == 3 and found["losses"][2] < found["losses"][0] and found["tokens_s"] > 0
    assert found["peak_memory_bytes"] > 1e7 and list(tmp_path.iterdir()) == []


def test_gpu_swap(monkeypatch, capsys):
    """What gpu_suite.py measures of swapping: nothing once time is up, and the table has all that was."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    suite = program("gpu_suite")
    asked = []
    figures = {"used": 64, "peak_vram_bytes": 3 << 30, "peak_ram_bytes": 5 << 30, "share": 0.9}
    figures.update(tokens_s=1.5, predicted_tokens_s=1.6)
    monkeypatch.setattr(suite.gpu_swap.vram, "measure", lambda folder, case, seconds: asked.append(case) or figures)
    process = {
        **{"one_tokens_s": 0.8, "together": 16, "together_tokens_s": 12.0},
        "drafts": {"same": True, "with": {"sweeps": 4}, "without": {"sweeps": 16}},
        "growth": {"turns": 500, "device_bytes": 0, "ram_bytes": 1 << 20},
    }
    monkeypatch.setattr(suite.gpu_swap, "_one_process", lambda folder, turns: process)
    monkeypatch.setattr(suite.gpu_swap, "accelerate", lambda layers, budget: {"why_not": "it is not there"})
    monkeypatch.setattr(suite.gpu_swap, "open_weights", lambda folder: SimpleNamespace(config=SMALL))
    late = suite.gpu_swap.measure({}, "folder", "fp16", lambda: -1, 500)
    assert not asked and all(case["why_not"] == "no time was left" for case in [*late["cases"], late["process"]])
    found = suite.gpu_swap.measure({}, "folder", "fp16", lambda: 1, 500)
    assert {case.swap for case in asked} == {"stream", "auto", "host"} and asked[0].used == 2048
    suite.draw_swap([*found["cases"], *late["cases"]], found)
    shown = capsys.readouterr().out
    assert shown.count("90.0 %") == len(asked) == shown.count("no time was left") and "…" not in shown
    for text in ("0.8 tokens/s, 16 sequences together 12", "4 sweeps, not 16; the ids are the same", "500 turns took 0.0 MiB"):
        assert text in shown
    assert "accelerate: not measured: it is not there" in shown


def test_gpu_suite_s_adapter(monkeypatch, capsys):
    """What lora.py says in a process of its own, or why it says nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    suite, asked = program("gpu_suite"), []
    said = {"tokens_s": 1234.5, "tokens": 2048, "device_peak_bytes": 11 << 30}
    answers = [SimpleNamespace(returncode=0, stdout=json.dumps(said)), SimpleNamespace(returncode=1, stderr="a\nno room\n")]
    monkeypatch.setattr(suite.subprocess, "run", lambda command, **how: asked.append(command) or answers.pop(0))
    for _ in range(2):
        suite.draw_lora(suite.lora(Path("folder")))
    suite.draw_lora({})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "int8, an adapter within 12GiB: 1,234 tokens/s, 2048 at a time, at most 11.00 GiB taken"
    assert second == "int8, an adapter: not measured: no room"
    monkeypatch.setattr(sys, "argv", [str(word) for word in asked[0][1:]])
    given = program("lora").options()
    assert (given.folder, given.device, given.vram, given.tokens, given.json) == (Path("folder"), "cuda", "12GiB", 2048, True)


@pytest.mark.parametrize("where", ["build", "measure"])
def test_gpu_suite_ends_in_time(tmp_path, monkeypatch, capsys, where):
    """What was measured until time was up is drawn and written, and the program fails where nothing was tested."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    suite = program("gpu_suite")

    def resident(folder, repeat):
        resident.called += 1
        return {"why_not": "as a test wants it"} if resident.called == 1 else time.sleep(60)

    resident.called = 0
    gpu = {"name": "a GPU", "capability": "9.0", "driver": "13.0", "toolkit": "13.0"}
    done = {"test_gpu_model": {"code": 0, "summary": "7 passed"}}
    monkeypatch.setattr(suite, "LIMIT", 1)
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    monkeypatch.setattr(suite, "gpu_facts", lambda: gpu)
    monkeypatch.setattr(suite, "build", lambda: time.sleep(60) if where == "build" else 0.0)
    monkeypatch.setattr(suite, "tests", lambda quick, sanitize: done)
    monkeypatch.setattr(suite, "_resident", resident)
    monkeypatch.setattr(suite, "random_checkpoint", lambda shape, parent: nullcontext(tmp_path))
    monkeypatch.setattr(suite.runtime, "jittor", lambda device: None)
    monkeypatch.setattr(suite.device_limits, "to_device", lambda *file: SimpleNamespace(measure=lambda: 2e10))
    monkeypatch.setattr(suite.gpu_swap, "measure", lambda into, *rest: into)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--quick"])
    start = time.monotonic()
    with pytest.raises(SystemExit) as e:
        suite.main()
    assert time.monotonic() - start < 30 and bool(e.value.code) == (where == "build")
    found = json.loads(next(tmp_path.glob("*-gpu.json")).read_text())
    why = "no time was left" if where == "build" else "as a test wants it"
    assert (found["fp16"]["why_not"], found["int8"]["why_not"]) == (why, "no time was left")
    assert f"fp16: not measured: {why}" in capsys.readouterr().out
