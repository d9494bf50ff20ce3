"""Text to token ids and back.

>>> tokenizer = load_tokenizer("moss-moon-003-sft-jt")
>>> tokenizer.encode("你好<eoh>")
[60237, 106067]

A folder brings its vocabulary in one of three ways, and all give the same interface, ``Tokenizer``:

1. ``tokenizer.json``, byte-level BPE for the ``tokenizers`` library;
2. the official ``vocab.json`` and ``merges.txt`` with ``added_tokens.json`` and ``special_tokens_map.json``;
3. a SentencePiece ``tokenizer.model``.

No code from the folder is run: ``auto_map`` in ``tokenizer_config.json`` is never looked at.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import MossError
from .base import Decoder, Tokenizer
from .files import COPIED, JSON, MERGES, SENTENCEPIECE, VOCAB, read_bytes, write_bytes
from .official import official_json

__all__ = ["Decoder", "Tokenizer", "load_tokenizer", "write_tokenizer"]


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a converted or an official checkpoint's folder.

    Raises MossError where the folder has none, or one that is broken or of a kind that cannot be decoded exactly.
    """
    folder = Path(folder)
    if (folder / JSON).exists():
        return _byte_level(folder / JSON, read_bytes(folder / JSON))
    if (folder / VOCAB).exists() or (folder / MERGES).exists():
        return _byte_level(folder, official_json(folder))
    if (folder / SENTENCEPIECE).exists():
        from .spm import SentencePiece

        return SentencePiece(folder / SENTENCEPIECE, read_bytes(folder / SENTENCEPIECE))
    if not folder.is_dir():
        raise MossError(f"{folder}: no such folder; give the folder of a checkpoint")
    raise MossError(f"{folder}: no tokenizer there: it needs {JSON}, or {VOCAB} and {MERGES}, or {SENTENCEPIECE}")


def write_tokenizer(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Give the folder ``dst`` the tokenizer of the checkpoint in ``src``.

    Each of the files named in ``files.COPIED`` is copied byte for byte where ``src`` has it. From official files a
    ``tokenizer.json`` is made besides, always the same bytes. Raises MossError where ``src`` has no tokenizer that opens,
    before anything is written.
    """
    src, dst = Path(src), Path(dst)
    load_tokenizer(src)
    found = [name for name in COPIED if (src / name).exists()]
    if JSON not in found and VOCAB in found:
        write_bytes(dst / JSON, official_json(src))
    for name in found:
        write_bytes(dst / name, read_bytes(src / name))


def _byte_level(path: Path, data: bytes) -> Tokenizer:
    from .bpe import ByteLevelBPE

    return ByteLevelBPE(path, data)
