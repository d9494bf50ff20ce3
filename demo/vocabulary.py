"""The demo model's own vocabulary: SentencePiece, two languages, bytes for what it lacks, the official special tokens."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece

SPECIALS = ("<|endoftext|>", "<eoh>", "<eom>", "<eot>", "<eoc>", "<eor>")
# One token each, beside what ``train`` is given. Operators and brackets are never part of a longer one, so that an expression
# is copied sign by sign.
WHOLE = (
    *("<|Human|>:", "<|Inner Thoughts|>:", "<|Commands|>:", "<|Results|>:", "<|MOSS|>:"),
    *('Calculate("', 'Solve("', '") =>', "moss-moon-003-sft", "moss-jt"),
    *"+-*/^=()%×÷.,;:'\"?，。？、：；",
)


def train(texts: Iterable[str], size: int, whole: Iterable[str], path: Path) -> Callable[[str], int]:
    """Write ``tokenizer.model``, of ``size`` tokens, those of ``whole`` among them; returns what tells a token's id.

    Every text comes back from its ids, since nothing is normalised (see moss_jt/tokenizer/spm.py).
    """
    symbols = [text.replace(" ", "\u2581") for text in (*SPECIALS, *WHOLE, *whole)]  # SentencePiece's space
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=size,
        model_type="unigram",
        character_coverage=0.9985,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=symbols,
        max_sentencepiece_length=12,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).piece_to_id
