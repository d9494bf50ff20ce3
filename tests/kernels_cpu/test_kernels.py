"""Every CPU kernel against float64, for each instruction set this machine has, on odd shapes and poisoned outputs."""

from __future__ import annotations

import numpy as np
import pytest

from moss_jt.ops.rotary import rotary_angles

from .. import dequantise, reference
from .build import ISAS, build, supported


@pytest.fixture(scope="module", params=list(ISAS))
def kernels(request, tmp_path_factory):
    if not supported(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    built = build(request.param, tmp_path_factory.mktemp("kernels"))
    assert (built.lanes == 16) == request.param.startswith("avx512")
    return built


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"np.random.default_rng({seed})")  # fresh every time; pytest shows it when the test fails
    return np.random.default_rng(seed)


def poisoned(*shape: int, dtype=np.float32) -> np.ndarray:
    """An output whose every entry must be written: NaN, and a guard row after it that must stay."""
    return np.full(shape, np.nan, dtype)


def close(ours: np.ndarray, exact: np.ndarray, size: np.ndarray, tolerance: float) -> None:
    """Error relative to ``size``: the exact values, or what they would be without chance cancellation."""
    error = np.linalg.norm(ours.astype(np.float64) - exact) / max(np.linalg.norm(size), 1e-30)
    assert np.isfinite(ours).all() and error < tolerance, f"relative error {error:.2e}"


