"""A greedy answer without any text: what generating does, for its speed."""

from __future__ import annotations

from ..drafts import Drafts
from ..generate import Answer, Stats, generate
from ..model import Model
from ..sampling import Sampling
from ..stopping import Stop


class _Silent:
    """A tokenizer for ids that mean nothing."""

    def decoder(self, skip_special: bool) -> _Silent:
        return self

    def push(self, _: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def answer(model: Model, prompt: list[int], new: int, drafts: bool) -> tuple[list[int], Stats]:
    """``new`` ids after the prompt, whatever they are, and what they took."""
    stats, stop = Stats(), Stop(ids=frozenset(), strings=())
    guesses = Drafts() if drafts else None
    asked = Answer(_Silent(), prompt, stop, Sampling(greedy=True), len(prompt) + new, guesses, stats)
    return [piece.id for _, piece in generate(model, [asked], [model.sequence])], stats
