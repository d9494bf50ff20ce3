"""Write the golden dialogues in the official fine-tuning format, for ``moss-jt eval``.

    python benchmarks/golden_dialogues.py ../shared/golden moss-moon-003-sft golden.jsonl

The first folder holds turns.json, what the official code's greedy decoding gave for whole turns; the second one a tokenizer.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from moss_jt.tokenizer import Tokenizer, load_tokenizer

ROLES = {"<eoh>": "Human", "<eot>": "Inner Thoughts", "<eoc>": "Commands", "<eor>": "Tool Responses", "<eom>": "MOSS"}
_VALUE = re.compile(f"(.*?({'|'.join(ROLES)})\n?)", re.S)


def conversation(ids: list[int], tokenizer: Tokenizer) -> dict:
    """One turn's ids as a conversation. Raises ValueError where encoding that again would not give the same ids."""
    text = tokenizer.decode(ids)
    meta, mark, rest = text.partition("<|Human|>: ")
    turn = {ROLES[end]: value for value, end in _VALUE.findall(mark + rest)}
    turn["MOSS"] += "\n"  # which the program adds
    again = [i for value in (meta, *turn.values()) for i in tokenizer.encode(value)]
    if again[: len(ids)] != ids:
        raise ValueError(f"encoding gives other ids: {text!r}")
    return {"meta_instruction": meta, "num_turns": 1, "chat": {"turn_1": turn}}


def main(golden: str, tokenizer: str, out: str) -> None:
    loaded = load_tokenizer(tokenizer)
    records = json.loads((Path(golden) / "turns.json").read_text(encoding="utf-8"))
    lines = [conversation(r["prompt_ids"] + r["greedy_ids"], loaded) for r in records]
    Path(out).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
