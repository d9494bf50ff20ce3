"""Conversations in the official fine-tuning format: what the model is trained on and measured by.

One conversation a line, as JSON::

    {"meta_instruction": "You are an AI assistant …", "num_turns": 1,
     "chat": {"turn_1": {"Human": "<|Human|>: 你好<eoh>\\n", "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\\n",
                         "Commands": "<|Commands|>: None<eoc>\\n", "Tool Responses": "<|Results|>:\\nNone\\n<eor>\\n",
                         "MOSS": "<|MOSS|>: …<eom>\\n"}}}

Each value is encoded by itself and the ids are joined in the order of the file, as the official finetune_moss.py does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Callable

import numpy as np

from .errors import MossError

LIMIT = 2048  # tokens of a conversation, officially
META = "meta_instruction"
ROLES = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")
WRITTEN = ("Inner Thoughts", "Commands", "MOSS")  # by the model; the others are given to it
_NEEDED = ("Human", "MOSS")  # the values that every turn has

LeftOut = Callable[[int, int], None]  # told the line and how many of its turns did not fit
Bad = Callable[[int, str], None]  # told the line and what is wrong with it


@dataclass(frozen=True)
class Span:
    """Where one value lies: ``ids[start:end]`` of its dialogue. ``role``: META, which is the first, or one of ROLES."""

    role: str
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Dialogue:
    """A conversation as ids. Token t is predicted from those before it, so a mask's t goes with the logits of t − 1."""

    line: int  # in its file, from 1
    ids: np.ndarray  # int32 (T,)
    spans: tuple[Span, ...]  # together all of ids, in order
    trained: np.ndarray  # bool (T,): has loss in the official training
    answers: np.ndarray  # bool (T,): the model's own words, up to and including the token that ends them


def read_dialogues(
    path: str | Path, tokenizer: Any, limit: int = LIMIT, left_out: LeftOut | None = None, bad: Bad | None = None
) -> Iterator[Dialogue]:
    """The conversations in a file, one after another.

    A turn that would pass ``limit`` tokens, and all after it, is left out, and so is a conversation without a turn that
    fits; ``left_out(line, turns)`` is told of both. Raises MossError, naming file and line, for what is not as above; with
    ``bad``, that is told of it instead, and of conversations without a turn that fits, and the line is passed over.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    meta, turns = _parse(line)
                    dialogue, kept = _dialogue(number, meta, turns, tokenizer, limit)
                    if bad is not None and not kept:
                        raise MossError(f"too long: its first turn ends beyond {limit} tokens")
                except MossError as e:
                    if bad is None:
                        raise MossError(f"{path}, line {number}: {e}") from None
                    bad(number, str(e))
                    continue
                if left_out is not None and kept < len(turns):
                    left_out(number, len(turns) - kept)
                if kept:
                    yield dialogue
    except OSError as e:
        raise MossError(f"{path}: cannot be read: {e.strerror}") from None


def _parse(line: bytes) -> tuple[str, list[dict[str, str]]]:
    """The meta instruction, and each turn's values by role."""
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise MossError("not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise MossError("not JSON; the file holds one whole conversation a line") from None
    if not isinstance(data, dict) or not isinstance(data.get("chat"), dict):
        raise MossError('not a conversation: it needs "meta_instruction", "num_turns" and "chat"')
    meta, count, chat = data.get(META), data.get("num_turns"), data["chat"]
    if not isinstance(meta, str) or not meta:
        raise MossError(f'"{META}" is missing, or is no text')
    if type(count) is not int or count < 1:
        raise MossError('"num_turns" is missing, or is not a number of turns')
    return meta, [_turn(f"turn_{i}", chat) for i in range(1, count + 1)]


def _turn(name: str, chat: dict) -> dict[str, str]:
    turn = chat.get(name)
    if not isinstance(turn, dict):
        raise MossError(f'"{name}" is missing from "chat", or is no turn')
    for role, value in turn.items():
        if role not in ROLES:
            raise MossError(f'"{name}" has the key "{role}"; a turn\'s are {", ".join(ROLES)}')
        if not isinstance(value, str) or not value:
            raise MossError(f'"{role}" of "{name}" is empty, or is no text')
    for role in _NEEDED:
        if role not in turn:
            raise MossError(f'"{name}" has no "{role}"')
    return turn


def _dialogue(line: int, meta: str, turns: list[dict[str, str]], tokenizer: Any, limit: int) -> tuple[Dialogue, int]:
    """The dialogue, and how many of its turns it holds."""
    ids = list(tokenizer.encode(meta))
    spans, kept = [Span(META, 0, len(ids))], 0
    for turn in turns:
        turn_ids, turn_spans = list(ids), []
        for role, value in turn.items():
            start = len(turn_ids)
            turn_ids += tokenizer.encode(value)
            turn_spans.append(Span(role, start, len(turn_ids)))
            if len(turn_ids) == start:
                raise MossError(f'"{role}" has no tokens: {value!r}')
        if len(turn_ids) > limit:
            break
        ids, spans, kept = turn_ids, spans + turn_spans, kept + 1
    array = np.array(ids, np.int32)
    return Dialogue(line, array, tuple(spans), _trained(len(ids), spans), _answers(array, spans, tokenizer.special_ids)), kept


def _trained(length: int, spans: list[Span]) -> np.ndarray:
    """The official mask: all but the meta instruction, and of Tool Responses only the tokens of the format around them."""
    mask = np.ones(length, bool)
    for span in spans:
        if span.role == META:
            mask[span.start : span.end] = False
        elif span.role == "Tool Responses":
            mask[span.start + 5 : span.end - 2] = False
    return mask


def _answers(ids: np.ndarray, spans: list[Span], special: frozenset[int]) -> np.ndarray:
    """What the model writes in one go ends with the last special token in it: the newline after ``<eoc>`` or ``<eom>`` is
    the program's, the one between ``<eot>`` and Commands the model's."""
    mask = np.zeros(len(ids), bool)
    for written, run in groupby(spans, lambda span: span.role in WRITTEN):
        if written:
            parts = list(run)
            start, end, last = parts[0].start, parts[-1].end, parts[-1].start
            ends = np.flatnonzero(np.isin(ids[last:end], sorted(special)))
            mask[start : last + int(ends[-1]) + 1 if len(ends) else end] = True
    return mask
