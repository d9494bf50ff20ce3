from __future__ import annotations

import numpy as np

from moss_jt.drafts import SIZES, Drafts


def propose(text: str, room: int = 7, drafts: Drafts | None = None) -> str:
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    return bytes((drafts or Drafts()).propose(ids, room).tolist()).decode()


def test_what_followed_the_same_tokens_is_proposed():
    assert propose("the cat sat; the c") == "at sat;"
    assert propose("xyz abc xyz def xyz", room=3) == " de"  # the last time counts
    assert propose("ab1.. 9ab2.. ab3 9ab", room=1) == "2"  # but a longer run of the same counts more
    assert propose("abcabc") == "abcabca"  # and goes on as if repeated
    assert propose("abcdefgh") == propose("a") == propose("") == ""
    assert propose("abcabc", room=0) == ""


def test_length_follows_what_pays():
    drafts = Drafts()
    drafts.learn(0, 0, 1.0)
    for _ in range(30):
        drafts.learn(7, 7, 1.0)  # guesses come true and cost nothing
    assert len(propose("abcabc", drafts=drafts)) == max(SIZES)
    for _ in range(60):
        drafts.learn(7, 0, 1.0)  # they stop coming true, and still cost nothing: one of them may as well be tried
    for size in SIZES[1:]:
        for _ in range(30):
            drafts.learn(size, 0, 2.0)  # and now they cost
    assert propose("abcabc", drafts=drafts) == ""
    for _ in range(200):
        drafts.learn(0, 0, 1.0)
    drafts._seconds = {0: 1.0, 1: 1.1}
    assert len(propose("abcabc", drafts=drafts)) > 0  # after a while it is tried again


def test_expensive_sweeps_mean_short_drafts():
    drafts = Drafts()
    for size, seconds in zip(SIZES, (1.0, 1.05, 3.0, 6.0)):
        for _ in range(40):
            drafts.learn(size, size, seconds)
    assert len(propose("abcabc", drafts=drafts)) == 1
