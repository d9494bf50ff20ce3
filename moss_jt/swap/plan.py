"""The plan: what lives in memory and what is read from disk for every sweep, so that a budget is kept. Pure arithmetic.

A budget bounds the peak of what the operating system counts as this process's memory: the program itself, its work space,
the cache, the weights that are resident, and the slots that streamed ones take turns in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..config import Config
from ..errors import MossError
from ..weights.layout import BITS, Coding, block_tensors, head_tensors
from . import parts

MIB = 1 << 20
RESIDENT, STREAMED = "resident", "streamed"
# Tokens of a prompt that pass through all blocks together. More would read the weights less often, but the products of
# this many are already bound by arithmetic, and work space grows with it.
CHUNK = 512
SLOTS = 2  # one is computed with while the other is filled; a disk that is never idle gains nothing from more
# Rows of lm_head that stay together: a whole number of the kernels' tiles, so that parts give the same bits as the whole.
ROWS = 256
_HEAD_PART = 64 * MIB  # of lm_head, where it alone is streamed: large enough for a disk's full speed

# Python, numpy, Jittor and its compiled ops were measured to take 75 MiB before the first token; more on other systems.
_PROGRAM = 128 * MIB
_LOGITS = 8  # positions whose logits are wanted together, as for drafts; more are the caller's memory


@dataclass(frozen=True)
class Speeds:
    """What this machine was measured to do: bytes a second read from memory and from disk, fp32 operations a second."""

    memory: float
    disk: float
    arithmetic: float


@dataclass(frozen=True)
class Step:
    """A block, or some rows of lm_head: bytes read from memory and from disk, and numbers multiplied for each token."""

    memory: int
    disk: int
    numbers: int


@dataclass(frozen=True)
class Expected:
    """What the plan can give at these speeds, and which of them is the limit: ``disk``, ``memory`` or ``arithmetic``."""

    tokens_s: float
    limit: str


@dataclass(frozen=True)
class Plan:
    """Where everything lives. Sizes are bytes."""

    config: Config
    coding: Coding
    context: int
    budget: int
    blocks: tuple[str, ...]  # where each one is: RESIDENT or STREAMED
    head_rows: int  # of lm_head's, from the first on, that are resident
    part_rows: int  # of the others, how many are read together
    slot: int  # the size of each slot; 0 where nothing is streamed
    kv_cache: str = "fp16"  # in what keys and values are kept

    @property
    def slots(self) -> int:
        return SLOTS if self.streams else 0

    @property
    def streams(self) -> bool:
        return self.slot > 0

    @property
    def streamed_blocks(self) -> list[int]:
        return [i for i, where in enumerate(self.blocks) if where == STREAMED]

    def head_ranges(self) -> list[tuple[int, int]]:
        """Rows (first, end) of lm_head in each streamed part."""
        starts = range(self.head_rows, self.config.vocab_size, max(1, self.part_rows))
        return [(a, min(a + self.part_rows, self.config.vocab_size)) for a in starts]

    @cached_property
    def memory(self) -> dict[str, int]:
        """What takes how much of the budget, at most."""
        s = _Sizes(self.config, self.coding, self.context, self.kv_cache)
        return {
            "program": _PROGRAM,
            "work space": s.work,
            "KV cache": s.cache,
            "blocks": self.blocks.count(RESIDENT) * s.block,
            "lm_head": s.head_rows(self.head_rows) + s.head_rest,
            "slots": self.slots * self.slot,
        }

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @cached_property
    def steps(self) -> list[Step]:
        """What a sweep with logits does, in order."""
        c, matrix = self.config, "lm_head.weight"
        block, head = block_tensors(c, self.coding), head_tensors(c, self.coding)
        kept = _bytes(t for t in head if not parts.belongs(t, matrix))
        numbers = (3 * c.n_embd + c.n_inner) * c.n_embd + c.n_embd * (c.n_embd + c.n_inner)
        cache = c.cache_bytes_per_token(self.kv_cache) // c.n_layer * self.context // 2  # half full
        size = _bytes(block)
        found = [Step(size + cache, size * (where == STREAMED), numbers) for where in self.blocks]
        for first, end in [(0, self.head_rows), *self.head_ranges()]:
            part = parts.rows(head, matrix, first, end)
            read = sum(span.nbytes for span in part.spans)
            found.append(Step(read + kept, read * (first >= self.head_rows), 0))
            kept = 0
        return found

    @property
    def disk_bytes(self) -> int:
        """Read from disk for a sweep with logits."""
        return sum(step.disk for step in self.steps)

    @property
    def memory_bytes(self) -> int:
        """Read from memory for a token's sweep, with a cache that is half full: all weights, wherever they live."""
        return sum(step.memory for step in self.steps)

    def decode(self, speeds: Speeds) -> Expected:
        """One token a sweep."""
        return self._expected(1, speeds)

    def prefill(self, speeds: Speeds) -> Expected:
        """A prompt of one chunk."""
        return self._expected(min(CHUNK, self.context), speeds)

    def _expected(self, tokens: int, speeds: Speeds) -> Expected:
        """What comes from disk is written to memory, too, before it is read there."""
        memory = [(step.memory + step.disk) / speeds.memory for step in self.steps]
        arithmetic = [2 * step.numbers * tokens / speeds.arithmetic for step in self.steps]
        disk = [step.disk / speeds.disk for step in self.steps]
        seconds = sweep_seconds(list(map(max, memory, arithmetic)), disk, self.slots)
        return Expected(tokens / seconds, max((sum(disk), "disk"), (sum(memory), "memory"), (sum(arithmetic), "arithmetic"))[1])


