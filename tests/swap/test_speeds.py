"""Speeds are measured once a day, for each machine and disk."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from moss_jt import machine
from moss_jt.swap import speeds


@pytest.fixture
def measurements(monkeypatch, tmp_path):
    """How often something was measured; what is measured grows with it."""
    calls = []

    def disk(folder):
        calls.append(folder)
        return 1e9 * len(calls)

    monkeypatch.setattr(machine, "disk_bandwidth", disk)
    monkeypatch.setattr(machine, "memory_bandwidth", lambda: 2e10)
    monkeypatch.setattr(speeds, "arithmetic", lambda: 1e11)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_once_a_day(measurements, tmp_path, monkeypatch):
    first = speeds.measured(tmp_path)
    assert (first.memory, first.disk, first.arithmetic) == (2e10, 1e9, 1e11)
    assert speeds.measured(tmp_path) == first and measurements == [tmp_path]
    assert speeds.measured(tmp_path, afresh=True).disk == 2e9
    assert speeds.measured(tmp_path).disk == 2e9
    now = time.time()
    for later in (25 * 3600, -3600):  # a day later, or after the clock was set back
        monkeypatch.setattr(time, "time", lambda later=later: now + later)
        count = len(measurements)
        speeds.measured(tmp_path)
        assert len(measurements) == count + 1


def test_another_disk_or_fewer_threads_are_another_measurement(measurements, tmp_path, monkeypatch):
    speeds.measured(tmp_path)
    monkeypatch.setattr(machine, "cores", lambda: machine.Cores(64, 64, None))
    speeds.measured(tmp_path)
    speeds.measured(Path("/proc"))
    assert len(measurements) == 3


@pytest.mark.parametrize("content", ["", "[]", "{", '{"KEY": 3}', '{"KEY": {"memory": "x"}}', '{"KEY": {"memory": 1}}', "\x00"])
def test_what_it_cannot_read_is_measured(measurements, tmp_path, content):
    file = tmp_path / "cache" / "moss-jt" / "speeds.json"
    file.parent.mkdir(parents=True)
    file.write_text(content.replace("KEY", speeds._key(tmp_path)))
    assert speeds.measured(tmp_path).disk == 1e9
    assert json.loads(file.read_text())[speeds._key(tmp_path)]["disk"] == 1e9


def test_remembered_without_measuring(measurements, tmp_path):
    assert speeds.remembered(tmp_path) is None and not measurements
    assert speeds.measured(tmp_path) == speeds.remembered(tmp_path) and len(measurements) == 1


def test_nowhere_to_remember(measurements, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    assert speeds.measured(tmp_path).disk == 1e9 and speeds.measured(tmp_path).disk == 2e9


def test_arithmetic_is_measured():
    assert 1e8 < speeds.arithmetic() < 1e14
