"""The learning rate of each step."""

from __future__ import annotations

import math


def cosine(step: int, steps: int, warmup_rates: float) -> float:
    """The share of the learning rate for step ``step``, from 0, of ``steps``: up to 1 in a line, then down to 0 along half a
    cosine. It is transformers' ``get_cosine_schedule_with_warmup``, with the number of steps that finetune_moss.py gives it."""
    warmup = int(warmup_rates * steps)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
