"""Where each block's weights live (the plan), and lending them to the model in time."""

from __future__ import annotations

from collections.abc import Callable

from .. import machine
from ..errors import MossError
from ..sizes import parse_size
from ..weights import Weights
from .plan import CHUNK, Plan, Speeds, in_mib, make_plan, smallest, too_small
from .resident import Resident
from .streamed import Streamed

__all__ = [
    "CHUNK",
    "Plan",
    "Resident",
    "Streamed",
    "lender",
    "make_plan",
    "plan_for",
    "plan_for_gpu",
    "smallest",
    "spare_memory",
]

# Left to the rest of the machine where no budget is given.
_MARGIN, _LEAST_MARGIN = 0.1, 512 << 20


def plan_for(weights: Weights, context: int, ram: str | int | None = None, kv_cache: str = "fp16") -> Plan:
    """The plan under a budget of ``ram`` (bytes, or a size like ``"6GiB"``); by default under what this machine has available
    less a margin: what is larger would not stay in memory, and come from disk page by page instead of ahead of its use.

    Raises MossError where that is too small.
    """
    model = (weights.config, weights.coding, context)
    if ram is not None:
        return make_plan(*model, parse_size(ram), kv_cache)
    available, least = machine.memory().available, smallest(*model, kv_cache)
    if available < least:
        raise MossError(too_small(*model, f"the {in_mib(available)} of memory that is available", kv_cache))
    return make_plan(*model, max(least, spare_memory()), kv_cache)


def plan_for_gpu(
    weights: Weights, context: int, vram: int, kv_cache: str, swap: str, ram: int, speeds: Callable[[], Speeds | None]
) -> Plan:
    """The plan under budgets of a GPU's memory, and of RAM for what does not fit there, in bytes. swap: as make_plan takes it.

    speeds: called where they decide. What the CPU would always be slower with is streamed. Raises MossError as make_plan does.
    """
    model = (weights.config, weights.coding, context, vram, kv_cache, True)
    plan = make_plan(*model, swap, ram)
    if swap != "auto" or not plan.host_blocks or not (known := speeds()):
        return plan
    plan = plan.settled(known)
    if plan.computes_on_host(1) or vram < smallest(*model[:3], kv_cache, True):
        return plan
    return make_plan(*model, "stream")


def spare_memory() -> int:
    """Bytes of RAM that are available, less a margin for the rest of the machine; 0 where there are none."""
    available = machine.memory().available
    return max(0, available - max(int(_MARGIN * available), _LEAST_MARGIN))


def lender(weights: Weights, plan: Plan | None) -> Resident | Streamed:
    """What lends the model its weights; without a plan, everything is mapped."""
    return Streamed(weights, plan) if plan and plan.streams else Resident(weights)
