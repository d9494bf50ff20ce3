"""A SentencePiece vocabulary, for small and re-trained models."""

from __future__ import annotations

import re
from pathlib import Path

import sentencepiece

from ..errors import MossError
from .base import SPECIALS, Tokenizer


class SentencePiece(Tokenizer):
    """Ids are what SentencePiece itself gives, save that special tokens are found in text also where they were trained as
    control symbols. What its normalization changes does not come back from decoding: train with
    ``normalization_rule_name="identity"``, ``remove_extra_whitespaces=False`` and ``byte_fallback=True`` to have every text
    back (but U+2581, which SentencePiece writes spaces with), and with ``add_dummy_prefix=False`` to be able to join the ids
    of several texts.
    """

    def __init__(self, path: Path, data: bytes):
        super().__init__()
        processor = _open(path, data)
        self.vocab_size = processor.get_piece_size()
        control = [i for i in range(self.vocab_size) if processor.is_control(i)]
        self._processor = _open(path, _found_in_text(data))
        specials = [self.token_id(name) for name in SPECIALS]
        if any(i is not None and self._processor.is_control(i) for i in specials):
            raise MossError(f"{path}: its special tokens cannot be found in text; train it with user_defined_symbols")
        self.special_ids = frozenset(control).union(i for i in specials if i is not None)
        self._leading_space = self._processor.encode("a", out_type=str)[0].startswith(_SPACE)

    def token_id(self, token: str) -> int | None:
        i = self._processor.piece_to_id(token)
        return i if self._processor.id_to_piece(i) == token else None

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _bytes(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
        if self._processor.is_unknown(token):
            return "\ufffd".encode()
        return piece.replace(_SPACE, " ").encode()


_SPACE = "\u2581"


def _open(path: Path, data: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)  # given to the constructor, an empty model would be no model at all
    except RuntimeError:
        raise MossError(f"{path}: damaged, or not a SentencePiece model; copy it from the checkpoint") from None
    return processor


def _found_in_text(model: bytes) -> bytes:
    """The model with its special control symbols made user-defined ones, which encoding finds in text.

    A piece is a protobuf message: its text (tag 0x0A), its score (0x15, four bytes) and its type (0x18: 3 is control,
    4 user-defined).
    """
    for name in map(str.encode, SPECIALS):
        start = re.escape(bytes([0x0A, len(name)]) + name) + rb"(?:\x15.{4})?\x18"
        model = re.sub(b"(" + start + b")\x03", lambda found: found[1] + b"\x04", model, flags=re.DOTALL)
    return model
