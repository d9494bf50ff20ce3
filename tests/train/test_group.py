"""Several processes that train together: the numbers of one, and what happens to all when one stops or fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import click
import numpy as np
import pytest
from safetensors.numpy import load_file

from moss_jt import MossError, cli
from moss_jt.mpirun import started
from moss_jt.train import full
from moss_jt.train.batch import Measured
from moss_jt.train.group import Group
from moss_jt.train.loop import Stopped, Training
from moss_jt.train.settings import Settings

from ..conftest import ROOT
from ..test_model import error
from .test_sft import args, base, here  # noqa: F401  (fixtures)

needs_mpi = pytest.mark.skipif(not (shutil.which("mpirun") and shutil.which("mpicc")), reason="mpirun or mpicc is not there")


# ---- the loop, with threads in place of processes ---------------------------------------------------------------------------


class Threads:
    """Groups of ``size`` threads. What one says, and the sums, all get; a thread that never comes breaks the barrier."""

    def __init__(self, size: int):
        self.size, self.given, self._barrier = size, [None] * size, threading.Barrier(size, timeout=20)

    def exchange(self, rank: int, mine: list) -> list:
        self.given[rank] = mine
        self._barrier.wait()
        found = list(self.given)
        self._barrier.wait()
        return found


class Member(Group):
    def __init__(self, threads: Threads, rank: int):
        self._threads, self.size, self.rank = threads, threads.size, rank

    def sums(self, *numbers):
        return tuple(map(sum, zip(*self._threads.exchange(self.rank, numbers))))

    def add(self, arrays):
        arrays = list(arrays)
        for x, those in zip(arrays, zip(*self._threads.exchange(self.rank, [x.copy() for x in arrays]))):
            x[...] = sum(those)


class Counting:
    """A Trainee whose gradient is the sum of its batches' first ids, and that keeps which it saw with which dropout."""

    def __init__(self, seen: list):
        from moss_jt.train.parameter import Parameter

        self.parameters = {"w": Parameter("w", np.zeros(1, np.float32), np.zeros(1, np.float32))}
        self.seen, self.dropout_state = seen, 0

    def train(self, batch, scale):
        self.seen.append((self.dropout_state, batch.ids[:, 0].tolist()))
        self.dropout_state += 1
        self.parameters["w"].gradient[0] += scale * batch.ids[:, 0].sum()
        return Measured(float(batch.ids[:, 0].sum()), batch.labels[:, 1:].size, 1)

    def measure(self, batch):
        return Measured(float(batch.ids[:, 0].sum()), batch.labels[:, 1:].size, len(batch.ids))

    def zero_gradients(self):
        self.parameters["w"].gradient[:] = 0

    def gradient_norm(self):
        return abs(float(self.parameters["w"].gradient[0]))

    def scale_gradients(self, factor):
        raise AssertionError("nothing is clipped here")


class Recording:
    """An optimizer and a watcher that keep what they are told."""

    def __init__(self, trainee):
        self._trainee, self.told = trainee, []

    def step(self, rate):
        if not isinstance(rate, float):
            self.told.append((rate.step, rate.loss, rate.acc, rate.gradient_norm, rate.tokens))

    def evaluating(self, done, batches):
        assert 0 < done <= batches

    def evaluation(self, done):
        self.told.append((done.step, done.val_loss, done.val_acc))


class Sequences:
    """As Conversations: of 4 tokens, the first one its number."""

    def __init__(self, count: int):
        self.lengths = np.full(count, 4)

    def __len__(self):
        return len(self.lengths)

    def batch(self, which):
        from moss_jt.train.batch import Batch

        ids = np.repeat(np.asarray(which, np.int32)[:, None], 4, 1)
        return Batch(ids, ids)


def training(tmp_path, accumulated: int, group: Group | None = None, stopping=lambda: False, saved=None):
    seen: list = []
    trainee = Counting(seen)
    record = Recording(trainee)
    settings = Settings(
        tmp_path, tmp_path, tmp_path, n_epochs=2, train_bsz_per_gpu=2, gradient_accumulation_steps=accumulated,
        gradient_clipping=0, eval_step=2, eval_bsz_per_gpu=3,
    )  # fmt: skip
    save = saved if saved is not None else lambda position: None
    made = Training(settings, trainee, record, Sequences(23), Sequences(10), save, [record], None, stopping, group)
    return made, trainee, record


