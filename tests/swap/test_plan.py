"""The plan's arithmetic: within the budget, monotone, evenly spread; refusals that name what works."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moss_jt import MossError, machine
from moss_jt.config import KV_CACHES, Config
from moss_jt.sizes import parse_size
from moss_jt.swap import plan_for, plan_for_gpu
from moss_jt.swap.plan import CHUNK, EITHER, HOST, MIB, RESIDENT, STREAMED, Plan, Speeds, less, make_plan, smallest
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


# ---- a GPU's memory ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(models(), shares)
def test_a_gpu_s_budget_is_kept(model, share):
    config, coding, context, kv_cache = model
    least = smallest(config, coding, context, kv_cache, gpu=True)
    with pytest.raises(MossError, match="is too small for this model"):
        planned(model, least - 1, gpu=True)
    most = planned(model, 1 << 60, gpu=True).peak
    plan = planned(model, least + int(share * (most - least)), gpu=True)
    assert plan.gpu and plan.peak <= plan.budget
    larger = planned(model, plan.budget + 64 * MIB, gpu=True)
    assert larger.disk_bytes <= plan.disk_bytes + 1e5 * len(plan.head_ranges())


@pytest.mark.parametrize("coding, gib", [(PLAIN, 4), (Coding("int8", "int8"), 3), (Coding("int4", "int8"), 2.5)])
def test_the_full_size_runs_on_small_cards(coding, gib):
    """With 2048 tokens of context in fp16."""
    plan = make_plan(MOON, coding, 2048, int(gib * GIB), gpu=True)
    assert plan.streams and plan.memory["KV cache"] == 2048 * 835_584
    assert plan.decode(Speeds(1e12, 25e9, 1e14)).limit == "link"


def test_what_a_refused_gpu_budget_needs():
    with pytest.raises(MossError) as e:
        make_plan(MOON, PLAIN, 2048, 3 * GIB, gpu=True)
    needed = [parse_size(size) for size in re.findall(r"\d+MiB", str(e.value))[1:]]
    contexts = [(PLAIN, 2048, "fp16"), (PLAIN, 512, "fp16"), (PLAIN, 2048, "int8")]
    for size, (coding, context, kv_cache) in zip(needed, contexts):
        assert make_plan(MOON, coding, context, size, kv_cache, gpu=True).peak <= size


# ---- blocks that the CPU computes beside a GPU -------------------------------------------------------------------------------

CARD = Speeds(memory=700e9, disk=25e9, arithmetic=60e12, host=Speeds(memory=50e9, disk=2e9, arithmetic=2e12))


@settings(max_examples=60, deadline=None)
@given(models(), st.sampled_from(["host", "auto"]), shares, st.none() | shares)
def test_blocks_for_the_host_keep_both_budgets(model, swap, share, of_ram):
    config, coding, _, kv_cache = model
    everything = make_plan(*model[:3], smallest(*model, True, "host"), kv_cache, True, "host").host_memory
    ram = None if of_ram is None or swap == "host" else int(of_ram * everything)
    how = (kv_cache, True, swap, ram)
    least, most = smallest(*model[:3], *how), make_plan(*model[:3], 1 << 60, *how).peak
    plan = make_plan(*model[:3], least + int(share * (most - least)), *how)
    with pytest.raises(MossError, match="is too small for this model"):
        make_plan(*model[:3], least - 1, *how)
    count, kind = len(plan.host_blocks), {"host": HOST, "auto": EITHER}[swap]
    block, cache = (
        nbytes(block_tensors(config, coding)),
        plan.context * config.cache_bytes_per_token(kv_cache) // config.n_layer,
    )
    if swap == "host":
        assert plan.blocks[:count] == (kind,) * count and kind not in plan.blocks[count:]
    assert ram is None or not count or count * (block + cache) < plan.host_memory <= ram
    assert (STREAMED in plan.blocks) <= (ram is not None)
    here, slots = config.n_layer - count, plan.slots * (plan.slot + (cache if plan.streamed_blocks and count else 0))
    resident = plan.blocks.count(RESIDENT) * block + here * cache + slots
    assert resident + 100 * MIB < plan.peak == sum(plan.memory.values()) <= plan.budget
    assert not plan.streamed_blocks or plan.slot >= block


@pytest.mark.parametrize("coding", [PLAIN, Coding("int8", "int8"), Coding("int4", "int8")], ids=str)
@pytest.mark.parametrize("gib", [3, 4, 6, 8, 12, 16, 24, 32, 48, 80])
def test_auto_is_as_fast_as_the_faster_one(coding, gib):
    """Or nearly: it pays for the slots and what comes with them."""
    plans = {swap: make_plan(MOON, coding, 2048, gib * GIB, gpu=True, swap=swap).settled(CARD) for swap in ("host", "auto")}
    with contextlib.suppress(MossError):
        plans["stream"] = make_plan(MOON, coding, 2048, gib * GIB, gpu=True)
    auto = plans.pop("auto")
    assert auto.peak <= gib * GIB and auto.decode(CARD).tokens_s >= 0.7 * plans["host"].decode(CARD).tokens_s
    for plan in plans.values():
        assert auto.prefill(CARD).tokens_s >= 0.98 * plan.prefill(CARD).tokens_s
    if "stream" in plans and auto.host_blocks:
        assert auto.decode(CARD).tokens_s > 1.2 * plans["stream"].decode(CARD).tokens_s


@pytest.mark.parametrize("host", [CARD.host, replace(CARD.host, memory=100e9), replace(CARD.host, arithmetic=2e11)])
@pytest.mark.parametrize("coding", [PLAIN, Coding("int4", "int8")], ids=str)
def test_streaming_begins_where_it_is_faster(coding, host):
    speeds = replace(CARD, host=host)
    plan = make_plan(MOON, coding, 2048, 6 * GIB, gpu=True, swap="auto").settled(speeds)
    ways = [replace(plan, streams_from=1), replace(plan, streams_from=CHUNK + 1)]
    for tokens, faster in ((plan.streams_from - 1, 1), (plan.streams_from, 0), (4 * plan.streams_from, 0)):
        seconds = [tokens / way._expected(tokens, speeds).tokens_s for way in ways]
        assert seconds[faster] <= seconds[1 - faster]
        assert plan.computes_on_host(tokens) == bool(faster)
    assert 1 < plan.streams_from < CHUNK
    moved = [sum(step.disk for step in plan.steps_of(n)) for n in (plan.streams_from - 1, plan.streams_from)]
    assert moved[0] == 0 < moved[1] and plan.steps == plan.steps_of(1)


def test_what_decides_is_measured_where_it_decides():
    weights, asked = SimpleNamespace(config=MOON, coding=PLAIN), []

    def speeds():
        asked.append(1)
        return replace(CARD, host=replace(CARD.host, memory=20e9))

    assert plan_for_gpu(weights, 2048, 80 * GIB, "fp16", "auto", 64 * GIB, speeds).blocks == (RESIDENT,) * 34
    assert plan_for_gpu(weights, 2048, 8 * GIB, "fp16", "host", 64 * GIB, speeds).swap == "host" and not asked
    slow = plan_for_gpu(weights, 2048, 8 * GIB, "fp16", "auto", 64 * GIB, speeds)
    assert slow == make_plan(MOON, PLAIN, 2048, 8 * GIB, gpu=True) and asked
    assert plan_for_gpu(weights, 2048, 8 * GIB, "fp16", "auto", 64 * GIB, lambda: None).computes_on_host(1)


def test_pages_that_move_go_both_ways():
    model = (MOON, PLAIN, 2048, 8 * GIB)
    unified, streamed = (make_plan(*model, gpu=True, swap=swap) for swap in ("unified", "stream"))
    assert unified.blocks == streamed.blocks and unified.memory == streamed.memory
    assert unified.disk_bytes == 2 * streamed.disk_bytes
    assert unified.decode(CARD).tokens_s == pytest.approx(streamed.decode(CARD).tokens_s / 2, rel=0.01)


@pytest.mark.parametrize("gib", [4, 8, 16, 24])
def test_what_jittor_moves(gib):
    """It keeps as many parts as fit, of any, and brings the others one after the other, each in the place of another."""
    plan = make_plan(MOON, PLAIN, 2048, gib * GIB, gpu=True, swap="jittor")
    parts = [size for size in (step.memory for step in plan.steps) if size > GIB // 4]
    assert plan.blocks == (STREAMED,) * 34 and not plan.head_rows and len(parts) == 34 + len(plan.head_ranges()) == 36
    assert plan.peak <= plan.budget < plan.peak + plan.slot and plan.memory["slots"] == plan.slots * plan.slot
    assert plan.disk_bytes == pytest.approx(2 * sum(parts) * min(1, (36 - plan.slots + 2) / 36), rel=0.03)
    computing = sum(step.memory + step.disk for step in plan.steps) / CARD.memory
    assert plan.decode(CARD).tokens_s == pytest.approx(1 / (plan.disk_bytes / CARD.disk + computing))
    assert less(plan, plan.lent_bytes - 1) is None


def test_jittor_and_what_it_cannot_keep():
    model = (MOON, PLAIN, 2048)
    assert make_plan(*model, 80 * GIB, gpu=True, swap="jittor").blocks == (RESIDENT,) * 34
    least = smallest(*model, gpu=True, swap="jittor")
    assert make_plan(*model, least, gpu=True, swap="jittor").slots == 1
    with pytest.raises(MossError, match=f"{-(-least // MIB)}MiB is the smallest that works"):
        make_plan(*model, least - 1, gpu=True, swap="jittor")
    with pytest.raises(MossError) as e:
        make_plan(*model, 8 * GIB, gpu=True, swap="jittor", ram=16 * GIB)
    needed = parse_size(re.search(r"needs (\d+MiB) of RAM", str(e.value))[1])
    assert 31 * GIB < needed < 36 * GIB and make_plan(*model, 8 * GIB, gpu=True, swap="jittor", ram=needed).streams


def test_ram_that_does_not_hold_them():
    with pytest.raises(MossError) as e:
        make_plan(MOON, PLAIN, 2048, 8 * GIB, gpu=True, swap="host", ram=16 * GIB)
    needed = parse_size(re.search(r"need (\d+MiB) of RAM", str(e.value))[1])
    assert (
        "\n" not in str(e.value)
        and make_plan(MOON, PLAIN, 2048, 8 * GIB, gpu=True, swap="host", ram=needed).host_memory <= needed
    )
    plan = make_plan(MOON, PLAIN, 2048, 8 * GIB, gpu=True, swap="auto", ram=16 * GIB)
    assert 10 < plan.blocks.count(EITHER) < 18 and plan.blocks.count(STREAMED) > 8
    streamed = [where == STREAMED for where in plan.blocks if where != RESIDENT]
    assert all(1 <= 3 * sum(streamed[i : i + 3]) <= 6 for i in range(len(streamed) - 2))  # among the others
    assert make_plan(MOON, PLAIN, 2048, 8 * GIB, gpu=True, swap="auto", ram=0).host_blocks == []
