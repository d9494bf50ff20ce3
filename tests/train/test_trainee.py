"""A Trainee against float64, by finite differences of the whole model's loss in random directions, and against transformers."""

from __future__ import annotations

import numpy as np
import pytest

from moss_jt import MossError
from moss_jt.train import AdamW, Batch, Trainee

from .models import SIZES, batch, loss, model


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"np.random.default_rng({seed})")
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", list(SIZES))
def test_losses_and_gradients_of_all_weights(tmp_path, rng, size):
    weights, state, config = model(tmp_path, int(rng.integers(1 << 30)), **SIZES[size])
    trainee = Trainee(weights)
    assert {name: p.value.shape for name, p in trainee.parameters.items()} == {name: x.shape for name, x in state.items()}
    assert all((p.value == state[name]).all() and not p.gradient.any() for name, p in trainee.parameters.items())
    given = batch(rng, config.vocab_size, [150, 7, 64])
    exact, count, right = loss(config, state, given)
    found = trainee.measure(given)
    assert (found.tokens, found.right) == (count, right) and abs(found.loss - exact) < 1e-5 * exact
    assert not any(p.gradient.any() for p in trainee.parameters.values())
    assert trainee.train(given, 0.25) == found
    state = {name: x.astype(np.float64) for name, x in state.items()}
    for name, x in state.items():  # each tensor in a direction of its own
        direction = trainee.parameters[name].gradient.astype(np.float64)
        direction += rng.standard_normal(x.shape) * np.linalg.norm(direction) / np.sqrt(x.size)
        direction *= 1e-4 * np.linalg.norm(x) / np.linalg.norm(direction)
        ends = [loss(config, {**state, name: x + way * direction}, given)[0] for way in (1, -1)]
        difference, ours = (ends[0] - ends[1]) / 2, float((trainee.parameters[name].gradient * direction).sum()) / 0.25
        assert abs(ours - difference) < 1e-3 * abs(difference), name
