"""Byte-level BPE from a tokenizer.json. The ``tokenizers`` library does the work, but for the trap MOSS was trained with."""

from __future__ import annotations

import re
from pathlib import Path

import tokenizers

from ..errors import MossError
from .base import SPECIALS, Tokenizer


class ByteLevelBPE(Tokenizer):
    """The trap: an added token with ``lstrip`` or ``rstrip`` (the runs of spaces and tabs) takes the whitespace from the
    pieces of text beside it, one token after another, so that ``"\\n    return"`` loses its newline and a run that touches
    another run can vanish. The library does the same only where text is between them, and does not count U+001C to U+001F as
    whitespace, so a text that holds such a token is cut and stripped here.

    Its merging is the official one too. It merges one place at a time where that merges a pair everywhere, which could differ
    only if a token came from two merges and were part of an earlier one; no text shows it with MOSS's merges.
    """

    def __init__(self, path: Path, data: bytes):
        super().__init__()
        self._rust = rust = _open(path, data)
        added = rust.get_added_tokens_decoder()
        self.vocab_size = rust.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, t in added.items() if t.special or t.content in SPECIALS)
        self._added = {i: t.content.encode() for i, t in added.items()}
        self._strips = {t.content: (t.lstrip, t.rstrip) for t in added.values() if t.lstrip or t.rstrip}
        # Text without any of these holds no token that strips: the shortest run stands for the longer ones.
        self._marks = [t for t in self._strips if not any(other in t for other in self._strips if other != t)]
        longest_first = sorted((t.content for t in added.values()), key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def token_id(self, token: str) -> int | None:
        return self._rust.token_to_id(token)

    def _encode(self, text: str) -> list[int]:
        if any(map(text.__contains__, self._marks)):
            return self._rust.encode(self._pieces(text), is_pretokenized=True, add_special_tokens=False).ids
        return self._rust.encode(text, add_special_tokens=False).ids

    def _pieces(self, text: str) -> list[str]:
        """The text cut at its added tokens and stripped beside those that strip, from left to right as it was officially."""
        pieces = [piece for piece in self._cut.split(text) if piece]
        for i, piece in enumerate(pieces):
            if piece in self._strips:
                left, right = self._strips[piece]
                if right and i + 1 < len(pieces):
                    pieces[i + 1] = pieces[i + 1].lstrip()
                if left and i > 0:
                    pieces[i - 1] = pieces[i - 1].rstrip()
        return [piece for piece in pieces if piece]

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        text = self._rust.id_to_token(token) or ""
        try:
            return bytes([_BYTE_OF[c] for c in text])
        except KeyError:  # not spelled in bytes, so it stands for itself
            return text.encode()


def _byte_of() -> dict[str, int]:
    """GPT-2's spelling of bytes: those that print stand for themselves, the others in order for U+0100 and up."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printed]
    return {**{chr(b): b for b in printed}, **{chr(0x100 + i): b for i, b in enumerate(others)}}


_BYTE_OF = _byte_of()


def _open(path: Path, data: bytes) -> tokenizers.Tokenizer:
    try:
        rust = tokenizers.Tokenizer.from_str(data.decode())
        unknown = getattr(rust.model, "unk_token", None)
        if unknown is not None and rust.token_to_id(unknown) is None:
            raise ValueError(f"it lacks its own unk_token {unknown!r}")
    except Exception as e:  # the library raises nothing more specific
        raise MossError(f"{path}: the tokenizer is damaged ({_first_line(e)}); copy it from the checkpoint") from None
    if not isinstance(rust.decoder, tokenizers.decoders.ByteLevel):
        raise MossError(f"{path}: not a byte-level tokenizer, which is the only kind that decodes exactly")
    rust.no_truncation()
    rust.no_padding()
    return rust


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:200]
