"""GPTQ's arithmetic against the paper's, written out input by input in float64; and the factors it uses."""

from __future__ import annotations

import numpy as np
import pytest
from moss_jt.convert import gptq_solver, hessian
from moss_jt.convert.gptq_solver import Part, Solved, by_rows, solve, weights_of
from moss_jt.convert.panels import in_panels
from moss_jt.convert.quantise import nearest

from moss_jt import MossError
from tests.dequantise import dequantise

DAMPING = 0.01


def activations(tokens: int, inputs: int) -> np.ndarray:
    """Random ones that depend on each other, some much larger than others."""
    rng = np.random.default_rng()
    mixed = rng.standard_normal((tokens, inputs)) @ rng.standard_normal((inputs, inputs))
    return (mixed * np.exp(rng.standard_normal(inputs))).astype(np.float32)


def damped(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    h = x.T @ x
    return h + DAMPING * h.diagonal().mean() * np.eye(len(h))


def factored(x: np.ndarray) -> np.ndarray:
    h = np.zeros((x.shape[1],) * 2, np.float32)
    hessian.add(h, x)
    hessian.mirror(h)
    hessian.factor(h, DAMPING)
    return h


def plainly(w: np.ndarray, h: np.ndarray, bits: int, group: int) -> np.ndarray:
    """The paper's: after each input its error, times a row of the factor of H⁻¹, is taken from all that follow. (N, K)."""
    w, found, top = w.astype(np.float64), np.empty(w.shape), 2**bits - 1
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    for j in range(w.shape[1]):
        if j % group == 0:
            scale, zero = grid(w[:, j : j + group], bits)
        found[:, j] = (np.clip(np.rint(w[:, j] / scale + zero), 0, top) - zero) * scale
        w[:, j + 1 :] -= np.outer((w[:, j] - found[:, j]) / u[j, j], u[j, j + 1 :])
    return found


def grid(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """docs/formats.md's rule for a group (N, S): scale and zero (N,)."""
    best, least = None, np.full(len(x), np.inf)
    for ratio in (1, 0.95, 0.9, 0.85, 0.8) if bits == 4 else (1,):
        low, high = np.minimum(x.min(1), 0) * ratio, np.maximum(x.max(1), 0) * ratio
        exact = (high - low) / (2**bits - 1)
        scale = exact.astype(np.float16)
        scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale).astype(np.float64)
        zero = np.rint(-low / scale)
        rounded = (np.clip(np.rint(x / scale[:, None] + zero[:, None]), 0, 2**bits - 1) - zero[:, None]) * scale[:, None]
        error = ((x - rounded) ** 2).sum(1)
        new = np.stack([scale, zero])
        best, least = new if best is None else np.where(error < least, new, best), np.minimum(error, least)
    return best[0], best[1]


def solved(w: np.ndarray, parts: list[Part], bits: int, group: int) -> tuple[Solved, np.ndarray]:
    """Of w (N, K); also what it lacks, (N, K)."""
    transposed = np.ascontiguousarray(w.T)
    found = Solved(*map(np.concatenate, zip(*solve(transposed, parts, bits, group))))
    return found, transposed.T


def square(lacks: np.ndarray, x: np.ndarray) -> float:
    return float(((lacks.astype(np.float64) @ x.T.astype(np.float64)) ** 2).sum())


@pytest.mark.parametrize("tile", [7, 32, 1024])
@pytest.mark.parametrize("inputs", [1, 32, 75])
def test_factor(monkeypatch, tile, inputs):
    monkeypatch.setattr(hessian, "_TILE", tile)
    x = activations(200, inputs)
    h = np.zeros((inputs, inputs), np.float32)
    hessian.add(h, x[:120])
    hessian.add(h, x[120:])
    hessian.mirror(h)
    full = x.T.astype(np.float64) @ x
    assert np.abs(h - full).max() < 1e-5 * np.abs(full).max() and (h == h.T).all()
    order = np.random.default_rng().permutation(inputs)
    assert (hessian.reordered(h, order) == h[order][:, order]).all()
    below = np.tril(h, -1)
    hessian.factor(h, DAMPING)
    r = np.triu(h).astype(np.float64)
    assert np.abs(r @ r.T - damped(x)).max() < 1e-5 * np.abs(full).max()
    assert (np.tril(h, -1) == below).all()


@pytest.mark.parametrize("tile", [5, 64])
def test_more_damping_where_there_is_no_factor(monkeypatch, tile):
    monkeypatch.setattr(hessian, "_TILE", tile)
    h = np.eye(24, dtype=np.float32)
    h[3, 20] = h[20, 3] = 1.05  # an eigenvalue of -0.05
    expected = h + 0.1 * np.eye(24)
    hessian.factor(h, 0.01)
    r = np.triu(h).astype(np.float64)
    assert np.abs(r @ r.T - expected).max() < 1e-6


def test_no_factor_at_all():
    h = np.zeros((20, 20), np.float32)
    hessian.factor(h, DAMPING)  # inputs that are always zero
    assert (np.triu(h) == np.float32(0.1) * np.eye(20, dtype=np.float32)).all()
    h[2, 2] = np.nan
    with pytest.raises(MossError, match="not finite"):
        hessian.factor(h, DAMPING)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (4, 24), (8, 128), (8, 8)])
