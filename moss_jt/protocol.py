"""The parts of a turn as ids, each encoded by itself, as in training: what MOSS reads and writes between its special tokens.

Without plugins a turn has two parts, with plugins five::

    <|Human|>: …<eoh>\\n
    <|Inner Thoughts|>: …<eot>\\n
    <|Commands|>: Calculate("60/6")<eoc>\\n
    <|Results|>:\\nCalculate("60/6") => '10.0'\\n<eor>\\n
    <|MOSS|>: …<eom>\\n
"""

from __future__ import annotations

import re
from typing import Any

from .errors import MossError

Segment = tuple[str, "list[int]"]  # a role and its ids

HUMAN, THOUGHTS, COMMANDS, RESULTS, MOSS = "Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS"
WITH_PLUGINS = [HUMAN, THOUGHTS, COMMANDS, RESULTS, MOSS]  # the roles are those of the official fine-tuning format
TOO_LONG = " None: too long for the context."  # the results
_HEADERS = {**{role: f"<|{role}|>:" for role in WITH_PLUGINS}, RESULTS: "<|Results|>:"}


class Protocol:
    """Raises MossError, when made, for a tokenizer that lacks the dialogue's special tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        if tokenizer.token_id("<eoh>") is None or tokenizer.token_id("<eom>") is None:
            raise MossError(
                "the tokenizer has no <eoh> and <eom>, so this model cannot hold a dialogue, only continue raw text"
            )
        self._eom, self._eot, self._eoc, self._eor = map(tokenizer.token_id, ("<eom>", "<eot>", "<eoc>", "<eor>"))
        self.has_plugins = None not in (self._eot, self._eoc, self._eor)
        self._special = _where_specials_start(tokenizer)
        self._openings: dict[str, list[int]] = {role: tokenizer.encode(header) for role, header in _HEADERS.items()}
        end: list[int] = tokenizer.encode("<eom>\n")
        self._newline = end[end.index(self._eom) + 1 :]

    def encode(self, before: str, text: str, after: str) -> list[int]:
        """Ids of ``before + text + after``, with special tokens in ``text`` as ordinary text.

        They are encoded in two halves, cut after the first character. In MOSS's vocabulary that is where the split
        pattern cuts anyway, so the ids are those of the same characters without a special meaning.
        """
        cuts = [0, *(found.start() + 1 for found in self._special.finditer(text)), len(text)]
        parts = [text[a:b] for a, b in zip(cuts, cuts[1:])]
        parts[0] = before + parts[0]
        parts[-1] += after
        return [i for part in parts for i in self._tokenizer.encode(part)]

    def opening(self, role: str) -> list[int]:
        """What stands before the model's own words in a part."""
        return self._openings[role]

    def human(self, text: str) -> Segment:
        return HUMAN, self.encode("<|Human|>: ", text, "<eoh>\n")

    def answer(self, written: list[int]) -> Segment:
        """What the model wrote after ``<|MOSS|>:``, closed where it did not do so itself."""
        end = self._newline if written[-1:] == [self._eom] else [self._eom, *self._newline]
        return MOSS, self.opening(MOSS) + written + end

    def consulted(self, written: list[int]) -> list[Segment]:
        """Thoughts and commands: what the model wrote after ``<|Inner Thoughts|>:``, put right where it is incomplete."""
        if written and written[-1] in self._tokenizer.special_ids - {self._eot}:  # what ended it
            written = written[:-1]
        if self._eot in written:
            end = written.index(self._eot) + 1
            end += len(self._newline) * (written[end : end + len(self._newline)] == self._newline)
            thoughts, commands = written[:end], written[end:]
        else:
            thoughts, commands = [*written, self._eot, *self._newline], []
        commands = commands or self._tokenizer.encode("<|Commands|>: None")
        return [(THOUGHTS, self.opening(THOUGHTS) + thoughts), (COMMANDS, [*commands, self._eoc, *self._newline])]

    def commands(self, ids: list[int]) -> str:
        """The text in a commands part."""
        return self._tokenizer.decode(ids, skip_special=True).strip().removeprefix(_HEADERS[COMMANDS]).strip()

    def results(self, text: str) -> Segment:
        """text: as ``plugins.commands.written`` gives it."""
        return RESULTS, self.encode(_HEADERS[RESULTS], text, "<eor>\n")

    def longest_extra(self) -> int:
        """Tokens that surround what the model writes before its answer, and what it is told in place of too long results."""
        nothing = [*self.consulted([]), self.results(TOO_LONG), (MOSS, self.opening(MOSS))]
        return sum(len(ids) for _, ids in nothing)

    def rebuilt(self, human: str, segments: list[Segment]) -> list[Segment]:
        """A turn's parts, made anew from what was said in them. Where they differ from ``segments``, those are damaged."""
        parts = [self.human(human)]
        if [role for role, _ in segments] == WITH_PLUGINS and self.has_plugins:
            (_, thoughts), (_, commands), (_, results) = segments[1:4]
            parts += self.consulted(thoughts[len(self.opening(THOUGHTS)) :] + commands[: -len(self._newline)])
            inside = results[len(self.opening(RESULTS)) : -len(self._newline) - 1]
            parts.append((RESULTS, [*self.opening(RESULTS), *inside, self._eor, *self._newline]))
        parts.append(self.answer(segments[-1][1][len(self.opening(MOSS)) : -len(self._newline)]))
        return parts


def _where_specials_start(tokenizer: Any) -> re.Pattern[str]:
    """Finds each place in a text where a special token begins, overlapping ones too."""
    texts = (tokenizer.decode([i]) for i in tokenizer.special_ids)
    return re.compile("(?=" + "|".join(re.escape(text) for text in texts if text) + ")")
