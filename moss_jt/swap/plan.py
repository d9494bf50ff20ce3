"""The plan: what lives in memory and what is brought there for every sweep, so that a budget is kept. Pure arithmetic.

A budget of RAM bounds the peak of what the operating system counts as this process's memory: the program itself, its work
space, the cache, the weights that are resident, and the slots that streamed ones take turns in, which come from disk. A
budget of VRAM bounds the same on a GPU, but for what CUDA itself takes there; what is streamed comes over the link.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ..config import Config
from ..errors import MossError
from ..weights.layout import BITS, Coding, block_tensors, head_tensors
from . import parts
from .placement import EITHER, HOST, RESIDENT, STREAMED, in_pairs, placements, spread
from .room import CHUNK, MIB, SLOTS, Sizes


@dataclass(frozen=True)
class Speeds:
    """What this machine was measured to do: bytes a second read from memory and from disk, fp32 operations a second. Of a
    GPU: its own memory, the link to it in place of the disk, and fp16 operations; ``host``: of the machine around it."""

    memory: float
    disk: float
    arithmetic: float
    host: Speeds | None = None


@dataclass(frozen=True)
class Step:
    """A block, or some rows of lm_head: bytes read from memory and from disk, and numbers multiplied for each token. ``host``:
    whether the CPU does it, beside a GPU."""

    memory: int
    disk: int
    numbers: int
    host: bool = False


@dataclass(frozen=True)
class Expected:
    """What the plan can give at these speeds, and which of them is the limit: ``disk`` or ``link``, ``memory`` or
    ``arithmetic``; ``host memory`` or ``host arithmetic``, where a GPU waits for the CPU."""

    tokens_s: float
    limit: str


@dataclass(frozen=True)
class Plan:
    """Where everything lives. Sizes are bytes."""

    config: Config
    coding: Coding
    context: int
    budget: int
    blocks: tuple[str, ...]  # where each one is: RESIDENT, STREAMED, HOST, or EITHER of the last two, sweep by sweep
    head_rows: int  # of lm_head's, from the first on, that are resident
    part_rows: int  # of the others, how many are read together
    slot: int  # the size of each slot; 0 where nothing is streamed
    kv_cache: str = "fp16"  # in what keys and values are kept
    gpu: bool = False  # whether the budget is of VRAM, and what is streamed comes over the link
    swap: str = "stream"  # how a GPU gets what does not fit there
    streams_from: int = 2  # tokens in a sweep, from which on blocks that may be EITHER are streamed
    head_slot: int = 0  # the size of slots for lm_head's parts alone; 0 where they share the others

    @property
    def slots(self) -> int:
        """With Jittor's own swapping, parts that are there at a time."""
        if self.swap == "jittor" and self.streams:
            s = Sizes(self.config, self.coding, self.context, self.kv_cache, self.gpu)
            return (self.budget - s.fixed - s.blocks(0)) // self.slot
        return SLOTS if self.streams else 0

    @property
    def streams(self) -> bool:
        return self.slot > 0

    @property
    def streamed_blocks(self) -> list[int]:
        """Those that are ever streamed."""
        return [i for i, where in enumerate(self.blocks) if where in (STREAMED, EITHER)]

    @property
    def host_blocks(self) -> list[int]:
        """Those that the CPU ever computes."""
        return [i for i, where in enumerate(self.blocks) if where in (HOST, EITHER)]

    @cached_property
    def kept(self) -> list[int]:
        """Of ``host_blocks``, those that the CPU need not compute, since the slots have room for them while nothing else is
        streamed: the first ones, which a sweep that streams begins with, and which are brought during the end of one."""
        shared = STREAMED in self.blocks or (self.head_ranges() and not self.head_slot)
        return [] if shared else [i for i, where in enumerate(self.blocks) if where == EITHER][: self.slots]

    def computes_on_host(self, tokens: int) -> bool:
        """Whether a sweep of so many tokens has the CPU compute ``host_blocks``, but for those ``kept``."""
        return HOST in self.blocks or (EITHER in self.blocks and tokens < self.streams_from)

    def head_ranges(self) -> list[tuple[int, int]]:
        """Rows (first, end) of lm_head in each streamed part."""
        starts = range(self.head_rows, self.config.vocab_size, max(1, self.part_rows))
        return [(a, min(a + self.part_rows, self.config.vocab_size)) for a in starts]

    @cached_property
    def memory(self) -> dict[str, int]:
        """What takes how much of the budget, at most."""
        s, host = Sizes(self.config, self.coding, self.context, self.kv_cache, self.gpu), len(self.host_blocks)
        return {
            "Jittor" if self.gpu else "program": s.program,
            "work space": s.work,
            "KV cache": (len(self.blocks) - host) * s.block_cache,
            "blocks": self.blocks.count(RESIDENT) * s.block,
            "lm_head": s.head_rows(self.head_rows) + s.head_rest,
            "slots": self.slots * (self.slot + self.head_slot + (EITHER in self.blocks) * s.block_cache),
        }

    @property
    def waiting(self) -> int:
        """Weights that are not on the GPU, and wait in RAM or on disk."""
        s = Sizes(self.config, self.coding, self.context, self.kv_cache, self.gpu)
        return (len(self.blocks) - self.blocks.count(RESIDENT)) * s.block + s.head - s.head_rows(self.head_rows)

    @property
    def lent_bytes(self) -> int:
        """What weights take of the GPU's memory, those that are there and slots, so far as a smaller plan may take less."""
        s = Sizes(self.config, self.coding, self.context, self.kv_cache, self.gpu)
        return self.blocks.count(RESIDENT) * s.block + s.head_rows(self.head_rows) + self.slots * (self.slot + self.head_slot)

    @property
    def host_memory(self) -> int:
        """RAM for blocks that the CPU computes: weights, keys and values, and work space."""
        s, count = Sizes(self.config, self.coding, self.context, self.kv_cache, self.gpu), len(self.host_blocks)
        return count * (s.block + s.block_cache) + (s.host_work if count else 0)

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @cached_property
    def steps(self) -> list[Step]:
        """What a token's sweep does, with logits, in order."""
        return self.steps_of(1)

    def blocks_lent(self, on_host: bool) -> list[int]:
        """Blocks that a sweep takes from the slots, if it has the CPU compute what it may, or else."""
        return [i for i in self.streamed_blocks if not on_host or self.blocks[i] == STREAMED or i in self.kept]

    def steps_of(self, tokens: int) -> list[Step]:
        """The same of a sweep of so many tokens; a block whose keys and values are in host memory brings them, too."""
        c, matrix, on_host = self.config, "lm_head.weight", self.computes_on_host(tokens)
        lent = self.blocks_lent(on_host)
        block, head = block_tensors(c, self.coding), head_tensors(c, self.coding)
        norm = sum(t.nbytes for t in head if not parts.belongs(t, matrix))
        numbers = (3 * c.n_embd + c.n_inner) * c.n_embd + c.n_embd * (c.n_embd + c.n_inner)
        cache = c.cache_bytes_per_token(self.kv_cache) // c.n_layer * self.context // 2  # half full
        size = sum(t.nbytes for t in block)
        ranges, beside = self.head_ranges(), self.head_slot > 0
        crossings = self._crossings(len(lent) + (0 if beside else len(ranges)))
        found = []
        for i, where in enumerate(self.blocks):
            brought = round(crossings * size) + (0 if on_host or where != EITHER else cache) if i in lent else 0
            found.append(Step(size + cache, brought, numbers, on_host and where in (HOST, EITHER) and i not in lent))
        crossings = self._crossings(len(ranges)) if beside else crossings
        for first, end in [(0, self.head_rows), *ranges]:
            part = parts.rows(head, matrix, first, end)
            read = sum(span.nbytes for span in part.spans) if first < end else 0
            found.append(Step(read + norm, round(crossings * read) * (first >= self.head_rows), 0))
            norm = 0
        return found

    def _crossings(self, parts: int) -> float:
        """How often each of so many parts that share slots crosses the link in a sweep, on average. Pages go back, too, and so
        does all that Jittor moves: of a sweep's parts those for which there is no room, one more, and another where lm_head is
        in several. Otherwise what has room in the slots stays there."""
        if self.swap == "jittor":
            return 2 * min(1, (parts - self.slots + min(len(self.head_ranges()), 2)) / parts) if parts else 0
        return 0 if parts <= self.slots else 2 if self.swap == "unified" else 1

    @property
    def disk_bytes(self) -> int:
        """Read from disk for a token's sweep with logits; on a GPU, brought over the link."""
        return sum(step.disk for step in self.steps)

    @property
    def memory_bytes(self) -> int:
        """Read from memory for a token's sweep, with a cache that is half full: all weights, wherever they live; on a GPU,
        without those that the CPU reads."""
        return sum(step.memory for step in self.steps if not step.host)

    @property
    def host_bytes(self) -> int:
        """Read from RAM for a token's sweep by a CPU beside the GPU."""
        return sum(step.memory for step in self.steps if step.host)

    def decode(self, speeds: Speeds) -> Expected:
        """One token a sweep."""
        return self._expected(1, speeds)

    def prefill(self, speeds: Speeds) -> Expected:
        """A prompt of one chunk."""
        return self._expected(min(CHUNK, self.context), speeds)

    def settled(self, speeds: Speeds) -> Plan:
        """The same plan for a machine of these speeds: from how many tokens in a sweep on streaming is faster than the CPU."""
        streaming, host = replace(self, streams_from=1), replace(self, streams_from=CHUNK + 1)
        tokens = range(1, CHUNK + 1)
        sooner = (n for n in tokens if streaming._expected(n, speeds).tokens_s >= host._expected(n, speeds).tokens_s)
        return replace(self, streams_from=next(sooner, CHUNK + 1))

    def _expected(self, tokens: int, speeds: Speeds) -> Expected:
        """What comes from disk is written to memory, too, before it is read there."""
        steps, link = self.steps_of(tokens), "link" if self.gpu else "disk"
        limits = {link: [step.disk / speeds.disk for step in steps]}
        for name, of, host in (("", speeds, False), ("host ", speeds.host, True)):
            those = [step if step.host == host else Step(0, 0, 0) for step in steps]
            if any(step.host for step in steps) or not host:
                limits[name + "memory"] = [(step.memory + step.disk) / of.memory for step in those]
                limits[name + "arithmetic"] = [2 * step.numbers * tokens / of.arithmetic for step in those]
        computing = [max(those) for those in zip(*(limits[name] for name in limits if name != link))]
        if self.swap == "jittor":  # one after the other
            seconds = sum(computing) + sum(limits[link])
        else:
            apart = len(self.blocks) if self.head_slot else None
            seconds = sweep_seconds(computing, limits[link], self.slots, apart)
        return Expected(tokens / seconds, max(limits, key=lambda name: sum(limits[name])))