def sweep_seconds(computing: list[float], reading: list[float], slots: int) -> float:
    """How long a sweep takes, one after the other, when step i computes for computing[i] seconds and, unless that is 0, needs
    what reading[i] seconds bring into one of the slots: what the ring does, in virtual time."""
    now = disk = before = 0.0
    over = [0.0] * slots  # when each slot's use ends, the one that is refilled next first
    for _ in range(4):  # the first sweeps find the disk idle
        before = now
        for compute, read in zip(computing, reading):
            if read:
                disk = max(disk, over.pop(0)) + read
                now = max(now, disk)
            now += compute
            if read:
                over.append(now)
    return now - before


def make_plan(config: Config, coding: Coding, context: int, budget: int, kv_cache: str = "fp16") -> Plan:
    """The plan that reads least from disk with a peak of at most ``budget`` bytes.

    coding: how the weights are stored. context: tokens to keep a cache for; kv_cache: in what, fp16 or int8.
    Raises MossError where the budget is too small, with the smallest that works and what would make that smaller.
    """
    sizes = _Sizes(config, coding, context, kv_cache)
    fitting = [placed for placed in _placements(sizes, budget - sizes.fixed) if placed.fits]
    if not fitting:
        raise MossError(too_small(config, coding, context, f"a budget of {in_mib(budget)}", kv_cache))
    best = min(fitting, key=lambda placed: placed.streamed)
    head = (sizes.head - sizes.head_rows(best.head_rows)) / sizes.block
    blocks = _spread(config.n_layer - best.blocks, config.n_layer, head)
    return Plan(config, coding, context, budget, blocks, best.head_rows, best.part_rows, best.slot, kv_cache)


def smallest(config: Config, coding: Coding, context: int, kv_cache: str = "fp16") -> int:
    """The smallest budget that works."""
    sizes = _Sizes(config, coding, context, kv_cache)
    return sizes.fixed + min(-placed.left for placed in _placements(sizes, 0))


