"""The official checkpoint's tokenizer files (vocab.json, merges.txt, ...) as one tokenizer.json.

They are read as the official code reads them, which is with the slow GPT-2 tokenizer of transformers 4.25.1: that decides
which tokens take the whitespace beside them.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import MossError
from .base import SPECIALS
from .files import ADDED, CONFIG, MERGES, SPECIAL, VOCAB, read_bytes

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_KEEPING_ROLES = (*_ROLES[:3], "pad_token")  # of these a plain string in tokenizer_config.json counts as a declaration


def official_json(folder: Path) -> bytes:
    """A tokenizer.json that opens by itself in the ``tokenizers`` library; the same bytes for the same files.

    ``lstrip`` and ``rstrip`` say which added tokens take the whitespace beside them. By itself the library makes the
    official ids of that, save where nothing but whitespace is between two such tokens, or one of U+001C to U+001F is beside
    one: ``ByteLevelBPE`` is exact there too.
    Raises MossError where a file is missing or broken.
    """
    vocab = _ids(folder / VOCAB)
    added = _ids(folder / ADDED) if (folder / ADDED).exists() else {}
    if vocab.keys() & added.keys() or sorted(added.values()) != list(range(len(vocab), len(vocab) + len(added))):
        raise MossError(f"{folder / ADDED}: it does not continue {VOCAB}; copy both from one checkpoint")
    declared = _declared(folder)
    for token in declared:
        if token not in vocab:
            added.setdefault(token, len(vocab) + len(added))
    known = {**vocab, **added}
    special = {**dict.fromkeys(SPECIALS, (False, False)), **declared}
    whole = sorted({*added, *(special.keys() & known.keys())}, key=known.__getitem__)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token, known[token], special) for token in whole],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": _model(vocab, _merges(folder / MERGES)),
    }
    try:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    except UnicodeEncodeError:
        raise MossError(f"{folder}: its tokenizer is damaged, a token is not Unicode; copy it from the checkpoint") from None


def _model(vocab: dict[str, int], merges: list[str]) -> dict:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": SPECIALS[0] if SPECIALS[0] in vocab else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocab,
        "merges": merges,
    }


def _added_token(token: str, token_id: int, special: dict[str, tuple[bool, bool]]) -> dict:
    left, right = special.get(token, (True, True))  # what is not special takes the whitespace on both sides
    flags = {"single_word": False, "lstrip": left, "rstrip": right, "normalized": False, "special": token in special}
    return {"id": token_id, "content": token, **flags}


def _declared(folder: Path) -> dict[str, tuple[bool, bool]]:
    """The declared special tokens, each with whether it takes the whitespace on its left and on its right.

    A token declared as an object says so itself. One declared as a plain string in special_tokens_map.json, as MOSS's
    ``<|endoftext|>`` is, takes both.
    """
    config, mapped = (_object(folder / name) if (folder / name).exists() else {} for name in (CONFIG, SPECIAL))
    declared: dict[str, tuple[bool, bool]] = {}
    for role in (*_ROLES, "additional_special_tokens"):
        where = SPECIAL if role in mapped else CONFIG
        value = mapped.get(role, config.get(role))
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, str) and where == CONFIG and role in _KEEPING_ROLES:
                token = {"content": token}
            if isinstance(token, dict) and isinstance(token.get("content"), str):
                declared[token["content"]] = bool(token.get("lstrip")), bool(token.get("rstrip"))
            elif isinstance(token, str):
                declared.setdefault(token, (True, True))
            elif token is not None:
                raise MossError(f"{folder / where}: {role} is neither a string nor a token; copy the file from the checkpoint")
    return declared


def _object(path: Path) -> dict:
    try:
        value = json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise MossError(f"{path}: damaged, not a JSON object; copy it from the checkpoint")
    return value


def _ids(path: Path) -> dict[str, int]:
    value = _object(path)
    if not all(type(i) is int for i in value.values()):
        raise MossError(f"{path}: damaged, an id is not a number; copy it from the checkpoint")
    return value


def _merges(path: Path) -> list[str]:
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError:
        raise MossError(f"{path}: damaged, not UTF-8; copy it from the checkpoint") from None
    # The first line is a header and what follows the last newline is left out, both whatever they hold.
    lines = [line.split() for line in text.replace("\r\n", "\n").split("\n")[1:-1]]
    for number, line in enumerate(lines, 2):
        if len(line) != 2:
            raise MossError(f"{path}: damaged, line {number} is not two symbols; copy it from the checkpoint")
    return [" ".join(line) for line in lines]
