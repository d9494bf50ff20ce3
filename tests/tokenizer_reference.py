"""The official tokenizer's algorithm, slow and obvious, to compare with. It shares nothing with moss_jt.tokenizer.

The text is cut at added tokens, the longest first; each that is not a declared special one takes the whitespace from both
its neighbours, one after another; what is left is split by GPT-2's pattern and merged by rank, byte by byte.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
WHITE_SPACE = set("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(0x2000, 0x200B)}


def byte_symbols() -> list[str]:
    """GPT-2's symbol of each byte."""
    symbols, spare = [], 256
    for byte in range(256):
        prints = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        symbols.append(chr(byte if prints else spare))
        spare += not prints
    return symbols


class OfficialTokenizer:
    """``keeping`` are the tokens beside which whitespace stays."""

    def __init__(self, folder: Path, keeping: set[str], special: set[str]):
        self.vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
        added = json.loads((folder / "added_tokens.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")[1:-1]
        self.rank = {tuple(line.split()): i for i, line in enumerate(lines)}
        self.keeping = keeping
        self.whole = {**added, **{s: self.vocab[s] for s in special if s in self.vocab}}

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in self.stripped(self.cut(text)):
            if piece in self.whole:
                ids.append(self.whole[piece])
            else:
                for word in split(piece):
                    ids += [self.vocab[token] for token in self.merged(word)]
        return ids

    def cut(self, text: str) -> list[str]:
        pieces, plain, at = [], "", 0
        while at < len(text):
            found = max((t for t in self.whole if text.startswith(t, at)), key=len, default=None)
            if found is None:
                plain += text[at]
                at += 1
                continue
            pieces += [plain, found] if plain else [found]
            plain, at = "", at + len(found)
        return [*pieces, plain] if plain else pieces

    def stripped(self, pieces: list[str]) -> list[str]:
        for i in range(len(pieces)):
            if pieces[i] in self.whole and pieces[i] not in self.keeping:
                if i + 1 < len(pieces):
                    pieces[i + 1] = pieces[i + 1].lstrip()
                if i > 0:
                    pieces[i - 1] = pieces[i - 1].rstrip()
        return [p for p in pieces if p]

    def merged(self, word: str) -> list[str]:
        symbols = byte_symbols()
        tokens = [symbols[b] for b in word.encode()]
        while True:
            pairs = [p for p in zip(tokens, tokens[1:]) if p in self.rank]
            if not pairs:
                return tokens
            best, old, tokens = min(pairs, key=self.rank.__getitem__), tokens, []
            while old:
                together = tuple(old[:2]) == best
                tokens.append(old[0] + old[1] if together else old[0])
                old = old[2 if together else 1 :]


def kind(char: str) -> str:
    category = unicodedata.category(char)[0]
    return "space" if char in WHITE_SPACE else category if category in "LN" else "other"


def split(text: str) -> list[str]:
    """GPT-2's pattern: 's|'t|'re|'ve|'m|'ll|'d| ?L+| ?N+| ?[^ LN]+|space+(?!not space)|space+"""
    words, at = [], 0
    while at < len(text):
        end = next((at + len(c) for c in CONTRACTIONS if text.startswith(c, at)), 0)
        if not end:
            start = at + (text[at] == " " and at + 1 < len(text) and kind(text[at + 1]) != "space")
            end = start + 1
            while end < len(text) and kind(text[end]) == kind(text[start]):
                end += 1
            if kind(text[start]) == "space" and end < len(text) and end - at > 1:
                end -= 1  # the last space goes to the word that follows
        words.append(text[at:end])
        at = end
    return words