class _Sizes:
    """What things take in memory."""

    def __init__(self, config: Config, coding: Coding, context: int, kv_cache: str):
        d, inner, v = config.n_embd, config.n_inner, config.vocab_size
        self.n_layer, self.vocab = config.n_layer, v
        self.block = parts.whole(block_tensors(config, coding)).room
        self._head = head_tensors(config, coding)
        self.head = self.head_rows(v)
        self.head_rest = _bytes(t for t in self._head if not parts.belongs(t, "lm_head.weight"))
        self.cache = config.cache_bytes_per_token(kv_cache) * context
        # The first product's result, the second's inputs, and some states, in fp32, for every token of a chunk; twice, because
        # Jittor keeps what chunks of other lengths had. Measured: 20 to 29 states' worth; this is 32 where the MLP is 4 wide.
        activations = min(CHUNK, context) * 4 * (2 * (3 * d + inner) + 2 * (d + inner) + 8 * d)
        self.work = activations + 2 * _LOGITS * v * 4 + context * config.rotary_dim * 4 + 16 * MIB
        self.fixed = _PROGRAM + self.work + self.cache + self.head_rest

    def head_rows(self, count: int) -> int:
        """Memory for this many rows of lm_head."""
        return parts.room_for_rows(self._head, "lm_head.weight", count) if count else 0

    def rows_in(self, room: int) -> int:
        """Rows of lm_head that fit, all or a multiple of ROWS."""
        return self.vocab if self.head <= room else parts.rows_that_fit(self._head, "lm_head.weight", room) // ROWS * ROWS


@dataclass(frozen=True)
class _Placement:
    blocks: int  # resident ones
    head_rows: int  # resident ones
    part_rows: int
    slot: int
    left: int  # bytes of the room that are not used; below zero: so many are wanting
    streamed: int  # bytes from disk, about

    @property
    def fits(self) -> bool:
        return self.left >= 0


def _placements(s: _Sizes, room: int) -> Iterator[_Placement]:
    """The kinds of placement there are, each with as much resident as fits."""
    yield _Placement(s.n_layer, s.vocab, 0, 0, room - s.n_layer * s.block - s.head, 0)
    few = max(ROWS, min(s.rows_in(_HEAD_PART), s.vocab // 8 // ROWS * ROWS))
    yield _placement(s, room, s.n_layer, few, s.head_rows(few))
    slot = max(s.block, s.head_rows(ROWS))
    blocks = max(0, min(s.n_layer - 1, (room - SLOTS * slot) // s.block))
    yield _placement(s, room, blocks, max(ROWS, s.rows_in(slot)), slot)


def _placement(s: _Sizes, room: int, blocks: int, part_rows: int, slot: int) -> _Placement:
    """With this many blocks resident, and as many rows of lm_head as still fit."""
    left = room - SLOTS * slot - blocks * s.block
    rows = s.rows_in(max(0, left))
    streamed = (s.n_layer - blocks) * s.block + s.head - s.head_rows(rows)
    return _Placement(blocks, rows, part_rows, slot, left - s.head_rows(rows), streamed)


def _spread(streamed: int, blocks: int, head: float) -> tuple[str, ...]:
    """Where each block is, with the streamed ones spread evenly over the sweep and lm_head's streamed part, as large as
    ``head`` blocks, at its end: while resident ones are computed, the disk can fill two slots and no more."""
    head = min(head, blocks - streamed)
    chosen = {int((k + (head + 1) / 2) * blocks / (streamed + head)) for k in range(streamed)}
    return tuple(STREAMED if i in chosen else RESIDENT for i in range(blocks))


def too_small(config: Config, coding: Coding, context: int, what: str, kv_cache: str) -> str:
    """Says that ``what`` is too small, what would do, and what would need less."""

    def needs(coding: Coding, context: int, kv_cache: str = kv_cache) -> str:
        return in_mib(smallest(config, coding, context, kv_cache))

    ways = [f"{needs(coding, context // 4)} with a context of {context // 4}"] if context >= 256 else []
    if kv_cache == "fp16":
        ways.append(f"{needs(coding, context, 'int8')} with a KV cache in int8")
    for lighter in ("int8", "int4"):
        if BITS[lighter] < BITS[coding.dtype]:
            head = min(coding.head_dtype, "int8", key=BITS.get)
            ways.append(f"{needs(Coding(lighter, head), context)} in {lighter}")
    less = f"; {', '.join(ways)}" if ways else ""
    needed = needs(coding, context)
    return f"{what} is too small for this model: {needed} is the smallest that works, with a context of {context} tokens{less}"


def in_mib(count: int) -> str:
    """Rounded up, as it can be given for a budget."""
    return f"{-(-count // MIB)}MiB"


def _bytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)
