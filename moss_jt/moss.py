"""The library's front: a model, its tokenizer, and what one does with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Callable

import numpy as np

from .config import Config
from .devices import open_device
from .drafts import Drafts
from .errors import MossError
from .generate import Answer, Piece, Stats, generate
from .meta_instruction import read_meta_instruction
from .model import Model
from .plugins import Plugin
from .sampling import Sampling
from .sizes import parse_size
from .stopping import Stop
from .swap import Plan
from .tokenizer import load_tokenizer
from .weights import open_weights


def load(
    folder: str | Path,
    device: str = "auto",
    context: int = 2048,
    ram: str | int | None = None,
    kv_cache: str = "fp16",
    vram: str | int | None = None,
    swap: str = "auto",
    planned: Callable[[Plan], object] | None = None,
    adapter: str | Path | None = None,
) -> Moss:
    """Open a converted checkpoint for use.

    device: ``"auto"``, ``"cpu"`` or ``"cuda"``. context: the tokens to keep room for, prompt and answer together; at most
    n_ctx are, since the model was never trained beyond. ram: the most memory to use, in bytes or like ``"6GiB"``; weights that
    do not fit are read from disk for every sweep; None: what is available less a margin. kv_cache: ``"fp16"`` or ``"int8"``, in
    what the keys and values of tokens are kept. vram: the most of a GPU's memory, besides what CUDA itself takes there; weights
    that do not fit wait in RAM, or on disk; None: what is free less a margin. swap: what becomes of those: ``"stream"``: they
    are brought for every sweep; ``"host"``: the CPU computes with them; ``"auto"``: what is faster, sweep by sweep;
    ``"unified"``: the driver moves them, told ahead; ``"jittor"``: Jittor does, by itself. planned: is called with the plan,
    what lives where, before weights are brought anywhere. adapter: the folder of a LoRA adapter that was trained for this
    model; the CPU computes it beside the weights.

    Raises MossError where the folder, the device, a budget or this machine's setup is at fault. The first call on a machine
    compiles for minutes, and says so on stderr.
    """
    if context < 2:
        raise MossError(f"context is {context}, it must be 2 or more")
    weights = open_weights(folder)
    tokenizer = load_tokenizer(folder)
    context = min(context, weights.config.n_ctx)
    low_rank = None
    if adapter is not None:
        from .train.low_rank import LowRankTerms

        low_rank = LowRankTerms(weights.config, Path(adapter)).blocks()
        if ram is not None:
            ram = parse_size(ram) - sum(x.nbytes for block in low_rank for both in block for x in both)
    on = open_device(weights, context, ram, kv_cache, device, vram, swap, planned, low_rank)
    return Moss(Model(weights, context, kv_cache=kv_cache, device=on), tokenizer, read_meta_instruction(folder))


class Moss:
    """A model ready to answer. Remembers the last sequence: what a new prompt shares with it is not computed again."""

    def __init__(self, model: Model, tokenizer, meta_instruction: str | None = None):
        """meta_instruction: the text that this checkpoint's dialogues begin with, if it is not MOSS's."""
        self.model, self.tokenizer, self.meta_instruction = model, tokenizer, meta_instruction
        self.last_stats = Stats()  # of the last generate, kept up to date while it runs

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def context(self) -> int:
        return self.model.context

    @property
    def kv_cache(self) -> str:
        """In what keys and values are kept: ``"fp16"`` or ``"int8"``."""
        return self.model.kv_cache

    @property
    def gpu_peak(self) -> int | None:
        """The most of the GPU's memory that was taken since the model was loaded, bytes, as its driver says; None on a CPU."""
        return self.model.device.peak if self.model.on_gpu else None

    @property
    def cache_bytes(self) -> int:
        """What the keys and values of the last sequence take."""
        return self.config.cache_bytes_per_token(self.kv_cache) * self.model.sequence.length

    def logits(self, ids: Iterable[int], last: int = 1) -> np.ndarray:
        """Logits of the last ``last`` positions of a sequence, float32 (last, V)."""
        return self.model.logits(list(ids), last)

    def generate(
        self,
        prompt: str | Iterable[int],
        max_new_tokens: int = 256,
        greedy: bool = False,
        temperature: float = 0.7,
        top_k: int = 40,
        top_p: float = 0.8,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: int | str | Iterable[int | str] | None = None,
        drafts: bool | None = None,
    ) -> Iterator[Piece]:
        """Continue a text, or ids, yielding a Piece (``.id``, ``.text``, ``.seconds``) per token.

        repetition_penalty: None is 1.02 when sampling, none when greedy. stop: ids and strings that end the answer; a stop
        token's piece is yielded, a stop string is not shown; None: the model's end token, ``<eom>`` and ``<eoc>``.
        seed: the same seed gives the same answer. drafts: guess tokens from the text so far and check several in one sweep,
        which changes the speed and not the answer; None: where weights stream. Raises MossError, at once, for values that
        make no sense.
        """
        sampling = Sampling(greedy, temperature, top_k, top_p, repetition_penalty, seed)
        self.last_stats = Stats()
        answer = self._answer(prompt, max_new_tokens, sampling, stop, drafts, self.last_stats)
        return (piece for _, piece in generate(self.model, [answer], [self.model.sequence]))

    def generate_batch(
        self, prompts: Iterable[str | Iterable[int]], max_new_tokens: int = 256, stop=None, drafts=None, **sampling
    ) -> Iterator[tuple[int, Piece]]:
        """Continue several prompts at once, all in the same sweeps over the weights; yields (which prompt, its next piece).

        Takes what ``generate`` takes. With a seed, each prompt's answer is the one that generate would give it.
        """
        chosen = Sampling(**sampling)
        answers = [self._answer(p, max_new_tokens, chosen, stop, drafts, Stats()) for p in prompts]
        return generate(self.model, answers, self.model.cache(places=len(answers)).sequences)

    def _answer(self, prompt, max_new_tokens: int, sampling: Sampling, stop, drafts: bool | None, stats: Stats) -> Answer:
        if max_new_tokens < 1:
            raise MossError(f"max_new_tokens is {max_new_tokens}, it must be 1 or more")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if len(ids) >= self.context:
            raise MossError(f"the prompt has {len(ids)} tokens and leaves no room for an answer in a context of {self.context}")
        stops = Stop.of(stop, self.tokenizer, self.config.eos_token_id)
        guess = Drafts() if (self.model.streams if drafts is None else drafts) else None
        return Answer(self.tokenizer, ids, stops, sampling, min(len(ids) + max_new_tokens, self.context), guess, stats)

    def chat(self, system: str | None = None, plugins: Iterable[Plugin] | None = None):
        """A Conversation; ``system`` replaces the meta instruction, ``plugins`` are what MOSS may call (see there)."""
        from .chat import Conversation

        return Conversation(self, system, plugins)
