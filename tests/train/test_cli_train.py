"""moss-jt train sft, with a trainee of a few lines in place of a MOSS: all but the arithmetic."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import moss_jt
from moss_jt.cli import main
from moss_jt.config import read_json
from moss_jt.tokenizer import load_tokenizer
from moss_jt.weights import open_weights

from ..checkpoints import random_state, small_config, write_official
from ..conftest import ROOT
from ..test_dialogues import PLAIN, TURN, conversation
from ..tokenizer_folders import official_folder
from .fake_trainee import FakeOptimizer, FakeTrainee

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


def write(path, samples):
    path.write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples), "utf-8")


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    """An empty folder in which links lead to ``base`` and a copy of the data is, and the fake takes the place of a MOSS."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base / "base")
    shutil.copytree(base / "data", tmp_path / "data")
    monkeypatch.setattr("moss_jt.train.Trainee", FakeTrainee)
    monkeypatch.setattr("moss_jt.train.AdamW", FakeOptimizer)
    return tmp_path


ARGS = ["-m", "base", "--data_dir", "data", "--output_dir", "out", "--learning_rate", "0.5", "--n_epochs", "3"]
SMALL = ["--train_bsz_per_gpu", "2", "--eval_bsz_per_gpu", "2", "--eval_step", "4", "--save_step", "5"]


@pytest.fixture
def sft(here, capsys):
    """Run it; returns (exit code, stdout, stderr)."""

    def call(*more: str, args: list[str] = ARGS + SMALL) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as e:
            main(["train", "sft", *args, *more])
        return (e.value.code or 0, *capsys.readouterr())

    return call


def metrics(folder="out/log"):
    with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in file]


def tensors(folder):
    weights = open_weights(folder)
    return {f"{file}/{name}": x.copy() for file, region in weights.regions.items() for name, x in region.map().items()}


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


# ---- resuming ---------------------------------------------------------------------------------------------------------------


def in_a_process(*more: str, delay: float = 0.02) -> subprocess.Popen:
    """The same command line as ``sft``, slow enough to be stopped."""
    command = [sys.executable, "-m", "tests.train.fake_trainee", "train", "sft", *ARGS, *SMALL, *more]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_TRAINEE_DELAY": str(delay)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(step: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        try:
            if any(r["step"] >= step for r in metrics()):
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def test_killed_it_goes_on_to_the_same_numbers(sft, here):
    assert sft()[0] == 0
    whole, model = metrics(), tensors("out/model")
    shutil.rmtree(here / "out")
    for step in (3, 7, 12):  # before the first checkpoint, and after one
        process = in_a_process()
        wait_for_step(step, process)
        process.kill()
        process.communicate()
        assert not (here / "out/model").exists()
    code, _, stderr = sft()
    assert code == 0 and "from step 10 on" in stderr, stderr
    assert metrics() == whole
    again = tensors("out/model")
    assert all((again[name] == x).all() for name, x in model.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint(sft, here, number):
    assert sft("--save_step", "1000")[0] == 0
    whole = metrics()
    shutil.rmtree(here / "out")
    process = in_a_process("--save_step", "1000", delay=0.1)
    wait_for_step(7, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "The same command goes on from here" in stderr
    assert "Traceback" not in stderr
    (checkpoint,) = here.glob("out/checkpoint-*")
    assert int(checkpoint.name[-8:]) >= 7
    assert sft("--save_step", "1000")[0] == 0
    assert metrics() == whole


def test_stopped_in_an_evaluation_it_is_made_up_for(sft, here, monkeypatch):
    assert sft()[0] == 0
    whole = metrics()
    shutil.rmtree(here / "out")
    original, calls = FakeTrainee.measure, []

    def measure(self, batch):
        calls.append(batch)
        if len(calls) == 3:  # the first batch of the second evaluation
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(FakeTrainee, "measure", measure)
    assert sft()[0] == 130
    assert metrics()[-1]["step"] == 8 and "loss" in metrics()[-1]
    assert sft()[0] == 0
    assert metrics() == whole


def test_a_second_signal_stops_at_once(here):
    process = in_a_process(delay=5)
    while process.stderr.readline().startswith("Training") is False:
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert any("Stopping" in line for line in process.stderr)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - start < 4


@pytest.mark.parametrize("step", [4, 5])
def test_a_full_disk_leaves_the_checkpoint_before(sft, here, monkeypatch, step):
    from moss_jt.train import checkpoints

    original, saved = checkpoints.write_arrays, []

    def write_arrays(path, arrays):
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"x" * 100)
            raise OSError(28, "No space left on device", str(path))
        return original(path, arrays)

    monkeypatch.setattr(checkpoints, "write_arrays", write_arrays)
    code, _, stderr = sft("--save_step", str(step))
    assert code == 1 and "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith(f"moss-jt: out/checkpoint-{2 * step:08d}: the disk is full (checkpoint-{step:08d} is whole)"), last
    assert [p.name for p in here.glob("out/checkpoint-*")] == [f"checkpoint-{step:08d}"]
    monkeypatch.setattr(checkpoints, "write_arrays", original)
    code, _, stderr = sft()
    assert code == 0 and f"from step {step} on" in stderr


def test_no_room_for_a_checkpoint_is_said_at_once(sft, here, monkeypatch):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, _, stderr = sft()
    assert code == 1 and "out: a checkpoint takes 0.03 GB, and 0.00 GB are free" in stderr


def test_finished_it_says_so_and_changes_nothing(sft, here):
    assert sft()[0] == 0
    before = {p: p.stat().st_mtime_ns for p in here.glob("out/model/*")}
    code, stdout, stderr = sft()
    assert (code, stdout) == (0, "out/model\n") and "from step 18 on" in stderr
    assert before == {p: p.stat().st_mtime_ns for p in here.glob("out/model/*")}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--learning_rate", "0.2"], "was made with learning_rate 0.5, not 0.2"),
        (["--n_epochs", "4"], "was made with n_epochs 3, not 4"),
        (["--seed", "1"], "was made with seed 42, not 1"),
        (["--train_bsz_per_gpu", "3"], "was made with train_bsz_per_gpu 2, not 3"),
        (["-m", "other"], "was made with another model"),
        (["--data_dir", "data2"], "was made with another train.jsonl"),
    ],
)
def test_another_training_is_not_continued(sft, here, more, says):
    assert sft()[0] == 0
    shutil.copytree(here / "base", here / "other")
    shutil.copytree(here / "data", here / "data2")
    os.utime(here / "other/wte.safetensors")
    write(here / "data2/train.jsonl", [conversation(PLAIN)])
    before = metrics()
    code, _, stderr = sft(*more)
    assert code == 1 and stderr.splitlines()[-1].startswith(f"moss-jt: out/checkpoint-00000018: {says}; "), stderr
    assert metrics() == before
    assert sft(*more, "--no_resume")[0] == 0