@pytest.mark.parametrize("size", [2, 3])
def test_together_they_do_what_one_does(tmp_path, size):
    """With as many batches a step: the same ones with the same dropout, and the same sums everywhere. 23 conversations are
    12 batches, so that some steps leave a process without any."""
    alone, one, told = training(tmp_path, 2 * size)
    alone.run()
    threads = Threads(size)
    those = [training(tmp_path, 2, Member(threads, rank)) for rank in range(size)]
    running = [threading.Thread(target=made.run) for made, *_ in those]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert sorted(row for _, trainee, _ in those for row in trainee.seen) == sorted(one.seen)
    assert len(told.told) > 4
    for _, trainee, record in those:
        assert trainee.dropout_state == one.dropout_state
        np.testing.assert_allclose([x for row in record.told for x in row], [x for row in told.told for x in row], rtol=1e-6)


def test_one_that_is_asked_to_stop_stops_all_at_the_same_step(tmp_path):
    threads, saves, asked = Threads(2), [[], []], []

    def run(rank: int) -> None:
        def stopping() -> bool:
            asked.append(rank)
            return rank == 1 and asked.count(1) > 6

        made, *_ = training(
            tmp_path, 2, Member(threads, rank), stopping, lambda at: saves[rank].append((at.step, at.dropout_state))
        )
        with pytest.raises(Stopped):
            made.run()

    running = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert saves[0] == saves[1] and len(saves[0]) == 1 and saves[0][0][0] > 0


@pytest.mark.parametrize("texts", [("same", "same", "same"), ("same", "same", "other")])
def test_whether_all_agree(texts):
    threads, found = Threads(3), []
    running = [
        threading.Thread(target=lambda rank=rank: found.append(Member(threads, rank).agrees(texts[rank]))) for rank in range(3)
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert found == [len(set(texts)) == 1] * 3 and Group().agrees("alone")


def test_without_mpirun_a_process_is_alone(monkeypatch):
    for name in ("RANK", "SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(f"OMPI_COMM_WORLD_{name}", raising=False)
    assert started() == (0, 1, 1)
    as_started(monkeypatch, 2, 4, 3)
    assert started() == (2, 4, 3)


def as_started(monkeypatch, *numbers: int) -> None:
    for name, number in zip(("RANK", "SIZE", "LOCAL_SIZE"), numbers):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(number))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "error, code, says",
    [
        (MossError("wrong"), 1, "moss-jt: wrong\n"),
        (click.UsageError("no such option"), 2, "Error: no such option\n"),
        (KeyboardInterrupt(), 130, "\n"),
        (MemoryError("too much"), 1, "MemoryError: too much\n"),
    ],
)
def test_one_of_several_ends_at_once_and_the_first_one_says_why(monkeypatch, capsys, rank, error, code, says):
    def fail(*args, **kwargs):
        raise error

    waited = []

    def leave(code: int):
        raise SystemExit(f"at once, {code}")

    monkeypatch.setattr(cli.group, "main", fail)
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(cli.os, "_exit", leave)
    as_started(monkeypatch, rank, 2, 2)
    with pytest.raises(SystemExit, match=f"at once, {code}"):
        cli.main(["train"])
    assert len(waited) == rank and capsys.readouterr().err.endswith(says)


def test_memory_for_all_processes_of_a_machine(monkeypatch, here):  # noqa: F811
    from types import SimpleNamespace

    from moss_jt.train.sft import prepare
    from moss_jt.weights import open_weights

    weights = open_weights(here / "fp16")
    needed = 16 * sum(int(np.prod(shape)) for shape in full.official_shapes(weights.config).values())
    monkeypatch.setattr(full, "memory", lambda: SimpleNamespace(available=2 * needed))
    settings = Settings(here / "fp16", here / "data", here / "out")
    as_started(monkeypatch, 0, 4, 2)
    prepare(settings)
    as_started(monkeypatch, 0, 4, 3)
    with pytest.raises(MossError, match=r"in each of 3 processes, and .* are available"):
        prepare(settings)


