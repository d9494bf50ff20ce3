"""Small vocabularies made on the spot, in each of the ways a folder can carry one."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

from .tokenizer_reference import byte_symbols, split

SPECIALS = ["<|endoftext|>", "<eoh>", "<eom>", "<eot>", "<eoc>", "<eor>"]
RUNS = [" " * n for n in range(5, 1, -1)] + ["\t" * n for n in range(3, 1, -1)]  # short, so that runs often touch
TEXT = "def hello():\n    return 'the world', it's 2023, we'll see\n你好，世界！你好，朋友。 the there then hello 20 2023 é è "


def official_folder(folder: Path) -> Path:
    """A folder like the official one: byte-level BPE trained on TEXT, runs and specials as added tokens."""
    symbols = byte_symbols()
    merges = _train([[symbols[b] for b in word.encode()] for word in split(TEXT)], 50)
    vocab = [*symbols, *("".join(pair) for pair in merges), SPECIALS[0]]
    added = [*RUNS, *SPECIALS[1:]]
    _json(folder / "vocab.json", {token: i for i, token in enumerate(vocab)})
    _json(folder / "added_tokens.json", {token: len(vocab) + i for i, token in enumerate(added)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    declared = [{"content": s, "lstrip": False, "rstrip": False} for s in SPECIALS]
    names = {"bos_token": SPECIALS[0], "unk_token": SPECIALS[0], "eos_token": declared[2]}
    _json(folder / "special_tokens_map.json", {**names, "additional_special_tokens": declared[1:]})
    auto_map = {"AutoTokenizer": ["tokenization_moss.MossTokenizer", None]}
    _json(folder / "tokenizer_config.json", {"bos_token": {"__type": "AddedToken", **declared[0]}, "auto_map": auto_map})
    (folder / "tokenization_moss.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    return folder


def sentencepiece_folder(folder: Path, **options) -> Path:
    """A folder with a SentencePiece model trained on TEXT that loses nothing; ``options`` are the trainer's."""
    import sentencepiece

    lossless = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    small = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_writer=model,
        **{**lossless, **small, **options},
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def _train(words: list[list[str]], count: int) -> list[tuple[str, str]]:
    merges = []
    for _ in range(count):
        counts = Counter(pair for word in words for pair in zip(word, word[1:]) if "".join(pair) not in map("".join, merges))
        best = max(sorted(counts), key=counts.__getitem__)
        merges.append(best)
        for word in words:
            for i in range(len(word) - 1, 0, -1):
                if tuple(word[i - 1 : i + 1]) == best:
                    word[i - 1 : i + 1] = ["".join(best)]
    return merges


def _json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
