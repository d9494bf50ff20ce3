"""The check of a GPU, with the CPU in its place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from moss_jt import MossError
from moss_jt.devices import Host, check
from moss_jt.sampling import likeliest
from moss_jt.weights.layout import Coding


class Gpu(Host):
    """The CPU as a GPU that was made for a plan. ``off`` is added to every logit but the first; the likeliest are those of the
    logits times ``sign``."""

    off, sign = 0.0, 1

    def __init__(self, weights, plan, pinned):
        super().__init__(weights, plan.context, kv_cache=plan.kv_cache)

    def sweep(self, cache, sweep):
        found = super().sweep(cache, sweep)
        for sequence in cache.sequences:
            sequence.length += len(sweep.ids)
        for logits in found:
            logits[1:] += self.off
        return [likeliest(self.sign * x, 1) if row.sampling else x for x, row in zip(found, sweep.rows)]


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """Where nothing has been checked before."""
    stamps = SimpleNamespace(flags=SimpleNamespace(cache_path=str(tmp_path)))
    monkeypatch.setattr(check, "jittor", lambda: stamps)
    monkeypatch.setattr(check, "Cuda", Gpu)
    return Gpu


@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
@pytest.mark.parametrize("coding", [Coding(), Coding("int8", "int8"), Coding("int4", "int8"), Coding("int4", "int8", 64, True)])
def test_what_is_right_passes_and_is_remembered(gpu, tmp_path, monkeypatch, coding, kv_cache):
    check.check(coding, kv_cache)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(check, "Cuda", lambda *what: pytest.fail("checked again"))
    check.check(coding, kv_cache)


def test_what_is_wrong_is_refused_each_time(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "off", 0.5)
    for _ in range(2):
        with pytest.raises(MossError, match=r"^the GPU computes logits that are wrong by \S+ of their size"):
            check.check(Coding(), "fp16")
    assert not list(Path(tmp_path).iterdir())


def test_a_wrong_likeliest_token_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "sign", -1)
    with pytest.raises(MossError, match="wrong by inf"):
        check.check(Coding(), "fp16")
