"""``moss-jt bench``: what it prints, that its figures agree with each other, and that nothing stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from statistics import median

import numpy as np
import pytest

import moss_jt
from moss_jt import bench, cuda, machine, runtime
from moss_jt.bench import Shape, decode, limits, load, page_cache, prefill, random_checkpoint, random_model, swap
from moss_jt.bench.pairs import Limit
from moss_jt.cli import main
from moss_jt.cli.bench_table import draw
from moss_jt.config import Config
from moss_jt.model import Model
from moss_jt.swap import make_plan, smallest
from moss_jt.weights import open_weights
from moss_jt.weights.layout import Coding

SMALL = Config(n_layer=3, n_embd=256, n_head=4, n_inner=512, rotary_dim=8, n_ctx=64, vocab_size=3000)
SHAPE = Shape(SMALL, Coding("int4", "int8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with random_checkpoint(SHAPE, tmp_path_factory.mktemp("bench")) as folder:
        yield folder


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run ``moss-jt bench`` with short samples and small limits; random models go to tmp_path. Returns code, stdout, stderr."""
    for module, name in ((decode, "_SECONDS"), (decode, "_HOLLOW_SECONDS"), (prefill, "_SECONDS"), (limits, "_SECONDS")):
        monkeypatch.setattr(module, name, 0)
    monkeypatch.setattr(swap, "_SECONDS", 0)
    monkeypatch.setattr(limits, "GIB", 8 << 20)
    monkeypatch.setattr(bench, "moon", lambda blocks: Config(**{**vars(SMALL), "n_layer": blocks}))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as e:
            main(["bench", *map(str, args)])
        assert list(tmp_path.iterdir()) == []
        return (e.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def as_json(run):
    def call(*args: object) -> dict:
        code, out, _ = run(*args, "--json")
        assert code == 0 and out.count("\n") == 1
        return json.loads(out)

    return call


def check_shares(found: dict, unit: str, speeds: list[float]) -> None:
    """``speeds``: beside each limit, in billions."""
    around = found[f"limit_{unit}_samples"]
    assert found["share_samples"] == pytest.approx([s / limit for s, limit in zip(speeds, around)])
    assert found["share"] == pytest.approx(median(found["share_samples"])) and len(around) == len(speeds)
    assert found[unit] == pytest.approx(median(speeds)) and found[f"limit_{unit}"] == pytest.approx(median(around))


def test_a_device_that_is_not_there(run, monkeypatch):
    monkeypatch.setattr(runtime, "_module", None)
    monkeypatch.setattr(runtime, "_adopted", lambda: pytest.fail("taken over"))
    monkeypatch.setattr(cuda, "driver", lambda: cuda.Driver(problem="no driver"))
    monkeypatch.setattr(cuda, "toolkits", lambda: iter(()))
    for name in [name for name in sys.modules if name.split(".")[0] == "jittor"]:
        monkeypatch.delitem(sys.modules, name)
    code, out, err = run("decode", "--random", 1, "--context-used", 0, "--device", "cuda")
    assert (code, out) == (1, "") and err.splitlines()[-1].endswith("device cuda: no driver")
    code, out, err = run("decode", "--random", 1, "--device", "gpu")
    assert (code, out) == (2, "") and "'gpu' is not one of 'auto', 'cpu', 'cuda'" in err


def test_decode(as_json):
    found = as_json("decode", "--random", 2, "--dtype", "int4", "--threads", 2, "--repeat", 4, "--context-used", 20)
    assert (found["bench"], found["model"], found["layers"], found["threads"]) == ("decode", "random", 2, 2)
    assert (found["dtype"], found["head_dtype"], found["n_embd"]) == ("int4", "int8", 256)
    assert found["version"] and found["date"] and set(found["machine"]) >= {"cpu", "kernels", "cores", "load_average"}
    shape = Shape(Config(**{**vars(SMALL), "n_layer": 2}), Coding("int4", "int8"))
    assert found["bytes_per_token"] == shape.token_bytes + 21 * 2 * 2 * 2 * 256  # and the cache: keys, values, 2 bytes each
    assert len(found["tokens_s"]) == 4 and min(found["tokens_s"]) > 0
    assert "memory read" in found["limit"]
    check_shares(found, "GB_s", [found["bytes_per_token"] * s / 1e9 for s in found["tokens_s"]])
    assert found["overhead_share"] > 0 and 0 < found["sampling_seconds"] < 1


def test_an_int8_cache(as_json, run, model):
    found = {}
    for kv_cache in ("fp16", "int8"):
        found[kv_cache] = as_json("decode", "-m", model, "--context-used", 49, "--repeat", 1, "--kv-cache", kv_cache)
        assert found[kv_cache]["kv_cache"] == kv_cache
    saved = 50 * 3 * 2 * (2 * 256 - (256 + 4 * 4))
    assert found["fp16"]["bytes_per_token"] - found["int8"]["bytes_per_token"] == saved
    assert as_json("prefill", "-m", model, "--prompt", 8, "--repeat", 1, "--kv-cache", "int8")["kv_cache"] == "int8"
    assert "KV cache int8, " in run("prefill", "-m", model, "--prompt", 8, "--repeat", 1, "--kv-cache", "int8")[1]


def test_several_tokens_share_the_bytes_of_a_sweep(as_json, model):
    one, four = (as_json("decode", "-m", model, "--context-used", 60 - n, "--batch", n, "--repeat", 1) for n in (1, 4))
    assert four["bytes_per_token"] == one["bytes_per_token"] / 4 and four["model"] == str(model) and four["layers"] == 3


class Chooser:
    """A model whose likeliest token is 7, then 8, then 9, …"""

    config = SMALL

    def __init__(self):
        self.asked = []

    sequence = None

    def evaluate(self, requests):
        ((_, ids, last, sampling),) = requests
        assert sampling.greedy
        self.asked.append((ids.tolist(), last))
        return [list(np.eye(last, 100, 7 + len(self.asked) - last))]


def test_a_sweep_evaluates_the_token_chosen_before():
    work = decode.Sweeps(Chooser(), used=10, batch=3)
    work.sweep()
    work.sweep()
    (first, *lasts), prompt = [ids[-1] for ids, _ in work.model.asked], work.model.asked[0][0]
    assert lasts == [first, 8] and len(prompt) == 13
    assert all(ids[:12] == prompt[:12] and last == 3 for ids, last in work.model.asked)


def test_a_sweep_evaluates_no_more_than_its_batch(model):
    work = decode.Sweeps(Model(open_weights(model), 64), used=10, batch=3)
    work.sweep()
    assert work.model.sequence.length == 13 and work.model.sequence.reusable(work.ids, 3) == 10
    assert [row.shape for row in work.logits] == [(3000,)] * 3


def test_prefill(as_json, model):
    found = as_json("prefill", "-m", model, "--prompt", 30, "--repeat", 3)
    assert found["prompt"] == 30 and len(found["tokens_s"]) == 3 and "fp32 multiply-add" in found["limit"]
    assert found["GFLOP_per_token"] == pytest.approx(SHAPE.prompt_operations(30) / 30 / 1e9)
    check_shares(found, "GFLOP_s", [found["GFLOP_per_token"] * s for s in found["tokens_s"]])


def test_prefill_starts_from_nothing(model):
    work = prefill.Prompts(Model(open_weights(model), 64), 30)
    swept = []
    weights = work.model.device.weights
    weights.rows = lambda ids, rows=weights.rows: swept.append(len(ids)) or rows(ids)
    work.evaluate()
    work.evaluate()
    assert swept == [30, 30]


def test_load(as_json, model, monkeypatch):
    monkeypatch.setattr(limits, "disk_read", lambda folder: Limit("disk", "GB_s", lambda: 2e9))
    came = iter([0, SHAPE.token_bytes])
    monkeypatch.setattr(page_cache, "disk_bytes", lambda: next(came))
    found = as_json("load", "-m", model, "--repeat", 2)
    assert found["bytes"] == SHAPE.token_bytes and "memory read" in found["warm"]["limit"]
    assert found["cold"]["limit_GB_s"] == 2 and "disk" in found["cold"]["limit"]
    for state in (found["warm"], found["cold"]):
        assert len(state["seconds"]) == 2
        check_shares(state, "GB_s", [found["bytes"] / s / 1e9 for s in state["seconds"]])


def test_load_that_cannot_be_cold(run, as_json, model, monkeypatch):
    monkeypatch.setattr(page_cache, "disk_bytes", lambda: 5)  # nothing comes from a disk
    assert as_json("load", "-m", model, "--repeat", 1)["cold"] is None
    assert "cannot be emptied here" in run("load", "-m", model, "--repeat", 1)[1]


def test_cold_files_come_from_the_disk(model):
    """Where they can be dropped: after a load, nothing has them mapped any more."""
    weights = open_weights(model)
    if page_cache.in_memory(model) or page_cache.disk_bytes() is None:
        pytest.skip("no disk here, or Linux does not say")
    page_cache.fill(weights)
    assert load._from_disk(lambda: load._load(weights)) < SHAPE.token_bytes / 2
    assert load._from_disk(lambda: load._load_cold(weights)) >= 0.9 * SHAPE.token_bytes


def test_swap(as_json, run, model, monkeypatch):
    monkeypatch.setattr(limits, "disk_read", lambda folder: Limit("disk", "GB_s", lambda: 2e9))
    monkeypatch.setattr(page_cache, "in_memory", lambda folder: False)
    budget = smallest(SMALL, Coding("int4", "int8"), 32)
    found = as_json("swap", "-m", model, "--ram", budget, "--context", 32, "--batch", 2, "--repeat", 2)
    plan = make_plan(SMALL, Coding("int4", "int8"), 32, budget)
    assert plan.disk_bytes > 0 and found["bytes_per_token"] == plan.disk_bytes / 2
    assert (found["budget_bytes"], found["context"], found["batch"]) == (budget, 32, 2) and found["peak_memory_bytes"] > 1 << 20
    assert (
        found["predicted_tokens_s"] > 0 and "the plan expects" in run("swap", "-m", model, "--ram", budget, "--context", 32)[1]
    )
    check_shares(found, "GB_s", [found["bytes_per_token"] * s / 1e9 for s in found["tokens_s"]])


@pytest.mark.parametrize("what", ["decode", "prefill", "load"])
def test_table(run, model, what):
    code, out, _ = run(what, "-m", model, "--repeat", 1, *(["--context-used", 9] if what == "decode" else []), *SHORT[what])
    assert code == 0 and f"{what}: 3 blocks, int4, lm_head int8, {model}" in out.replace("\n", "")
    assert " ± " in out and "share of that limit" in out and ("seconds" if what == "load" else "tokens/s") in out


SHORT = {"decode": ["--batch", 2], "prefill": ["--prompt", 8], "load": []}


def test_figures_of_the_table(capsys):
    compared = {"limit": "of stone", "limit_GB_s_samples": [10.0, 12.0], "GB_s": 5.5, "share": 0.5, "share_samples": [0.4, 0.6]}
    machine_ = {"cpu": "A [bold] CPU", "kernels": "AVX2", "load_average": 0.04}
    about = {"layers": 34, "dtype": "fp16", "head_dtype": "fp16", "model": "random", "machine": machine_, "threads": 2}
    own = {"tokens_s": [100.0, 102.0], "bytes_per_token": 32.1e9, "overhead_share": 0.012, "sampling_seconds": 0.0015}
    draw({"bench": "decode", **about, **own, **compared})
    out = capsys.readouterr().out
    assert "decode: 34 blocks, fp16, random\nA [bold] CPU, AVX2 kernels, 2 threads, load average 0.0\n" in out
    rows = dict(re.findall(r"^ (\S.*?)  +(\S.*?) *$", out, re.M))
    assert rows == {
        "tokens/s": "101.0 ± 1.4",
        "bytes a token": "32.10 GB",
        "that is": "5.5 GB/s",
        "of stone": "11.00 ± 1.41 GB/s",
        "share of that limit": "50.0 % ± 14.1 %",
        "of a token's time, outside the kernels": "1.2 %",
        "choosing by the default sampling would add": "1.50 ms",
    }


# ---- what is refused, and what stays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["decode"], 2, "either -m DIR or --random BLOCKS"),
        (["decode", "--random", 1, "-m", "."], 2, "either -m DIR or --random BLOCKS"),
        (["decode", "-m", ".", "--dtype", "int4"], 2, "belong to --random"),
        (["decode", "-m", "missing"], 2, "missing"),
        (["decode", "-m", "."], 1, "no config.json here"),
        (["decode", "--random", 0], 2, "0 is not in the range"),
        (["decode", "--random", 1, "--dtype", "fp8"], 2, "fp8"),
        (["decode", "--random", 1, "--dir", "missing"], 2, "missing"),
        (["decode", "--random", 1, "--threads", 0], 2, "0 is not in the range"),
        (["decode", "--random", 1, "--context-used", 64], 1, "64 tokens and 1 more do not fit the model's context of 64"),
        (["prefill", "--random", 1, "--prompt", 65], 1, "a prompt of 65 tokens does not fit the model's context of 64"),
        (["swap", "--random", 1], 2, "--ram"),
        (["swap", "--random", 1, "--ram", "lots"], 2, "'lots' is not a size"),
        (["swap", "--random", 1, "--ram", "1MiB"], 1, "is the smallest that works"),
        (["swap", "--random", 1, "--ram", "20GiB"], 1, "nothing comes from the disk"),
        (["swap", "--random", 1, "--ram", "155MiB", "--context", 32, "--batch", 40], 1, "40 tokens a sweep do not fit"),
    ],
)
def test_one_line_says_what_is_wrong(run, monkeypatch, tmp_path_factory, args, code, text):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    monkeypatch.setattr(random_model, "_write", lambda *args: pytest.fail("was made before it was refused"))
    found, out, err = run(*args)
    assert (found, out) == (code, "") and text in err.splitlines()[-1] and "Traceback" not in err