def product(x: np.ndarray, w: np.ndarray, *added: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x wᵀ and what is added to it, in float64, and the size of a sum of such terms of random signs."""
    x, added = x.astype(np.float64), [a.astype(np.float64) for a in added]
    return x @ w.T + sum(added), np.sqrt(x**2 @ (w**2).T + sum(a**2 for a in added))


def test_every_half_converts_exactly(kernels):
    halves = np.arange(2**16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    for convert in (kernels.to_float, kernels.load_f16):
        floats = poisoned(halves.size)
        convert(halves, floats, halves.size)
        assert np.array_equal(floats.view(np.uint32), halves.view(np.float16).astype(np.float32).view(np.uint32))


def test_floats_round_to_the_nearest_half(kernels, rng):
    floats = np.concatenate(
        [
            rng.standard_normal(4000) * 10.0 ** rng.integers(-9, 5, 4000),
            [0.0, -0.0, 65504, 65519.99, 5.96e-8, 2.98e-8, 2.9e-8, 6.1e-5, 6.097e-5, 2049, 2051],
        ]
    ).astype(np.float32)
    floats = floats[np.abs(floats) < 65520]
    halves = np.full(floats.size, 0x7E00, np.uint16)
    kernels.to_f16(floats, halves, floats.size)
    assert np.array_equal(halves, floats.astype(np.float16).view(np.uint16))


def test_exp_and_gelu_new(kernels):
    x = np.concatenate([np.linspace(-87, 88, 5001), [-1e30, -1000, 0]]).astype(np.float32)
    y = x.copy()
    kernels.exp(y, y.size)
    exact = np.exp(np.maximum(x, -87).astype(np.float64))
    assert (np.abs(y - exact) <= 1e-5 * exact).all()
    x = np.concatenate([np.linspace(-30, 30, 6007), [-1e4, 1e4, 1e-20, 0]]).astype(np.float32)
    y = x.copy()
    kernels.gelu_new(y, y.size)
    assert (np.abs(y - reference.gelu_new(x.astype(np.float64))) <= 1e-6 + 1e-6 * np.abs(x)).all()


@pytest.mark.parametrize("T, D", [(1, 8), (1, 6144), (5, 40), (7, 200), (3, 17)])
def test_layer_norm(kernels, rng, T, D):
    x = (rng.standard_normal((T, D)) * 3 + 100).astype(np.float32)  # a large mean: cancellation would show
    w, b = rng.standard_normal((2, D)).astype(np.float32)
    y = poisoned(T, D)
    kernels.layer_norm(x, w, b, y, T, D, 1e-5)
    exact = reference.layer_norm(x.astype(np.float64), w, b, 1e-5)
    close(y, exact, exact, 1e-5)


# T, N, K: both sides of 8 tokens, rows and inputs that are no multiple of a vector, a tile or a piece.
SHAPES = [
    (1, 1, 8),
    (2, 13, 8),
    (3, 65, 24),
    (4, 96, 40),
    (5, 130, 1032),
    (6, 31, 96),
    (7, 3, 2056),
    (8, 70, 100),
    (9, 67, 1048),
    (16, 40, 264),
    (17, 75, 520),
    (25, 33, 56),
    (45, 50, 300),
]


NONE = np.zeros(1, np.int32)


def random_weights(rng, bits, N, K, group=128, parts=()):
    """(what the kernels take: bits, q, scale, zero, group, order, orders), and the exact weights in float64. parts: how many
    rows each order of the inputs is for."""
    size = 10.0 ** rng.integers(-4, 1, (N, 1))  # rows of very different size
    if bits == 16:
        w = (rng.standard_normal((N, K)) * size).astype(np.float16)
        w.reshape(-1)[:: max(1, w.size // 7)] = 3e-7  # subnormal halves
        return (16, w, w, w, group, NONE, 0), w.astype(np.float64)
    panels, groups, chunks = -(-N // 16), -(-K // group), group * bits // 32
    q = rng.integers(0, 256, (panels, groups, chunks, 64), dtype=np.uint8)
    scale = np.zeros((panels, groups, 16))
    scale += rng.random(scale.shape) * np.resize(size, (panels, 1, 16)) / 2**bits
    zero = rng.integers(0, 2**bits, scale.shape, dtype=np.uint8)
    scale = (scale * rng.choice([-1, 1], scale.shape)).astype(np.float16)
    exact = dequantise.dequantise(q, scale, zero, bits, N, K)
    orders = np.array([rng.permutation(K) for _ in parts], np.int32).reshape(len(parts), K)
    if parts:
        cut = np.split(exact, np.cumsum(parts)[:-1])
        exact = np.concatenate([dequantise.in_order(w, order) for w, order in zip(cut, orders)])
    return (bits, q, scale, zero, group, orders if parts else NONE, len(parts)), exact


BITS = pytest.mark.parametrize("bits", [16, 8, 4])
GROUPS = pytest.mark.parametrize("bits, group", [(16, 128), (8, 128), (4, 128), (8, 8), (4, 8), (8, 72), (4, 40), (4, 64)])


def tolerance(bits: int, tokens: int) -> float:
    """Of int8 and int4, and of fp16 if there are many tokens, inputs are multiplied as 16-bit numbers with a scale for each
    group (inputs.h); of fp16, weights are then, too (weights_f16.h)."""
    return 1e-4 if bits < 16 else 2e-6 if tokens <= 8 else 4e-4


@GROUPS
@pytest.mark.parametrize("T, N, K", SHAPES)
def test_linear_head(kernels, rng, bits, group, T, N, K):
    x, b = rng.standard_normal((T, K)).astype(np.float32), rng.standard_normal(N).astype(np.float32)
    weights, exact = random_weights(rng, bits, N, K, group)
    y = poisoned(T + 1, N)
    kernels.linear_head(x, *weights, b, y, T, N, K)
    close(y[:T], *product(x, exact, b), tolerance(bits, T))
    assert np.isnan(y[T]).all()


def random_low_rank(rng, N, K):
    """(what the kernels take: down, up, R), and the exact sum that it adds to the weights; now and then nothing."""
    R = int(rng.choice([0, 1, 3, 8, 33]))
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((R, K), (N, R)))
    up /= 4 * np.sqrt(R + 1)  # together no larger than weights are
    return (down, up, R), up.astype(np.float64) @ down


@BITS
@pytest.mark.parametrize("T, N, K", SHAPES)
@pytest.mark.parametrize("part", [0.0, 0.57, 1.0])
@pytest.mark.parametrize("orders", [0, 1, 2])
def test_linear_in(kernels, rng, bits, T, N, K, part, orders):
    I = int(N * part)  # noqa: E741
    if orders == 2:
        I = N - (N - I) // 16 * 16  # noqa: E741  # each order has whole panels
    x, b = rng.standard_normal((T, K)).astype(np.float32), rng.standard_normal(max(I, 1)).astype(np.float32)
    weights, exact = random_weights(rng, bits, N, K, parts=((), (N,), (N - I, I))[orders])
    more, added = random_low_rank(rng, N, K)
    y = poisoned(T + 1, N)
    kernels.linear_in(x, *weights, *more, b, y, T, N, K, I)
    exact, size = product(x, exact + added, np.concatenate([np.zeros(N - I), b[:I]]))
    exact[:, N - I :] = reference.gelu_new(exact[:, N - I :])
    close(y[:T], exact, size, tolerance(bits, T))
    assert np.isnan(y[T]).all()


@BITS
@pytest.mark.parametrize("T, N, K", SHAPES)
def test_linear_out(kernels, rng, bits, T, N, K):
    A = K // 4
    M = K - A + 5  # the MLP's part lies at the end of longer rows
    a, m, r = (rng.standard_normal((T, n)).astype(np.float32) for n in (A, M, N))
    weights, exact = random_weights(rng, bits, N, K, parts=(N,) if T % 2 else ())
    b, y = rng.standard_normal(N).astype(np.float32), poisoned(T + 1, N)
    more, added = random_low_rank(rng, N, K)
    kernels.linear_out(a, m, *weights, *more, b, r, y, T, N, K, A, M)
    close(y[:T], *product(np.concatenate([a, m[:, 5:]], 1), exact + added, b, r), tolerance(bits, T))
    assert np.isnan(y[T]).all()


@BITS
@pytest.mark.parametrize("largest", [None, (255, 0), (0, 255)])
@pytest.mark.parametrize("T", [1, 9, 30])
def test_inputs_of_very_different_size(kernels, rng, bits, T, largest):
    """Outliers, as hidden states have them; zeros; subnormal numbers; all inputs at their largest, so that sums are, too: in
    int8 those of q - zero - 1 = 254 or -256."""
    N, K = 40, 384
    x = (rng.standard_normal((T, K)) * 10.0 ** rng.integers(-6, 3, (T, K))).astype(np.float32)
    x[:, 5], x[:, 128:256], x[T // 2] = 3000, 0, 1e-40
    weights, exact = random_weights(rng, bits, N, K)
    if largest:
        x = np.where(rng.random((T, 1)) < 0.5, 1, -1e4) * np.ones((T, K), np.float32)
        bits_, q, scale, zero, *rest = weights
        if bits == 16:
            q[:] = 65504
        else:
            q[:], zero[:] = largest
        weights = (bits_, q, scale, zero, *rest)
        exact = q.astype(np.float64) if bits == 16 else dequantise.dequantise(q, scale, zero, bits, N, K)
    x, b, y = x.astype(np.float32), np.zeros(N, np.float32), poisoned(T, N)
    kernels.linear_head(x, *weights, b, y, T, N, K)
    exact, size = product(x, exact, b)
    close(y, exact, exact if largest else size, 4 * tolerance(bits, T))  # numbers that are all alike are rounded alike


class Rows:
    """Keys and values of a cache in 16 or 8 bits: random where ``filled`` says so, and poisoned elsewhere."""

    def __init__(self, rng, bits: int, filled: np.ndarray, S: int):
        """filled: bool (B, C), or whatever a cache's (B, H, C) are broadcast from."""
        self.bits = bits
        shape, filled = (2, *filled.shape, S), filled[None, ..., None]
        if bits == 16:
            self.numbers = np.where(filled, rng.standard_normal(shape), np.nan).astype(np.float16)
            self.scales = np.full((2, 1), np.nan, np.float32)  # nobody's
        else:
            self.numbers = rng.integers(-127, 128, shape, np.int8)
            self.scales = np.where(filled, rng.random((*shape[:-1], 1)) / 50, np.nan).astype(np.float32)[..., 0]

    @property
    def given(self) -> tuple:
        """As the kernels take a cache."""
        return (self.bits, *self.numbers, *self.scales)

    @property
    def exact(self) -> np.ndarray:
        """(2, B, H, C, S): keys and values."""
        exact = self.numbers.astype(np.float64)
        return exact if self.bits == 16 else exact * self.scales[..., None]

    def copy(self) -> tuple[np.ndarray, np.ndarray]:
        return self.numbers.copy(), self.scales.copy()

    def check(self, at: tuple, rows: np.ndarray) -> None:
        """What was written at these places, which is to be ``rows`` as well as the coding can hold them."""
        if self.bits == 16:
            return close(self.numbers[at], rows, rows, 5e-4)
        numbers, scale = self.numbers[at], self.scales[at].astype(np.float64)
        assert np.allclose(scale, np.abs(rows).max(-1) / 127, 1e-5, 0)
        assert (np.abs(numbers).max(-1) == 127).all() and numbers.min() >= -127
        assert (np.abs(numbers * scale[..., None] - rows) <= 0.501 * scale[..., None]).all()


CACHES = pytest.mark.parametrize("cache", [16, 8])


@pytest.mark.parametrize("S", [3, 8, 20, 256])
def test_rows_of_an_int8_cache(kernels, rng, S):
    x = rng.standard_normal((6, S)).astype(np.float32) * np.array([[1], [1e30], [1e-30], [1e-40], [0], [1]], np.float32)
    x[-1, S // 2] = -3000
    rows = Rows(rng, 8, np.zeros((7, 1), bool)[:, 0], S)
    before = rows.copy()
    kernels.put(x, *rows.given, 6, S)
    rows.check((0, [0, 1, 2, 5]), x[[0, 1, 2, 5]].astype(np.float64))
    assert not rows.numbers[0, 3:5].any() and not rows.scales[0, 3:5].any()  # too small to tell from zero
    for new, old in zip(rows.copy(), before):
        assert np.array_equal(new[0, 6], old[0, 6], equal_nan=True) and np.array_equal(new[1], old[1], equal_nan=True)


@CACHES
@pytest.mark.parametrize(
    "H, S, rotary, C, sequences",  # of each sequence: tokens in the cache, new tokens
    [
        (4, 8, 8, 40, [(0, 1)]),
        (4, 24, 6, 70, [(0, 33)]),
        (8, 16, 4, 100, [(60, 1)]),
        (4, 256, 64, 130, [(90, 3)]),
        (12, 20, 20, 64, [(31, 33)]),
        (4, 64, 32, 200, [(100, 100)]),
        (4, 40, 16, 90, [(3, 1), (0, 70), (50, 40), (89, 1)]),
        (4, 20, 4, 400, [(30, 300), (0, 11), (390, 10)]),
        (4, 256, 64, 300, [(0, 260)]),
    ],
)
def test_attention(kernels, rng, H, S, rotary, C, sequences, cache):
    D, Y, B = H * S, 3 * H * S + 7, len(sequences) + 1
    slots = rng.permutation(B)[:-1]  # one slot of the cache stays untouched
    first = np.cumsum([0, *(count for _, count in sequences)])
    T = first[-1]
    table = np.array([(slot, start, f, n) for slot, f, (start, n) in zip(slots, first, sequences)], np.int32)
    y = rng.standard_normal((T, Y)).astype(np.float32) * 2
    filled, new = np.zeros((2, B, H, C), bool)
    for slot, start, _, n in table:
        filled[slot, :, :start] = new[slot, :, start : start + n] = True
    rows = Rows(rng, cache, filled, S)
    before, out = rows.copy(), poisoned(T + 1, D)
    kernels.attention(y, Y, rotary_angles(C, rotary), *rows.given, out, H, S, rotary, C, table, len(table))

    for slot, start, row, n in table:
        seen, its = start + n, slice(row, row + n)
        q, k, v = (reference.heads(part, H) for part in np.split(y[its, : 3 * D].astype(np.float64), 3, axis=1))
        q, k = (reference.rotary(a, np.arange(start, seen), rotary) for a in (q, k))
        rows.check((slice(None), slot, slice(None), slice(start, seen)), np.stack([k, v]))
        exact = reference.attention(q, *rows.exact[:, slot, :, :seen])
        exact = exact.transpose(1, 0, 2).reshape(n, D)
        close(out[its], exact, exact, 3e-6)
    for after, old in zip(rows.copy(), before):
        if after.ndim > 2:  # scales that are somebody's
            assert np.array_equal(after[:, ~new], old[:, ~new], equal_nan=True)
    assert np.isnan(out[T]).all()


@BITS
@CACHES
@pytest.mark.parametrize("orders", [0, 2])
@pytest.mark.parametrize("T", [1, 7, 20])
def test_block(kernels, rng, bits, cache, T, orders):
    D, I, H, rotary, C, start = 32, 88, 4, 4, 40, 5  # noqa: E741
    orders = orders if bits < 16 else 0
    x = rng.standard_normal((T, D)).astype(np.float32)
    norm, in_bias, out_bias = (
        1 + rng.standard_normal((2, D)).astype(np.float32) / 9,
        *(rng.standard_normal(n).astype(np.float32) for n in (I, D)),
    )
    w, exact_in = random_weights(rng, bits, 3 * D + I, D, parts=(3 * D, I) if orders else ())
    w2, exact_out = random_weights(rng, bits, D, D + I, parts=(D,) if orders else ())
    more, added = random_low_rank(rng, 3 * D + I, D)
    more2, added2 = random_low_rank(rng, D, D + I)
    exact_in, exact_out = exact_in + added, exact_out + added2
    rows = Rows(rng, cache, np.broadcast_to(np.arange(C) < start, (1, H, C)), D // H)
    y = poisoned(T + 1, D)
    kernels.block(
        x, *norm, 1e-5, *w, *more, in_bias, *w2[1:4], w2[5], *more2, out_bias, rotary_angles(C, rotary), *rows.given, H, rotary,
        C, np.array([[0, start, 0, T]], np.int32), 1, y, T, D, I,
    )  # fmt: skip

    h = reference.layer_norm(x.astype(np.float64), *norm, 1e-5)
    first = h @ exact_in.T
    q, k, v = (reference.heads(part, H) for part in np.split(first[:, : 3 * D], 3, axis=1))
    q, k = (reference.rotary(a, np.arange(start, start + T), rotary) for a in (q, k))
    old = rows.exact[:, 0, :, :start]
    a = reference.attention(q, np.concatenate([old[0], k], 1), np.concatenate([old[1], v], 1))
    both = np.concatenate([a.transpose(1, 0, 2).reshape(T, D), reference.gelu_new(first[:, 3 * D :] + in_bias)], 1)
    exact = x + both @ exact_out.T + out_bias
    close(y[:T], exact, np.abs(exact) + np.sqrt(both**2 @ (exact_out**2).T), {16: 2e-3, 8: 2e-2}[cache])  # it rounds
    assert np.isnan(y[T]).all()
