from __future__ import annotations

import json

import numpy as np
import pytest

import moss_jt
from moss_jt.cli import main
from moss_jt.config import Config
from moss_jt.train.lora import Lora, load_adapter, save_adapter, shapes

from . import reference
from .checkpoints import random_state, small_config, write_official
from .test_dialogues import PLAIN, TURN, conversation
from .tokenizer_folders import official_folder

CONFIG = small_config(n_ctx=512, n_positions=512, vocab_size=400)


def official(folder, seed: int, **changes):
    config = {**CONFIG, **changes}
    return official_folder(write_official(folder, config, random_state(config, seed), masks=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With two models, a in fp16 and b, the same in int4; c has another vocabulary, d another tokenizer."""
    folder = tmp_path_factory.mktemp("eval")
    src = official(folder / "src", 1)
    for name, dtype in (("a", "fp16"), ("b", "int4")):
        moss_jt.convert.weights(src, folder / name, dtype)
    moss_jt.convert.weights(official(folder / "src-c", 1, vocab_size=404), folder / "c")
    other = official(folder / "src-d", 1)
    header = (other / "merges.txt").read_text("utf-8").splitlines()[0]
    (other / "merges.txt").write_text(header + "\n", "utf-8")
    moss_jt.convert.weights(other, folder / "d")
    long = {**PLAIN, "MOSS": "<|MOSS|>: " + "x" * 600 + "<eom>\n"}
    _adapter(folder / "adapter", 1)
    _adapter(folder / "wide", 1, n_embd=2 * CONFIG["n_embd"])
    lines = [conversation(TURN, PLAIN), conversation(PLAIN, long, PLAIN), conversation(PLAIN)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "data.jsonl").write_text(text, "utf-8")
    return folder


def _adapter(folder, seed: int, **changes) -> None:
    lora, rng = Lora(3, 6), np.random.default_rng(seed)
    sizes = shapes(Config.from_dict({**CONFIG, **changes}), lora)
    save_adapter(folder, lora, {name: rng.normal(0, 0.2, size).astype(np.float32) for name, size in sizes.items()})


@pytest.fixture
def run(capsys, folder, monkeypatch):
    """Run the command line in that folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as e:
            main(["eval", *args])
        return (e.value.code or 0, *capsys.readouterr())

    return call


def exact(folder, adapter=None):
    """From float64: the answers' log p, (tokens, V), and the tokens."""
    from moss_jt.dialogues import read_dialogues
    from moss_jt.tokenizer import load_tokenizer

    state, rows, targets = random_state(CONFIG, 1), [], []
    if adapter is not None:
        lora, tensors = load_adapter(adapter, Config.from_dict(CONFIG))
        for a, b in ((name, name.replace("lora_A", "lora_B")) for name in tensors if "lora_A" in name):
            name = a.removeprefix("base_model.model.").replace("lora_A.", "")
            state[name] = state[name] + lora.scale * tensors[b].astype(np.float64) @ tensors[a]
    for d in read_dialogues(folder / "data.jsonl", load_tokenizer(folder / "a"), 512):
        logits = reference.logits(Config.from_dict(CONFIG), state, d.ids)
        at = np.flatnonzero(d.answers)
        rows.append(logits[at - 1] - np.log(np.exp(logits[at - 1]).sum(1, keepdims=True)))
        targets.append(d.ids[at])
    return np.concatenate(rows), np.concatenate(targets)


def test_perplexity(run, folder):
    code, stdout, _ = run("perplexity", "-m", "a", "data.jsonl", "--json")
    found = json.loads(stdout)
    assert (code, found["dialogues"], found["turns_left_out"], found["data"]) == (0, 3, 2, "data.jsonl")
    log_p, targets = exact(folder)
    loss = -log_p[np.arange(len(targets)), targets].mean()
    assert found["tokens"] == len(targets)
    assert found["loss"] == pytest.approx(loss, rel=1e-3)
    assert found["perplexity"] == pytest.approx(np.exp(loss), rel=5e-3)
    assert found["accuracy"] == pytest.approx((log_p.argmax(1) == targets).mean(), abs=0.03)
    code, stdout, _ = run("perplexity", "-m", "a", "data.jsonl")
    assert code == 0 and f"{found['perplexity']:.6g}" in stdout and f"{found['tokens']:,}" in stdout
    assert "3; 2 turns do not fit and are left out" in stdout


def test_a_shorter_context_leaves_out_more(run):
    whole, cut = (
        json.loads(run("perplexity", "-m", "a", "data.jsonl", "--json", *more)[1]) for more in ((), ("--context", "150"))
    )
    assert cut["turns_left_out"] > whole["turns_left_out"] and cut["tokens"] < whole["tokens"]


def test_compare(run, folder):
    code, stdout, _ = run("compare", "a", "b", "data.jsonl", "--json")
    found = json.loads(stdout)
    assert code == 0 and (found["reference"], found["other"], found["dialogues"]) == ("a", "b", 3)
    alone = [json.loads(run("perplexity", "-m", name, "data.jsonl", "--json")[1]) for name in ("a", "b")]
    for score, its in zip((found["reference_score"], found["other_score"]), alone):
        assert score == {name: pytest.approx(its[name]) for name in score}
    assert 0 < found["mean_kl"] < found["max_kl"] < 1 and 0.3 < found["agreement"] < 1
    place = found["first_divergence"]
    assert place["reference"]["id"] != place["other"]["id"] and place["line"] in (1, 2, 3) and place["before"]
    code, stdout, _ = run("compare", "a", "b", "data.jsonl")
    assert code == 0 and f"line {place['line']}, token {place['position']}, after" in stdout
    assert stdout.startswith("reference         a\nother             b\n")
    assert f"{found['mean_kl']:.4g} nats" in stdout and f"{found['agreement']:.4%}" in stdout


def test_with_an_adapter(run, folder):
    found = json.loads(run("perplexity", "-m", "a", "--adapter", "adapter", "data.jsonl", "--json")[1])
    log_p, targets = exact(folder, folder / "adapter")
    loss = -log_p[np.arange(len(targets)), targets].mean()
    assert found["adapter"] == "adapter" and found["loss"] == pytest.approx(loss, rel=1e-3)
    plain = json.loads(run("perplexity", "-m", "a", "data.jsonl", "--json")[1])
    assert plain["adapter"] is None and abs(plain["loss"] - loss) > 1e-2  # so that it is not the model's without it

    given = ("reference", "other")
    for which, option in (("other", "--adapter"), ("reference", "--reference-adapter")):
        both = json.loads(run("compare", "a", "a", "data.jsonl", option, "adapter", "--json")[1])
        assert [both[f"{name}_adapter"] for name in given] == ["adapter" if name == which else None for name in given]
        for name in given:
            assert both[f"{name}_score"]["loss"] == pytest.approx((found if name == which else plain)["loss"])
        assert both["mean_kl"] > 1e-3
    code, stdout, _ = run("compare", "a", "a", "data.jsonl", "--adapter", "adapter", "--reference-adapter", "adapter")
    assert code == 0 and "100.0000% of the likeliest tokens, 0 differ" in stdout
    assert stdout.startswith("reference         a with adapter\nother             a with adapter\n")


def test_a_model_is_itself(run):
    code, stdout, _ = run("compare", "a", "a", "data.jsonl")
    assert code == 0
    assert "100.0000% of the likeliest tokens, 0 differ" in stdout and "first divergence  none" in stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["perplexity", "-m", "a", "none.jsonl"], "none.jsonl: cannot be read: No such file or directory"),
        (["perplexity", "-m", "no", "data.jsonl"], "no: no config.json here"),
        (["perplexity", "-m", "src", "data.jsonl"], "src: not converted yet"),
        (["perplexity", "-m", "a", "bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["perplexity", "-m", "a", "empty.jsonl"], "empty.jsonl: holds no conversation that fits in 512 tokens"),
        (
            ["perplexity", "-m", "a", "data.jsonl", "--context", "30"],
            "data.jsonl: holds no conversation that fits in 30 tokens",
        ),
        (["perplexity", "-m", "a", "--adapter", "src", "data.jsonl"], "src/adapter_config.json: missing"),
        (["compare", "a", "b", "data.jsonl", "--adapter", "wide"], "wide/adapter.safetensors: tensor "),
        (["compare", "a", "b", "data.jsonl", "--reference-adapter", "b"], "b/adapter_config.json: missing"),
        (["compare", "a", "c", "data.jsonl"], "c: its vocabulary is 404, that of a 400"),
        (["compare", "a", "d", "data.jsonl"], "d: its tokenizer gives other ids than that of a"),
    ],
)
def test_one_line_says_what_is_wrong(run, folder, args, says):
    (folder / "bad.jsonl").write_text(json.dumps(conversation(PLAIN)) + "\n{\n")
    (folder / "empty.jsonl").write_text("\n")
    code, stdout, stderr = run(*args)
    assert (code, stdout, stderr.count("\n")) == (1, "", 1), stderr
    assert stderr.startswith(f"moss-jt: {says}")


@pytest.mark.parametrize("args", [["perplexity", "data.jsonl"], ["compare", "a", "data.jsonl"], ["perplexity", "-m", "a"]])
def test_wrong_usage(run, args):
    assert run(*args)[0] == 2
