"""A long conversation takes no more memory than a short one."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from moss_jt.machine import MIB
from moss_jt.model import Model
from moss_jt.moss import Moss
from moss_jt.swap import smallest

from .fake_moss import FakeTokenizer
from .swap.models import plan, write
from .test_generate import Bytes

CONTEXT, TURNS = 256, 200


class Tokenizer(FakeTokenizer):
    decoder = Bytes.decoder


@pytest.fixture(autouse=True)
def collecting_is_fast():
    """What other tests left is looked through once, and not after every turn."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def resident() -> int:
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS:"))


@pytest.mark.parametrize("streams", [False, True])
def test_memory_does_not_grow_over_turns(tmp_path, streams):
    weights = write(tmp_path / "model", vocab_size=262, n_ctx=CONTEXT, n_positions=CONTEXT)
    fits = plan(weights, 1, CONTEXT)
    model = Model(weights, CONTEXT, plan(weights, 0, CONTEXT) if streams else fits)
    assert model.streams == streams and smallest(weights.config, weights.coding, CONTEXT) < fits.peak
    conversation = Moss(model, Tokenizer()).chat("Be kind.\n")
    seen = []
    for turn in range(TURNS):
        for _ in conversation.send(f"What is {turn} times {turn}?", max_new_tokens=12, seed=turn):
            pass
        seen.append(resident())
    assert len(conversation.turns) == TURNS  # of which most no longer fit the prompt
    # What a single turn could leave behind, a cache or a sweep's work space, is 2 MiB and more here.
    assert max(seen[TURNS // 2 :]) - max(seen[: TURNS // 2]) < MIB, [size >> 10 for size in seen[::10]]
