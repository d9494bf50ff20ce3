"""Guessing the next tokens from the text so far, so that one sweep over the weights can yield several.

An answer often repeats what was said: names, quotes, code, numbers. What followed the same few tokens before is a good guess
(Saxena, Prompt Lookup Decoding, 2023), and checking a guess costs no more weights to read.
"""

from __future__ import annotations

import numpy as np

SIZES = (0, 1, 3, 7)  # tokens to guess: with the one before them, what the kernels for few tokens take at once
_LONGEST, _SHORTEST = 4, 2  # tokens that must have occurred before
_HOPE = 0.7  # how often a guess comes true, before anything is known
_MEMORY = 0.2  # weight of the newest observation


class Drafts:
    """Proposes drafts of the length that has been paying best. One for each answer."""

    def __init__(self) -> None:
        self._true = _HOPE  # how often the next token of a draft comes true
        self._seconds: dict[int, float] = {}  # of a sweep that checks so many guesses

    def propose(self, ids: np.ndarray, room: int) -> np.ndarray:
        """Up to ``room`` tokens that may follow ids; none where nothing like it occurred before, or where it does not pay."""
        size = min(self._size(), room)
        at = _earlier(ids) if size > 0 else None
        if at is None:
            return ids[:0]
        period = len(ids) - at  # what reaches the end of ids goes on as if it repeated itself
        return ids[at + np.arange(size) % period]

    def learn(self, proposed: int, true: int, seconds: float) -> None:
        """Say how many of the tokens proposed came true, and what the sweep took."""
        known = self._seconds.get(proposed, seconds)
        self._seconds[proposed] = known + _MEMORY * (seconds - known)
        if proposed:
            tried = min(true + 1, proposed)
            self._true += _MEMORY * (true / tried - self._true)
        else:
            self._true += 0.1 * _MEMORY * (_HOPE - self._true)  # times change: try again some day

    def _size(self) -> int:
        """The size with the most tokens to be expected a second. A size never tried is hoped to cost no more than the last."""
        best, gain, cost = 0, 0.0, 0.0
        for size in SIZES:
            cost = self._seconds.get(size, cost)
            tokens = sum(self._true**i for i in range(size + 1))
            if not cost or tokens / cost > gain:
                best, gain = size, tokens / cost if cost else 0.0
        return best


def _earlier(ids: np.ndarray) -> int | None:
    """Where ids went on the last time that its last tokens occurred, the longest run of them that did occur before."""
    for n in range(min(_LONGEST, len(ids) - 1), _SHORTEST - 1, -1):
        same = np.ones(len(ids) - n, bool)  # whether the n tokens from here on are the last n
        for i in range(n):
            same &= ids[i : i + len(same)] == ids[len(ids) - n + i]
        found = np.flatnonzero(same)
        if len(found):
            return int(found[-1]) + n
    return None