def test_what_changes_no_number_may_change(sft, here):
    assert sft("--save_step", "7", "--keep", "1")[0] == 0
    shutil.copytree(here / "data", here / "elsewhere")
    more = ["--save_step", "3", "--eval_step", "2", "--keep", "3", "--data_dir", "elsewhere", "--eval_bsz_per_gpu", "1"]
    assert sft(*more, "--dtype", "int8")[0] == 0


def test_resume_insists_and_no_resume_begins_anew(sft):
    code, _, stderr = sft("--resume")
    assert code == 1 and "out: holds no checkpoint to resume from" in stderr
    assert sft()[0] == 0
    assert "from step 18 on" in sft("--resume")[2]
    code, _, stderr = sft("--no-resume")
    assert code == 0 and "from the beginning" in stderr and len([r for r in metrics() if "loss" in r]) == 18


def test_a_damaged_checkpoint_is_named(sft, here):
    assert sft()[0] == 0
    path = here / "out/checkpoint-00000018"
    for name in ("optimizer.safetensors", "model/model.safetensors"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-5])
        code, _, stderr = sft()
        assert code == 1 and f"{name}: " in stderr and "cut short" in stderr and "Traceback" not in stderr
        (path / name).write_bytes(whole)
    (path / "training.json").write_text("{")
    assert "out/checkpoint-00000018/training.json: damaged" in sft()[2]


def test_two_trainings_do_not_share_a_folder(sft, here):
    process = in_a_process(delay=0.2)
    wait_for_step(1, process)
    code, _, stderr = sft()
    process.kill()
    process.communicate()
    assert code == 1 and "out: another training is writing there" in stderr


def test_keep(sft, here):
    assert sft("--save_step", "4", "--keep", "3")[0] == 0
    assert sorted(int(p.name[-8:]) for p in here.glob("out/checkpoint-*")) == [12, 16, 18]


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
        ("learning_rat: 1", 1, "sft.yaml: 'learning_rat' is not a setting; settings are data_dir, dtype, "),
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
