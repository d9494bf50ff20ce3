"""moss-jt train sft, with a trainee of a few lines in place of a MOSS: all but the arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import moss_jt
from moss_jt.config import read_json
from moss_jt.tokenizer import load_tokenizer
from moss_jt.weights import open_weights

from ..conftest import ROOT
from ..test_dialogues import PLAIN, TURN, conversation
from .conftest import CONFIG
from .fake_trainee import FakeOptimizer, FakeTrainee
from .runs import ARGS, metrics, tensors, write

# ---- from beginning to end --------------------------------------------------------------------------------------------------


def test_a_training_from_beginning_to_end(sft, here):
    code, stdout, stderr = sft()
    assert (code, stdout) == (0, "out/model\n"), stderr
    assert sorted(p.name for p in here.glob("out/*")) == ["checkpoint-00000018", "log", "model", "training.lock"]
    found = metrics()
    steps, evaluations = ([r for r in found if key in r] for key in ("loss", "val_loss"))
    assert [r["step"] for r in steps] == list(range(1, 19)) and [r["step"] for r in evaluations] == [4, 8, 12, 16, 18]
    assert steps[-1]["loss"] < steps[0]["loss"] * 0.8
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] and evaluations[-1]["val_acc"] > 0.2
    assert "12 conversations" in stderr and "18 steps, from the beginning" in stderr and "step 18: val_loss" in stderr
    before, after = tensors("base"), tensors("out/model")
    assert (before["wte.safetensors/wte.weight"] != after["wte.safetensors/wte.weight"]).any()
    assert all((before[n] == after[n]).all() for n in before if n.startswith("block"))


def test_the_result_ends_with_eom_and_has_the_tokenizer(sft, base, here):
    assert sft("--n_epochs", "1")[0] == 0
    tokenizer, model = load_tokenizer("out/model"), here / "out/model"
    config = read_json("out/model")
    assert config["eos_token_id"] == tokenizer.token_id("<eom>") != CONFIG["eos_token_id"]
    assert json.loads((model / "generation_config.json").read_text()) == {"eos_token_id": config["eos_token_id"], "top_k": 40}
    original = read_json(base / "src")
    assert {**original, "eos_token_id": 0} == {k: v for k, v in {**config, "eos_token_id": 0}.items() if k != "moss_jt"}
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", "meta_instruction.txt"):
        assert (model / name).read_bytes() == (base / "src" / name).read_bytes()


def test_a_checkpoint_is_an_official_folder_too(sft):
    assert sft("--n_epochs", "1", "--save_step", "4", "--keep", "2")[0] == 0
    moss_jt.convert.weights("out/checkpoint-00000006/model", "again")
    assert all((x == tensors("out/model")[n]).all() for n, x in tensors("again").items())
    moss_jt.convert.weights("out/checkpoint-00000004/model", "earlier")


def test_the_result_quantised(sft):
    assert sft("--dtype", "int8")[0] == 0
    assert open_weights("out/model").coding.dtype == "int8"


def test_gradients_accumulate_to_the_mean_over_all_tokens(sft, here, monkeypatch):
    """A step of 2 batches of 2 is one of a batch of 4 wherever dropout is out of play."""
    monkeypatch.setattr(FakeTrainee, "kept", 1.0)
    write(here / "data/train.jsonl", [conversation(*turns) for turns in ((PLAIN,), (TURN, PLAIN), (TURN,), (PLAIN, PLAIN))])
    losses = []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        more = ["--train_bsz_per_gpu", str(size), "--gradient_accumulation_steps", str(accumulated), "--no_resume"]
        assert sft(*more, "--n_epochs", "4")[0] == 0
        losses.append([(r["loss"], r["gradient_norm"]) for r in metrics() if "loss" in r])
    assert len(losses[0]) == 4
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-4)


def test_clipping_and_the_rate_reach_the_optimizer(sft, monkeypatch):
    trainees, optimizers, norms = [], [], []

    class Recording(FakeTrainee):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            trainees.append(self)

    class Optimizer(FakeOptimizer):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            optimizers.append(self)

        def step(self, lr):
            norms.append(trainees[-1].gradient_norm())
            super().step(lr)

    monkeypatch.setattr("moss_jt.train.Trainee", Recording)
    monkeypatch.setattr("moss_jt.train.AdamW", Optimizer)
    assert sft("--gradient_clipping", "0.3", "--warmup_rates", "0.2")[0] == 0
    before = [r["gradient_norm"] for r in metrics() if "loss" in r]
    assert min(before) < 0.3 < max(before) and norms == pytest.approx([min(n, 0.3) for n in before], rel=1e-4)
    rates = optimizers[0].rates
    assert rates[:4] == pytest.approx([0, 0.5 / 3, 1 / 3, 0.5]) and rates[-1] < 0.05
    norms.clear()
    assert sft("--gradient_clipping", "0", "--no_resume")[0] == 0
    assert norms == pytest.approx([r["gradient_norm"] for r in metrics() if "loss" in r]) and max(norms) > 0.3


def test_the_evaluation_is_the_official_metric(sft, monkeypatch):
    """Loss: the mean of the batches' means; accuracy: of all tokens (SFTMetric)."""
    trainees = []

    class Recording(FakeTrainee):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            self.measured = []
            trainees.append(self)

        def measure(self, batch):
            self.measured.append(super().measure(batch))
            return self.measured[-1]

    monkeypatch.setattr("moss_jt.train.Trainee", Recording)
    assert sft("--eval_step", "1000")[0] == 0
    a, b = trainees[0].measured
    assert a.tokens != b.tokens
    last = metrics()[-1]
    assert last["val_loss"] == pytest.approx((a.loss / a.tokens + b.loss / b.tokens) / 2)
    assert last["val_acc"] == pytest.approx((a.right + b.right) / (a.tokens + b.tokens))


