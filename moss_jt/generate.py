"""From prompts to pieces of text: sweep after sweep, until each answer stops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .drafts import Drafts
from .model import Request
from .sampling import Likeliest, Sampler, Sampling
from .stopping import Stop, Text


@dataclass(frozen=True)
class Piece:
    """What one token added to the answer."""

    id: int
    text: str  # what became certain with it; "" in the middle of a character, and for special tokens
    seconds: float  # since the piece before; the first one's is the time of the prompt, that of a draft come true next to none


@dataclass
class Stats:
    """What an answer cost. Times are in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's, those that were not evaluated again
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    sweeps: int = 0  # over the weights; fewer than new_tokens where drafts came true
    stopped: bool = False  # by a stop token or string, rather than by a limit

    def count(self, seconds: float) -> None:
        """One more token, after so many seconds."""
        if self.new_tokens:
            self.decode_seconds += seconds
        else:
            self.prefill_seconds = seconds
        self.new_tokens += 1

    @property
    def prefill_tokens_s(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_s(self) -> float:
        # The first token comes out of the prefill.
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Answer:
    """One sequence being continued: what was chosen, what of it was shown, and when it ends."""

    def __init__(
        self, tokenizer, ids: list[int], stop: Stop, sampling: Sampling, limit: int, drafts: Drafts | None, stats: Stats
    ):
        """limit: tokens of prompt and answer together. drafts: guesses ahead, if any. stats: filled as the answer grows."""
        self.done = False
        self.stats = stats
        self._stop, self._drafts = stop, drafts
        self._sampling, self._sampler = sampling, Sampler(sampling)
        self._text = Text(tokenizer.decoder(skip_special=True), stop.strings)
        self._sequence = np.empty(limit, np.int64)
        self._sequence[: len(ids)] = ids
        self._length = stats.prompt_tokens = len(ids)

    @property
    def ids(self) -> np.ndarray:
        """Prompt and answer so far."""
        return self._sequence[: self._length]

    def draft(self) -> np.ndarray:
        """Guesses for the tokens that come next, to be evaluated with the rest; the last token is never guessed."""
        if self._drafts is None or not self.stats.new_tokens:
            return self._sequence[:0]
        return self._drafts.propose(self.ids, len(self._sequence) - self._length - 1)

    def request(self, sequence, draft: np.ndarray) -> Request:
        """For the logits after all ids and after each token of the draft."""
        return Request(sequence, np.concatenate([self.ids, draft]), len(draft) + 1, self._sampling)

    def take(self, logits: list[np.ndarray | Likeliest], draft: np.ndarray, before: float) -> list[Piece]:
        """Choose as many tokens as the logits after ids and after each token of the draft allow.

        Each is chosen as it would have been without a draft, and those after a wrong guess are not looked at: so drafts
        change neither the distribution nor, with the same seed, the answer. before: when the sweep began.
        """
        self.stats.sweeps += 1
        start, pieces = before, []
        for i, row in enumerate(logits):
            pieces.append(self._add(self._sampler.choose(row, self.ids), before))
            before = time.perf_counter()
            if self.done or i == len(draft) or pieces[-1].id != draft[i]:
                break
        if self._drafts is not None and self.stats.sweeps > 1:
            self._drafts.learn(len(draft), len(pieces) - 1, time.perf_counter() - start)
        return pieces

    def _add(self, chosen: int, before: float) -> Piece:
        self._sequence[self._length] = chosen
        self._length += 1
        shown = self._text.push(chosen)
        self.stats.stopped = chosen in self._stop.ids or self._text.stopped
        self.done = self.stats.stopped or self._length == len(self._sequence)
        if self.done:
            shown += self._text.finish()
        seconds = time.perf_counter() - before
        self.stats.count(seconds)
        return Piece(chosen, shown, seconds)


def generate(model, answers: list[Answer], sequences: list) -> Iterator[tuple[int, Piece]]:
    """Continue all answers, each sweep shared by those not done; yields (which answer, its next piece).

    sequences: where in the model's cache each one lives. A piece comes for every token, the stop token's included. An answer
    ends at a stop or at its limit. The generator can be closed at any time.
    """
    for answer, sequence in zip(answers, sequences):
        answer.stats.cached_tokens = sequence.reusable(answer.ids)
    while going := [i for i, answer in enumerate(answers) if not answer.done]:
        before = time.perf_counter()
        drafts = [answers[i].draft() for i in going]
        # All ids each time: the model evaluates only what it has not, even when it was used in between.
        requests = [answers[i].request(sequences[i], draft) for i, draft in zip(going, drafts)]
        for i, draft, logits in zip(going, drafts, model.evaluate(requests)):
            for piece in answers[i].take(logits, draft, before):
                yield i, piece
