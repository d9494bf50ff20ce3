"""The files of a tokenizer: their names, reading and writing them."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import MossError

JSON = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
VOCAB, MERGES = "vocab.json", "merges.txt"
ADDED, SPECIAL, CONFIG = "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"

# A converted checkpoint keeps these as they were, so that an export can give them back.
COPIED = (JSON, SENTENCEPIECE, VOCAB, MERGES, ADDED, SPECIAL, CONFIG)


def read_bytes(path: Path) -> bytes:
    """The whole file. Raises MossError where it cannot be read, or where only its Git LFS pointer was downloaded."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MossError(f"{path}: no such file; copy it from the checkpoint") from None
    except OSError as e:
        raise MossError(f"{path}: cannot be read: {e.strerror}") from None
    if data.startswith(b"version https://git-lfs"):
        raise MossError(f"{path}: this is a Git LFS pointer, not the file itself; run: git lfs pull")
    return data


def write_bytes(path: Path, data: bytes) -> None:
    """Write the file, whole or not at all. Raises MossError where that is impossible."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as e:
        raise MossError(f"{path}: cannot be written: {e.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
