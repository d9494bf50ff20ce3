"""What ends an answer, and showing no more of it than is certain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .errors import MossError


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


class Text:
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