# ---- mpirun -----------------------------------------------------------------------------------------------------------------

_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, str(ROOT / "cli.py")]


def numbers(folder) -> list[dict]:
    lines = (folder / "log/metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def weights(folder) -> dict[str, np.ndarray]:
    """Of the last checkpoint, with the optimizer's moments."""
    (last,) = folder.glob("checkpoint-*")
    return {name: x for path in last.rglob("*.safetensors") for name, x in load_file(path).items()}


def start(*more: str, command: list[str] = COMMAND) -> subprocess.Popen:
    """By two processes."""
    mpirun = ["mpirun", "-np", "2", "--oversubscribe", "--bind-to", "none", *command, *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(mpirun, env={**os.environ, **_ROOT}, stderr=pipe, stdout=pipe, text=True)


@needs_mpi
@pytest.mark.parametrize("kind", ["full", "lora on int4"])
def test_two_processes_give_the_numbers_of_one(here, kind):  # noqa: F811
    """Losses and weights, up to rounding."""
    together = start(*args(kind, "two"))
    out, err = together.communicate(timeout=300)
    assert together.returncode == 0, err
    assert out.count("\n") == 1 and err.count("Training ") == 1 and err.count("conversations, ") == 2
    alone = [*COMMAND, *args(kind, "one"), "--gradient_accumulation_steps", "2"]
    subprocess.run(alone, check=True, capture_output=True, env={**os.environ, **_ROOT})
    one, two = numbers(here / "one"), numbers(here / "two")
    assert [sorted(row) for row in one] == [sorted(row) for row in two]
    for a, b in zip(one, two):
        np.testing.assert_allclose([b[k] for k in sorted(b)], [a[k] for k in sorted(a)], rtol=1e-6)
    one, two = weights(here / "one"), weights(here / "two")
    assert one.keys() == two.keys()
    for name in one:
        assert error(two[name], one[name]) < 1e-5, name


@needs_mpi
def test_stopping_and_going_on(here):  # noqa: F811
    """One of two is asked to stop, and then mpirun is."""
    more = ["--n_epochs", "15"]  # so that there is time for it
    whole = start(*args("lora", "whole"), *more)
    assert whole.wait(300) == 0
    for ask in (lambda pid: os.kill(children(pid)[-1], signal.SIGTERM), lambda pid: os.kill(pid, signal.SIGUSR1)):
        log = here / "parts/log/metrics.jsonl"
        before = log.read_text() if log.exists() else ""
        running = start(*args("lora", "parts"), *more)
        while not (log.exists() and len(log.read_text()) > len(before)):
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.02)
        ask(running.pid)
        _, err = running.communicate(timeout=60)
        assert running.returncode and "Stopped. The same command goes on from here." in err
    again = start(*args("lora", "parts"), *more)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert numbers(here / "parts") == numbers(here / "whole")


@needs_mpi
def test_what_is_wrong_is_said_once_and_ends_all(here):  # noqa: F811
    (here / "bad").mkdir()
    (here / "bad/train.jsonl").write_text("{\n")
    for more, code, says in (
        (["--data_dir", "bad"], 1, "moss-jt: bad/train.jsonl, line 1"),
        (["--n_epochs", "0"], 2, "Error: Invalid value for '--n_epochs'"),
        ([":", "-np", "1", *COMMAND, *args("full", "out"), "--seed", "1"], 1, "moss-jt: out: the processes differ"),
    ):
        failed = start(*args("full", "out"), *more)
        _, err = failed.communicate(timeout=60)
        assert failed.returncode == code and err.count(says) == 1, err


@needs_mpi
def test_one_that_breaks_down_does_not_leave_the_other_waiting(here):  # noqa: F811
    (here / "breaks.py").write_text(
        "import os\n"
        "from moss_jt import cli\n"
        "from moss_jt.train import Trainee\n"
        "def fail(*_): raise MemoryError('no more')\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '0': Trainee.train = fail\n"
        "cli.main()\n"
    )
    failed = start(*args("lora", "out"), command=[sys.executable, "breaks.py"])
    _, err = failed.communicate(timeout=60)
    assert failed.returncode == 1 and err.count("MemoryError: no more") == 1


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]
