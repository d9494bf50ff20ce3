"""Sizes in bytes: read from what a user writes, and written for people."""

from __future__ import annotations

import re

from .errors import MossError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str | int) -> int:
    """Bytes in ``"6GiB"``, ``"6G"`` (both 6·2³⁰), ``"6000MB"`` (6000·10⁶), ``"0.5GiB"``, ``"6442450944"`` or a number.

    Raises MossError for anything else, and for what is less than a byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(I?B)?", str(text).strip().upper())
    size = int(float(match[1]) * (1000 if match[3] == "B" else 1024) ** _POWERS[match[2]]) if match else 0
    if size < 1:
        raise MossError(f"{text!r} is not a size: write it like 6GiB, 6G, 6000MB or 0.5GiB")
    return size


def gib(count: float) -> str:
    """Memory for people, in the units of its budgets; at least as precise as anyone would set one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