def test_without_val_nothing_is_evaluated(sft, here):
    (here / "data/val.jsonl").unlink()
    code, _, stderr = sft()
    assert code == 0 and "val.jsonl: not there, so nothing is evaluated" in stderr
    assert not [r for r in metrics() if "val_loss" in r]


# ---- settings and data ------------------------------------------------------------------------------------------------------


def test_settings_from_yaml_and_the_command_line_over_them(sft, here):
    (here / "sft.yaml").write_text(
        "model_name_or_path: base\ndata_dir: data\noutput_dir: out\nlearning_rate: 1e-2\nn_epochs: 1\n"
        "train_bsz_per_gpu: 3\nlog_dir: logs\nskip_bad: true\n"
    )
    code, _, stderr = sft("--train-bsz-per-gpu", "6", "--config", "sft.yaml", args=[])
    assert code == 0, stderr
    found = [r for r in metrics("logs") if "loss" in r]
    assert len(found) == 2 and found[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("learning_rat: 1", 1, "sft.yaml: 'learning_rat' is not a setting; settings are data_dir, device, "),
        ("- 1", 1, "sft.yaml: holds no settings"),
        ("a: [", 1, "sft.yaml: not YAML: "),
        ("keep: many", 2, "Invalid value for '--keep': 'many' is not a valid integer"),
        ("config: x", 1, "sft.yaml: 'config' is not a setting"),
        ("lora_targets: [1]", 2, "names with commas between them are expected"),
    ],
)
def test_a_bad_yaml(sft, here, text, code, says):
    (here / "sft.yaml").write_text(text)
    found, _, stderr = sft("--config", "sft.yaml")
    assert found == code and says in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(
    "more",
    [
        ["--n_epochs", "0"], ["--learning_rate", "0"], ["--warmup_rates", "1"], ["--seed", "-1"], ["--seed", "4294967296"],
        ["--gradient_clipping", "-1"], ["--lora_dropout", "0.1"], ["--lora_rank", "2", "--lora_targets", "wte"],
        ["--lora_rank", "2", "--dtype", "int8"], ["--keep", "0"], ["--learning_rate", "nan"], ["--no-such"],
    ],
)  # fmt: skip
def test_wrong_usage(sft, more):
    code, _, stderr = sft(*more)
    assert code == 2 and "Traceback" not in stderr


@pytest.mark.parametrize("missing", ["-m", "--data_dir", "--output_dir"])
def test_what_is_needed(sft, missing):
    at = ARGS.index(missing)
    assert sft(args=ARGS[:at] + ARGS[at + 2 :])[0] == 2


def test_bad_data(sft, here):
    with open("data/train.jsonl", "a") as file:
        file.write("{\n")
    code, _, stderr = sft()
    assert (code, stderr.count("\n")) == (1, 1) and stderr.startswith("moss-jt: data/train.jsonl, line 13: not JSON")
    code, _, stderr = sft("--skip_bad")
    assert code == 0 and "1 bad lines are left out, the first is line 13: not JSON" in stderr


def test_turns_that_do_not_fit_are_counted(sft, here):
    write(here / "data/train.jsonl", [conversation(PLAIN), conversation(PLAIN, *[TURN] * 5)])
    code, _, stderr = sft("--max_seq_len", "300")
    assert code == 0 and "turns do not fit and are left out, the first in line 2" in stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["-m", "none"], "none: no such folder"),
        (["-m", "data"], "data: no config.json here"),
        (["--data_dir", "none"], "none/train.jsonl: cannot be read: No such file or directory"),
    ],
)
def test_one_line_says_what_is_wrong(sft, more, says):
    code, stdout, stderr = sft(*more)
    assert (code, stdout, stderr.count("\n")) == (1, "", 1) and stderr.startswith(f"moss-jt: {says}"), stderr


def test_quantised_weights_are_not_trained(sft, base, here):
    moss_jt.convert.weights(base / "src", here / "int8", "int8")
    code, _, stderr = sft("-m", "int8")
    assert code == 1 and "int8: is in int8, whose weights cannot be trained" in stderr and "--lora_rank" in stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--device", "cuda"], "all weights are trained on the CPU only: take --device cpu, or --lora_rank for an adapter"),
        (["--vram", "4GiB"], "all weights are trained on the CPU only"),
        (["--lora_rank", "2", "--device", "cpu", "--vram", "4GiB"], "vram is a budget of a GPU's memory, and device is cpu"),
        (["--device", "tpu"], "Invalid value for '--device'"),
    ],
)
def test_a_gpu_for_what_it_does_not_do(sft, more, says):
    code, _, stderr = sft(*more)
    assert code == 2 and says in " ".join(stderr.split())


def test_several_processes_do_not_take_a_gpu(here):
    """In a process of its own, since one of several ends at once where it fails."""
    command = [sys.executable, str(ROOT / "cli.py"), "train", "sft", *ARGS, "--lora_rank", "2", "--device", "cuda"]
    done = subprocess.run(command, env={**os.environ, "OMPI_COMM_WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "several processes train on the CPU only" in done.stderr


def test_numbers_that_overflow_are_noticed(sft, here):
    code, _, stderr = sft("--learning_rate", "1e30", "--save_step", "1", "--warmup_rates", "0")
    assert code == 1 and "beyond all numbers" in stderr and "Traceback" not in stderr


def test_tensorboard(sft, here):
    pytest.importorskip("tensorboardX")
    assert sft()[0] == 0
    assert list(here.glob("out/log/events.out.tfevents.*"))


def test_without_tensorboardx_a_line_says_so(sft, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    code, _, stderr = sft()
    assert code == 0 and "Without TensorBoard logs" in stderr and metrics()
