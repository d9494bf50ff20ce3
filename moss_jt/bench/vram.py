"""Speed and peak memory within budgets, of a GPU's memory or of RAM: a matrix of cases, each in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from statistics import mean

from .. import machine
from ..devices import open_device
from ..errors import MossError
from ..machine import GIB
from ..model import Model
from ..runtime import jittor
from ..sizes import gib
from ..swap import make_plan
from ..swap.plan import Plan, Speeds, in_mib
from ..swap.speeds import arithmetic
from ..weights import Weights, open_weights
from . import device_limits, limits, page_cache
from .apart import run_apart
from .decode import Sweeps
from .pairs import rate

BUDGETS = (None, *(size * GIB for size in (4, 6, 8, 12, 16, 24)))
SWAPS = {"cuda": ("auto", "stream"), "cpu": ("stream",)}  # that are measured unless others are named
LENGTHS = ("short", "full")
_SHORT = 64  # tokens of a short turn


@dataclass(frozen=True)
class Case:
    """A model within a budget (bytes; None: whatever holds all of it), and how many tokens are in use."""

    device: str  # cuda: the budget is of its memory; cpu: of RAM
    dtype: str
    budget: int | None
    swap: str | None  # None: nothing is brought
    length: str  # short, or full: all of the context
    context: int = 2048
    kv_cache: str = "fp16"

    @property
    def used(self) -> int:
        return min(_SHORT, self.context) if self.length == "short" else self.context

    def __str__(self) -> str:
        where = "resident" if self.budget is None else f"{gib(self.budget)}, {self.swap}"
        return f"{self.dtype}, {where}, {self.length}"


def cases(
    device: str, dtypes: list[str], budgets: list[int | None], swaps: list[str], lengths: list[str], context: int, kv_cache: str
) -> Iterator[Case]:
    """Every combination; what is resident, it is whatever the swap."""
    for dtype in dtypes:
        for budget in budgets:
            for swap in [None] if budget is None else swaps:
                for length in lengths:
                    yield Case(device, dtype, budget, swap, length, context, kv_cache)


def measure(folder: Path, case: Case, seconds: float) -> dict:
    """The figures of a case, as docs/bench.md names them, or ``why_not``. Tokens are counted for so many seconds, one at
    least."""
    start = time.monotonic()
    code = "from moss_jt.bench.vram import apart; apart()"
    done = run_apart(code, str(folder), json.dumps(asdict(case)), str(seconds))
    if done.returncode:
        how = f"by signal {-done.returncode}" if done.returncode < 0 else f"with {done.returncode}"
        return {"why_not": f"its process ended {how}"}
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": time.monotonic() - start}


def apart() -> None:
    """What runs in the process of a case."""
    folder, case, seconds = sys.argv[1:]
    try:
        found = figures(open_weights(folder), Case(**json.loads(case)), float(seconds))
    except MossError as e:
        found = {"why_not": str(e)}
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps(found))


def figures(weights: Weights, case: Case, seconds: float) -> dict:
    """The figures of a case, measured here. Raises MossError where it cannot be, or would be that of another case."""
    case = replace(case, context=min(case.context, weights.config.n_ctx))
    budget = _budget(weights, case)
    jittor(case.device, save_mem=case.swap == "jittor")
    gpu = case.device == "cuda"
    (page_cache.fill if case.budget is None else page_cache.drop)(weights)
    link = [_link(weights, gpu)]
    device = open_device(weights, case.context, kv_cache=case.kv_cache, device=case.device, **_within(case, budget))
    plan = device.plan
    model = Model(weights, case.context, kv_cache=case.kv_cache, device=device)
    start = time.perf_counter()
    work = Sweeps(model, case.used - 1, 1)
    prompt = case.used / (time.perf_counter() - start)
    work.sweep()  # so that as much has been brought ahead at the beginning as at the end
    tokens_s = rate(work.sweep, 1, seconds)
    peaks = {"peak_vram_bytes": device.peak if gpu else None, "peak_ram_bytes": machine.peak_memory()}
    streams = device.streams
    del work, model, device  # what is measured next needs memory, too
    link.append(_link(weights, gpu))
    speeds = _speeds(mean(link), gpu)
    return {
        "used": case.used,
        "blocks": {where: plan.blocks.count(where) for where in dict.fromkeys(plan.blocks)},
        "planned_peak_bytes": plan.peak,
        **peaks,
        "prompt_tokens_s": prompt,
        "tokens_s": tokens_s,
        "predicted_tokens_s": plan.decode(speeds).tokens_s,
        "bytes_per_token": plan.disk_bytes,
        "GB_s": plan.disk_bytes * tokens_s / 1e9,
        "link": "pinned memory to the device" if gpu else "disk",
        "link_GB_s": speeds.disk / 1e9,
        "share": plan.disk_bytes * tokens_s / speeds.disk if streams else None,
        "memory_GB_s": speeds.memory / 1e9,
        "host_GB_s": speeds.host.memory / 1e9 if speeds.host else None,
    }


def _budget(weights: Weights, case: Case) -> int:
    """In bytes. Raises MossError where it is too large for this machine, or holds everything, as that of another case does."""
    everything = _plan(weights, case, 1 << 60).peak
    if case.budget is not None and case.budget >= everything:
        raise MossError(f"everything fits in {gib(everything)}: as resident")
    budget = everything if case.budget is None else case.budget
    available = machine.memory().available
    if case.device == "cpu" and case.budget is not None and page_cache.in_memory(weights.folder):
        raise MossError(f"{weights.folder}: is in memory and on no disk; choose another folder with --dir")
    if case.device == "cpu" and budget > available:
        raise MossError(f"{in_mib(budget)} of memory are needed, and {in_mib(available)} are available")
    return budget


def _plan(weights: Weights, case: Case, budget: int) -> Plan:
    return make_plan(weights.config, weights.coding, case.context, budget, case.kv_cache, gpu=case.device == "cuda")


def _within(case: Case, budget: int) -> dict:
    """The budget, and the swap, as open_device takes them."""
    if case.device == "cpu":
        return {"ram": budget}
    return {"vram": budget, "swap": case.swap or "stream"}


def _link(weights: Weights, gpu: bool) -> float:
    """Bytes a second of what weights are brought over."""
    return (device_limits.to_device() if gpu else limits.disk_read(weights.folder)).measure()


def _speeds(link: float, gpu: bool) -> Speeds:
    """Measured now, for what the plan expects of them."""
    ram = limits.memory_read(machine.cores().usable).measure()
    if gpu:
        return Speeds(device_limits.copy().measure(), link, inf, Speeds(ram, inf, arithmetic()))
    return Speeds(ram, link, arithmetic())
