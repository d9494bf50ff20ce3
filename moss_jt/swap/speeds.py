"""The speeds a plan is judged by: measured in seconds, and remembered for a day, since they belong to the machine."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from .. import cuda, cudart, machine
from ..errors import MossError
from .plan import Plan, Speeds

_DAY = 24 * 3600


def measured(folder: Path, afresh: bool = False) -> Speeds:
    """This machine's, and those of the disk that ``folder`` is on; measured now if not since yesterday, or if ``afresh``.

    Takes about five seconds then, and numpy. Raises MossError where the disk cannot be measured.
    """
    if not afresh and (found := remembered(folder)):
        return found
    now = Speeds(machine.memory_bandwidth(), machine.disk_bandwidth(folder), arithmetic())
    _write(_file(), {**_read(_file()), _key(folder): {**asdict(now), "at": time.time()}})
    return now


def remembered(folder: Path) -> Speeds | None:
    """Those that ``measured`` would give without measuring; None where it would have to."""
    return _recent(_read(_file()).get(_key(folder)))


def at_hand(plan: Plan, folder: Path) -> Speeds | None:
    """Those that the plan's speed depends on, where they are remembered; of a GPU in use, the link's is measured, in
    milliseconds. None where something is missing, or nothing is brought to a GPU, whose own speed is not known."""
    known = remembered(folder)
    if not plan.gpu:
        return known
    if (plan.host_blocks and not known) or not (plan.streams or plan.host_blocks):
        return None
    return Speeds(float("inf"), cudart.link_bandwidth(), float("inf"), known)


def of_gpu(folder: Path, link: float | None = None, afresh: bool = False) -> Speeds | None:
    """Of a GPU, only its link, bytes a second, measured now unless given: the rest of it counts as no limit, since what is
    streamed hides it. And those of the machine around it, as ``measured``. None where there is no GPU to measure."""
    try:
        link = link or cuda.link_bandwidth()[0]
    except MossError:
        return None
    return Speeds(float("inf"), link, float("inf"), measured(folder, afresh))


def arithmetic() -> float:
    """fp32 operations a second of numpy's matrix product: what a good kernel reaches. Best of three."""
    import numpy as np

    a = np.ones((1536, 1536), np.float32)
    best = float("inf")
    for _ in range(4):  # the first one starts threads
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * len(a) ** 3 / best


def _key(folder: Path) -> str:
    """What the speeds belong to: this processor, as far as this process may use it, and the disk."""
    return f"{machine.cpu().model}, {machine.cores().usable} threads, device {os.stat(folder).st_dev}"


def _file() -> Path:
    """Where speeds are kept, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moss-jt" / "speeds.json"


def _read(file: Path) -> dict:
    with suppress(OSError, ValueError):
        if isinstance(known := json.loads(file.read_text()), dict):
            return known
    return {}


def _recent(entry: object) -> Speeds | None:
    try:
        found = Speeds(*(float(entry[name]) for name in ("memory", "disk", "arithmetic")))
        fresh = 0 <= time.time() - float(entry["at"]) < _DAY
    except (TypeError, KeyError, ValueError):  # nothing, or written by something else
        return None
    return found if fresh and min(found.memory, found.disk, found.arithmetic) > 0 else None


def _write(file: Path, known: dict) -> None:
    """Whole or not at all; where it cannot be written, the next plan measures again."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"{file.name}.{os.getpid()}")
        beside.write_text(json.dumps(known, indent=1))
        os.replace(beside, file)