def test_solve_is_the_papers(monkeypatch, bits, group):
    monkeypatch.setattr(gptq_solver, "_ROWS", 17)
    monkeypatch.setattr(gptq_solver, "_SEARCHED", 10)
    n, k, x = 45, 150, activations(400, 150)
    w = np.random.default_rng().standard_normal((n, k)).astype(np.float32)
    found, lacks = solved(w, [Part(0, factored(x))], bits, group)
    expected = plainly(w, damped(x), bits, group)
    weights = weights_of(found, group).T
    assert np.abs(w - weights - lacks).max() < 1e-5
    # Where float32 rounds to the other side, the rest of that row goes another, equally good way.
    same = (np.abs(weights - expected) < 1e-3 * np.abs(expected).max()).all(1)
    assert same.mean() > 0.7
    assert square(lacks, x) == pytest.approx(square(w - expected, x), rel=0.05)
    assert square(lacks, x) < 0.9 * square(w - nearest(w, bits, group), x)


def test_parts_are_independent_though_groups_straddle():
    n, x = 30, (activations(300, 40), activations(300, 90))
    w = np.random.default_rng().standard_normal((n, 130)).astype(np.float32)
    joint = np.zeros((130, 130))
    joint[:40, :40], joint[40:, 40:] = damped(x[0]), damped(x[1])
    for group in (32, 128):
        found, lacks = solved(w, [Part(0, factored(x[0])), Part(40, factored(x[1]))], 4, group)
        expected = plainly(w, joint, 4, group)
        same = (np.abs(weights_of(found, group).T - expected) < 1e-3 * np.abs(expected).max()).all(1)
        assert same.mean() > 0.7
        assert square(lacks, np.linalg.cholesky(joint).T) == pytest.approx(
            square(w - expected, np.linalg.cholesky(joint).T), rel=0.05
        )


@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_that_know_nothing_of_each_other_are_rounded_to_the_nearest(bits):
    w = np.random.default_rng().standard_normal((20, 100)).astype(np.float32)
    found, _ = solved(w, [Part(0, np.eye(100, dtype=np.float32) * 3)], bits, 32)
    assert (nearest(w, bits, 32) == weights_of(found, 32).T).all()


@pytest.mark.parametrize("sign", [1, -1, 0])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_written(monkeypatch, bits, sign):
    monkeypatch.setattr(gptq_solver, "_WRITTEN", 20)
    n, k, group = 50, 100, 24
    w = np.random.default_rng().standard_normal((n, k)).astype(np.float32)
    w = np.abs(w) * sign if sign else w  # zeros 0, which are stored mirrored, and the largest
    found, _ = solved(w, [Part(0, factored(activations(300, k)))], bits, group)
    stored = [np.concatenate(parts) for parts in zip(*in_panels(by_rows(found, bits, group), bits))]
    assert np.abs(dequantise(*stored, bits, n, k) - weights_of(found, group).T).max() < 1e-6
    whole = dequantise(*stored, bits, n, 120)
    assert (whole[:, k:] == 0).all()
