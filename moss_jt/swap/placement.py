"""How much of a model stays where, and which blocks those are: what a plan chooses from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .room import MIB, ROWS, SLOTS, Sizes

RESIDENT, STREAMED, HOST, EITHER = "resident", "streamed", "host", "host or streamed"
_JITTOR_UNIT = 2 * MIB  # its allocator's
_HEAD_PART = 64 * MIB  # of lm_head, where it alone is streamed: large enough for a disk's full speed


@dataclass(frozen=True)
class Placement:
    blocks: int  # resident ones
    head_rows: int  # resident ones
    part_rows: int
    slot: int
    left: int  # bytes of the room that are not used; below zero: so many are wanting
    brought: int  # bytes that come from elsewhere, about

    @property
    def fits(self) -> bool:
        return self.left >= 0


def placements(s: Sizes, room: int) -> Iterator[Placement]:
    """The kinds of placement there are, each with as much resident as fits."""
    yield _placement(s, room, s.n_layer, 0, 0)
    slot = max(s.block, s.head_rows(ROWS))
    part = max(ROWS, s.rows_in(slot))
    if s.swap == "jittor":
        slot = -(-slot // _JITTOR_UNIT) * _JITTOR_UNIT
        yield Placement(0, 0, part, slot, room - s.blocks(0) - slot, 2 * (s.n_layer * s.block + s.head))
        return
    few = max(ROWS, min(s.rows_in(_HEAD_PART), s.vocab // 8 // ROWS * ROWS))
    yield _placement(s, room, s.n_layer, few, s.head_rows(few))
    if s.swap == "host":
        yield _placement(s, room, s.blocks_in(room - s.head), 0, 0)
        yield _placement(s, room, s.blocks_in(room - SLOTS * s.head_rows(few)), few, s.head_rows(few))
        return
    yield _placement(s, room, s.blocks_in(room - SLOTS * slot), part, slot)
    if s.swap == "auto":
        yield _placement(s, room, s.blocks_in(room - SLOTS * slot - s.head), part, slot)


def _placement(s: Sizes, room: int, blocks: int, part_rows: int, slot: int) -> Placement:
    """With this many blocks resident, and as many rows of lm_head as still fit; all of them where there are no slots. What the
    CPU computes counts half: it is read at twice the speed of a link, or more."""
    left = room - SLOTS * slot - s.blocks(blocks)
    rows = s.rows_in(max(0, left)) if slot else s.vocab
    elsewhere, head = s.n_layer - blocks, s.head - s.head_rows(rows)
    brought = 2 * (elsewhere * s.block + head) - s.on_host(blocks) * s.block
    return Placement(blocks, rows, part_rows, slot, left - s.head_rows(rows), brought)


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
