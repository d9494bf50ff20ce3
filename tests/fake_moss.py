"""A Moss without a model: one token per byte, answers from a function. What `moss_jt.load` gives, as far as talking needs it.

``python -m tests.fake_moss chat -m any`` is the command line with this in place of a model.
"""

from __future__ import annotations

import codecs
import inspect
import re
import sys
import time
from types import SimpleNamespace

from click.testing import CliRunner

from moss_jt.chat import Conversation
from moss_jt.errors import MossError
from moss_jt.generate import Piece, Stats

SPECIALS = ("<|endoftext|>", "<eoh>", "<eom>", "<eot>", "<eoc>", "<eor>")
ENDS = {256 + SPECIALS.index(end) for end in ("<|endoftext|>", "<eom>", "<eoc>")}


def runner() -> CliRunner:
    """Keeps stdout and stderr apart, which click before 8.2 (Python 3.9's newest is 8.1) does only when asked to."""
    old = "mix_stderr" in inspect.signature(CliRunner).parameters
    return CliRunner(**({"mix_stderr": False} if old else {}))


class FakeTokenizer:
    special_ids = frozenset(range(256, 256 + len(SPECIALS)))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, SPECIALS)) + ")", text):
            ids += [256 + SPECIALS.index(part)] if part in SPECIALS else part.encode()
        return ids

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        parts = (bytes([i]) if i < 256 else b"" if skip_special else SPECIALS[i - 256].encode() for i in ids)
        return b"".join(parts).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        return 256 + SPECIALS.index(token) if token in SPECIALS else None


class FakeMoss:
    """``answer(question) -> str`` is what it says; ``prompts`` and ``calls`` record what it was asked, in order.

    ``thinks(question) -> str`` is what it writes after ``<|Inner Thoughts|>:`` where there are plugins.
    """

    def __init__(self, context: int = 4096, answer=None, delay: float = 0.0, thinks=None):
        self.context, self.delay = context, delay
        self.config = SimpleNamespace(vocab_size=300, eos_token_id=258)
        self.tokenizer = FakeTokenizer()
        self.meta_instruction: str | None = None
        self.answer = answer or (lambda question: f" You said: {question}")
        self.thinks = thinks or (lambda question: " None<eot>\n<|Commands|>: None<eoc>")
        self.prompts: list[list[int]] = []
        self.calls: list[dict] = []
        self.cached: list[int] = []
        self.last_stats = Stats()
        self.kv_cache, self.cache_bytes, self.gpu_peak = "int8", 12_340_000, None

    def chat(self, system: str | None = None, plugins=None) -> Conversation:
        return Conversation(self, system, plugins)

    def generate(self, text_or_ids, max_new_tokens: int = 256, **options):
        ids = self.tokenizer.encode(text_or_ids) if isinstance(text_or_ids, str) else list(text_or_ids)
        if len(ids) > self.context:
            raise MossError(f"the prompt has {len(ids)} tokens, the context {self.context}")
        self.prompts.append(ids)
        self.calls.append({"max_new_tokens": max_new_tokens, **options})
        common = next((n for n, (a, b) in enumerate(zip(ids, self.cached)) if a != b), min(len(ids), len(self.cached)))
        self.last_stats = stats = Stats(len(ids), common)
        self.cached = list(ids)
        prompt = self.tokenizer.decode(ids)
        question = prompt.rsplit("<|Human|>: ", 1)[-1].split("<eoh>")[0]
        says = self.thinks if prompt.endswith("<|Inner Thoughts|>:") else self.answer
        decoder = codecs.getincrementaldecoder("utf-8")()
        for i in self.tokenizer.encode(says(question) + "<eom>")[:max_new_tokens]:
            time.sleep(self.delay)
            stats.count(0.01)
            stats.stopped = i in ENDS
            self.cached.append(i)
            yield Piece(i, "" if i >= 256 else decoder.decode(bytes([i])), 0.01)
            if i in ENDS:
                return


def _echo_or_endless(question: str) -> str:
    if question != "endless":
        return f" You said: {question}"
    print("answering", file=sys.stderr, flush=True)
    return " " + "0123456789" * 10_000


if __name__ == "__main__":
    import moss_jt
    from moss_jt.cli import main

    moss_jt.load = lambda folder, context=2048, **_: FakeMoss(context, _echo_or_endless, delay=0.002)
    main()