def sweep_seconds(computing: list[float], reading: list[float], slots: int, apart: int | None = None) -> float:
    """How long a sweep takes, one after the other, when step i computes for computing[i] seconds and, unless that is 0, needs
    what reading[i] seconds bring into one of the slots: what the ring does, in virtual time. ``apart``: the first step from
    which on parts have as many slots of their own."""
    apart = len(reading) if apart is None else apart
    after, there, disk = {}, {}, 0.0
    for steps in (range(apart), range(apart, len(reading))):
        those = [i for i in steps if reading[i]]
        after.update({i: those[(k + slots) % len(those)] for k, i in enumerate(those)})  # what takes its slot
        for i in those[:slots]:
            there[i] = disk = disk + reading[i]
    now = before = 0.0
    for _ in range(4):  # the first sweeps find the disk idle
        before = now
        for i, seconds in enumerate(computing):
            now = max(now, there.get(i, 0.0)) + seconds
            if i in after:
                there[after[i]] = disk = max(disk, now) + reading[after[i]]
    return now - before


def make_plan(
    config: Config,
    coding: Coding,
    context: int,
    budget: int,
    kv_cache: str = "fp16",
    gpu: bool = False,
    swap: str = "stream",
    ram: int | None = None,
) -> Plan:
    """The plan whose tokens cost least with a peak of at most ``budget`` bytes, of RAM or of a GPU's memory.

    coding: how the weights are stored. context: tokens to keep a cache for; kv_cache: in what, fp16 or int8. swap: what becomes
    of blocks that do not fit a GPU: ``stream``; ``unified``: the same, by moving pages; ``host``: the CPU computes them;
    ``auto``: it does or they are streamed, sweep by sweep, as ``Plan.settled`` says, and it does where no slots fit;
    ``jittor``: it moves all of them. ram: the most for those that the CPU computes, or that Jittor moves, None: any; with auto,
    those beyond are streamed.
    Raises MossError where the budget is too small, with the smallest that works and what would make that smaller, and where
    ``host`` or ``jittor`` needs more RAM.
    """
    sizes = Sizes(config, coding, context, kv_cache, gpu, swap, None if swap == "host" else ram)
    fitting = [placed for placed in placements(sizes, budget - sizes.fixed) if placed.fits]
    if not fitting:
        raise MossError(too_small(config, coding, context, f"a budget of {in_mib(budget)}", kv_cache, gpu, swap, ram))
    best = min(fitting, key=lambda placed: placed.cost)
    head, host = (sizes.head - sizes.head_rows(best.head_rows)) / sizes.block, sizes.on_host(best.blocks)
    if host and best.come:
        blocks = in_pairs(host, config.n_layer - best.blocks - host, config.n_layer)
    else:  # the first ones, since what goes into them is on the host already
        blocks = (HOST,) * host + spread(config.n_layer - best.blocks - host, config.n_layer - host, head)
    lm_head = {"head_rows": best.head_rows, "part_rows": best.part_rows, "head_slot": best.head_slot}
    plan = Plan(config, coding, context, budget, blocks, slot=best.slot, kv_cache=kv_cache, gpu=gpu, swap=swap, **lm_head)
    if ram is not None and swap == "host" and plan.host_memory > ram:
        raise MossError(
            f"the {host} blocks that the CPU would compute need {in_mib(plan.host_memory)} of RAM, and {in_mib(ram)} can be "
            "used: swap auto and stream bring from disk what does not fit there"
        )
    if ram is not None and swap == "jittor" and plan.streams and (needed := plan.waiting + 2 * plan.slot) > ram:
        raise MossError(
            f"swap jittor needs {in_mib(needed)} of RAM, and {in_mib(ram)} can be used, a limit that Jittor would not keep: "
            "swap auto and stream bring from disk what does not fit there"
        )
    return plan


