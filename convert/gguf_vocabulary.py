"""The tokenizer as GGUF has it, from the tokenizer.json of a converted checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import MossError
from ..tokenizer import load_tokenizer
from ..tokenizer.base import SPECIALS
from ..tokenizer.files import JSON

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def vocabulary(folder: Path, config: Config) -> dict[str, Any]:
    """The metadata of a byte-level BPE with GPT-2's split pattern. Raises MossError where the folder has no such tokenizer.

    The runs of spaces and tabs are user-defined tokens. llama.cpp finds them anywhere, too, but leaves the whitespace beside
    them, which the official tokenizer takes away.
    """
    path = folder / JSON
    if not path.is_file():
        raise MossError(f"{path}: missing; only a byte-level tokenizer can be written to a GGUF file")
    load_tokenizer(folder)  # checks it
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw["model"].get("type", "BPE") != "BPE" or not _splits_like_gpt2(raw["pre_tokenizer"]):
        raise MossError(f"{path}: cuts text otherwise than GPT-2's tokenizer; a GGUF file could not say how")
    ids = {i: (token, _NORMAL) for token, i in raw["model"]["vocab"].items()}
    for token in raw["added_tokens"]:
        special = token["special"] or token["content"] in SPECIALS
        ids[token["id"]] = token["content"], _CONTROL if special else _USER_DEFINED
    if max(ids) >= config.vocab_size:
        raise MossError(f"{path}: has the id {max(ids)}, and the model only {config.vocab_size}; copy both from one checkpoint")
    tokens = [ids.get(i, (f"[unused {i}]", _UNUSED)) for i in range(config.vocab_size)]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": [kind for _, kind in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    for role, i in (("bos", config.bos_token_id), ("eos", config.eos_token_id)):
        if i is not None:
            found[f"tokenizer.ggml.{role}_token_id"] = i
    return found


def _splits_like_gpt2(how: dict | None) -> bool:
    how = how or {}
    return how.get("type") == "ByteLevel" and how.get("use_regex", True) and not how.get("add_prefix_space", True)
