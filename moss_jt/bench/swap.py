"""Tokens from weights that do not fit in memory: bound by how fast the disk is read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .. import machine
from ..errors import MossError
from ..model import Model
from ..sizes import gib
from ..swap import Plan, make_plan
from ..swap.plan import Speeds
from ..swap.speeds import arithmetic
from ..weights import Weights
from . import limits, page_cache
from .decode import Sweeps
from .pairs import compared, in_turn, rate
from .shape import Shape

_SECONDS = 1.0  # a sample lasts, or one sweep


@dataclass(frozen=True)
class Swap:
    """Decode with at most ``budget`` bytes of memory and room for ``context`` tokens in a cache in fp16 or int8, ``batch`` of
    them a sweep."""

    budget: int
    context: int = 2048
    batch: int = 1
    kv_cache: str = "fp16"

    def check(self, shape: Shape, folder: Path) -> None:
        """Raises MossError where the budget is too small, or nothing would come from a disk."""
        context = min(self.context, shape.config.n_ctx)
        if self.batch > context:
            raise MossError(f"{self.batch} tokens a sweep do not fit a context of {context}")
        plan = self._plan(shape)
        if not plan.disk_bytes:  # or it stays in the slots
            raise MossError(f"nothing comes from the disk: everything fits in {gib(plan.peak)}, less than the budget")
        if page_cache.in_memory(folder):
            raise MossError(f"{folder}: is in memory and on no disk; choose another folder with --dir")

    def _plan(self, shape: Shape) -> Plan:
        context = min(self.context, shape.config.n_ctx)
        return make_plan(shape.config, shape.coding, context, self.budget, self.kv_cache)

    def run(self, weights: Weights, threads: int, repeat: int) -> dict:
        plan = self._plan(Shape.of(weights))
        page_cache.drop(weights)
        model = Model(weights, plan.context, plan, self.kv_cache)
        work, limit = Sweeps(model, 0, self.batch), limits.disk_read(weights.folder)
        samples, disk = in_turn(limit, lambda: _sample(work, plan), repeat)
        tokens_s, counted = map(list, zip(*samples))
        peak = machine.peak_memory()  # before what is measured for the prediction takes more
        token = plan.disk_bytes / self.batch
        speeds = Speeds(limits.memory_read(threads).measure(), median(disk), arithmetic())
        return {
            "budget_bytes": self.budget,
            "peak_memory_bytes": peak,
            "context": plan.context,
            "batch": self.batch,
            "kv_cache": self.kv_cache,
            "tokens_s": tokens_s,
            "predicted_tokens_s": plan.decode(speeds).tokens_s * self.batch,
            "bytes_per_token": token,
            "bytes_per_token_counted": None if None in counted else median(counted),  # by Linux
            **compared(limit, [token * speed for speed in tokens_s], disk),
        }


def _sample(work: Sweeps, plan: Plan) -> tuple[float, float | None]:
    """Tokens a second, and the bytes of each that came from the disk."""
    work.sweep()  # so that as much has been read ahead at the beginning as at the end
    before, tokens = page_cache.disk_bytes(), 0

    def sweep() -> None:
        nonlocal tokens
        work.sweep()
        tokens += work.batch

    tokens_s = rate(sweep, work.batch, _SECONDS)
    after = page_cache.disk_bytes()
    # What is being read ahead now must not slow down the limit, which is measured next.
    time.sleep(2 * plan.memory["slots"] / (plan.disk_bytes / work.batch * tokens_s))
    return tokens_s, None if before is None or after is None else (after - before) / tokens
