"""The folder that appears complete or not at all: stopped, killed, full disks, two at once."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moss_jt import MossError, convert
from moss_jt.weights import open_weights
from tests.checkpoints import random_state, small_config, write_official

CONFIG = small_config(n_layer=4)
STATE = random_state(CONFIG)


@pytest.fixture
def src(tmp_path) -> Path:
    return write_official(tmp_path / "src", CONFIG, STATE, shards=2)


def assert_same_folders(a: Path, b: Path) -> None:
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir())
    assert filecmp.cmpfiles(a, b, names, shallow=False) == (names, [], [])


# Converts to argv[4] and kills itself in the middle of the file that follows argv[3].
KILLED = """
import os, pathlib, signal, sys
from moss_jt import convert
src, dst, whole = map(pathlib.Path, sys.argv[1:4])
def progress(done, total):
    if (dst.with_name(dst.name + ".partial") / whole).exists():
        os.kill(os.getpid(), signal.SIGKILL)
convert.weights(src, dst, sys.argv[4], progress=progress)
"""


@pytest.mark.parametrize("dtype", ["fp16", "int4"])
@pytest.mark.parametrize("whole", ["config.json", "block-00.safetensors", "block-03.safetensors"])
def test_kill_9_and_again(tmp_path, src, whole, dtype):
    dst, partial = tmp_path / "dst", tmp_path / "dst.partial"
    killed = subprocess.run([sys.executable, "-c", KILLED, src, dst, whole, dtype], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not dst.exists()
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in partial.glob("*.safetensors")}
    assert (whole in before or whole == "config.json") and len(before) < len(convert.plan_weights(src, dst).files)

    convert.weights(src, dst, dtype)
    assert not partial.exists()
    after = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in dst.glob("*.safetensors")}
    assert before.items() <= after.items()  # what was whole was not written again
    convert.weights(src, tmp_path / "uninterrupted", dtype)
    assert_same_folders(dst, tmp_path / "uninterrupted")
    open_weights(dst)


def test_a_torn_file_is_written_anew(tmp_path, src):
    partial = tmp_path / "dst.partial"
    stop_after(src, tmp_path / "dst", "block-01.safetensors")
    (partial / "block-02.safetensors.tmp").write_bytes(b"torn" * 1000)
    (partial / "head.safetensors.tmp").write_bytes(b"longer than it will be" * 10_000)
    convert.weights(src, tmp_path / "dst")
    convert.weights(src, tmp_path / "other")
    assert_same_folders(tmp_path / "dst", tmp_path / "other")


class Stopped(Exception):
    pass


def stop_after(src: Path, dst: Path, whole: str, dtype: str = "fp16") -> None:
    def progress(done: int, total: int) -> None:
        if (dst.with_name(dst.name + ".partial") / whole).exists():
            raise Stopped

    with pytest.raises(Stopped):
        convert.weights(src, dst, dtype, progress=progress)


@pytest.mark.parametrize("dtype", ["fp16", "int4"])
def test_progress_counts_every_byte(tmp_path, src, dtype):
    seen = []
    convert.weights(src, tmp_path / "dst", dtype, progress=lambda done, total: seen.append((done, total)))
    total = sum(p.stat().st_size for p in (tmp_path / "dst").glob("*.safetensors"))
    assert {t for _, t in seen} == {total} and seen[0] == (0, total) and seen[-1] == (total, total)
    assert seen == sorted(seen)
    shutil.rmtree(tmp_path / "dst")
    stop_after(src, tmp_path / "dst", "block-00.safetensors", dtype)
    seen.clear()
    convert.weights(src, tmp_path / "dst", dtype, progress=lambda done, total: seen.append((done, total)))
    assert 0 < seen[0][0] < total and seen[-1] == (total, total)


def test_a_second_conversion_into_the_same_folder_is_refused(tmp_path, src):
    refusals = []

    def progress(done: int, total: int) -> None:
        if not refusals:
            with pytest.raises(MossError, match="another conversion is writing there") as e:
                convert.weights(src, tmp_path / "dst")
            refusals.append(e)

    convert.weights(src, tmp_path / "dst", progress=progress)
    assert refusals
    open_weights(tmp_path / "dst")


def test_a_second_process_is_refused(tmp_path, src):
    def progress(done: int, total: int) -> None:
        if done == total:
            code = "import sys; from moss_jt.cli import main; main(sys.argv[1:])"
            other = subprocess.run(
                [sys.executable, "-c", code, "convert", "weights", src, tmp_path / "dst"], capture_output=True, text=True
            )
            assert other.returncode == 1 and "another conversion is writing there" in other.stderr

    convert.weights(src, tmp_path / "dst", progress=progress)


def test_the_same_conversion_again_does_nothing(tmp_path, src):
    convert.weights(src, tmp_path / "dst")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "dst").iterdir()}
    assert convert.weights(src, tmp_path / "dst") == tmp_path / "dst"
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "dst").iterdir()}


def test_an_existing_destination_is_left_alone(tmp_path, src):
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "precious").write_text("mine")
    with pytest.raises(MossError, match="exists already"):
        convert.weights(src, dst)
    assert [p.name for p in dst.iterdir()] == ["precious"]
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(MossError, match="exists already"):
        convert.weights(src, tmp_path / "link")


def test_a_partial_folder_of_another_source_is_refused(tmp_path, src):
    stop_after(src, tmp_path / "dst", "block-00.safetensors")
    os.utime(src / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(MossError, match=r"dst\.partial: begun from another source or with other settings; delete it"):
        convert.weights(src, tmp_path / "dst")


@pytest.mark.parametrize("dtypes", [("fp16", None), ("int8", None), ("int4", "fp16"), ("int4", "int4")])
def test_a_partial_folder_of_another_dtype_is_refused(tmp_path, src, dtypes):
    stop_after(src, tmp_path / "dst", "block-00.safetensors", "int4")
    with pytest.raises(MossError, match=r"dst\.partial: begun from another source or with other settings; delete it"):
        convert.weights(src, tmp_path / "dst", *dtypes)
    open_weights(convert.weights(src, tmp_path / "dst", "int4", "int8"))


def test_a_partial_folder_that_is_none_of_ours(tmp_path, src):
    partial = tmp_path / "dst.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(MossError, match="begun from another source"):
        convert.weights(src, tmp_path / "dst")
    assert (partial / "thesis.txt").read_text() == "mine"
    shutil.rmtree(partial)
    partial.write_text("a file")
    with pytest.raises(MossError, match=r"dst\.partial: cannot be written"):
        convert.weights(src, tmp_path / "dst")


@pytest.mark.parametrize("record", ["", '{"format": 1, "dt'])
def test_killed_before_anything_was_written(tmp_path, src, record):
    (tmp_path / "dst.partial").mkdir()
    (tmp_path / "dst.partial/convert.json").write_text(record)
    convert.weights(src, tmp_path / "dst")
    open_weights(tmp_path / "dst")


def test_places_where_nothing_can_be_written(tmp_path, src):
    cases = {
        src: "is the source itself",
        tmp_path / "." / "src": "is the source itself",
        src / "inside": "lies in the other",
        tmp_path: "lies in the other",
        tmp_path / "no" / "such" / "dst": "no such folder to write dst into",
        src / "config.json" / "dst": "lies in the other",
        Path("/"): "not a name",
    }
    for dst, says in cases.items():
        with pytest.raises(MossError, match=says):
            convert.weights(src, dst)
    (tmp_path / "link").symlink_to(src)
    with pytest.raises(MossError, match="is the source itself"):
        convert.weights(src, tmp_path / "link")


def test_no_room_is_found_before_anything_is_written(tmp_path, src, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    with pytest.raises(MossError, match=r"0\.\d\d GB are still to be written, but only 0\.00 GB are free"):
        convert.weights(src, tmp_path / "dst")
    assert not (tmp_path / "dst.partial").exists()


def test_only_what_remains_needs_room(tmp_path, src, monkeypatch):
    stop_after(src, tmp_path / "dst", "block-01.safetensors")
    job = convert.plan_weights(src, tmp_path / "dst")
    assert list(job.remaining) == ["block-02.safetensors", "block-03.safetensors", "head.safetensors"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system (root)")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_at_any_moment(tmp_path, src, small_disk, monkeypatch):
    """The first check is made to see room, then the disk fills while writing; room is made bit by bit until it is enough."""
    usage = shutil._ntuple_diskusage(10**12, 0, 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    dst, ballast = small_disk / "dst", small_disk / "ballast"
    ballast.write_bytes(bytes(500 << 10))
    full = 0
    for left in range(488 << 10, 0, -(12 << 10)):
        os.truncate(ballast, left)
        try:
            convert.weights(src, dst)
            break
        except MossError as e:
            assert "the disk is full" in str(e) or os.strerror(errno.ENOSPC) in str(e)
            assert str(e).isprintable() and not dst.exists()
            full += 1
    assert full > 5
    convert.weights(src, tmp_path / "elsewhere")
    assert_same_folders(dst, tmp_path / "elsewhere")


def test_a_full_disk_is_refused_beforehand(src, small_disk):
    with pytest.raises(MossError, match="are still to be written, but only"):
        convert.weights(src, small_disk / "dst")
    assert list(small_disk.iterdir()) == []


def test_a_read_only_destination(src, small_disk, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(MossError, match=r"dst\.partial: cannot be written: Read-only file system"):
        convert.weights(src, small_disk / "dst")


def test_the_record_names_the_source(tmp_path, src):
    convert.weights(src, tmp_path / "dst")
    record = json.loads((tmp_path / "dst/convert.json").read_text())
    assert record["format"] == 3 and record["dtype"] == "fp16"
    sizes = {f["name"]: f["bytes"] for f in record["source"]}
    assert sizes == {p.name: p.stat().st_size for p in src.iterdir() if not p.name.endswith("index.json")}
