"""Tokens one after another: bound by how fast memory is read."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from ..config import Config
from ..devices import open_device, wants_gpu
from ..errors import MossError
from ..model import Model, Request
from ..sampling import Sampler, Sampling
from ..weights import Weights, open_weights
from . import device_limits, limits, page_cache
from .pairs import compared, in_turn, rate, ratios
from .random_model import random_checkpoint
from .shape import Shape

_SECONDS, _HOLLOW_SECONDS = 0.3, 0.03  # a sample lasts, or one sweep
GREEDY = Sampling(greedy=True)


def open_model(weights: Weights, kv_cache: str, device: str, swap: str = "auto") -> Model:
    """For the longest context there is; on the CPU all weights are mapped. ``swap``: as open_device takes it."""
    context = weights.config.n_ctx
    wanted = wants_gpu(device) or swap != "auto"
    on = open_device(weights, context, kv_cache=kv_cache, device=device, swap=swap) if wanted else None
    return Model(weights, context, kv_cache=kv_cache, device=on)


@dataclass(frozen=True)
class Decode:
    """``batch`` tokens a sweep, with ``used`` in a cache in fp16 or int8."""

    used: int = 128
    batch: int = 1
    kv_cache: str = "fp16"
    swap: str = "auto"

    def check(self, shape: Shape, folder: Path) -> None:
        """Raises MossError where so many tokens, or the weights in ``folder``, do not fit."""
        if self.used + self.batch > shape.config.n_ctx:
            raise MossError(f"{self.used} tokens and {self.batch} more do not fit the model's context of {shape.config.n_ctx}")
        page_cache.check_room(shape, folder, self.kv_cache)

    def run(self, weights: Weights, threads: int, repeat: int, device: str = "cpu") -> dict:
        page_cache.fill(weights)
        model = open_model(weights, self.kv_cache, device, self.swap)
        work, hollow = Sweeps(model, self.used, self.batch), _hollow(weights, self.batch, self.kv_cache, device)
        limit = device_limits.copy() if model.on_gpu else limits.memory_read(threads)
        samples, memory = in_turn(limit, lambda: (work.tokens_s(), hollow.tokens_s(_HOLLOW_SECONDS)), repeat)
        tokens_s, hollow_tokens_s = map(list, zip(*samples))
        token = self.token_bytes(Shape.of(weights))
        return {
            "context_used": self.used,
            "batch": self.batch,
            "kv_cache": self.kv_cache,
            "tokens_s": tokens_s,
            "bytes_per_token": token,
            **compared(limit, [token * speed for speed in tokens_s], memory),
            "overhead_share": median(ratios(tokens_s, hollow_tokens_s)),  # of a token's time, what it takes without weights
            "sampling_seconds": _sampling_seconds(model, work.ids),
        }

    def token_bytes(self, shape: Shape) -> float:
        """Weights and cache that a sweep reads, for each of its tokens."""
        cache = shape.config.cache_bytes_per_token(self.kv_cache) * (self.used + self.batch)
        return (shape.token_bytes + cache) / self.batch


class Sweeps:
    """Sweeps of ``batch`` tokens behind ``used`` cached ones, the last token of each chosen from the sweep before."""

    def __init__(self, model: Model, used: int, batch: int):
        self.model, self.batch = model, batch
        self.ids = np.random.default_rng(0).integers(0, model.config.vocab_size, used + batch)
        self._sampler = Sampler(GREEDY)
        self.logits = self._evaluate()  # fills the cache, and touches every weight for the first time

    def sweep(self) -> None:
        """The model evaluates only the last ``batch`` ids, again and again: for those before it has the cache."""
        self.logits = self._evaluate()
        chosen = [self._sampler.choose(row, self.ids) for row in self.logits]
        self.ids[-1] = chosen[-1]

    def _evaluate(self) -> list:
        return self.model.evaluate([Request(self.model.sequence, self.ids, self.batch, GREEDY)])[0]

    def tokens_s(self, seconds: float = _SECONDS) -> float:
        return rate(self.sweep, self.batch, seconds)


def _hollow(weights: Weights, batch: int, kv_cache: str, device: str) -> Sweeps:
    """The same over as many blocks with next to no weights: its time is Python's, Jittor's, and that of starting threads."""
    config = Config(weights.config.n_layer, n_embd=8, n_head=4, n_inner=8, rotary_dim=2, n_ctx=batch, vocab_size=8)
    with random_checkpoint(Shape(config, weights.coding), Path(tempfile.gettempdir())) as folder:
        return Sweeps(open_model(open_weights(folder), kv_cache, device), 0, batch)


def _sampling_seconds(model: Model, ids: np.ndarray) -> float:
    """What choosing a token by the default sampling takes. In the samples it is the likeliest, as with the peers."""
    sampler, logits = Sampler(Sampling(seed=0)), model.logits(ids)[-1]

    def seconds() -> float:
        start = time.perf_counter()
        sampler.choose(logits, ids)
        return time.perf_counter() - start

    return median(seconds() for _ in range(20))
