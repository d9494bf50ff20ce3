from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moss_jt.cli import main
from moss_jt.cli.plan import in_short
from moss_jt.swap import make_plan, smallest, speeds
from moss_jt.swap.plan import Speeds

from .swap.models import plan, write


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """What ``afresh`` was for each measurement."""
    asked = []
    monkeypatch.setattr(speeds, "measured", lambda folder, afresh: asked.append(afresh) or Speeds(2e10, 1e9, 1e11))
    return asked


def run(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as e:
        main(["plan", *map(str, args)])
    return e.value.code, *capsys.readouterr()


def test_json(capsys, weights, measured):
    p = plan(weights, 0.4, 300)
    code, out, err = run(capsys, weights.folder, "--ram", p.budget, "--context", 300, "--json")
    found = json.loads(out)
    assert (code, err, measured) == (0, "", [False])
    assert found["peak"] == sum(found["memory"].values()) <= found["budget"] == p.budget
    assert found["blocks"] == list(p.blocks) and {"resident", "streamed"} == set(found["blocks"])
    assert found["bytes_per_token"] == {"disk": p.disk_bytes, "memory": p.memory_bytes}
    assert found["speeds"] == {"memory": 2e10, "disk": 1e9, "arithmetic": 1e11}
    assert found["decode"] == {"tokens_s": p.decode(Speeds(2e10, 1e9, 1e11)).tokens_s, "limit": "disk"}
    assert found["prefill"]["tokens_s"] > found["decode"]["tokens_s"] and found["context"] == 300


def test_a_cache_in_int8(capsys, weights):
    found = {}
    for kv_cache in ("fp16", "int8"):
        _, out, _ = run(
            capsys, weights.folder, "--ram", "1GiB", "--context", 300, "--no-measure", "--json", "--kv-cache", kv_cache
        )
        found[kv_cache] = json.loads(out)
        assert found[kv_cache]["kv_cache"] == kv_cache
        assert found[kv_cache]["memory"]["KV cache"] == 300 * weights.config.cache_bytes_per_token(kv_cache)
    assert found["int8"]["peak"] < found["fp16"]["peak"]
    assert "300 tokens in int8" in run(capsys, weights.folder, "--context", 300, "--no-measure", "--kv-cache", "int8")[1]


def test_table(capsys, weights, measured):
    budget = plan(weights, 0.4, 512).budget
    code, out, err = run(capsys, weights.folder, "--ram", budget)
    assert (code, err) == (0, "") and "context 512" in out  # no more than the model was trained for
    for text in ("resident ■", "streamed □", "KV cache", "2 that streamed weights", "--ram", "GB a token", "the limit is disk"):
        assert text in out
    code, out, _ = run(capsys, weights.folder)
    assert "5 resident" in out and "what can be spared here" in out and "disk" not in out.split("wte")[1].split("\n", 1)[1]
    assert measured == [False, False]


def test_measuring(capsys, weights, measured):
    _, out, _ = run(capsys, weights.folder, "--no-measure")
    assert measured == [] and "tokens/s" not in out and "GB a token" in out
    assert json.loads(run(capsys, weights.folder, "--no-measure", "--json")[1])["decode"] is None
    run(capsys, weights.folder, "--measure")
    assert measured == [True]


def test_refusals(capsys, weights, tmp_path):
    code, out, err = run(capsys, weights.folder, "--ram", "1MiB")
    assert (code, out) == (1, "") and err.count("\n") == 1 and "is the smallest that works" in err
    for args in (
        (weights.folder, "--ram", "much"),
        (weights.folder, "--context", "1"),
        (weights.folder, "--kv-cache", "int4"),
        (),
    ):
        assert run(capsys, *args)[0] == 2
    code, _, err = run(capsys, tmp_path / "none")
    assert code == 1 and err.endswith("no such folder\n") and err.count("\n") == 1


def test_in_short(weights, monkeypatch):
    """As --stats shows it: with speeds where they are known already, and those of a GPU's link."""
    p, known = plan(weights, 0.4, 512), Speeds(2e10, 1e9, 1e11)
    monkeypatch.setattr(speeds, "remembered", lambda folder: known)
    places, moved, decode = in_short(weights.folder, p)
    assert f"{len(p.streamed_blocks)} streamed □; lm_head " in places and "of RAM" in places
    assert f"read from disk {p.disk_bytes / 1e9:.2f} GB a token, at 1.0 GB/s" in moved and "read from memory" in moved
    assert decode == f"  decode {p.decode(known).tokens_s:,.0f} tokens/s; the limit is disk"
    monkeypatch.setattr(speeds, "remembered", lambda folder: None)
    places, moved = in_short(weights.folder, plan(weights, 1))
    assert "5 resident; lm_head resident; KV cache " in places and "disk" not in moved and "GB/s" not in moved
    on_gpu = make_plan(weights.config, weights.coding, 512, smallest(weights.config, weights.coding, 512, gpu=True), gpu=True)
    monkeypatch.setattr(speeds.cudart, "link_bandwidth", lambda: 2e10)
    places, moved, decode = in_short(weights.folder, on_gpu)
    assert "of the GPU's memory" in places and "over the link" in moved and decode.endswith("the limit is link")


def test_what_jittor_moves(capsys, tmp_path):
    larger = write(tmp_path / "model", n_embd=512, n_layer=3)
    model = (larger.config, larger.coding, 512)
    budget = smallest(*model, gpu=True, swap="jittor")
    args = (larger.folder, "--vram", budget, "--swap", "jittor", "--context", 512, "--no-measure")
    code, out, err = run(capsys, *args)
    assert (code, err) == (0, "") and "3 moved by Jittor □" in out and "1 at a time, which is Jittor's limit" in out
    assert "of weights  " in out and "on disk, a row" in out and "the rest on disk" not in out
    code, _, err = run(capsys, *args, "--ram", "8MiB")
    assert code == 1 and err.count("\n") == 1 and "of RAM, and 8MiB can be used, a limit that Jittor would not keep" in err


def test_jittor_is_not_imported(weights):
    code = (
        "import sys\nfrom moss_jt.cli import main\n"
        f"try: main(['plan', {str(weights.folder)!r}, '--no-measure'])\n"
        "finally: print([m for m in sys.modules if m.startswith('jittor')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("[]\n")
