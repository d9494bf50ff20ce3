"""Weights that are brought to a simulated GPU: whatever its timing, kernels read what they were lent."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jt.swap import make_plan, on_device, reader, smallest
from moss_jt.swap.on_device import OnDevice
from moss_jt.swap.plan import Plan
from moss_jt.swap.ring import Ring
from moss_jt.swap.streamed import Streamed

from . import models, simulated_cuda
from .simulated_cuda import Simulated

CONTEXT = 24


@pytest.fixture(scope="module", params=["fp16", "int4"])
def weights(request, tmp_path_factory):
    head = "fp16" if request.param == "fp16" else "int8"
    return models.write(tmp_path_factory.mktemp("gpu") / "model", request.param, head, n_layer=7)


def planned(weights, share: float, swap: str = "stream"):
    """Within this share of what is missing from the smallest budget to everything."""
    model = (weights.config, weights.coding, CONTEXT)
    least, most = smallest(*model, gpu=True, swap=swap), make_plan(*model, 1 << 40, gpu=True).peak
    return make_plan(*model, least + int(share * (most - least)), gpu=True, swap=swap)


def opened(weights, monkeypatch, seed: int, plan, pinned: int) -> tuple[Simulated, OnDevice]:
    cuda = Simulated(seed)
    monkeypatch.setattr(on_device, "cudart", cuda)
    return cuda, OnDevice(weights, plan if isinstance(plan, Plan) else planned(weights, plan), pinned)


def sweep(
    weights, cuda: Simulated, lender: OnDevice, head: bool, wrong: list, stop: int | None = None, by_cpu: list | None = None
) -> None:
    """Kernels that read all of every block but those ``by_cpu``, and of lm_head; up to block ``stop``."""
    lender.expect(head, by_cpu is not None)
    for i in range(weights.config.n_layer):
        if i in (by_cpu or ()):
            continue
        with lender.block(i) as found:
            if i == stop:
                raise KeyError
            for name, array in weights.block(i).items():
                cuda.use(found[name], array, wrong)
    whole = weights.head()
    for found, first, count in lender.head() if head else ():
        for name in ("ln_f.weight", "ln_f.bias"):
            cuda.use(found[name], whole[name], wrong)
        for name, address in found.items():
            if name.startswith("lm_head"):
                together = 16 if name.endswith((".q", ".scale", ".zero")) else 1
                cuda.use(address, whole[name][first // together : -(-(first + count) // together)], wrong)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    share=st.sampled_from([0, 0.2, 0.5, 0.9, 1]),
    pinned=st.sampled_from([0, 200_000, 1 << 30]),
    sweeps=st.lists(st.tuples(st.booleans(), st.none() | st.integers(0, 6)), min_size=1, max_size=6),
)
def test_whatever_the_timing(weights, seed, share, pinned, sweeps):
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda, lender = opened(weights, monkeypatch, seed, share, pinned)
        allocated, wrong = cuda.taken, []
        assert lender.streams == (share < 1)
        assert bool(lender.from_disk) == lender.streams if pinned == 0 else pinned < 1 << 30 or not lender.from_disk
        for head, stop in sweeps:
            if stop is None:
                sweep(weights, cuda, lender, head, wrong)
            else:
                with pytest.raises(KeyError):
                    sweep(weights, cuda, lender, head, wrong, stop)
        cuda.synchronize()
        assert not wrong and cuda.taken == allocated
        if lender.streams:
            lender.close()


@pytest.fixture(scope="module", params=["fp16", "int4"])
def keeping(request, tmp_path_factory):
    """A model whose blocks are larger than lm_head, and plans for it whose slots keep blocks in some sweeps: with lm_head on
    the device, and in slots of its own."""
    folder = tmp_path_factory.mktemp("keeping") / "model"
    weights = models.write(folder, request.param, "int8", n_layer=7, n_inner=2400)
    plans = [plan for share in np.linspace(0, 1, 100) if (plan := planned(weights, share, "auto")).kept]
    return weights, [next(plan for plan in plans if bool(plan.head_slot) == apart) for apart in (False, True)]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    apart=st.booleans(),
    sweeps=st.lists(st.tuples(st.booleans(), st.booleans(), st.none() | st.integers(0, 6)), min_size=1, max_size=6),
)
def test_blocks_that_the_slots_keep(keeping, seed, apart, sweeps):
    """While the CPU computes others; between sweeps that stream, interrupted or not."""
    weights, plan = keeping[0], keeping[1][apart]
    by_cpu = [i for i in plan.host_blocks if i not in plan.kept]
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda, lender = opened(weights, monkeypatch, seed, plan, 1 << 30)
        wrong = []
        for head, on_host, stop in sweeps:
            with suppress(KeyError):
                sweep(weights, cuda, lender, head, wrong, stop, by_cpu if on_host else None)
        cuda.synchronize()
        assert not wrong and plan.kept == [0, 1] and len(by_cpu) > 0
        lender.close()


def recorded(copies: list, which: dict, copy, slot, source: np.ndarray) -> None:
    copies.append(which[source.ctypes.data])
    copy(slot, source)


def test_what_is_kept_comes_once(keeping, monkeypatch):
    """Not even then after a sweep that streams, which ends with bringing it; and such a sweep does not bring it again."""
    weights, plans = keeping
    for plan in plans:
        cuda, lender = opened(weights, monkeypatch, 5, plan, 1 << 30)
        by_cpu, copies = [i for i in plan.host_blocks if i not in plan.kept], []
        which, carrier = {memory.ctypes.data: item for item, memory in lender._waiting.items()}, lender._rings[0]._carrier
        carrier._copy = partial(recorded, copies, which, carrier._copy)
        sweep(weights, cuda, lender, True, [])
        for _ in range(3):
            sweep(weights, cuda, lender, True, [], by_cpu=by_cpu)
        sweep(weights, cuda, lender, True, [])
        streamed = [i for i in copies if isinstance(i, int)]
        assert streamed == [*by_cpu, *plan.kept, *by_cpu, *plan.kept]
        assert len(copies) - len(streamed) == 5 * len(plan.head_ranges()) and bool(plan.head_slot) == bool(plan.head_ranges())
        lender.close()


def test_both_tiers_have_one_scheduler(weights, monkeypatch):
    """What is read from disk into RAM and what is brought to a GPU is asked of the same Ring, in the same order."""
    asked, follow, lend = [], Ring.follow, Ring.lend
    monkeypatch.setattr(Ring, "follow", lambda ring, items: (asked.append(list(items)), follow(ring, items))[1])
    monkeypatch.setattr(Ring, "lend", lambda ring, item: (asked.append(item), lend(ring, item))[1])
    cuda, gpu = opened(weights, monkeypatch, 3, 0.2, 1 << 30)
    parts = [*gpu._blocks, *gpu._ranges]
    assert parts and asked == [parts]
    sweep(weights, cuda, gpu, True, [])
    on_gpu = asked[:]
    asked.clear()
    blocks = tuple("streamed" if i in gpu._blocks else "resident" for i in range(7))
    plan = make_plan(weights.config, weights.coding, CONTEXT, smallest(weights.config, weights.coding, CONTEXT))
    cpu = Streamed(weights, replace(plan, blocks=blocks, head_rows=gpu._ranges[0][0], part_rows=plan.part_rows))
    cpu.expect(True)
    for i in range(7):
        with cpu.block(i):
            pass
    assert len(list(cpu.head())) == len(gpu._head)
    assert asked == on_gpu == [parts, parts, *parts]
    gpu.close()
    cpu.close()


@pytest.mark.parametrize("mistake", ["no wait for the copy", "no wait for the kernels"])
def test_a_mistake_would_be_seen(weights, monkeypatch, mistake):
    """The same without one of the waits: the simulated device finds it."""
    found = []
    for seed in range(20):
        with monkeypatch.context() as m:
            if mistake == "no wait for the copy":
                m.setattr(on_device._Arrival, "result", lambda self: None)
            else:
                m.setattr(on_device._Link, "release", lambda self, slot: None)
            cuda, lender = opened(weights, m, seed, 0.2, 1 << 30)
            for _ in range(3):
                sweep(weights, cuda, lender, True, found)
            cuda.synchronize()
            lender.close()
    assert found


def test_a_copy_that_fails_ends_its_sweep_only(weights, monkeypatch):
    cuda, lender = opened(weights, monkeypatch, 1, 0.2, 1 << 30)
    wrong, failing = [], SimpleNamespace(left=0)

    def fails() -> bool:
        failing.left -= 1
        return failing.left == 0

    cuda.fails = fails
    for after in (1, 2, 3, 5):
        failing.left = after
        with pytest.raises(RuntimeError, match="cannot be started"):
            for _ in range(3):
                sweep(weights, cuda, lender, True, wrong)
        sweep(weights, cuda, lender, True, wrong)
        sweep(weights, cuda, lender, False, wrong)
    cuda.synchronize()
    assert not wrong


def test_a_disk_s_error_is_of_the_sweep_that_needed_it(weights, monkeypatch):
    cuda, lender = opened(weights, monkeypatch, 2, 0.2, 0)
    wrong, fetch, broken = [], on_device.Source.fetch, SimpleNamespace(now=True)

    def failing(self, memory: np.ndarray) -> None:
        if broken.now:
            raise OSError("gone")
        fetch(self, memory)

    monkeypatch.setattr(on_device.Source, "fetch", failing)
    with pytest.raises(OSError, match="gone"):
        for _ in range(3):
            sweep(weights, cuda, lender, True, wrong)
    broken.now = False
    with suppress(OSError):  # what was brought ahead meanwhile
        sweep(weights, cuda, lender, True, wrong)
    for _ in range(3):
        sweep(weights, cuda, lender, True, wrong)
    cuda.synchronize()
    assert not wrong
    lender.close()


def test_weights_that_are_pinned_where_they_are(weights, monkeypatch):
    """In the file's pages: blocks, and what is one piece of lm_head; unless the driver refuses, or copies are slower."""
    for registers, slower, in_place in ((True, 1.0, True), (True, 1.2, False), (False, 1.0, False)):
        cuda, wrong = Simulated(4), []
        cuda.registers, cuda.slower = registers, slower
        monkeypatch.setattr(on_device, "cudart", cuda)
        lender = OnDevice(weights, planned(weights, 0.2), 1 << 40)
        pieces = {item: len(lender._sources[item].part.spans) for item in lender._waiting}
        mapped = {item for item, memory in lender._waiting.items() if not memory.flags.writeable}
        assert mapped == {item for item, count in pieces.items() if in_place and count == 1}
        assert {True: max(pieces.values()) == 1, False: len(mapped) < len(pieces)}[weights.coding.dtype == "fp16"]
        for head in (True, False, True):
            sweep(weights, cuda, lender, head, wrong)
        cuda.synchronize()
        assert not wrong
        lender.close()


