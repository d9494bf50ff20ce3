"""The plan's arithmetic: within the budget, monotone, evenly spread; refusals that name what works."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moss_jt import MossError, machine
from moss_jt.config import KV_CACHES, Config
from moss_jt.sizes import parse_size
from moss_jt.swap import plan_for
from moss_jt.swap.plan import CHUNK, MIB, RESIDENT, Plan, Speeds, make_plan, smallest
from moss_jt.swap.ring import Ring
from moss_jt.swap.room import ROWS
from moss_jt.weights.layout import BITS, PLAIN, Coding, block_tensors, head_tensors, matrix

from .simulated import Device

GIB = 1 << 30
MOON = Config(34, 6144, 24, 24576, 64, 2048, 107008)
SPEEDS = Speeds(memory=30e9, disk=2e9, arithmetic=100e9)


# Compiled with -Ofast, Jittor makes this thread's processor flush subnormals, which hypothesis would rather complain about.
shares = st.floats(0, 1.2, allow_subnormal=False)


@st.composite
def models(draw) -> tuple[Config, Coding, int, str]:
    """(config, coding, context, kv_cache): blocks from far smaller to far larger than lm_head."""
    heads, size = 4 * draw(st.integers(1, 6)), 2 * draw(st.integers(1, 128))
    d = heads * size
    inner, v = draw(st.sampled_from([d, 4 * d, 3 * d + 7])), draw(st.integers(1, 110_000))
    config = Config(draw(st.integers(1, 40)), d, heads, inner, 2, 2048, v)
    dtype, head = draw(st.sampled_from(list(BITS))), draw(st.sampled_from(list(BITS)))
    coding = Coding(dtype, head, 8 * draw(st.integers(1, 16)), draw(st.booleans()))
    return config, coding, draw(st.integers(2, 2048)), draw(st.sampled_from(KV_CACHES))


def planned(model: tuple[Config, Coding, int, str], budget: int, gpu: bool = False) -> Plan:
    return make_plan(*model[:3], budget, model[3], gpu)


def nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)


def check(plan: Plan) -> None:
    """What must hold for every plan, added up here from the files' layout."""
    config, streamed = plan.config, plan.streamed_blocks
    block = block_tensors(config, plan.coding)
    row = nbytes(matrix("", 16, config.n_embd, plan.coding.head_dtype)) / 16
    resident = (config.n_layer - len(streamed)) * nbytes(block) + plan.head_rows * row
    slots = plan.slots * plan.slot
    number, scale = {"fp16": (2, 0), "int8": (1, 4)}[plan.kv_cache]
    cache = plan.context * config.n_layer * 2 * config.n_head * (config.n_embd // config.n_head * number + scale)
    assert plan.memory["KV cache"] == cache
    assert resident + slots + cache + 100 * MIB < plan.peak <= plan.budget
    assert plan.peak == sum(plan.memory.values()) and min(plan.memory.values()) >= 0
    ranges = [(0, plan.head_rows), *plan.head_ranges()]
    assert ranges[-1][1] == config.vocab_size and all(a < b for a, b in ranges[1:])
    assert all(before[1] == after[0] for before, after in zip(ranges, ranges[1:]))
    assert all(a % ROWS == 0 for a, _ in ranges)
    assert plan.streams == (plan.slots >= 2) == bool(streamed or plan.head_ranges())
    assert not streamed or plan.slot >= nbytes(block)
    assert all(plan.slot >= (b - a) * row for a, b in plan.head_ranges())
    assert (
        0 <= plan.disk_bytes - (len(streamed) * nbytes(block) + (config.vocab_size - plan.head_rows) * row) < 1e5 * len(ranges)
    )


@settings(max_examples=300, deadline=None)
@given(models(), shares)
def test_plans_keep_their_budget_and_use_it(model, share):
    least, most = smallest(*model), planned(model, 1 << 50).peak
    budget = least + int(share * (most - least))
    plan = planned(model, budget)
    check(plan)
    assert plan.streams == (budget < most)
    room = plan.budget - plan.peak
    if plan.streams and plan.head_ranges() and plan.streamed_blocks:  # what is left would not hold more of lm_head
        head = nbytes(head_tensors(plan.config, plan.coding))
        assert room <= (ROWS + 2) * head / plan.config.vocab_size + 50_000


@settings(max_examples=100, deadline=None)
@given(models(), st.lists(shares, min_size=2, max_size=20))
def test_a_larger_budget_reads_no_more_from_disk(model, shares):
    least, most = smallest(*model), planned(model, 1 << 50).peak
    moved = [planned(model, least + int(share * (most - least))).disk_bytes for share in sorted(shares)]
    # Up to the pages at the edges of lm_head's parts.
    assert all(after <= before + 1e6 for before, after in zip(moved, moved[1:]))


@settings(max_examples=100, deadline=None)
@given(models(), st.integers(1, 1 << 40))
def test_refusals_name_the_smallest_that_works(model, short):
    least = smallest(*model)
    check(planned(model, least))
    assume(least - short > 0)
    with pytest.raises(MossError) as e:
        planned(model, least - short)
    text = str(e.value)
    named = parse_size(re.search(r"(\d+MiB) is the smallest", text)[1])
    assert least <= named < least + MIB and "\n" not in text
    check(planned(model, named))
    config, coding, context, kv_cache = model
    for size, shorter in re.findall(r"(\d+MiB) with a context of (\d+)", text.partition(";")[2]):
        check(make_plan(config, coding, int(shorter), parse_size(size), kv_cache))
        assert int(shorter) < context
    for size, lighter in re.findall(r"(\d+MiB) in (int\d)", text):
        assert BITS[lighter] < BITS[coding.dtype]
        check(
            make_plan(
                config, Coding(lighter, min(coding.head_dtype, "int8", key=BITS.get)), context, parse_size(size), kv_cache
            )
        )
    in_int8 = re.search(r"(\d+MiB) with a KV cache in int8", text)
    assert bool(in_int8) == (kv_cache == "fp16")
    if in_int8:
        check(make_plan(config, coding, context, parse_size(in_int8[1]), "int8"))


def test_the_large_model():
    """The figures that README and guide rest on."""
    plan = make_plan(MOON, PLAIN, 2048, 6 * GIB)
    assert plan.peak > 6 * GIB - 4 * MIB and plan.blocks.count(RESIDENT) == 2 and 29e9 < plan.disk_bytes < 30e9
    assert smallest(MOON, PLAIN, 2048) < 4 * GIB
    assert smallest(MOON, Coding("int4", "int8"), 512) < 1.5 * GIB
    assert make_plan(MOON, Coding("int4", "int8"), 2048, 11 * GIB).disk_bytes == 0
    nearly = make_plan(
        MOON, Coding("int4", "int8"), 2048, 10 * GIB
    )  # lm_head alone is streamed, and only what does not fit of it
    assert not nearly.streamed_blocks and nearly.slots * nearly.slot < 150 * MIB and nearly.disk_bytes < 0.5e9


def test_an_int8_cache_leaves_room_for_weights():
    plans = {kv_cache: make_plan(MOON, PLAIN, 2048, 6 * GIB, kv_cache) for kv_cache in KV_CACHES}
    caches = {kv_cache: plan.memory["KV cache"] for kv_cache, plan in plans.items()}
    assert caches == {"fp16": 2048 * 835_584, "int8": 2048 * 424_320}
    block = nbytes(block_tensors(MOON, PLAIN))
    saved = plans["fp16"].disk_bytes - plans["int8"].disk_bytes
    assert saved == pytest.approx(caches["fp16"] - caches["int8"], abs=block / 20)
    everything = {kv_cache: make_plan(MOON, PLAIN, 2048, 50 * GIB, kv_cache).memory_bytes for kv_cache in KV_CACHES}
    assert everything["fp16"] - everything["int8"] == 1024 * (835_584 - 424_320)


def test_blocks_are_spread_evenly():
    for gib in range(5, 31):
        at = make_plan(MOON, PLAIN, 2048, gib * GIB).streamed_blocks
        gaps = [b - a for a, b in zip(at, at[1:])] or [34]
        assert max(gaps) - min(gaps) <= 1 and abs(at[0] - (33 - at[-1])) <= 1


def test_a_shorter_prompt_than_a_chunk_needs_less_work_space():
    space = [make_plan(MOON, PLAIN, n, 50 * GIB).memory["work space"] for n in (128, CHUNK, 2048)]
    assert space[0] < space[1] / 2 and space[2] < space[1] * 1.01


@pytest.mark.parametrize("gib", [4, 6, 12, 24, 30, 31, 32, 40])
@pytest.mark.parametrize("speeds", [SPEEDS, replace(SPEEDS, disk=29e9), replace(SPEEDS, disk=60e9)])
def test_expected_speed_is_that_of_the_simulated_machine(gib, speeds):
    """The ring, driven in virtual time by a disk and a memory of these speeds, needs as long as the plan says."""
    plan = make_plan(MOON, PLAIN, 2048, gib * GIB)
    block, head = nbytes(block_tensors(MOON, PLAIN)), nbytes(head_tensors(MOON, PLAIN))
    row, cache = head / MOON.vocab_size, MOON.cache_bytes_per_token() * 1024 / 34
    size = {**{i: block for i in plan.streamed_blocks}, **{(a, b): (b - a) * row for a, b in plan.head_ranges()}}
    device = Device(lambda item: size[item] / speeds.disk, waits=True)
    ring, start = Ring(range(plan.slots), device), 0.0
    for sweep in range(6):
        if size:
            ring.follow(list(size))
        if sweep == 2:
            start = device.now
        for item in [*range(34), (0, plan.head_rows), *plan.head_ranges()]:
            moved = (block + cache if isinstance(item, int) else (item[1] - item[0]) * row) + size.get(item, 0)
            if item in size:
                with ring.lend(item) as slot:
                    device.use(slot, item, moved / speeds.memory)
            else:
                device.compute(moved / speeds.memory)
    device.check()
    assert 4 / (device.now - start) == pytest.approx(plan.decode(speeds).tokens_s, rel=1e-3)
    assert plan.memory_bytes == pytest.approx(34 * (block + cache) + head, rel=1e-3)


def test_what_the_limit_is():
    plan = make_plan(MOON, PLAIN, 2048, 6 * GIB)
    assert plan.decode(SPEEDS).limit == "disk" and plan.decode(replace(SPEEDS, disk=100e9)).limit == "memory"
    for disk in (1e9, 2e9, 3e9):  # where the disk is far slower than the rest, it never rests
        speeds = replace(SPEEDS, disk=disk)
        assert plan.decode(speeds).tokens_s == pytest.approx(disk / plan.disk_bytes, rel=0.01)
    everything = make_plan(MOON, PLAIN, 2048, 40 * GIB)
    assert everything.decode(SPEEDS).tokens_s == pytest.approx(30e9 / everything.memory_bytes)


def test_spreading_hides_the_disk():
    """With some blocks streamed and everything about as fast to read as to compute, hardly anything is waited for."""
    for gib in (18, 24, 28):
        plan = make_plan(MOON, PLAIN, 2048, gib * GIB)
        moved = plan.memory_bytes + plan.disk_bytes
        speeds = replace(SPEEDS, disk=SPEEDS.memory * plan.disk_bytes / moved)
        assert plan.decode(speeds).tokens_s > 0.85 * speeds.memory / moved


def test_prefill_is_bound_by_arithmetic_or_by_the_disk():
    plan = make_plan(MOON, PLAIN, 2048, 6 * GIB)
    slow, fast = plan.prefill(SPEEDS), plan.prefill(replace(SPEEDS, arithmetic=1e15))
    assert slow.limit == "arithmetic" and slow.tokens_s == pytest.approx(100e9 / (2 * 34 * 12 * 6144**2), rel=0.01)
    assert fast.limit == "disk" and fast.tokens_s == pytest.approx(512 / (plan.disk_bytes / 2e9), rel=0.01)


# ---- without a budget -------------------------------------------------------------------------------------------------------


def spared(monkeypatch, available: int, context: int = 2048) -> Plan:
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(64 * GIB, available))
    return plan_for(SimpleNamespace(config=MOON, coding=PLAIN), context)


def test_by_default_what_the_machine_can_spare(monkeypatch):
    assert not spared(monkeypatch, 60 * GIB).streams
    plan = spared(monkeypatch, 14 * GIB)
    assert plan.streams and 12 * GIB < plan.peak <= 14 * GIB * 0.9
    assert spared(monkeypatch, 4 * GIB).peak <= 4 * GIB - 200 * MIB  # less than the margin is left: still better than nothing
    with pytest.raises(MossError, match=r"^the 2048MiB of memory that is available is too small .* 3\d\d\dMiB is the smallest"):
        spared(monkeypatch, 2 * GIB)


def test_a_budget_is_taken_at_its_word(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: pytest.fail("asked"))
    weights = SimpleNamespace(config=MOON, coding=Coding("int8", "int8"))
    assert plan_for(weights, 2048, "6GiB").budget == plan_for(weights, 2048, 6 * GIB).budget == 6 * GIB
    assert plan_for(weights, 2048, "6GiB", "int8").memory["KV cache"] == 2048 * 424_320
    with pytest.raises(MossError, match="'lots' is not a size"):
        plan_for(weights, 2048, "lots")
