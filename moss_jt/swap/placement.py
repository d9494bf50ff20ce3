"""How much of a model stays where, and which blocks those are: what a plan chooses from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .room import MIB, ROWS, SLOTS, Sizes

RESIDENT, STREAMED, HOST, EITHER = "resident", "streamed", "host", "host or streamed"
_JITTOR_UNIT = 2 * MIB  # its allocator's
_LINK = 2  # how many times as long it takes to bring something as to compute with it on the host
_HEAD_PART = 64 * MIB  # of lm_head, where it alone is streamed: large enough for a disk's full speed


@dataclass(frozen=True)
class Placement:
    blocks: int  # resident ones
    head_rows: int  # resident ones
    part_rows: int
    slot: int
    head_slot: int  # of lm_head's parts, where blocks have the others for themselves
    come: bool  # whether what the CPU computes is sometimes streamed
    left: int  # bytes of the room that are not used; below zero: so many are wanting
    cost: int  # of a token: bytes that the CPU would read in the same time, about

    @property
    def fits(self) -> bool:
        return self.left >= 0


def placements(s: Sizes, room: int) -> Iterator[Placement]:
    """The kinds of placement there are, each with as much resident as fits. Of equals the first is to be taken."""
    slot = max(s.block, s.head_rows(ROWS))
    few = max(ROWS, min(s.rows_in(_HEAD_PART), s.vocab // 8 // ROWS * ROWS))
    small = s.head_rows(few)
    yield _placement(s, room, s.n_layer, 0, 0)
    if s.swap == "jittor":
        yield _jittor(s, room, slot)
        return
    yield _placement(s, room, s.n_layer, few, small)
    if s.swap != "host":
        streaming = list(_streaming(s, room, slot, few))
        yield from streaming
        if s.swap != "auto" or any(placed.fits for placed in streaming):
            return
    least = s.n_layer - s.most_on_host
    yield _placement(s, room, max(least, s.blocks_in(room - s.head)), 0, 0)
    yield _placement(s, room, max(least, s.blocks_in(room - SLOTS * small)), few, small)


def _streaming(s: Sizes, room: int, slot: int, few: int) -> Iterator[Placement]:
    """With slots for blocks. With auto, lm_head is rather resident, or has slots of its own, so that the others can keep blocks
    for a CPU that computes at least one."""
    left, part, small = room - SLOTS * slot, max(ROWS, s.rows_in(slot)), s.head_rows(few)
    come = s.swap == "auto"
    if come:
        yield _placement(s, room, s.blocks_in(left - s.head, come), part, slot, 0, come)
        beside = min(s.blocks_in(left - SLOTS * small, come), max(0, s.n_layer - SLOTS - 1))
        yield _placement(s, room, beside, few, slot, small, come)
    yield _placement(s, room, s.blocks_in(left, come), part, slot, 0, come)


def _jittor(s: Sizes, room: int, slot: int) -> Placement:
    slot = -(-slot // _JITTOR_UNIT) * _JITTOR_UNIT
    cost = _LINK * (s.n_layer * s.block + s.head)
    return Placement(0, 0, max(ROWS, s.rows_in(slot)), slot, 0, False, room - s.blocks(0) - slot, cost)


def _placement(
    s: Sizes, room: int, blocks: int, part_rows: int, slot: int, head_slot: int = 0, come: bool = False
) -> Placement:
    """With this many blocks resident, and as many rows of lm_head as still fit; all of them where there are no slots."""
    left = room - SLOTS * (slot + head_slot) - s.blocks(blocks, come)
    rows = s.rows_in(max(0, left)) if slot else s.vocab
    elsewhere, head, host = s.n_layer - blocks, s.head - s.head_rows(rows), s.on_host(blocks)
    # For a token. What the CPU computes counts half: it is read at twice the speed of a link, or more. Meanwhile, or while the
    # GPU computes all blocks, slots for lm_head are filled.
    if s.most_on_host and host == elsewhere:
        kept = min(SLOTS, host) if come and (head_slot or not head) else 0
        filled = min(head, SLOTS * (head_slot or slot))
        cost = max((host - kept) * s.block, _LINK * filled if host else 0) + _LINK * (head - filled)
    else:
        cost = _LINK * ((elsewhere - host) * s.block + head) + host * s.block
    return Placement(blocks, rows, part_rows, slot, head_slot, come, left - s.head_rows(rows), cost)


def spread(streamed: int, blocks: int, head: float) -> tuple[str, ...]:
    """Where each block is, with the streamed ones spread evenly over the sweep and lm_head's streamed part, as large as
    ``head`` blocks, at its end: while resident ones are computed, the disk can fill two slots and no more."""
    head = min(head, blocks - streamed)
    chosen = {int((k + (head + 1) / 2) * blocks / (streamed + head)) for k in range(streamed)}
    return tuple(STREAMED if i in chosen else RESIDENT for i in range(blocks))


def in_pairs(host: int, streamed: int, blocks: int) -> tuple[str, ...]:
    """Where each block is, with ``host`` ones that are EITHER, and streamed ones evenly among them. They lie in pairs, as there
    are two slots, spread evenly from the first block on: while the resident ones between two pairs are computed, the link fills
    both slots, and where the CPU computes, the state crosses it only twice a pair."""
    elsewhere = host + streamed
    pairs, resident, found = math.ceil(elsewhere / SLOTS), blocks - elsewhere, []
    kinds = [EITHER if (k + 1) * host // elsewhere > k * host // elsewhere else STREAMED for k in range(elsewhere)]
    for k in range(pairs):
        found += kinds[SLOTS * k : SLOTS * (k + 1)]
        found += [RESIDENT] * (math.ceil((k + 1) * resident / pairs) - math.ceil(k * resident / pairs))
    return tuple(found)
