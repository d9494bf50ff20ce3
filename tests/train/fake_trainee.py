"""A Trainee and an optimizer of a few lines: each token is predicted from the one before it, by wte and lm_head alone.

``python -m tests.train.fake_trainee train sft …`` is the command line with these in place of the real ones.
"""

from __future__ import annotations

import os
import time

import numpy as np
from moss_jt.convert.mapping import official_bands, official_shapes, pieces
from moss_jt.convert.view import of_region

from moss_jt.train.batch import NO_LOSS, Batch, Measured
from moss_jt.train.parameter import Parameter

DELAY = float(os.environ.get("FAKE_TRAINEE_DELAY", "0"))  # seconds a batch takes


class FakeTrainee:
    """Has all of MOSS's parameters; most of them do nothing."""

    kept = 0.9  # share of a row of wte that dropout leaves

    def __init__(self, weights, lora=None, device="auto", ram=None, vram=None, seed=0, tokens=None):
        of_file = pieces(weights.config)
        files = {p.official: name for name, its in of_file.items() for p in its}
        self.parameters = {}
        for name in official_shapes(weights.config):
            views = of_region(weights.regions[files[name]])
            bands = official_bands(of_file[files[name]], name, views)
            value = np.concatenate([np.concatenate([v.read() for v in band.views], -1) for band in bands])
            self.parameters[name] = Parameter(name, value.astype(np.float32), np.zeros(value.shape, np.float32))
        self.seed, self.dropout_state = seed, 0

    def train(self, batch: Batch, scale: float = 1.0) -> Measured:
        time.sleep(DELAY)
        random = np.random.RandomState([self.seed, self.dropout_state])
        self.dropout_state += 1
        before, after = _pairs(batch)
        p = self.parameters
        e, w = (p[name] for name in ("transformer.wte.weight", "lm_head.weight"))
        kept = (random.random_sample(e.value.shape[1]) < self.kept).astype(np.float32)
        x = e.value[before] * kept
        probability, measured = self._forward(x, after)
        probability[np.arange(len(after)), after] -= 1
        probability *= np.float32(scale)
        w.gradient[...] += probability.T @ x
        p["lm_head.bias"].gradient[...] += probability.sum(0)
        np.add.at(e.gradient, before, probability @ w.value * kept)
        return measured

    def measure(self, batch: Batch) -> Measured:
        time.sleep(DELAY)
        before, after = _pairs(batch)
        return self._forward(self.parameters["transformer.wte.weight"].value[before], after)[1]

    def _forward(self, x, after):
        logits = x @ self.parameters["lm_head.weight"].value.T + self.parameters["lm_head.bias"].value
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(1, keepdims=True)
        loss = -np.log(p[np.arange(len(after)), after].astype(np.float64)).sum()
        return p, Measured(float(loss), len(after), int((p.argmax(1) == after).sum()))

    def zero_gradients(self) -> None:
        for p in self.parameters.values():
            p.gradient[...] = 0

    def gradient_norm(self) -> float:
        return float(np.sqrt(sum((p.gradient.astype(np.float64) ** 2).sum() for p in self.parameters.values())))

    def scale_gradients(self, factor: float) -> None:
        for p in self.parameters.values():
            p.gradient[...] *= factor


class FakeOptimizer:
    """Momentum."""

    def __init__(self, parameters, lr, weight_decay=0.1):
        self._parameters = parameters
        self._moments = {f"{name}.m": np.zeros_like(p.value) for name, p in parameters.items()}
        self._steps = np.zeros((), np.int64)
        self.rates: list[float] = []

    def step(self, lr: float) -> None:
        self._steps += 1
        self.rates.append(lr)
        for name, p in self._parameters.items():
            m = self._moments[f"{name}.m"]
            m[...] = 0.9 * m + p.gradient
            p.value[...] -= np.float32(lr) * m

    def state(self) -> dict[str, np.ndarray]:
        return {"steps": self._steps, **self._moments}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        for name, x in self.state().items():
            x[...] = state[name]


def _pairs(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that count, and those before them."""
    counts = batch.labels[:, 1:] != NO_LOSS
    return batch.ids[:, :-1][counts], batch.labels[:, 1:][counts]


if __name__ == "__main__":
    import moss_jt.train
    from moss_jt.cli import main

    moss_jt.train.Trainee, moss_jt.train.AdamW = FakeTrainee, FakeOptimizer
    main()
