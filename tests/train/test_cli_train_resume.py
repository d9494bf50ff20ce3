"""moss-jt train sft, killed, stopped, out of disk space, and run again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ..conftest import ROOT
from ..test_dialogues import PLAIN, conversation
from .fake_trainee import FakeTrainee
from .runs import ARGS, SMALL, metrics, tensors, write


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
