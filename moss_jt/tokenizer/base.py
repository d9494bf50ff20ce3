"""What every tokenizer offers, whatever its vocabulary is stored in."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from ..errors import MossError

# The tokens that give MOSS's dialogues their structure; special even where a vocabulary does not declare them so.
SPECIALS = ("<|endoftext|>", "<eoh>", "<eom>", "<eot>", "<eoc>", "<eor>")


class Tokenizer:
    """Text to ids and back.

    ``vocab_size`` is the number of ids that stand for something; a model's embedding may have more rows.
    ``special_ids`` are the ids of the special tokens; the runs of spaces and tabs are not among them.
    """

    vocab_size: int
    special_ids: frozenset[int]
    # Whether encoding puts a space before the text, which decoding then takes away again.
    _leading_space = False

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; special tokens written out in it, such as ``<eoh>``, become their ids.

        Raises MossError for lone surrogates, as the official tokenizer fails on them: they are no characters, and have no
        bytes to encode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise MossError(
                f"the text is not valid Unicode: character {e.start} is the lone surrogate U+{ord(text[e.start]):04X}; "
                "remove or replace it"
            ) from None
        return self._encode(text)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ``ids``, nothing added or cleaned up; ``skip_special`` leaves special tokens out.

        An id that the vocabulary lacks (a model's embedding has more rows than there are tokens) has no text and gives
        none. Bytes that are no UTF-8 become U+FFFD.
        """
        decoder = self.decoder(skip_special)
        return "".join([decoder.push(i) for i in ids]) + decoder.finish()

    def decoder(self, skip_special: bool = True) -> Decoder:
        """Decodes token by token: what it gives, joined, is what ``decode`` gives for all of them."""
        return Decoder(self, skip_special)

    def token_id(self, token: str) -> int | None:
        """The id of the token so named, for example ``<eom>``; None where there is none."""
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        """What the id stands for; a token may hold any part of a character's UTF-8. Nothing for an id outside the
        vocabulary."""
        if token not in self._known:
            if not 0 <= token < self.vocab_size:
                return b""
            self._known[token] = self._bytes(int(token))
        return self._known[token]

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _bytes(self, token: int) -> bytes:
        raise NotImplementedError


class Decoder:
    """Text from ids, one by one, never half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer._leading_space

    def push(self, token: int) -> str:
        """The text that has become certain with this token: empty while a character is incomplete."""
        data = b"" if token in self._skipped else self._tokenizer.token_bytes(token)
        if self._drop_space and data:
            self._drop_space = False
            data = data[data.startswith(b" ") :]
        return self._utf8.decode(data)

    def finish(self) -> str:
        """The rest: U+FFFD where a character was left incomplete."""
        return self._utf8.decode(b"", final=True)
