"""moss-jt train sft with the real thing: small models learn, and a training that was killed gives the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import moss_jt
from moss_jt.cli import main

from ..checkpoints import random_state, small_config, write_official
from ..conftest import ROOT
from ..dialogue_files import golden_dialogues, write
from ..test_dialogues import PLAIN, TURN, conversation
from ..test_model import error
from ..tokenizer_folders import official_folder

CONFIG = small_config(n_ctx=512, n_positions=512, vocab_size=400)
SMALL = "--learning_rate 3e-3 --n_epochs 4 --train_bsz_per_gpu 2 --eval_step 4 --save_step 5".split()  # noqa: SIM905
LORA = "--lora_rank 4 --lora_dropout 0.1 --learning_rate 1e-2".split()  # noqa: SIM905
KINDS = {"full": ("fp16", []), "lora": ("fp16", LORA), "lora on int4": ("int4", LORA)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """With the models fp16 and int4, and data."""
    folder = tmp_path_factory.mktemp("sft")
    src = official_folder(write_official(folder / "src", CONFIG, random_state(CONFIG, 1), masks=False))
    for dtype in ("fp16", "int4"):
        moss_jt.convert.weights(src, folder / dtype, dtype)
    (folder / "data").mkdir()
    metas = ["You are MOSS.\n" * n for n in range(1, 4)]
    write(folder / "data/train.jsonl", [conversation(*t, meta=m) for m in metas for t in ((PLAIN,), (TURN, PLAIN), (TURN,))])
    write(folder / "data/val.jsonl", [conversation(PLAIN, TURN)])
    return folder


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in base.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def args(kind: str, out: str) -> list[str]:
    dtype, more = KINDS[kind]
    return ["train", "sft", "-m", dtype, "--data_dir", "data", "--output_dir", out, *SMALL, *more]


def run(*args: str) -> None:
    with pytest.raises(SystemExit) as e:
        main(list(args))
    assert not e.value.code


def metrics(out: str) -> list[dict]:
    with open(f"{out}/log/metrics.jsonl", encoding="utf-8") as file:
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in file]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_killed_it_goes_on_to_the_same_digits(here, kind, capsys):
    run(*args(kind, "whole"))
    found = metrics("whole")
    losses, evaluated = ([r[key] for r in found if key in r] for key in ("loss", "val_loss"))
    assert len(losses) == 20 and np.mean(losses[-5:]) < 0.8 * losses[0]
    assert evaluated[-1] < 0.8 * losses[0] and evaluated == sorted(evaluated, reverse=True)

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(ROOT / "cli.py"), *args(kind, "killed")], env=env, stderr=subprocess.PIPE)
    while process.poll() is None:
        try:
            if any(r["step"] >= 7 for r in metrics("killed")):
                break
        except (OSError, ValueError):
            pass
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not os.path.exists("killed/model") and not os.path.exists("killed/adapter")
    run(*args(kind, "killed"))
    assert "from the beginning" not in capsys.readouterr().err.rpartition("Training")[2]
    assert metrics("killed") == found
    for name in ("model/wte.safetensors", "model/block-01.safetensors", "adapter/adapter.safetensors"):
        if os.path.exists(f"whole/{name}"):
            with open(f"whole/{name}", "rb") as a, open(f"killed/{name}", "rb") as b:
                assert a.read() == b.read()


def test_the_result_is_what_was_evaluated(here):
    """Loaded again, the model gives the loss of the last evaluation, but for its weights' rounding to fp16."""
    from moss_jt.train import Trainee
    from moss_jt.train.data import read_conversations
    from moss_jt.weights import open_weights

    run(*args("full", "out"))
    val = read_conversations(here / "data/val.jsonl", moss_jt.load("out/model", device="cpu").tokenizer, 512)
    measured = Trainee(open_weights("out/model"), device="cpu").measure(val.batch(np.array([0])))
    assert measured.loss / measured.tokens == pytest.approx(metrics("out")[-1]["val_loss"], rel=1e-3)
    assert measured.right / measured.tokens == pytest.approx(metrics("out")[-1]["val_acc"], abs=0.02)


def test_an_adapter_beside_its_model_is_the_merged_model(here):
    run(*args("lora", "out"))
    run("train", "merge", "-m", "fp16", "--adapter", "out/adapter", "merged")
    ids = np.random.default_rng(0).integers(0, 400, 40)
    merged = moss_jt.load("merged", device="cpu").logits(ids, last=40)
    beside = moss_jt.load("fp16", device="cpu", adapter="out/adapter").logits(ids, last=40)
    assert error(beside, merged) < 2e-3
    assert error(moss_jt.load("fp16", device="cpu").logits(ids, last=40), merged) > 2e-2


def test_the_trained_checkpoint_learns_on(official_checkpoint, golden, tmp_path, monkeypatch):
    """moss-tiny-sft, on dialogues that it has seen."""
    from moss_jt.tokenizer import load_tokenizer

    monkeypatch.chdir(tmp_path)
    moss_jt.convert.weights(official_checkpoint("moss-tiny-sft"), "tiny")
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        write(tmp_path / f"data/{name}.jsonl", golden_dialogues(golden, load_tokenizer("tiny"))[:3])
    more = "--learning_rate 1e-4 --n_epochs 4 --train_bsz_per_gpu 3 --eval_step 1".split()  # noqa: SIM905
    run("train", "sft", "-m", "tiny", "--data_dir", "data", "--output_dir", "out", *more)
    evaluated = [r["val_loss"] for r in metrics("out") if "val_loss" in r]
    assert len(evaluated) == 4 and evaluated[-1] < 0.8 * evaluated[0] < 0.1
