"""Every CPU kernel against float64, for each instruction set this machine has, on odd shapes and poisoned outputs."""

from __future__ import annotations

import numpy as np
import pytest

from .build import ISAS, build, supported


@pytest.fixture(scope="module", params=list(ISAS))
def kernels(request, tmp_path_factory):
    if not supported(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    built = build(request.param, tmp_path_factory.mktemp("kernels"))
    assert (built.lanes == 16) == (request.param == "avx512")
    return built


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"np.random.default_rng({seed})")  # fresh every time; pytest shows it when the test fails
    return np.random.default_rng(seed)


def poisoned(*shape: int, dtype=np.float32) -> np.ndarray:
    """An output whose every entry must be written: NaN, and a guard row after it that must stay."""
    return np.full(shape, np.nan, dtype)


def close(ours: np.ndarray, exact: np.ndarray, tolerance: float) -> None:
    error = np.linalg.norm(ours.astype(np.float64) - exact) / max(np.linalg.norm(exact), 1e-30)
    assert np.isfinite(ours).all() and error < tolerance, f"relative error {error:.2e}"


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_every_half_converts_exactly(kernels):
    halves = np.arange(2**16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    for convert in (kernels.to_float, kernels.load_f16):
        floats = poisoned(halves.size)
        convert(halves, floats, halves.size)
        assert np.array_equal(floats.view(np.uint32), halves.view(np.float16).astype(np.float32).view(np.uint32))


def test_floats_round_to_the_nearest_half(kernels, rng):
    floats = np.concatenate([
        rng.standard_normal(4000) * 10.0 ** rng.integers(-9, 5, 4000),
        [0.0, -0.0, 65504, 65519.99, 5.96e-8, 2.98e-8, 2.9e-8, 6.1e-5, 6.097e-5, 2049, 2051],
    ]).astype(np.float32)
    floats = floats[np.abs(floats) < 65520]
    halves = np.full(floats.size, 0x7E00, np.uint16)
    kernels.to_f16(floats, halves, floats.size)
    assert np.array_equal(halves, floats.astype(np.float16).view(np.uint16))


def test_exp_and_gelu(kernels):
    x = np.concatenate([np.linspace(-87, 88, 5001), [-1e30, -1000, 0]]).astype(np.float32)
    y = x.copy()
    kernels.exp(y, y.size)
    exact = np.exp(np.maximum(x, -87).astype(np.float64))
    assert (np.abs(y - exact) <= 1e-5 * exact).all()
    x = np.concatenate([np.linspace(-30, 30, 6007), [-1e4, 1e4, 1e-20, 0]]).astype(np.float32)
    y = x.copy()
    kernels.gelu_new(y, y.size)
    assert (np.abs(y - gelu(x.astype(np.float64))) <= 1e-6 + 1e-6 * np.abs(x)).all()


@pytest.mark.parametrize("T, D", [(1, 8), (1, 6144), (5, 40), (7, 200), (3, 17)])
def test_layer_norm(kernels, rng, T, D):
    x = (rng.standard_normal((T, D)) * 3 + 100).astype(np.float32)  # a large mean: cancellation would show
    w, b = rng.standard_normal((2, D)).astype(np.float32)
    y = poisoned(T, D)
    kernels.layer_norm(x, w, b, y, T, D, 1e-5)
    x64 = x.astype(np.float64)
    exact = (x64 - x64.mean(1, keepdims=True)) / np.sqrt(x64.var(1, keepdims=True) + 1e-5) * w + b
    close(y, exact, 1e-5)


SHAPES = [(1, 1, 8), (2, 13, 8), (3, 65, 24), (4, 96, 40), (5, 130, 1032), (6, 31, 96), (7, 3, 2056), (8, 70, 100), (9, 67, 1048), (25, 33, 56)]


def half_matrix(rng, N, K):
    w = (rng.standard_normal((N, K)) * 10.0 ** rng.integers(-4, 1, (N, 1))).astype(np.float16)
    w.reshape(-1)[:: max(1, w.size // 7)] = 3e-7  # subnormal halves
    return w


@pytest.mark.parametrize("T, N, K", SHAPES)
def test_linear_head(kernels, rng, T, N, K):
    x, w, b = rng.standard_normal((T, K)).astype(np.float32), half_matrix(rng, N, K), rng.standard_normal(N).astype(np.float32)
    y = poisoned(T + 1, N)
    kernels.linear_head(x, w, b, y, T, N, K)
    close(y[:T], x.astype(np.float64) @ w.astype(np.float64).T + b, 1e-6)
    assert np.isnan(y[T]).all()


@pytest.mark.parametrize("T, N, K", SHAPES)
@pytest.mark.parametrize("part", [0.0, 0.57, 1.0])
def test_linear_in(kernels, rng, T, N, K, part):
    I = int(N * part)  # noqa: E741
    x, w, b = rng.standard_normal((T, K)).astype(np.float32), half_matrix(rng, N, K), rng.standard_normal(max(I, 1)).astype(np.float32)
    y = poisoned(T + 1, N)
    kernels.linear_in(x, w, b, y, T, N, K, I)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    exact[:, N - I :] = gelu(exact[:, N - I :] + b[:I])
    close(y[:T], exact, 1e-6)
    assert np.isnan(y[T]).all()


@pytest.mark.parametrize("T, N, K", SHAPES)
def test_linear_out(kernels, rng, T, N, K):
    A = K // 4
    I = K - A  # noqa: E741
    M = I + 5  # the MLP's part lies at the end of longer rows
    a, m, r = (rng.standard_normal((T, n)).astype(np.float32) for n in (A, M, N))
    w, b = half_matrix(rng, N, K), rng.standard_normal(N).astype(np.float32)
    y = poisoned(T + 1, N)
    kernels.linear_out(a, m, w, b, r, y, T, N, A, I, M)
    exact = np.concatenate([a, m[:, 5:]], 1).astype(np.float64) @ w.astype(np.float64).T + b + r
    close(y[:T], exact, 1e-6)
    assert np.isnan(y[T]).all()


def turned(x, positions, rotary):
    """Rotary in complex numbers: entry pairs (2i, 2i+1) times e^(i angle)."""
    angle = positions[:, None] * 10000.0 ** (-np.arange(0, rotary, 2) / rotary)
    z = (x[..., 0:rotary:2] + 1j * x[..., 1:rotary:2]) * np.exp(1j * angle)
    y = x.copy()
    y[..., 0:rotary:2], y[..., 1:rotary:2] = z.real, z.imag
    return y


def exact_attention(q, k, v):
    """q (H, T, S), k and v (H, L, S): the last T of L positions ask, none sees later ones."""
    H, T, S = q.shape
    L = k.shape[1]
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(S)
    scores[:, np.arange(L)[None] > np.arange(L - T, L)[:, None]] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)) @ v


@pytest.mark.parametrize("H, S, rotary, C, start, T", [
    (4, 8, 8, 40, 0, 1), (4, 24, 6, 70, 0, 33), (8, 16, 4, 100, 60, 1), (4, 256, 64, 130, 90, 3), (12, 20, 20, 64, 31, 33), (4, 64, 32, 200, 100, 100),
])  # fmt: skip
def test_attention(kernels, rng, H, S, rotary, C, start, T):
    D, Y = H * S, 3 * H * S + 7
    y = rng.standard_normal((T, Y)).astype(np.float32) * 2
    keys, values = (np.full((H, C, S), np.nan, np.float16) for _ in range(2))
    keys[:, :start], values[:, :start] = rng.standard_normal((2, H, start, S)).astype(np.float16)
    before = keys.copy(), values.copy()
    angles = np.arange(C)[:, None] * 10000.0 ** (-np.arange(0, rotary, 2) / rotary)
    out = poisoned(T + 1, D)
    kernels.attention(y, Y, np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32), keys, values, out, H, S, rotary, C, start, T)

    q, k, v = y[:, : 3 * D].astype(np.float64).reshape(T, 3, H, S).transpose(1, 2, 0, 3)
    positions = np.arange(start, start + T)
    k = turned(k, positions, rotary)
    close(keys[:, start : start + T], k, 5e-4)  # what fp16 rounds
    close(values[:, start : start + T], v, 5e-4)
    for new, old in zip((keys, values), before):  # nothing else was touched
        assert np.array_equal(new[:, :start], old[:, :start]) and np.isnan(new[:, start + T :]).all()
    seen = start + T
    exact = exact_attention(turned(q, positions, rotary), keys[:, :seen].astype(np.float64), values[:, :seen].astype(np.float64))
    close(out[:T], exact.transpose(1, 0, 2).reshape(T, D), 3e-6)
    assert np.isnan(out[T]).all()
