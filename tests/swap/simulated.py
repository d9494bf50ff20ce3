"""A device in virtual time: an engine that copies, in order, one that computes, and a record of every access to a slot."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Callable


class CopyFailed(Exception):
    pass


@dataclass
class Access:
    slot: Hashable
    item: Hashable
    begin: float
    end: float


@dataclass
class Device:
    """The carrier of a ring, and what uses the ring's slots.

    seconds(item): how long the next copy takes. waits: whether the host waits for copies and for what it computes, as a CPU
    does; otherwise it runs ahead, and the compute engine waits for copies, as a GPU's stream does. fails(item): whether the
    next copy fails.
    """

    seconds: Callable[[Hashable], float]
    waits: bool
    fails: Callable[[Hashable], bool] = lambda item: False
    now: float = 0.0  # on the host
    copying: float = 0.0  # until then the engine copies what was started
    computing: float = 0.0
    writes: list[Access] = field(default_factory=list)
    reads: list[Access] = field(default_factory=list)
    free: dict[Hashable, float] = field(default_factory=dict)  # when the uses of a slot that were released are over

    def start(self, slot: Hashable, item: Hashable) -> SimulatedCopy:
        begin = max(self.now, self.copying, self.free.get(slot, 0))
        self.copying = begin + self.seconds(item)
        # Also one that fails writes: whatever was there is gone.
        self.writes.append(Access(slot, item, begin, self.copying))
        return SimulatedCopy(self, self.writes[-1], self.fails(item))

    def release(self, slot: Hashable) -> None:
        self.free[slot] = max(self.now, self.computing)

    def use(self, slot: Hashable, item: Hashable, seconds: float) -> None:
        """Compute with the item that is taken to be in the slot."""
        begin = max(self.now, self.computing)
        self.reads.append(Access(slot, item, begin, begin + seconds))
        self.compute(seconds)

    def compute(self, seconds: float) -> None:
        self.computing = max(self.now, self.computing) + seconds
        if self.waits:
            self.now = self.computing

    def check(self) -> None:
        """Every read was of a slot into which that item, and nothing after it, had been copied to the end."""
        for read in self.reads:
            before = [w for w in self.writes if w.slot == read.slot and w.begin < read.end]
            assert before, f"{read} of a slot that nothing was copied into"
            last = max(before, key=lambda w: w.begin)
            assert last.item == read.item and last.end <= read.begin, f"{read} while its slot has {last}"


@dataclass
class SimulatedCopy:
    device: Device
    write: Access
    failed: bool

    def result(self) -> None:
        if self.device.waits:
            self.device.now = max(self.device.now, self.write.end)
        else:
            self.device.computing = max(self.device.computing, self.write.end)
        if self.failed:
            raise CopyFailed(self.write.item)

    def cancel(self) -> None:
        """What has not begun is left out. (The engine stays as late as if it had been carried out.)"""
        if self.write.begin > self.device.now:
            self.device.writes = [w for w in self.device.writes if w is not self.write]
