"""Taking turns, and the arithmetic of shares."""

from __future__ import annotations

import pytest

from moss_jt.bench.pairs import Limit, compared, in_turn, rate, spread


def test_each_sample_is_between_two_measurements_of_the_limit():
    said, limits = [], iter([10.0, 20.0, 40.0, 0.0])

    def measure() -> float:
        said.append("limit")
        return next(limits)

    def work() -> str:
        said.append("work")
        return f"sample {len(said)}"

    samples, around = in_turn(Limit("a limit", "GB_s", measure), work, 3)
    assert said == ["limit", "work"] * 3 + ["limit"]
    assert samples == ["sample 2", "sample 4", "sample 6"] and around == [15, 30, 20]


def test_compared():
    limit = Limit("a limit", "GFLOP_s", lambda: 0)
    assert compared(limit, [1e9, 8e9, 3e9], [4e9, 10e9, 30e9]) == {
        "GFLOP_s": 3.0,
        "limit": "a limit",
        "limit_GFLOP_s": 10.0,
        "limit_GFLOP_s_samples": [4.0, 10.0, 30.0],
        "share": 0.25,  # the median of the shares, not the share of the medians
        "share_samples": [0.25, 0.8, 0.1],
    }


@pytest.mark.parametrize(("seconds", "calls"), [(0, 1), (1, 4), (1.1, 5)])
def test_rate(monkeypatch, seconds, calls):
    """The clock says a quarter of a second for each call."""
    done = []
    monkeypatch.setattr("moss_jt.bench.pairs.time.perf_counter", lambda: 100 + len(done) / 4)
    assert rate(lambda: done.append(1), 3, seconds) == pytest.approx(12) and len(done) == calls


def test_spread():
    assert spread([5.0]) == 0 and spread([1.0, 3.0]) == pytest.approx(2**0.5)
