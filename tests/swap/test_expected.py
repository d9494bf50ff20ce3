"""The speed that a plan expects is that of the scheduler: the ring itself, driven in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jt.swap.plan import CHUNK, Plan, Speeds, make_plan, smallest
from moss_jt.swap.ring import Ring

from .simulated import Device
from .test_plan import models, shares

SWEEPS = 4


def simulated(plan: Plan, speeds: Speeds, tokens: int) -> float:
    """Tokens a second of a device of these speeds. A CPU waits for each copy, and computes at once; a GPU is told everything
    ahead, and is waited for at the end of each sweep."""
    items = [*range(plan.config.n_layer), (0, plan.head_rows), *plan.head_ranges()]
    steps = dict(zip(items, plan.steps))
    streamed = [item for item, step in steps.items() if step.disk]
    device = Device(lambda item: steps[item].disk / speeds.disk, waits=not plan.gpu)
    ring, start = Ring(range(plan.slots), device), 0.0
    for sweep in range(2 * SWEEPS):
        start = device.now if sweep == SWEEPS else start
        if streamed:
            ring.follow(streamed)
        for item, step in steps.items():
            memory = (step.memory + step.disk) / speeds.memory  # what is brought is written there, too
            seconds = max(memory, 2 * step.numbers * tokens / speeds.arithmetic)
            if item in streamed:
                with ring.lend(item) as slot:
                    device.use(slot, item, seconds)
            else:
                device.compute(seconds)
        device.now = max(device.now, device.computing)
    device.check()
    assert streamed == [*plan.streamed_blocks, *plan.head_ranges()]
    return SWEEPS * tokens / (device.now - start)


@st.composite
def speeds(draw) -> Speeds:
    """From a slow disk and an old CPU to a fast link and a large GPU."""

    def between(low: float, high: float) -> float:
        return low * (high / low) ** draw(st.floats(0, 1, allow_subnormal=False))

    return Speeds(memory=between(1e9, 4e12), disk=between(1e8, 1e11), arithmetic=between(1e10, 1e15))


@settings(max_examples=80, deadline=None)
@given(models(), shares, speeds(), st.booleans(), st.booleans())
def test_what_is_expected_is_what_the_scheduler_does(model, share, speeds, gpu, prefill):
    config, coding, context, kv_cache = model
    least = smallest(config, coding, context, kv_cache, gpu)
    most = make_plan(config, coding, context, 1 << 60, kv_cache, gpu).peak
    plan = make_plan(config, coding, context, least + int(share * (most - least)), kv_cache, gpu)
    expected = plan.prefill(speeds) if prefill else plan.decode(speeds)
    found = simulated(plan, speeds, min(CHUNK, context) if prefill else 1)
    assert found == pytest.approx(expected.tokens_s, rel=0.02)
