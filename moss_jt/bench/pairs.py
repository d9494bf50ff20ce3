"""Measuring in turn. A machine's speed may swing twofold within minutes, so a figure counts only beside its limit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median, stdev
from typing import Any, Callable


@dataclass(frozen=True)
class Limit:
    """What bounds some work."""

    name: str
    unit: str  # that results are in: GB_s or GFLOP_s
    measure: Callable[[], float]  # bytes or operations a second


def rate(work: Callable[[], Any], amount: float, seconds: float) -> float:
    """Call ``work``, which does ``amount`` of something, for this long, once at least; returns the amount a second."""
    start, done = time.perf_counter(), 0.0
    while True:
        work()
        done += amount
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return done / elapsed


def in_turn(limit: Limit, work: Callable[[], Any], repeat: int) -> tuple[list, list[float]]:
    """``repeat`` samples of ``work``, and beside each the mean of the limits measured right before and right after it."""
    samples, limits = [], [limit.measure()]
    for _ in range(repeat):
        samples.append(work())
        limits.append(limit.measure())
    return samples, [(before + after) / 2 for before, after in zip(limits, limits[1:])]


def compared(limit: Limit, speeds: list[float], limits: list[float]) -> dict:
    """The figures of a comparison: the median speed and the median limit, and the shares, each of a speed in its own limit.

    speeds, limits: as many of each, bytes or operations a second.
    """
    shares = ratios(speeds, limits)
    return {
        limit.unit: median(speeds) / 1e9,
        "limit": limit.name,
        f"limit_{limit.unit}": median(limits) / 1e9,
        f"limit_{limit.unit}_samples": [x / 1e9 for x in limits],
        "share": median(shares),
        "share_samples": shares,
    }


def ratios(values: list[float], others: list[float]) -> list[float]:
    return [value / other for value, other in zip(values, others)]


def spread(samples: list[float]) -> float:
    """Their standard deviation; 0 for a single one."""
    return stdev(samples) if samples[1:] else 0.0
