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
    ahead, and is waited for at the end of each sweep, and where the CPU beside it computes."""
    items = [*range(plan.config.n_layer), (0, plan.head_rows), *plan.head_ranges()]
    steps = dict(zip(items, plan.steps_of(tokens)))
    lent = [plan.blocks_lent(plan.computes_on_host(tokens)), plan.head_ranges()]
    lent = lent if plan.head_slot else [[*lent[0], *lent[1]], []]
    device = Device(lambda item: steps[item].disk / speeds.disk, waits=not plan.gpu)
    rings = [Ring([(which, slot) for slot in range(plan.slots)], device) for which in ("blocks", "lm_head")]
    start = 0.0
    for sweep in range(2 * SWEEPS):
        start = device.now if sweep == SWEEPS else start
        for ring, those in zip(rings, lent):
            if those:
                ring.follow(those)
        for item, step in steps.items():
            of = speeds.host if step.host else speeds
            memory = (step.memory + step.disk) / of.memory  # what is brought is written there, too
            seconds = max(memory, 2 * step.numbers * tokens / of.arithmetic)
            if step.host:
                device.now = max(device.now, device.computing) + seconds
            elif item in lent[0] or item in lent[1]:
                with rings[item in lent[1]].lend(item) as slot:
                    device.use(slot, item, seconds)
            else:
                device.compute(seconds)
        device.now = max(device.now, device.computing)
    device.check()
    return SWEEPS * tokens / (device.now - start)


@st.composite
def speeds(draw) -> Speeds:
    """From a slow disk and an old CPU to a fast link and a large GPU."""

    def between(low: float, high: float) -> float:
        return low * (high / low) ** draw(st.floats(0, 1, allow_subnormal=False))

    host = Speeds(memory=between(1e9, 1e11), disk=1e9, arithmetic=between(1e10, 1e13))
    return Speeds(between(1e9, 4e12), between(1e8, 1e11), between(1e10, 1e15), host)


@settings(max_examples=160, deadline=None)
@given(models(), shares, speeds(), st.sampled_from([None, "stream", "auto", "auto", "host"]), st.booleans())
def test_what_is_expected_is_what_the_scheduler_does(model, share, speeds, swap, prefill):
    """On a CPU, and in a GPU's modes, whose plans have the CPU compute for single tokens where there is a choice."""
    config, coding, context, kv_cache = model
    how = (kv_cache, swap is not None, swap or "stream")
    least = smallest(config, coding, context, *how)
    most = make_plan(config, coding, context, 1 << 60, *how).peak
    plan = make_plan(config, coding, context, least + int(share * (most - least)), *how)
    expected = plan.prefill(speeds) if prefill else plan.decode(speeds)
    found = simulated(plan, speeds, min(CHUNK, context) if prefill else 1)
    assert found == pytest.approx(expected.tokens_s, rel=0.02)