def test_nothing_is_pinned_in_place_that_cannot_be_read(weights, monkeypatch):
    cuda = Simulated(4)
    cuda.registers = True
    monkeypatch.setattr(on_device, "cudart", cuda)
    monkeypatch.setattr(reader, "_MADV_POPULATE_READ", 12345)  # as on a system that does not know it
    lender = OnDevice(weights, planned(weights, 0.2), 1 << 40)
    assert all(memory.flags.writeable for memory in lender._waiting.values())
    lender.close()


# ---- unified memory ----------------------------------------------------------------------------------------------------------


def unified(weights, monkeypatch, seed: int, share: float, pinned: int, size: int = 64 << 20) -> tuple[Simulated, OnDevice]:
    cuda, model = Simulated(seed, size), (weights.config, weights.coding, CONTEXT, "fp16", True, "unified")
    monkeypatch.setattr(on_device, "cudart", cuda)
    config, coding, context, *how = model
    least, most = smallest(*model), make_plan(config, coding, context, 1 << 40, *how).peak
    return cuda, OnDevice(weights, make_plan(config, coding, context, least + int(share * (most - least)), *how), pinned)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1 << 30), share=st.sampled_from([0, 0.5, 0.9]), heads=st.lists(st.booleans(), min_size=2, max_size=6)
)
def test_pages_that_move(weights, seed, share, heads):
    """No more of them are on the device at a time than the slots would hold, and those that are computed with always are."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda, lender = unified(weights, monkeypatch, seed, share, 1 << 40)
        wrong, away = [], []
        lend = lender._rings[0].lend

        @contextmanager
        def lent(item):
            with lend(item) as turn:
                cuda.launch(lambda: lender._waiting[item] in cuda.on_device or away.append(item))
                yield turn

        lender._rings[0].lend = lent
        for head in heads:
            sweep(weights, cuda, lender, head, wrong)
        cuda.synchronize()
        room = max(m.nbytes for m in lender._waiting.values())
        assert not wrong and not away and room < cuda.most_on_device <= 2 * room
        assert cuda.managed == sum(m.nbytes for m in lender._waiting.values())
        lender.close()


def test_no_more_unified_memory_than_is_free(weights, monkeypatch):
    cuda, lender = unified(weights, monkeypatch, 0, 0.2, 1 << 40)
    lender.close()
    for pinned, size, what in ((1 << 40, cuda.taken - 100_000, "free on the device"), (100_000, 64 << 20, "RAM that can be")):
        with pytest.raises(simulated_cuda.OutOfDeviceMemory, match=what):
            unified(weights, monkeypatch, 0, 0.2, pinned, size)
