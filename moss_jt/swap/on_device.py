"""Weights on a GPU: some are there for good, the others come over the link for every sweep, ahead of their use.

What is streamed waits in pinned host memory, where there is RAM for it, and is one copy a block, on a stream of its own; the
rest is read from disk into pinned memory first, by a thread, while the part before it is copied. The ring decides what comes
when (ring.py); events keep a slot from being overwritten while a kernel still reads it, and from being read too early.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from .. import cudart
from ..errors import MossError
from ..weights import Weights
from ..weights.store import arrays
from .host import as_vars
from .parts import Part
from .plan import Plan, in_mib
from .reader import Worker
from .ring import Ring
from .sources import Source, sources

_AS_FAST = 1.03  # times as long, at most
_STAGED = 2  # pinned buffers that what comes from disk takes turns in: one is read into while the other is copied


class Again(NamedTuple):
    """A block that is lent a second time in a sweep there and back."""

    block: int


class OnDevice:
    """Lends the addresses of weights on the device: block by block, and lm_head in ranges of rows.

    Parts are known by their block's number, or by their rows (first, end) of lm_head.
    """

    def __init__(self, weights: Weights, plan: Plan, pinned: int):
        """``pinned``: the most host memory for what is not on the device. Raises MossError where a file cannot be read,
        OutOfDeviceMemory where a budget is more than there is."""
        self._blocks, self._host, self._ranges = plan.streamed_blocks, plan.host_blocks, plan.head_ranges()
        self._beside_host = plan.blocks_lent(on_host=True)
        self._head = [(0, plan.head_rows), *self._ranges] if plan.head_rows else self._ranges
        self._norm, self._bias, self._memory = small(weights)
        found = sources(weights, self._head)
        streamed = {item: found.pop(item) for item in dict.fromkeys((*self._host, *self._blocks, *self._ranges))}
        others = {item: source for item, source in streamed.items() if item not in self._host}
        self.from_disk = _beyond(others, pinned - plan.host_memory)
        loader = _Loader(max(s.part.room for s in (*found.values(), *streamed.values())))
        self._resident = {item: loader.to_device(source) for item, source in found.items()}
        unified = plan.swap == "unified"
        if unified:
            _check_unified(sum(s.part.room for s in streamed.values()), len(self.from_disk))
        lent = {*self._blocks, *self._ranges}  # others stay where they are
        waiting = {
            item: loader.to_managed(source) if unified else loader.to_pinned(source, item in lent)
            for item, source in streamed.items()
            if item not in self.from_disk
        }
        loader.finish()
        self._sources = {**found, **streamed}
        self._on_host = {i: as_vars(arrays(waiting[i], streamed[i].part.spans[0].tensors)) for i in self._host}
        self._waiting = waiting  # Vars do not keep their memory
        self._rings: list[Ring] = []
        if plan.streams:
            disk = {item: streamed[item] for item in self.from_disk}
            carrier = _Pages(waiting) if unified else _Link(_twice(waiting), _twice(disk))
            sizes = [plan.slot, plan.head_slot] if plan.head_slot else [plan.slot]
            slots = [[_Turn() if unified else _Slot(size) for _ in range(plan.slots)] for size in sizes]
            self.close = weakref.finalize(self, carrier.close)
            self._rings = [Ring(those, carrier) for those in slots]  # for blocks first, for lm_head last
            self.expect(head=True)

    @property
    def streams(self) -> bool:
        return bool(self._rings)

    def expect(self, head: bool, on_host: bool = False) -> None:
        """A sweep begins: all blocks, without those for the host if they are computed there, are lent next, each once and in
        order, and then, if ``head``, lm_head. What comes at the beginning of the next sweep is brought during the end of this
        one."""
        blocks, ranges = self._beside_host if on_host else self._blocks, self._ranges if head else []
        for ring, items in zip(self._rings, [blocks, ranges] if len(self._rings) == 2 else [[*blocks, *ranges]]):
            if items:
                ring.follow(items)

    def expect_both_ways(self) -> None:
        """A sweep begins in which all blocks are lent in order, and then ``again`` in reverse; lm_head is not streamed."""
        if self._blocks:
            self._rings[0].follow([*self._blocks, *map(Again, reversed(self._blocks))])

    def is_resident(self, i: int) -> bool:
        return i in self._resident

    def on_host(self, i: int) -> dict:
        """The weights of a block that the CPU may compute, name -> Var, where they wait in host memory."""
        return self._on_host[i]

    def moved(self, item: Hashable) -> None:
        """As ByJittor's: nothing is moved that anybody uses."""

    @contextmanager
    def block(self, i: int, again: bool = False) -> Iterator[dict[str, int]]:
        """The addresses of block i's tensors. What uses them must have been issued when the loan ends."""
        with self._at(Again(i) if again and i not in self._resident else i) as base:
            yield addresses(self._sources[i].part, base)

    def head(self) -> Iterator[tuple[dict[str, int], int, int]]:
        """The addresses of ln_f's and lm_head's tensors, the first of its rows, and how many: some at a time, in order."""
        for first, end in self._head:
            with self._at((first, end)) as base:
                bias = {"lm_head.bias": self._bias + 4 * first}
                yield {**self._norm, **bias, **addresses(self._sources[first, end].part, base)}, first, end - first

    @contextmanager
    def _at(self, item: Hashable) -> Iterator[int]:
        if item in self._resident:
            yield self._resident[item].pointer
        else:
            with self._rings[-1 if item in self._ranges else 0].lend(item) as slot:
                yield slot.pointer