def test_memory_that_is_short(run, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(1 << 30, 1 << 30))
    code, _, err = run("decode", "--random", 1, "--context-used", 1)
    assert code == 1 and err.startswith("moss-jt: measuring from memory needs 1.") and err.count("\n") == 1


def test_swap_needs_a_disk(run, monkeypatch):
    monkeypatch.setattr(page_cache, "in_memory", lambda folder: True)
    budget = smallest(Config(**{**vars(SMALL), "n_layer": 3}), Coding(), 64)
    code, _, err = run("swap", "--random", 3, "--ram", budget)
    assert code == 1 and "is in memory and on no disk" in err


STOPPED = """
import sys, time
from moss_jt import bench, runtime
from moss_jt.cli import main
small = bench.moon(1)
bench.moon = lambda blocks: type(small)(blocks, 64, 4, 64, 8, 64, 100)
runtime.jittor = lambda *args, **how: (print("made", flush=True), time.sleep(60))
main(["bench", "decode", "--random", "1", "--context-used", "0"])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_nothing_stays_when_it_is_stopped(tmp_path, number, code):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "made\n"
        assert len(list(tmp_path.glob("moss-jt-bench-*/block-00.safetensors"))) == 1
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in err and list(tmp_path.iterdir()) == []


def test_nothing_stays_after_an_error(run, monkeypatch):
    def fail(self, weights, threads, repeat, device):
        raise moss_jt.MossError("it broke")

    monkeypatch.setattr(bench.Decode, "run", fail)
    assert run("decode", "--random", 1, "--context-used", 0)[::2] == (1, "moss-jt: it broke\n")  # run looks for what stays
