"""moss-jt train sft, with a trainee of a few lines in place of a MOSS."""

from __future__ import annotations

import shutil

import pytest

import moss_jt
from moss_jt.cli import main

from ..checkpoints import random_state, small_config, write_official
from ..test_dialogues import PLAIN, TURN, conversation
from ..tokenizer_folders import official_folder
from .fake_trainee import FakeOptimizer, FakeTrainee
from .runs import ARGS, SMALL, write

CONFIG = small_config(n_ctx=512, n_positions=512, vocab_size=400, eos_token_id=7)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """With the model ``base`` and the data ``data``."""
    folder = tmp_path_factory.mktemp("train")
    src = official_folder(write_official(folder / "src", CONFIG, random_state(CONFIG, 1), masks=False))
    (src / "generation_config.json").write_text('{"eos_token_id": 7, "top_k": 40}')
    (src / "meta_instruction.txt").write_text("You are MOSS.\n")
    moss_jt.convert.weights(src, folder / "base")
    (folder / "data").mkdir()
    meta = ["You are MOSS.\n" * n for n in range(1, 5)]
    write(
        folder / "data/train.jsonl",
        [conversation(*turns, meta=m) for m in meta for turns in ((PLAIN,), (TURN, PLAIN), (TURN,))],
    )
    write(folder / "data/val.jsonl", [conversation(TURN), conversation(PLAIN, PLAIN), conversation(PLAIN)])
    return folder


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    """An empty folder in which links lead to ``base`` and a copy of the data is, and the fake takes the place of a MOSS."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base / "base")
    shutil.copytree(base / "data", tmp_path / "data")
    monkeypatch.setattr("moss_jt.train.Trainee", FakeTrainee)
    monkeypatch.setattr("moss_jt.train.AdamW", FakeOptimizer)
    return tmp_path


@pytest.fixture
def sft(here, capsys):
    """Run it; returns (exit code, stdout, stderr)."""

    def call(*more: str, args: list[str] = ARGS + SMALL) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as e:
            main(["train", "sft", *args, *more])
        return (e.value.code or 0, *capsys.readouterr())

    return call
