"""Files of dialogues in the official format for fine-tuning: some for the smallest checkpoints, and the golden ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

PARTS = {
    "Human": "<|Human|>",
    "Inner Thoughts": "<|Inner Thoughts|>",
    "Commands": "<|Commands|>",
    "Tool Responses": "<|Results|>",
    "MOSS": "<|MOSS|>",
}


_TALK = ["hi!", "hi hi", "h i h i", "i!", "h!h!", "hi hihi ih", "!!!", "i hi h"]


def small_talk() -> list[dict]:
    """Eight dialogues in the few words that the tokenizer of tests/checkpoints.py has."""
    found = []
    for i, human in enumerate(_TALK):
        turn = {"Human": human + "<eoh>", "MOSS": _TALK[-i] + "  <eom>"}
        found.append({"meta_instruction": "hi! " * i + "h", "num_turns": 1, "chat": {"turn_1": turn}})
    return found


def golden_dialogues(golden: Path, tokenizer) -> list[dict]:
    """Those of golden/, which moss-tiny-sft knows by heart."""
    turns = json.loads((golden / "turns.json").read_text(encoding="utf-8"))
    return [_dialogue(tokenizer.decode(turn["prompt_ids"] + turn["greedy_ids"]) + "\n") for turn in turns]


def _dialogue(text: str) -> dict:
    meta, *values = re.split("(?=" + "|".join(map(re.escape, PARTS.values())) + ")", text)
    turn = dict(zip(PARTS, values))
    assert len(values) == len(PARTS) and all(value.startswith(PARTS[role]) for role, value in turn.items())
    return {"meta_instruction": meta, "num_turns": 1, "chat": {"turn_1": turn}}


def write(path: Path, found: list[dict]) -> Path:
    path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in found), encoding="utf-8")
    return path
