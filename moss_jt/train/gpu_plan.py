"""What training an adapter takes of a GPU's memory, and which frozen blocks stay there. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config
from ..errors import MossError
from ..swap.parts import whole
from ..swap.plan import RESIDENT, STREAMED, Plan, in_mib
from ..weights import Weights
from ..weights.layout import HEAD_FILE, PANEL, block_file
from .lora import TARGETS, Lora, shapes

_SLOTS = 2
_ALIGN = 256
_JITTOR = 48 << 20  # what its pools hold
_CUBLAS = 64 << 20  # its own work space: 32 MiB on the newest cards
_WEIGHTS = 64 << 20  # floats of a matrix that are there at a time
_SCORES = 16 << 20  # of attention
_LOGITS = 16  # positions, at least, whose logits fit


class Space:
    """Device memory of a training: ``sizes``, name -> bytes, one after the other. ``tokens``: that are trained on at a time."""

    def __init__(self, config: Config, lora: Lora, tokens: int):
        c, self.tokens = config, tokens
        d, y, z = c.n_embd, 3 * c.n_embd + c.n_inner, c.n_embd + c.n_inner
        learned = sum(n * k for n, k in shapes(c, lora).values())
        widest = max({"fc_out": c.n_inner}.get(target, d) for target in lora.targets)
        scores = min(c.n_head * tokens * tokens, max(tokens * tokens, _SCORES))
        panels = -(-max(y, d, c.vocab_size) // PANEL) * PANEL  # rows of the largest matrix
        floats = {
            "states": (c.n_layer + 1) * tokens * d,  # what goes into each block, and comes from the last one
            "gradient": tokens * d,
            "h": tokens * d,
            "dh": tokens * d,
            "stats": 2 * tokens,
            # A block's [q k v fc_in] and [attention gelu] with their derivatives, or logits.
            "insides": max(2 * tokens * (y + z), _LOGITS * c.vocab_size),
            "scores": scores,
            "score gradients": scores,
            "weights": max(PANEL * z, min(_WEIGHTS, panels * z)),
            "inner": tokens * lora.rank,
            "inner gradient": tokens * lora.rank,
            "dropped": tokens * widest if lora.dropout else 0,
            "angles": tokens * c.rotary_dim,
            "rows": tokens,
            "targets": tokens,
            "found": 4 * tokens,
            "adapter": learned,
            "adapter gradient": learned,
        }
        self.sizes = {name: 4 * count for name, count in floats.items()}

    @property
    def nbytes(self) -> int:
        return sum(map(_aligned, self.sizes.values()))

    def places(self, base: int) -> dict[str, int]:
        """Where each one is, in memory from ``base``, a multiple of 256, on."""
        found = {}
        for name, size in self.sizes.items():
            found[name], base = base, base + _aligned(size)
        return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class Needs:
    """Bytes: ``fixed``, whatever stays; ``block``: each; ``blocks``: how many there are."""

    fixed: int
    block: int
    blocks: int

    @property
    def smallest(self) -> int:
        """The smallest budget that works: all else is streamed."""
        return self.fixed + min(self.blocks, _SLOTS) * self.block

    def resident(self, budget: int) -> int:
        """How many blocks stay within a budget, slots for the others counted."""
        room = (budget - self.fixed) // self.block
        return self.blocks if room >= self.blocks else room - _SLOTS


def needs(weights: Weights, space: Space) -> Needs:
    config = weights.config
    block = max(whole(weights.regions[block_file(i)].tensors).room for i in range(config.n_layer))
    head = whole(weights.regions[HEAD_FILE].tensors).room
    return Needs(_JITTOR + _CUBLAS + space.nbytes + head + (1 << 16), block, config.n_layer)


def make_plan(weights: Weights, space: Space, budget: int) -> Plan:
    """The plan under a budget of a GPU's memory, in bytes. Raises MossError where it is too small, and says what would do."""
    needed, config = needs(weights, space), weights.config
    if budget < needed.smallest:
        raise MossError(too_small(f"a budget of {in_mib(budget)}", needed, space))
    streamed = config.n_layer - needed.resident(budget)
    # Spread evenly: while the resident ones compute, the link fills the slots. Never the last, which is needed twice in a row.
    chosen = {k * config.n_layer // max(1, streamed) for k in range(streamed)}
    blocks = tuple(STREAMED if i in chosen else RESIDENT for i in range(config.n_layer))
    slot = needed.block if streamed else 0
    return Plan(config, weights.coding, space.tokens, budget, blocks, config.vocab_size, 0, slot, gpu=True, swap="stream")


def too_small(what: str, needed: Needs, space: Space) -> str:
    return (
        f"{what} is too small for training on {space.tokens} tokens at a time: {in_mib(needed.smallest)} is the smallest that "
        "works; a smaller max_seq_len needs less"
    )


def places_of(target: str, config: Config) -> tuple[int, int, int, int]:
    """Outputs and inputs of a target's matrix, and its first columns among a block's: of h or [attention gelu], which go in,
    and of [q k v fc_in] or the state, which come out."""
    d, inner = config.n_embd, config.n_inner
    sizes = {"qkv_proj": (3 * d, d, 0, 0), "fc_in": (inner, d, 0, 3 * d), "out_proj": (d, d, 0, 0), "fc_out": (d, inner, d, 0)}
    assert sizes.keys() == TARGETS.keys()
    return sizes[target]
