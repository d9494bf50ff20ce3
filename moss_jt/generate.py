"""From a prompt to pieces of text: one token at a time, until a stop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .errors import MossError
from .sampling import Sampler, Sampling


@dataclass(frozen=True)
class Piece:
    """What one token added to the answer."""

    id: int
    text: str  # what became certain with it; "" in the middle of a character, and for special tokens
    seconds: float  # since the piece before; the first one's is the time of the prompt


@dataclass
class Stats:
    """What an answer cost. Times are in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's, those that were not evaluated again
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
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


@dataclass(frozen=True)
class Stop:
    """What ends an answer: token ids, and strings that are not shown."""

    ids: frozenset[int] = field(default_factory=frozenset)
    strings: tuple[str, ...] = ()

    @classmethod
    def of(cls, stop: int | str | Iterable[int | str] | None, tokenizer, eos: int | None) -> Stop:
        """From what ``generate`` takes. A string that is a token of its own, such as ``<eom>``, stands for its id.

        None: the model's end token, and the ends of an answer and of a command, ``<eom>`` and ``<eoc>``.
        """
        if stop is None:
            ids = [eos, tokenizer.token_id("<eom>"), tokenizer.token_id("<eoc>")]
            return cls(frozenset(i for i in ids if i is not None))
        ids, strings = set(), []
        for s in [stop] if isinstance(stop, (int, str)) else stop:
            token = tokenizer.token_id(s) if isinstance(s, str) else int(s)
            if not isinstance(s, str) or token in tokenizer.special_ids:
                ids.add(token)
            elif s:
                strings.append(s)
            else:
                raise MossError("an empty stop string would stop every answer at once")
        return cls(frozenset(ids), tuple(strings))


def generate(
    model, tokenizer, ids: list[int], stop: Stop, sampling: Sampling, max_new_tokens: int, stats: Stats
) -> Iterator[Piece]:
    """Continue ids, yielding a Piece per token, the stop token's included. Fills stats as it goes.

    Ends at a stop, after max_new_tokens, or when the model's context is full. It can be closed at any time.
    """
    sampler, text = Sampler(sampling), _Text(tokenizer.decoder(skip_special=True), stop.strings)
    limit = min(len(ids) + max_new_tokens, model.context)
    sequence = np.empty(limit, np.int64)
    sequence[: len(ids)] = ids
    stats.prompt_tokens, stats.cached_tokens = len(ids), model.sequence.reusable(ids)
    before = time.perf_counter()
    for length in range(len(ids), limit):
        # The whole sequence each time: the model evaluates only what it has not, even when it was used in between.
        chosen = sampler.choose(model.logits(sequence[:length])[0], sequence[:length])
        sequence[length] = chosen
        shown = text.push(chosen)
        stats.stopped = chosen in stop.ids or text.stopped
        last = stats.stopped or length + 1 == limit
        if last:
            shown += text.finish()
        now = time.perf_counter()
        stats.count(now - before)
        yield Piece(chosen, shown, now - before)
        if last:
            return
        before = time.perf_counter()  # what the caller did with the piece is not ours


class _Text:
    """Tokens in, text out; holds back what may yet turn out to be the beginning of a stop string."""

    def __init__(self, decoder, stops: tuple[str, ...]):
        self._decoder, self._stops = decoder, stops
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._release(self._decoder.push(token), final=False)

    def finish(self) -> str:
        return self._release(self._decoder.finish(), final=True)

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = min((at for at in map(text.find, self._stops) if at >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            return text[:found]
        keep = 0 if final else max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` that ``text`` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
