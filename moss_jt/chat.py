"""Conversations: turns, prompts and history, in the dialogue format that MOSS was trained with.

A prompt is the meta instruction, the turns so far, and a question whose answer is left open::

    <|Human|>: question<eoh>\\n<|MOSS|>: answer<eom>\\n<|Human|>: question<eoh>\\n<|MOSS|>:

Each part is encoded by itself and the ids are joined, as in training, and the ids that the model gave are kept as they
are. So each prompt begins with the one before and its answer, and only what is new has to be evaluated.

With plugins, the model first writes what it thinks and which commands it wants run, and answers when it has seen their
results (see ``protocol``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import MossError
from .meta_instruction import META_INSTRUCTION, enabled, switched
from .plugins import BUILT_IN, Plugin, commands
from .protocol import MOSS, THOUGHTS, TOO_LONG, Protocol, Segment

MAX_NEW_TOKENS = 512  # an answer's length unless asked otherwise
MAX_CONSULT_TOKENS = 512  # thoughts, commands and their results
FILE_FORMAT = "moss-jt conversation 1"


@dataclass
class Turn:
    """A question and its answer. ``segments`` are the parts of the protocol in order: (role, ids)."""

    human: str
    answer: str
    segments: list[Segment]

    @property
    def ids(self) -> list[int]:
        return [i for _, ids in self.segments for i in ids]


class Conversation:
    """Talk with a loaded model, turn by turn.

    ``system`` replaces the meta instruction (``None``: the checkpoint's own, or else the official one). ``plugins`` are what
    MOSS may call (``moss_jt.plugins``), and the switches in the system text are set accordingly; ``None``: those of moss-jt's
    own that the system text enables as it is, none in the official one.

    ``turns`` holds every turn; the oldest ``dropped`` of them no longer fit in the context and are not shown to the model
    any more. Special tokens in what the user writes, ``<eom>`` for example, reach the model as ordinary text, never as the
    token.
    """

    def __init__(self, moss: Any, system: str | None = None, plugins: Iterable[Plugin] | None = None):
        self._moss = moss
        self._protocol = Protocol(moss.tokenizer)
        self.turns: list[Turn] = []
        self.dropped = 0
        self._chosen = None if plugins is None else list(plugins)
        self.system = system

    @property
    def system(self) -> str:
        """The text before the first turn. It ends with a newline: one is added where it is missing."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is None:
            text = META_INSTRUCTION if self._moss.meta_instruction is None else self._moss.meta_instruction
        self._arrange(text, self._chosen)

    @property
    def plugins(self) -> list[Plugin]:
        """What MOSS may call. Setting it sets the switches in the system text; ``None``: what that text enables by itself."""
        return list(self._plugins)

    @plugins.setter
    def plugins(self, chosen: Iterable[Plugin] | None) -> None:
        self._arrange(self._text, None if chosen is None else list(chosen))

    def _arrange(self, text: str, chosen: list[Plugin] | None) -> None:
        plugins = enabled(text, BUILT_IN.values()) if chosen is None else chosen
        if plugins and not self._protocol.has_plugins:
            raise MossError("the tokenizer has no <eot>, <eoc> and <eor>, so this model cannot call plugins; turn them off")
        self._text, self._chosen, self._plugins = text, chosen, plugins
        system = text if chosen is None else switched(text, chosen)
        self._system = system + "\n" if system and not system.endswith("\n") else system
        self._system_ids = self._protocol.encode("", self._system, "")

    def send(
        self, text: str, max_new_tokens: int = MAX_NEW_TOKENS, told: commands.Told | None = None, **sampling: Any
    ) -> Iterator[Any]:
        """Ask, and yield the answer's pieces as ``Moss.generate`` gives them; ``sampling`` goes there.

        With plugins, the pieces of thoughts and commands come first, without their text, and ``told(command, result)`` is
        called for each command that was run. ``max_new_tokens`` are the answer's.

        When the generator ends, is closed, or is interrupted, the answer so far is kept as a turn, closed with ``<eom>``;
        without a single token of it nothing changes. Leaves out the oldest turns where history and answer would pass the
        context. Raises MossError where the message alone is too long.
        """
        ids, dropped = self._fit(text, max_new_tokens)
        consulted: list[Segment] = []
        if self._plugins:
            consulted = yield from self._consult(ids, max_new_tokens, told, sampling)
            ids = ids[: -len(self._opening)] + [i for _, part in consulted for i in part] + self._protocol.opening(MOSS)
        room = min(max_new_tokens, self._moss.context - len(ids))
        answer, answer_ids = "", []
        with closing(self._moss.generate(ids, max_new_tokens=room, **sampling)) as pieces:
            try:
                for piece in pieces:
                    answer_ids.append(piece.id)
                    if not answer:  # the space after "<|MOSS|>:" belongs to the format
                        piece = replace(piece, text=piece.text.lstrip())
                    answer += piece.text
                    yield piece
            finally:
                if answer_ids:
                    segments = [self._protocol.human(text), *consulted, self._protocol.answer(answer_ids)]
                    self.turns.append(Turn(text, answer, segments))
                    self.dropped = dropped

    def _consult(self, ids: list[int], max_new_tokens: int, told: commands.Told | None, sampling: dict) -> Iterator[Any]:
        """Let the model think and write commands after ``ids``, and run them: the turn's parts up to their results."""
        answer, consult = self._rooms(max_new_tokens)
        sampling = {name: value for name, value in sampling.items() if name != "stop"}  # which is of the answer
        written: list[int] = []
        with closing(self._moss.generate(ids, max_new_tokens=consult // 2, **sampling)) as pieces:
            for piece in pieces:
                written.append(piece.id)
                yield replace(piece, text="")
        parts = self._protocol.consulted(written)
        results = commands.run(commands.parse(self._protocol.commands(parts[-1][1])), self._plugins, told)
        before = len(ids) - len(self._opening) + sum(len(part) for _, part in parts) + len(self._protocol.opening(MOSS))
        return [*parts, self._results(results, self._moss.context - answer - before)]

    def _results(self, results: list[commands.Result], room: int) -> Segment:
        """The turn's part with the results, shortened where they would take more than so many tokens."""
        for longest in (commands.LONGEST_RESULT, 300, 100):
            part = self._protocol.results(commands.written(results, longest))
            if len(part[1]) <= room:
                return part
        return self._protocol.results(TOO_LONG)

    def retry(self, **sampling: Any) -> Iterator[Any]:
        """Ask the last question again; its answer is replaced once there is a token of a new one."""
        last, dropped = self.undo(), self.dropped
        kept = len(self.turns)
        try:
            yield from self.send(last.human, **sampling)
        finally:
            if len(self.turns) == kept:
                self.turns.append(last)
                self.dropped = dropped

    def undo(self) -> Turn:
        """Take the last turn back and return it. Raises MossError where there is none."""
        if not self.turns:
            raise MossError("there is no turn to go back to")
        turn = self.turns.pop()
        self.dropped = min(self.dropped, len(self.turns))
        return turn

    def clear(self) -> None:
        """Forget all turns; the system text stays."""
        self.turns.clear()
        self.dropped = 0

    def prompt_ids(self, text: str, max_new_tokens: int = MAX_NEW_TOKENS) -> list[int]:
        """The ids from which the model would go on now to answer ``text``: ``<|MOSS|>:`` is the last, or with plugins
        ``<|Inner Thoughts|>:``."""
        return self._fit(text, max_new_tokens)[0]

    @property
    def _opening(self) -> list[int]:
        """What the model goes on from."""
        return self._protocol.opening(THOUGHTS if self._plugins else MOSS)

    def _rooms(self, max_new_tokens: int) -> tuple[int, int]:
        """Tokens kept for the answer, and for what comes before it where there are plugins; of a small context a quarter
        each, so that there is a history, too."""
        quarter = self._moss.context // 4
        return min(max_new_tokens, quarter), min(MAX_CONSULT_TOKENS, quarter) if self._plugins else 0

    def _fit(self, text: str, max_new_tokens: int) -> tuple[list[int], int]:
        """The prompt's ids, and how many of the oldest turns it leaves out."""
        context, room = self._moss.context, sum(self._rooms(max_new_tokens))
        if self._plugins:
            room += self._protocol.longest_extra()
        question = self._protocol.human(text)[1] + self._opening
        space = context - room - len(self._system_ids) - len(question)
        if space < 0:
            raise MossError(
                f"the message is too long: {len(question)} tokens, where {max(0, len(question) + space)} fit in the context "
                f"of {context} beside the system text ({len(self._system_ids)}) and room for the answer ({room})"
            )
        dropped = _drop([len(turn.ids) for turn in self.turns], self.dropped, space)
        history = [i for turn in self.turns[dropped:] for i in turn.ids]
        return self._system_ids + history + question, dropped

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON (see docs/chat.md); ``path`` appears whole or stays as it was.

        Replaces a saved conversation, but no other file. Raises MossError where it cannot be written.
        """
        path = Path(path)
        if path.exists() or path.is_symlink():
            _read(path, "exists and is not a saved conversation; choose another name")
        turns = [
            {"human": t.human, "answer": t.answer, "segments": [{"role": role, "ids": ids} for role, ids in t.segments]}
            for t in self.turns
        ]
        _write(path, {"format": FILE_FORMAT, "system": self.system, "dropped": self.dropped, "turns": turns})

    @classmethod
    def load(cls, moss: Any, path: str | Path, plugins: Iterable[Plugin] | None = None) -> Conversation:
        """Read what ``save`` wrote; ``plugins`` as for a new one. Raises MossError where it is broken or was made with
        another tokenizer."""
        data = _read(Path(path), "not a saved conversation")
        try:
            system, dropped = data["system"], data["dropped"]
            conversation = cls(moss, system, plugins)
            conversation.turns = [conversation._load_turn(turn) for turn in data["turns"]]
            if not isinstance(system, str) or type(dropped) is not int or not 0 <= dropped <= len(conversation.turns):
                raise ValueError
        except MossError as e:
            raise MossError(f"{path}: {e}") from None
        except (ValueError, TypeError, LookupError, AttributeError):
            raise MossError(f"{path}: this saved conversation is damaged") from None
        conversation.dropped = dropped
        return conversation

    def _load_turn(self, raw: dict) -> Turn:
        human, answer = raw["human"], raw["answer"]
        segments = [(s["role"], s["ids"]) for s in raw["segments"]]
        if segments[0] != self._protocol.human(human):
            raise MossError("saved with another tokenizer, or damaged")
        known = all(type(i) is int and 0 <= i < self._moss.config.vocab_size for _, ids in segments for i in ids)
        if not isinstance(answer, str) or not known or self._protocol.rebuilt(human, segments) != segments:
            raise ValueError
        return Turn(human, answer, segments)


def _drop(sizes: list[int], dropped: int, space: int) -> int:
    """How many of the oldest turns to leave out, ``dropped`` being out already, so that the others fit in ``space`` tokens.

    Once one has to go, everything after it has to be evaluated again. So then a quarter of the space is freed, and that
    does not come back with every turn; the newest turn is kept where it fits at all.
    """
    left = sum(sizes[dropped:])
    goal = space if left <= space else space * 3 // 4
    while left > space or (left > goal and dropped < len(sizes) - 1):
        left -= sizes[dropped]
        dropped += 1
    return dropped


def _read(path: Path, otherwise: str) -> dict:
    """The JSON object in a saved conversation's file. Raises MossError, with ``otherwise`` where it is something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise MossError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or data.get("format") != FILE_FORMAT:
        raise MossError(f"{path}: {otherwise}")
    return data


def _write(path: Path, data: dict) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(data, file, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as e:
        raise MossError(f"{path}: cannot be written: {e.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
