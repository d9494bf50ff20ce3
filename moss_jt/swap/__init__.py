"""Where each block's weights live (the plan), and lending them to the model in time."""

from __future__ import annotations

from ..weights import Weights
from .plan import CHUNK, Plan, make_plan, smallest
from .resident import Resident
from .streamed import Streamed

__all__ = ["CHUNK", "Plan", "Resident", "Streamed", "lender", "make_plan", "smallest"]


def lender(weights: Weights, plan: Plan | None) -> Resident | Streamed:
    """What lends the model its weights; without a plan, everything is mapped."""
    return Streamed(weights, plan) if plan and plan.streams else Resident(weights)
