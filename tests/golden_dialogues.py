"""The golden dialogues, which moss-tiny-sft knows by heart, in the official format for fine-tuning."""

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


def dialogues(golden: Path, tokenizer) -> list[dict]:
    """Each as a line of train.jsonl holds it."""
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
