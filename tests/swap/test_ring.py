"""The ring, driven by a simulated device that records every access, and by threads."""

from __future__ import annotations

import random
import sys
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jt.swap import ring as ring_module
from moss_jt.swap.reader import Worker
from moss_jt.swap.ring import Ring

from .simulated import CopyFailed, Device

ITEMS = list(range(6))


class Stopped(Exception):
    """What comes up in the middle of a sweep."""


@st.composite
def sweeps(draw) -> list[tuple[list[int], list[int], bool]]:
    """(what is announced, what is lent, whether the last loan ends in an exception) for each of some sweeps."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        order = draw(st.sampled_from([ITEMS, ITEMS[:4], ITEMS[3:], [2], ITEMS[::-1]]))
        lent = [item for item in order if draw(st.integers(0, 5))]  # some are skipped
        found.append((order, lent[: draw(st.integers(0, len(lent)))], draw(st.booleans())))
    return found


def run(ring: Ring, device: Device, order: list[int], lent: list[int], stop: bool, compute) -> None:
    ring.follow(order)
    for i, item in enumerate(lent):
        with ring.lend(item) as slot:
            device.use(slot, item, compute())
            if stop and i == len(lent) - 1:
                raise Stopped


@settings(max_examples=300, deadline=None)
@given(sweeps(), st.integers(1, 4), st.booleans(), st.randoms(use_true_random=False), st.sampled_from([0, 0.1, 0.5]))
def test_no_slot_is_read_early_or_overwritten_in_use(program, slots, waits, rng, failing):
    """Whatever copies and computing take, wherever sweeps stop, whichever copies fail."""

    def seconds(*_) -> float:
        return 10 ** rng.uniform(-2, 1)

    device = Device(seconds, waits, lambda item: rng.random() < failing)
    ring = Ring([f"slot {i}" for i in range(slots)], device)
    for order, lent, stop in program:
        with suppress(Stopped, CopyFailed):
            run(ring, device, order, lent, stop, seconds)
        device.now += seconds() * rng.choice([0, 1])
    device.fails = lambda item: False
    for _ in range(2):  # whatever was, and were it copies that failed ahead of use, the second sweep from now works
        try:
            run(ring, device, ITEMS, ITEMS, False, seconds)
        except CopyFailed:
            assert failing
    device.check()
    assert [read.item for read in device.reads[-len(ITEMS) :]] == ITEMS


@pytest.mark.parametrize("waits", [True, False])
def test_the_recorder_notices(waits):
    """What is read before its copy is done, overwritten in use, or not what it is taken for."""

    def before_it_is_there(device: Device) -> None:
        device.start("slot", 0)
        device.use("slot", 0, 1.0)

    def overwritten(device: Device) -> None:
        device.start("slot", 0).result()
        device.start("slot", 1)
        device.use("slot", 0, 1.0)

    def another(device: Device) -> None:
        device.start("slot", 1).result()
        device.use("slot", 0, 1.0)

    for wrong in (before_it_is_there, overwritten, another):
        device = Device(lambda item: 1.0, waits)
        wrong(device)
        with pytest.raises(AssertionError):
            device.check()


def test_reading_goes_on_across_the_end_of_a_sweep():
    device = Device(lambda item: 1.0, waits=True)
    ring = Ring(["a", "b"], device)
    for _ in range(20):
        run(ring, device, ITEMS, ITEMS, False, lambda: 0.5)
    assert device.now == 20 * len(ITEMS) + 0.5  # the copy engine never rested
    assert [write.item for write in device.writes] == [*ITEMS * 20, 0, 1]  # and nothing was copied twice


def test_what_is_announced_decides_what_is_brought():
    device = Device(lambda item: 1.0, waits=True)
    ring = Ring(["a", "b"], device)
    run(ring, device, [0, 1, 2], [0, 1, 2], False, lambda: 0.1)  # 0 and 1 are on their way again
    run(ring, device, [0, 1, 2, "head"], [0, 1, 2, "head"], False, lambda: 0.1)
    run(ring, device, [0, 1, 2], [0, 1, 2], False, lambda: 0.1)
    assert [write.item for write in device.writes] == [0, 1, 2, 0, 1, 2, "head", 0, 1, 2, 0, 1]


def test_another_beginning_drops_what_was_brought_for_nothing():
    device = Device(lambda item: 1.0, waits=True)
    ring = Ring(["a", "b", "c", "d"], device)
    with pytest.raises(Stopped):
        run(ring, device, ITEMS, ITEMS[:1], True, lambda: 0.1)
    run(ring, device, ITEMS, ITEMS, False, lambda: 0.1)
    device.check()
    assert [write.item for write in device.writes[:8]] == [0, 1, *ITEMS]  # 2, 3 and 4 had not begun


def test_what_all_fits_is_brought_once():
    """After a longer cycle, too, whose next beginning was brought already; and again where a copy failed."""
    device = Device(lambda item: 1.0, waits=True)
    ring = Ring(["a", "b", "c"], device)
    run(ring, device, ITEMS, ITEMS, False, lambda: 0.1)
    for some in ([0, 1, 2], [0, 1, 2], [0, 1], [0, 1]):
        run(ring, device, some, some, False, lambda: 0.1)
    assert [write.item for write in device.writes] == [*ITEMS, 0, 1, 2]
    run(ring, device, ITEMS, ITEMS, False, lambda: 0.1)
    assert [write.item for write in device.writes[9:]] == [2, 3, 4, 5, 0, 1, 2]  # 0 and 1 had stayed
    device.fails = lambda item: item == 4
    with pytest.raises(CopyFailed):
        run(ring, device, [3, 4], [3, 4], False, lambda: 0.1)
    device.fails = lambda item: False
    with pytest.raises(CopyFailed):  # it was started anew before
        run(ring, device, [3, 4], [3, 4], False, lambda: 0.1)
    for _ in range(2):
        run(ring, device, [3, 4], [3, 4], False, lambda: 0.1)
    assert [write.item for write in device.writes[-4:]] == [3, 4, 4, 4]
    device.check()


def test_one_loan_at_a_time():
    ring = Ring(["a", "b"], Device(lambda item: 1.0, waits=True))
    ring.follow(ITEMS)
    with ring.lend(0), pytest.raises(RuntimeError, match="0 is still lent"), ring.lend(1):
        pass
    with ring.lend(1):
        pass


def test_a_loan_left_open_ends_with_its_sweep_and_not_later():
    """A generator that lends may be closed long after the sweep that it belonged to."""
    device = Device(lambda item: 1.0, waits=True)
    ring = Ring(["a", "b"], device)
    ring.follow(ITEMS)
    left_open = ring.lend(0)
    left_open.__enter__()
    ring.follow(ITEMS)
    with ring.lend(0) as slot:
        left_open.__exit__(None, None, None)
        device.use(slot, 0, 5.0)
        with pytest.raises(RuntimeError), ring.lend(1):
            pass
    run(ring, device, ITEMS, ITEMS, False, lambda: 0.1)
    device.check()


class _Interrupt:
    """Raises KeyboardInterrupt before the n-th instruction that the ring's file executes from now on."""

    def __init__(self, n: int):
        self.left, self.file = n, ring_module.__file__

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        if frame.f_code.co_filename != self.file:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.trace


