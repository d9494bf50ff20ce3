"""The loops do all that they count."""

from __future__ import annotations

import numpy as np
import pytest

from moss_jt import MossError
from moss_jt.bench import limits
from moss_jt.runtime import jittor

MIB = 1 << 20


def test_every_float_is_read():
    values = np.zeros(3 * MIB, np.float32)
    places = np.random.default_rng().choice(len(values), 1000, replace=False)
    values[places] = np.arange(1000)
    var = jittor().core.reuse_np_array(values)
    assert limits._call("out_p[0] = moss::read_all(in0_p, in0_shape0);", [var])[0] == 999 * 1000 / 2


def test_every_operation_is_done():
    """Each chain ends at 2, the fixed point of x / 2 + 1, so their sum counts them."""
    total, operations = limits._call(
        "out_p[0] = moss::multiply_add(3); out_p[1] = 2. * moss::VEC * moss::CHAINS * moss::ROUNDS * 3;", []
    )
    lanes = total / 2
    assert lanes % (3 * 12) == 0 and lanes / 36 in (8, 16) and operations == 2 * lanes * (1 << 16)


def test_subnormals_stay_what_they_are():
    limits._call("out_p[0] = 1;", [])
    assert np.float32(1e-40) / np.float32(2) > 0


def test_memory(monkeypatch):
    monkeypatch.setattr(limits, "_SECONDS", 0)
    monkeypatch.setattr(limits, "GIB", 9 * MIB)  # a whole number of pieces is read
    sizes = []
    monkeypatch.setattr(limits, "rate", lambda work, amount, seconds: (work(), sizes.append(amount), 5.0)[-1])
    limit = limits.memory_read(2)
    assert limit.measure() == 5.0 and sizes == [8 * MIB] * 2
    assert (limit.name, limit.unit) == ("memory read, 0.01 GB by 2 threads", "GB_s")


def test_arithmetic(monkeypatch):
    monkeypatch.setattr(limits, "_SECONDS", 0)
    limit = limits.multiply_add(1)
    assert limit.measure() > 1e8 and limit.unit == "GFLOP_s" and limit.name.endswith(", 1 thread")


def test_disk(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(64 << 20))
    assert limits.disk_read(tmp_path).measure() > 1e6
    with pytest.raises(MossError, match=r"^\S+/missing: its disk's speed cannot be measured: No such file or directory$"):
        limits.disk_read(tmp_path / "missing").measure()
