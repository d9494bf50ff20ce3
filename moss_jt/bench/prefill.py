"""A prompt at once: bound by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import MossError
from ..model import Model, Request
from ..weights import Weights
from . import device_limits, limits, page_cache
from .decode import GREEDY, open_model
from .pairs import compared, in_turn, rate
from .shape import Shape

_SECONDS = 0.3  # a sample lasts, or one prompt


@dataclass(frozen=True)
class Prefill:
    """``prompt`` tokens into an empty cache, in fp16 or int8, up to the logits of the last one."""

    prompt: int = 128
    kv_cache: str = "fp16"
    swap: str = "auto"

    def check(self, shape: Shape, folder: Path) -> None:
        """Raises MossError where so many tokens, or the weights in ``folder``, do not fit."""
        if self.prompt > shape.config.n_ctx:
            raise MossError(f"a prompt of {self.prompt} tokens does not fit the model's context of {shape.config.n_ctx}")
        page_cache.check_room(shape, folder, self.kv_cache)

    def run(self, weights: Weights, threads: int, repeat: int, device: str = "cpu") -> dict:
        page_cache.fill(weights)
        model = open_model(weights, self.kv_cache, device, self.swap)
        work, limit = Prompts(model, self.prompt), device_limits.multiply() if model.on_gpu else limits.multiply_add(threads)
        tokens_s, arithmetic = in_turn(limit, work.tokens_s, repeat)
        shape = Shape.of(weights)
        token = shape.prompt_operations(self.prompt) / self.prompt
        return {
            "prompt": self.prompt,
            "kv_cache": self.kv_cache,
            "tokens_s": tokens_s,
            "GFLOP_per_token": token / 1e9,
            **compared(limit, [token * speed for speed in tokens_s], arithmetic),
        }


class Prompts:
    """The same prompt again and again, each time from the beginning."""

    def __init__(self, model: Model, tokens: int):
        self.model = model
        self.ids = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens)
        self.evaluate()  # touches every weight for the first time

    def evaluate(self) -> None:
        self.model.sequence.truncate(0)
        self.model.evaluate([Request(self.model.sequence, self.ids, 1, GREEDY)])

    def tokens_s(self) -> float:
        return rate(self.evaluate, len(self.ids), _SECONDS)
