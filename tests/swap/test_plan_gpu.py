"""Plans of a GPU's memory: both budgets kept, and each mode as fast as it can be."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jt import MossError
from moss_jt.sizes import parse_size
from moss_jt.swap import plan_for_gpu
from moss_jt.swap.plan import CHUNK, EITHER, HOST, MIB, RESIDENT, STREAMED, Speeds, less, make_plan, smallest
from moss_jt.weights.layout import PLAIN, Coding, block_tensors

from .test_plan import GIB, MOON, models, nbytes, planned, shares


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
    count, kinds = len(plan.host_blocks), {"host": {HOST}, "auto": {HOST, EITHER}}[swap]
    block, cache = (
        nbytes(block_tensors(config, coding)),
        plan.context * config.cache_bytes_per_token(kv_cache) // config.n_layer,
    )
    if HOST in plan.blocks:
        assert plan.blocks[:count] == (HOST,) * count and set(plan.blocks[count:]) <= {RESIDENT}
        kinds = {HOST}
    assert {plan.blocks[i] for i in plan.host_blocks} <= kinds
    assert ram is None or not count or count * (block + cache) < plan.host_memory <= ram
    assert (STREAMED in plan.blocks) <= (ram is not None)
    here, come = config.n_layer - count, cache if EITHER in plan.blocks else 0
    slots = plan.slots * (plan.slot + plan.head_slot + come)
    resident = plan.blocks.count(RESIDENT) * block + here * cache + slots
    assert resident + 100 * MIB < plan.peak == sum(plan.memory.values()) <= plan.budget
    assert not plan.streamed_blocks or plan.slot >= block


LAPTOP = Speeds(memory=300e9, disk=12e9, arithmetic=20e12, host=Speeds(memory=40e9, disk=2e9, arithmetic=8e11))


@pytest.mark.parametrize("coding", [PLAIN, Coding("int8", "int8"), Coding("int4", "int8")], ids=str)
@pytest.mark.parametrize("speeds", [CARD, LAPTOP], ids=["card", "laptop"])
def test_auto_is_as_fast_as_the_faster_one(coding, speeds):
    """Or nearly: lm_head takes room from blocks where that makes decode faster, and where it does not fit beside the slots,
    these are filled with it and keep no blocks."""
    for eighths in range(4, 33 * 8):
        how = (MOON, coding, 2048, eighths * GIB // 8, "fp16", True)
        auto, host = (make_plan(*how, swap) for swap in ("auto", "host"))
        assert auto.peak <= auto.budget
        ratio = auto.decode(speeds).tokens_s / host.decode(speeds).tokens_s
        assert ratio >= (0.999 if auto.kept and not auto.head_ranges() else 0.94)
        assert auto.prefill(speeds).tokens_s >= host.prefill(speeds).tokens_s
        with contextlib.suppress(MossError):
            stream = make_plan(*how)
            assert auto.decode(speeds).tokens_s >= 0.999 * stream.decode(speeds).tokens_s
            assert auto.prefill(speeds).tokens_s >= 0.9 * stream.prefill(speeds).tokens_s


def test_without_room_for_slots_auto_is_host():
    for coding in (PLAIN, Coding("int4", "int8")):
        model = (MOON, coding, 2048)
        least = smallest(*model, gpu=True, swap="auto")
        assert least == smallest(*model, gpu=True, swap="host") < GIB // 2
        auto, host = (make_plan(*model, least, gpu=True, swap=swap) for swap in ("auto", "host"))
        assert replace(auto, swap="host") == host and auto.settled(LAPTOP).computes_on_host(CHUNK)
    with pytest.raises(MossError, match="is too small for this model"):  # some have to be streamed
        make_plan(*model, GIB // 2, gpu=True, swap="auto", ram=GIB)


def test_a_slow_cpu_where_streaming_alone_does_not_fit():
    weights = SimpleNamespace(config=MOON, coding=PLAIN)
    slow = replace(CARD, host=replace(CARD.host, memory=1e9))
    plan = plan_for_gpu(weights, 2048, 3 * GIB, "fp16", "auto", 64 * GIB, lambda: slow)
    assert plan.swap == "auto" and plan.streams_from == 1 and not plan.computes_on_host(1)


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
