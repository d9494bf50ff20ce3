"""What everything takes in memory."""

from __future__ import annotations

from ..config import Config
from ..weights.layout import Coding, block_tensors, head_tensors
from . import parts

MIB = 1 << 20
# Tokens of a prompt that pass through all blocks together. More would read the weights less often, but the products of
# this many are already bound by arithmetic, and work space grows with it.
CHUNK = 512
SLOTS = 2  # one is computed with while the other is filled; a disk that is never idle gains nothing from more
# Rows of lm_head that stay together: a whole number of the kernels' tiles, so that parts give the same bits as the whole.
ROWS = 256

# Python, numpy, Jittor and its compiled ops were measured to take 75 MiB before the first token; more on other systems.
_PROGRAM = 128 * MIB
_LOGITS = 8  # positions whose logits are wanted together, as for drafts; more are the caller's memory
# On a GPU: what Jittor's pools hold of ops' small results, and the sums of products that are divided among its processors.
_POOLS, _SUMS = 48 * MIB, 96 * MIB
_GPU_ROWS = 16  # positions whose logits are computed together


class Sizes:
    """What things take in memory. ``swap``, ``ram``: as make_plan takes them."""

    def __init__(
        self,
        config: Config,
        coding: Coding,
        context: int,
        kv_cache: str,
        gpu: bool,
        swap: str = "stream",
        ram: int | None = None,
    ):
        self.n_layer, self.vocab, self.swap = config.n_layer, config.vocab_size, swap
        self.block = parts.whole(block_tensors(config, coding)).room
        self._head = head_tensors(config, coding)
        self.head = self.head_rows(self.vocab)
        self.head_rest = _bytes(t for t in self._head if not parts.belongs(t, "lm_head.weight"))
        self.block_cache = config.cache_bytes_per_token(kv_cache) * context // config.n_layer
        self.host_work = _cpu_work(config, context)
        self.program = _POOLS if gpu else _PROGRAM
        self.work = _gpu_work(config, context) if gpu else self.host_work
        self.fixed = self.program + self.work + self.head_rest
        room = self.n_layer if ram is None else (ram - self.host_work) // (self.block + self.block_cache)
        self.most_on_host = min(self.n_layer, max(0, room)) if swap in ("host", "auto") else 0

    def on_host(self, resident: int) -> int:
        """How many blocks the CPU computes, at least in some sweeps, where so many are resident."""
        return min(self.n_layer - resident, self.most_on_host)

    def blocks(self, resident: int, come: bool = False) -> int:
        """Memory for so many resident blocks, and for the keys and values of all that are always computed there. ``come``:
        whether those that the CPU computes are sometimes in a slot, too, with their keys and values beside it."""
        host = self.on_host(resident)
        beside = SLOTS if come and host else 0
        return resident * self.block + (self.n_layer - host + beside) * self.block_cache

    def blocks_in(self, room: int, come: bool = False) -> int:
        """How many resident blocks fit, short of all."""
        return next((n for n in range(self.n_layer - 1, 0, -1) if self.blocks(n, come) <= room), 0)

    def head_rows(self, count: int) -> int:
        """Memory for this many rows of lm_head."""
        return parts.room_for_rows(self._head, "lm_head.weight", count) if count else 0

    def rows_in(self, room: int) -> int:
        """Rows of lm_head that fit, all or a multiple of ROWS."""
        return self.vocab if self.head <= room else parts.rows_that_fit(self._head, "lm_head.weight", room) // ROWS * ROWS


def _cpu_work(c: Config, context: int) -> int:
    """Work space: the first product's result, the second's inputs, and some states, in fp32, for every token of a chunk; twice,
    because Jittor keeps what chunks of other lengths had. Measured: 20 to 29 states' worth; this is 32 where the MLP is 4 wide.
    """
    activations = min(CHUNK, context) * 4 * (2 * (3 * c.n_embd + c.n_inner) + 2 * (c.n_embd + c.n_inner) + 8 * c.n_embd)
    return activations + 2 * _LOGITS * c.vocab_size * 4 + context * c.rotary_dim * 4 + 16 * MIB


def _gpu_work(c: Config, context: int) -> int:
    """Work space as sweep.cuh divides it, for one sequence: the state, q k v, attention and MLP, logits, and the inputs of a
    product in the order of its weights; twice the logits, because an op gives them to Jittor."""
    activations = min(CHUNK, context) * (10 * c.n_embd + 2 * (c.n_embd + c.n_inner) + 4 * (c.n_embd + c.n_inner))
    logits = 4 * _GPU_ROWS * (2 * c.vocab_size + c.n_embd + context)
    return activations + logits + _SUMS + context * c.rotary_dim * 4


def _bytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)