def _twice(those: dict) -> dict:
    """Blocks under the names of both their loans."""
    return {**those, **{Again(item): what for item, what in those.items()}}


def addresses(part: Part, base: int) -> dict[str, int]:
    """Where a part's tensors are, in memory that starts at ``base``."""
    found = {}
    for span in part.spans:
        at = base + span.shift
        for t in span.tensors:
            found[t.name] = at
            at += t.nbytes
        base += span.room
    return found


def small(weights: Weights) -> tuple[dict[str, int], int, cudart.Memory]:
    """The addresses of ln_f's tensors and of lm_head's whole bias, and the memory that they are in."""
    head = {name: np.array(a) for name, a in weights.head().items() if not name.startswith("lm_head.weight")}
    memory, at, found = cudart.Memory(sum(a.nbytes for a in head.values())), 0, {}
    for name, array in head.items():
        cudart.to_device(memory.pointer + at, array)
        found[name] = memory.pointer + at
        at += array.nbytes
    return found, found.pop("lm_head.bias"), memory


def _beyond(streamed: dict[Hashable, Source], pinned: int) -> set[Hashable]:
    """The streamed parts for which there is no room in so much pinned memory. Spread over the sweep, so that while one comes
    from disk others come from memory."""
    if sum(s.part.room for s in streamed.values()) <= pinned:
        return set()
    left = pinned - _STAGED * max(s.part.room for s in streamed.values())
    fitting = 0
    for source in streamed.values():
        left -= source.part.room
        fitting += left >= 0
    items, count = list(streamed), max(0, fitting)
    kept = {int((k + 0.5) * len(items) / count) for k in range(count)}
    return {item for k, item in enumerate(items) if k not in kept}


def _check_unified(nbytes: int, beyond: int) -> None:
    """Raises OutOfDeviceMemory where the device cannot hold all at once: asked for more than there is, a driver may hang. And
    where the RAM cannot: ``beyond`` parts."""
    free = cudart.memory_info()[0]
    if beyond or nbytes > free:
        raise cudart.OutOfDeviceMemory(
            f"unified memory of {in_mib(nbytes)}, for what does not fit the budget, is more than the "
            f"{'RAM that can be used' if beyond else in_mib(free) + ' that are free on the device'}: take swap auto or stream"
        )


class _Turn:
    """What streamed parts take turns in. ``pointer``: where the part is. ``free``: when every use before is over; ``filled``:
    when it is there."""

    def __init__(self):
        self.free, self.filled = cudart.Event(), cudart.Event()


class _Slot(_Turn):
    """Memory that they are copied into."""

    def __init__(self, nbytes: int):
        super().__init__()
        self.memory = cudart.Memory(nbytes)
        self.pointer = self.memory.pointer