@pytest.mark.parametrize("waits", [True, False])
def test_interrupted_anywhere_it_works_afterwards(waits):
    def sweep(ring: Ring, device: Device) -> None:
        run(ring, device, ITEMS, ITEMS, False, lambda: 0.3)

    def interrupted(n: int) -> int:
        """Instructions that were left of n when a sweep was through; 0 or less if it was interrupted."""
        device = Device(lambda item: 1.0, waits)
        ring = Ring(["a", "b"], device)
        sweep(ring, device)
        before = sys.gettrace()
        try:
            with suppress(KeyboardInterrupt), _Interrupt(n) as interrupt:
                sweep(ring, device)
        finally:
            sys.settrace(before)
        for _ in range(2):
            sweep(ring, device)
        device.check()
        return interrupt.left

    often = 1 << 20
    interrupted(often)  # the first tracing of all sees no instructions in some versions of Python
    count = often - interrupted(often)
    assert count > 500
    for n in range(1, count + 1):
        assert interrupted(n) <= 0


class _Threaded:
    """A carrier that writes into bytearrays in a thread, slowly and byte by byte."""

    def __init__(self, rng: random.Random):
        self.worker, self.rng = Worker("test"), rng

    def start(self, slot: bytearray, item: int):
        return self.worker.start(self.write, slot, item, [self.rng.random() for _ in slot])

    def write(self, slot: bytearray, item: int, pauses: list[float]) -> None:
        for i, pause in enumerate(pauses):
            slot[i] = item
            time.sleep(pause * 1e-4)

    def release(self, slot: bytearray) -> None:
        pass


@pytest.mark.parametrize("slots", [2, 3])
def test_with_threads(slots):
    rng = random.Random(slots)
    before = threading.active_count()
    carrier = _Threaded(rng)
    ring = Ring([bytearray(8) for _ in range(slots)], carrier)
    for _ in range(30):
        ring.follow(ITEMS)
        for item in ITEMS[: rng.choice([2, 6])]:
            with ring.lend(item) as slot:
                for _ in range(3):
                    assert slot == bytes([item]) * 8
                    time.sleep(rng.random() * 3e-4)
    carrier.worker.close()
    assert threading.active_count() == before
