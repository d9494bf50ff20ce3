"""The ops' derivatives as Jittor takes them, by finite differences of float64."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np

from moss_jt.runtime import float_environment_kept, jittor
from moss_jt.train import Trainee, ops

from .. import reference
from .models import model


def test_jittor_differentiates_through_a_block_and_the_loss(tmp_path):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    rng, (weights, state, config) = np.random.default_rng(seed), model(tmp_path, seed, n_layer=1, n_embd=24, n_head=4)
    full, (b, t) = Trainee(weights).weights, (2, 9)
    x = rng.standard_normal((b * t, 24)).astype(np.float32)
    rows, targets = np.array([0, 3, 16]), rng.integers(0, config.vocab_size, 3)
    jt = jittor()
    block = ops.Block(lambda backward: full.block(0, backward), ops.Sizes(config, b, t, official=True))
    var = jt.array(x)
    with float_environment_kept():  # Jittor loads ops of its own
        loss = 0.5 * ops.Head(full.head, rows, targets, config.layer_norm_epsilon)(block(3 * var))
        gradient = jt.grad(loss, var).numpy().astype(np.float64)

    def exact(x: np.ndarray) -> float:
        state_of = {**state, "transformer.wte.weight": 3 * x}  # every row a token of its own
        logits = np.concatenate([reference.logits(config, state_of, np.arange(i * t, (i + 1) * t)) for i in range(b)])[rows]
        logits = logits - logits.max(1, keepdims=True)
        return -0.5 * float((logits - np.log(np.exp(logits).sum(1, keepdims=True)))[range(3), targets].sum())

    assert abs(loss.numpy()[0] - exact(x.astype(np.float64))) < 1e-5 * abs(loss.numpy()[0])
    for _ in range(5):
        direction = gradient + rng.standard_normal(x.shape) * np.linalg.norm(gradient) / np.sqrt(x.size)
        direction *= 1e-4 / np.linalg.norm(direction)
        difference = exact(x + direction) - exact(x - direction)
        assert abs(2 * (gradient * direction).sum() - difference) < 1e-3 * abs(difference)


def test_a_block_is_lent_once_forwards_and_once_backwards(tmp_path):
    weights, _, config = model(tmp_path, 1, n_layer=1)
    full, lent = Trainee(weights).weights, []

    def lend(backward: bool):
        lent.append(backward)
        with full.block(0, backward) as table:
            return nullcontext(table)

    block = ops.Block(lend, ops.Sizes(config, 1, 3, official=True))
    x = jittor().array(np.ones((3, 16), np.float32))
    y = block.forward(x)
    assert lent == [False] and y.shape == [3, 16]
    assert block.backward(y).shape == [3, 16] and lent == [False, True]