class _Link:
    """The ring's carrier. Copies are carried out in the order in which they were started, since they are put into one stream
    in that order: by a thread, where some come from disk."""

    def __init__(self, waiting: dict[Hashable, np.ndarray], disk: dict[Hashable, Source]):
        self._waiting, self._disk = waiting, disk
        self._stream = cudart.Stream()
        self._worker = Worker("moss-jt brings weights") if disk else None
        room = max((s.part.room for s in disk.values()), default=0)
        self._staged = deque((cudart.pinned(room), cudart.Event()) for _ in range(_STAGED if disk else 0))

    def start(self, slot: _Slot, item: Hashable) -> _Arrival:
        if self._worker:
            return _Arrival(slot, self._worker.start(self._bring, slot, item))
        self._copy(slot, self._waiting[item])
        return _Arrival(slot, None)

    def release(self, slot: _Slot) -> None:
        slot.free.record()

    def close(self) -> None:
        if self._worker:
            self._worker.close()
        self._stream.synchronize()

    def _bring(self, slot: _Slot, item: Hashable) -> None:
        if item in self._waiting:
            self._copy(slot, self._waiting[item])
            return
        memory, copied = self._staged[0]
        self._staged.rotate(-1)
        copied.synchronize()
        source = self._disk[item]
        source.fetch(memory)
        self._copy(slot, memory[: source.part.room])
        copied.record(self._stream)

    def _copy(self, slot: _Slot, source: np.ndarray) -> None:
        self._stream.wait(slot.free)
        cudart.to_device(slot.memory.pointer, source, self._stream)
        slot.filled.record(self._stream)


class _Pages:
    """The carrier where parts are in memory that is the host's and the device's at once: their pages are moved there ahead of
    their use, and back after it, so that no more than the turns hold is on the device."""

    def __init__(self, waiting: dict[Hashable, cudart.Managed]):
        self._waiting, self._stream = waiting, cudart.Stream()
        self._in_turn: dict[int, Hashable] = {}

    def start(self, turn: _Turn, item: Hashable) -> _Arrival:
        self._stream.wait(turn.free)
        before, self._in_turn[id(turn)] = self._in_turn.get(id(turn)), item
        if before not in (None, item):
            self._waiting[before].move(False, self._stream)
        self._waiting[item].move(True, self._stream)
        turn.pointer = self._waiting[item].pointer
        turn.filled.record(self._stream)
        return _Arrival(turn, None)

    def release(self, turn: _Turn) -> None:
        turn.free.record()

    def close(self) -> None:
        self._stream.synchronize()


class _Arrival:
    """A copy into a slot that is on its way, or waits for the disk."""

    def __init__(self, slot: _Slot, read: Future | None):
        self._slot, self._read = slot, read

    def result(self) -> None:
        """What Jittor launches from now on begins when it is there. Raises what reading it raised."""
        if self._read:
            self._read.result()
        self._slot.filled.wait_on_default()

    def cancel(self) -> None:
        if self._read:
            self._read.cancel()


class _Loader:
    """Brings parts from their files at the beginning: one is read while the one before is copied."""

    def __init__(self, room: int):
        self._halves = [(cudart.pinned(room), cudart.Event()) for _ in range(2)]
        self._in_place, self._compared = True, False  # until it turns out otherwise

    def to_device(self, source: Source) -> cudart.Memory:
        memory = cudart.Memory(source.part.room)
        staged, copied = self._halves[0]
        self._halves.reverse()
        copied.synchronize()
        source.fetch(staged)
        cudart.to_device(memory.pointer, staged[: source.part.room])
        copied.record()
        return memory

    def to_pinned(self, source: Source, lent: bool) -> np.ndarray:
        """Of a file's pages where they are in the page cache, if the driver can, and copies from there to the device, for what
        is ``lent``, are no slower; or else of a copy."""
        if self._in_place and (memory := self._registered(source, lent)) is not None:
            return memory
        memory = cudart.pinned(source.part.room)
        source.fetch(memory)
        return memory

    def _registered(self, source: Source, lent: bool) -> np.ndarray | None:
        if len(source.part.spans) > 1:  # which are one copy to the device
            return None
        try:
            memory = cudart.registered(source.mapped())
        except MossError:  # whatever is wrong with the file is said when it is read
            self._in_place = False
            return None
        if lent and not self._compared:
            there, staged = cudart.Memory(memory.nbytes), self._halves[0][0][: memory.nbytes]
            usual, in_place = (cudart.copy_seconds(there, array) for array in (staged, memory))
            self._in_place, self._compared = in_place < _AS_FAST * usual, True
        return memory if self._in_place else None

    def to_managed(self, source: Source) -> cudart.Managed:
        """Read elsewhere first: direct I/O may refuse such pages."""
        memory = cudart.Managed(source.part.room)
        staged, _ = self._halves[0]
        cudart.synchronize()
        source.fetch(staged)
        memory.bytes[:] = staged[: source.part.room]
        return memory

    def finish(self) -> None:
        """The staging memory may go once nothing reads it any more."""
        cudart.synchronize()
        self._halves.clear()
