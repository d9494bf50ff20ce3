"""Models under a budget: the same bits as with everything resident, whatever happens to a sweep; nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import moss_jt
from moss_jt import MossError
from moss_jt.model import Model, Request
from moss_jt.swap import Resident, Streamed, lender, reader
from moss_jt.weights.layout import HEAD_FILE, block_file
from tests.checkpoints import random_state, small_config, write_official
from tests.conftest import ROOT
from tests.tokenizer_folders import official_folder

from .models import CONTEXT, plan, write

SHARES = [0, 0.2, 0.5, 0.8, 0.99, 1]
IDS = np.random.default_rng(0).integers(0, 2100, CONTEXT)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(weights) -> np.ndarray:
    """Logits of all positions, everything resident."""
    return Model(weights, CONTEXT).logits(IDS, CONTEXT)


@pytest.fixture(autouse=True)
def nothing_left():
    """No thread, no open file of weights, once the models of a test are forgotten."""
    gc.collect()
    threads, files = set(threading.enumerate()), weights_files()
    yield
    gc.collect()
    assert set(threading.enumerate()) <= threads and weights_files() <= files


def weights_files() -> int:
    opened = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.lexists(fd) and ".safetensors" in os.readlink(fd) for fd in opened)


def streaming(weights, share: float = 0.3) -> Model:
    return Model(weights, CONTEXT, plan(weights, share))


@pytest.mark.parametrize(
    "dtypes",
    [("fp16", "fp16", 64), ("int8", "int8", 128), ("int4", "int8", 192)],
    ids=lambda dtypes: "-".join(map(str, dtypes)),
)
def test_the_same_bits_under_every_budget(tmp_path, dtypes):
    *dtypes, width = dtypes
    weights = write(tmp_path / "model", *dtypes, seed=3, n_embd=width)

    def computed(model: Model) -> list[np.ndarray]:
        """All logits of a prompt; then token by token from its middle."""
        return [model.logits(IDS, CONTEXT), *(model.logits(IDS[:n]) for n in range(20, 23))]

    expected, seen = computed(Model(weights, CONTEXT)), set()
    for share in SHARES:
        p = plan(weights, share)
        model = Model(weights, CONTEXT, p)
        assert model.streams == p.streams == (share < 1)
        assert all(map(np.array_equal, computed(model), expected))
        seen.add((len(p.streamed_blocks), len(p.head_ranges())))
    assert len(seen) >= 4


def test_the_kinds_of_lenders(weights):
    assert isinstance(lender(weights, None), Resident) and isinstance(lender(weights, plan(weights, 1)), Resident)
    assert isinstance(lender(weights, plan(weights, 0.5)), Streamed)


def test_each_streamed_part_is_read_once_a_sweep(weights, monkeypatch):
    read, streamed = [], plan(weights, 0.3)
    original = reader.File.read

    def record(self, offset, memory, nbytes):
        read.append((self.path.name, offset))
        return original(self, offset, memory, nbytes)

    monkeypatch.setattr(reader.File, "read", record)
    model = Model(weights, CONTEXT, streamed)
    model.logits(IDS[:5])
    start = len(read)
    for n in range(6, 16):
        model.logits(IDS[:n])
    time.sleep(0.05)  # what was read ahead before the first of these sweeps is read ahead again after the last
    sweep = len(streamed.streamed_blocks) + len(streamed.head_ranges())
    assert len(read) - start == pytest.approx(10 * sweep, abs=2)
    assert len(set(read[start : start + sweep])) == sweep
    monkeypatch.setattr("moss_jt.model.CHUNK", 8)
    start = len(read)
    model.logits(IDS[::-1])  # five chunks, and the head once
    assert sum(name == HEAD_FILE for name, _ in read[start:]) == len(streamed.head_ranges())


def test_prompts_of_several_chunks_and_several_sequences(weights, expected, monkeypatch):
    monkeypatch.setattr("moss_jt.model.CHUNK", 8)
    model, resident = streaming(weights), Model(weights, CONTEXT)
    got = model.logits(IDS, CONTEXT)
    assert np.array_equal(got, resident.logits(IDS, CONTEXT))
    assert np.allclose(got, expected, atol=1e-2)
    batches = [m.cache(places=3).sequences for m in (model, resident)]
    for lengths in ([3, 11, 20], [5, 12, 30]):
        requests = [[Request(s, IDS[n:][:m], 2) for s, n, m in zip(sequences, (0, 3, 0), lengths)] for sequences in batches]
        for ours, theirs in zip(model.evaluate(requests[0]), resident.evaluate(requests[1])):
            assert np.array_equal(ours, theirs)


def test_any_order_of_prompts_and_interruptions(weights, expected):
    """Truncated, continued, begun anew, stopped in the middle of a sweep by whatever comes up."""
    model, resident = streaming(weights), Model(weights, CONTEXT)
    rng = np.random.default_rng(1)
    for _ in range(60):
        ids = IDS[: rng.integers(1, CONTEXT)].copy()
        ids[rng.integers(0, len(ids)) :] = rng.integers(0, 2100)
        if rng.random() < 0.4:
            with pytest.raises(KeyError), stopped_at(model, int(rng.integers(0, 5))):
                model.sequence.truncate(0)
                model.logits(ids)
            resident.sequence.truncate(0)  # how many tokens are evaluated at once decides how they are rounded
        else:
            assert np.array_equal(model.logits(ids), resident.logits(ids))


class stopped_at:
    """Within this, using block i fails."""

    def __init__(self, model: Model, i: int):
        self.lender, self.i = model.device.weights, i

    def __enter__(self):
        lend = type(self.lender).block

        def block(i):
            loan = lend(self.lender, i)
            if i != self.i:
                return loan
            loan.__enter__()
            try:
                raise KeyError("stopped")
            except KeyError:
                if not loan.__exit__(*sys.exc_info()):
                    raise
            raise AssertionError

        self.lender.block = block

    def __exit__(self, *_):
        del self.lender.block


def test_a_generator_of_the_head_that_is_left_open(weights, expected):
    model = streaming(weights, 0)
    parts = model.device.weights.head()
    next(parts)
    assert np.array_equal(model.logits(IDS, CONTEXT), expected)
    parts.close()
    model.sequence.truncate(0)
    assert np.array_equal(model.logits(IDS, CONTEXT), expected)


# ---- errors -----------------------------------------------------------------------------------------------------------------


def test_a_file_that_shrinks_while_the_model_runs(tmp_path):
    weights = write(tmp_path)
    model = streaming(weights, 0)
    expected = model.logits(IDS)
    path = tmp_path / block_file(3)
    content = path.read_bytes()
    os.truncate(path, len(content) // 2)
    model.sequence.truncate(0)
    with pytest.raises(MossError, match=rf"{block_file(3)}: ends at byte {len(content) // 2}: it was changed"):
        for _ in range(2):  # the block may have been read ahead
            model.sequence.truncate(0)
            model.logits(IDS)
    path.write_bytes(content)
    model.sequence.truncate(0)
    assert np.array_equal(model.logits(IDS), expected)


def test_a_disk_that_fails_now_and_then(weights, expected, monkeypatch):
    model, preadv, rng = streaming(weights, 0), os.preadv, np.random.default_rng(2)

    def flaky(*arguments):
        if threading.current_thread() is not threading.main_thread() and rng.random() < 0.05:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    monkeypatch.setattr(reader.os, "preadv", flaky)
    failed = 0
    for _ in range(30):
        model.sequence.truncate(0)
        try:
            assert np.array_equal(model.logits(IDS, CONTEXT), expected)
        except MossError as e:
            assert "cannot be read: Input/output error" in str(e)
            failed += 1
    assert 0 < failed < 30


def test_a_missing_file(tmp_path):
    weights = write(tmp_path)
    (tmp_path / block_file(2)).unlink()
    with pytest.raises(MossError, match=f"{block_file(2)}: cannot be opened"):
        streaming(weights)


# ---- the end ----------------------------------------------------------------------------------------------------------------


def test_closed_and_forgotten(weights):
    """That nothing is left is what the fixture checks for every test here."""
    model = streaming(weights)
    model.logits(IDS)
    model.device.weights.close()
    model.device.weights.close()
    with pytest.raises(RuntimeError, match="has ended"):
        model.logits(IDS[::-1])
    for _ in range(5):
        streaming(weights).logits(IDS[:2])


SCRIPT = """
import sys, time
from moss_jt.model import Model, Request
from moss_jt.swap import reader
from moss_jt.weights import open_weights
from tests.swap.models import CONTEXT, plan
weights = open_weights(sys.argv[1])
read = reader.File.read
reader.File.read = lambda *arguments: (time.sleep(0.05), read(*arguments))[1]
model = Model(weights, CONTEXT, plan(weights, 0))
"""


def script(weights, then: str) -> subprocess.Popen:
    folder = weights.folder
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + then, folder], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "model.logits([1, 2])", "del model"])
def test_the_program_ends_while_something_is_read(weights, end):
    process = script(weights, end)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0


def test_ctrl_c_while_something_is_read(weights):
    process = script(weights, "print('ready', flush=True)\nwhile True: model.logits([1]); model.sequence.truncate(0)")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 5 and errors.strip().endswith("KeyboardInterrupt") and "Fatal" not in errors


# ---- the library's front ----------------------------------------------------------------------------------------------------


def test_load_with_a_budget(tmp_path):
    config = small_config(n_layer=4, n_embd=64, n_ctx=64, n_positions=64, vocab_size=1100)
    write_official(tmp_path / "official", config, random_state(config), masks=False)
    folder = moss_jt.convert.weights(official_folder(tmp_path / "official"), tmp_path / "ours")
    expected = moss_jt.load(folder).logits(range(20))
    tight = plan(moss_jt.weights.open_weights(folder), 0.2, 64).budget
    for ram in (tight, str(tight), f"{tight / 2**20 + 0.01}MiB"):
        plans = []
        m = moss_jt.load(folder, ram=ram, planned=plans.append)
        assert plans == [m.model.device.plan] and plans[0].streams
        assert m.model.streams and np.array_equal(m.logits(range(20)), expected)
    assert not moss_jt.load(folder, ram="1GiB").model.streams
    with pytest.raises(MossError, match=r"a budget of 1MiB is too small .* \d+MiB is the smallest"):
        moss_jt.load(folder, ram="1MiB")
    assert Path(folder).is_dir()
