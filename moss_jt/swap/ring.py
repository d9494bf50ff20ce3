"""Bringing what is needed next into slots that are used in turn. Knows neither what a slot is nor how one is filled.

The ring decides, a carrier carries: reads a file into host memory, or copies from there to a device. The ring has no thread
of its own. A copy is started by whoever's loan just ended, which is the earliest moment there is, so nothing waits for a
thread to wake up; what takes time goes on in the carrier.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Copy(Protocol):
    """A copy on its way, as ``concurrent.futures.Future`` is one."""

    def result(self) -> Any:
        """Return when the slot may be used by what the caller does next; raise what went wrong."""

    def cancel(self) -> Any:
        """Its result is no longer wanted: it may be left out if it has not begun."""


class Carrier(Protocol):
    """Fills slots. It must carry out copies one after the other, in the order in which they were started: the ring may start
    a copy into a slot while an older one, no longer wanted, is still on its way there."""

    def start(self, slot: Any, item: Hashable) -> Copy:
        """Begin to bring the item into the slot, once every use of the slot released before is over; do not wait."""

    def release(self, slot: Any) -> None:
        """All uses of the slot have been issued. On a device they may still be going on."""


class _Brought:
    """An item that is in a slot, or on its way there. ``there``: whether it was waited for with success."""

    def __init__(self, item: Hashable, slot: Any):
        self.item, self.slot, self.there = item, slot, False
        self.copy: Copy | None = None


class Ring:
    """Lends items, one at a time, in a cyclic order, from slots that are filled ahead, across the end of the cycle, too. Items
    that are no more than the slots are brought once, and stay.

    For one thread. An exception may come at any moment, KeyboardInterrupt included: after the next ``follow``, the ring
    works as before.
    """

    def __init__(self, slots: Sequence[Any], carrier: Carrier):
        """slots: two or more, all alike; one would do, without anything being brought ahead."""
        self._slots, self._carrier = list(slots), carrier
        self._ahead: list[_Brought] = []  # what is lent or will be next, in order; a slot that is not here is free
        self._lent: _Brought | None = None
        self._after: dict[Hashable, Hashable] = {}

    def follow(self, items: Sequence[Hashable]) -> None:
        """From now on, the items (all different, at least one) are lent in this order, again and again, until told otherwise.

        A loan that an exception kept from ending is over. What was brought ahead is kept where it is still right.
        """
        lent, self._lent = self._lent, None
        self._ahead = [b for b in self._ahead if b is not lent]
        self._after = dict(zip(items, [*items[1:], items[0]]))
        self._aim(items[0])

    @contextmanager
    def lend(self, item: Hashable) -> Iterator[Any]:
        """The slot that holds the item, to be read inside the ``with`` only. Waits until it is there.

        Items may be skipped; the order goes on from this one. Raises what the carrier's copy raises.
        """
        if self._lent is not None:
            raise RuntimeError(f"{self._lent.item} is still lent")
        if not self._ahead or self._ahead[0].item != item:
            self._aim(item)
        brought = self._lent = self._ahead[0]
        try:
            brought.copy.result()
            brought.there = True
            yield brought.slot
        finally:
            self._end(brought)

    def _end(self, brought: _Brought) -> None:
        """The loan is over: its slot takes what comes after all that is ahead, which is the same again where all have room."""
        if self._lent is not brought:  # over already: another sweep has begun
            return
        self._carrier.release(brought.slot)
        self._ahead = [b for b in self._ahead if b is not brought]
        self._lent = None
        if brought.there and len(self._after) <= len(self._slots):
            self._ahead.append(brought)
        else:
            self._fill(self._after[(self._ahead or [brought])[-1].item])

    def _aim(self, item: Hashable) -> None:
        """Make the item the next one: keep what is ahead as far as it follows in order, drop the rest, fill what is free."""
        kept, dropped = [], []
        for brought in self._ahead:
            right = brought.copy is not None and brought.item == item
            (kept if right else dropped).append(brought)
            item = self._after[item] if right else item
        self._ahead = kept
        for brought in dropped:
            if brought.copy is not None and not brought.there:
                brought.copy.cancel()
        self._fill(item)

    def _fill(self, item: Hashable) -> None:
        """Start to bring the item, and what follows it, into the free slots, each once at most."""
        taken = {id(brought.slot) for brought in self._ahead}
        for slot in self._slots:
            if id(slot) not in taken and len(self._ahead) < len(self._after):
                brought = _Brought(item, slot)
                self._ahead.append(brought)  # before the copy starts: whatever interrupts, its slot is not taken for free
                brought.copy = self._carrier.start(slot, item)
                item = self._after[item]