def less(plan: Plan, room: int) -> Plan | None:
    """The plan with weights and slots in at most ``room`` bytes of a GPU's memory, and more of them streamed. Keys and values
    stay where they are: what the CPU may compute, it goes on to, and always where no slots for it fit. None where so little is
    not enough."""
    n = len(plan.blocks) - len(plan.host_blocks)
    if plan.swap == "jittor":
        return None
    sizes = Sizes(plan.config, plan.coding, plan.context, plan.kv_cache, plan.gpu)
    sizes.n_layer = n  # of the others
    found = [placed for placed in placements(sizes, room + n * sizes.block_cache) if placed.fits]
    streaming = [placed for placed in found if placed.slot >= sizes.block]
    either = EITHER in plan.blocks and len(streaming) > 0
    fitting = streaming if either else found
    if not fitting:
        return None
    best = min(fitting, key=lambda placed: placed.cost)
    others = iter(spread(n - best.blocks, n, (sizes.head - sizes.head_rows(best.head_rows)) / sizes.block))
    on_host = EITHER if either else HOST
    blocks = tuple(on_host if where in (HOST, EITHER) else next(others) for where in plan.blocks)
    return replace(plan, blocks=blocks, head_rows=best.head_rows, part_rows=best.part_rows, slot=best.slot, head_slot=0)


def smallest(
    config: Config,
    coding: Coding,
    context: int,
    kv_cache: str = "fp16",
    gpu: bool = False,
    swap: str = "stream",
    ram: int | None = None,
) -> int:
    """The smallest budget that works."""
    sizes = Sizes(config, coding, context, kv_cache, gpu, swap, None if swap == "host" else ram)
    return sizes.fixed + min(-placed.left for placed in placements(sizes, 0))


def too_small(
    config: Config,
    coding: Coding,
    context: int,
    what: str,
    kv_cache: str,
    gpu: bool = False,
    swap: str = "stream",
    ram: int | None = None,
) -> str:
    """Says that ``what`` is too small, what would do, and what would need less."""

    def needs(coding: Coding, context: int, kv_cache: str = kv_cache) -> str:
        return in_mib(smallest(config, coding, context, kv_cache, gpu, swap, ram))

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
