"""Every kernel of training against float64, for each instruction set this machine has, on odd shapes and poisoned outputs."""

from __future__ import annotations

import numpy as np
import pytest

from .. import reference
from .build import ISAS, build, supported
from .test_kernels import close, poisoned, random_weights, rng  # noqa: F401 (rng is a fixture)

SOURCE = r"""
#include "train_block.h"
using namespace moss;
typedef int64_t i64;
extern "C" {
int lanes() { return VEC; }
void c_gemm(const float* a, i64 turned_a, i64 row_a, const float* b, i64 turned_b, i64 row_b, float* c, i64 row_c, i64 M, i64 N,
            i64 K, i64 add_to) {
    const Strided right = turned_b ? transposed(b, row_b) : plain(b, row_b);
    gemm(turned_a ? transposed(a, row_a) : plain(a, row_a), right, c, row_c, M, N, K, add_to);
}
Linear stored(i64 bits, const void* q, const f16* s, const uint8_t* z, i64 group, const int32_t* order, i64 orders, i64 N,
              i64 K) {
    return {N, K, 0, 0, bits, group, q, s, z, orders ? order : nullptr, nullptr};
}
#define WEIGHTS i64 bits, const void *q, const f16 *s, const uint8_t *z, i64 group, const int32_t *order, i64 orders
void c_linear_forward(float* x, WEIGHTS, float* y, i64 T, i64 N, i64 K, i64 add_to) {
    linear_forward(stored(bits, q, s, z, group, order, orders, N, K), {x, K}, {y, N}, T, add_to);
}
void c_linear_backward(float* dy, WEIGHTS, float* dx, i64 T, i64 N, i64 K, i64 add_to) {
    linear_backward(stored(bits, q, s, z, group, order, orders, N, K), {dx, K}, {dy, N}, {dx, K}, T, add_to);
}
Adapter adapter(i64 N, i64 K, i64 rank, i64 parts, double scale, double dropout, i64 seed, float** tensors) {
    return {N, K, rank, 2, 3, parts, scale, dropout, (uint64_t)seed, tensors[0], tensors[1], tensors[2], tensors[3]};
}
void c_adapter_forward(float* x, float* y, i64 T, i64 N, i64 K, i64 rank, i64 parts, double scale, double dropout, i64 seed,
                       float** tensors) {
    adapter_forward(adapter(N, K, rank, parts, scale, dropout, seed, tensors), {x, K + 2}, {y, N + 3}, T);
}
void c_adapter_backward(float* x, float* dy, float* dx, i64 T, i64 N, i64 K, i64 rank, i64 parts, double scale, double dropout,
                        i64 seed, float** tensors) {
    adapter_backward(adapter(N, K, rank, parts, scale, dropout, seed, tensors), {x, K + 2}, {dy, N + 3}, {dx, K + 2}, T);
}
void c_norm(float* x, float* w, float* b, float* y, float* stats, float* dy, float* added, float* dw, float* db, float* dx,
            i64 T, i64 D, double eps) {
    norm_forward(x, w, b, y, stats, T, D, (float)eps);
    norm_backward(x, stats, {w, dw}, {b, db}, dy, added, dx, T, D);
}
void c_slope(float* x, i64 n) { map(x, n, [](vec v, i64, int) { return gelu_new_slope(v); }); }
void c_add_rows(float* x, i64 stride, i64 T, i64 N, float* sums) { add_rows(x, stride, T, N, sums); }
void c_attention(float* y, float* z, i64 stride, float* dz, float* dy, const float* angles, i64 B, i64 T, i64 H, i64 S,
                 i64 rotary, i64 row, i64 official) {
    const Projected p{B, T, H, S, rotary, row, official != 0, angles};
    turn_rows(p, y, 1);
    attention_forward(p, y, z, stride);
    attention_backward(p, y, dz, stride, dy);
    turn_rows(p, dy, -1);
}
void c_cross_entropy(float* logits, i64 V, i64 target, double scale, double* loss) {
    bool right = false;
    loss[0] = cross_entropy(logits, V, target, (float)scale, &right);
    loss[1] = right;
}
void c_adamw(float* p, float* g, float* m, float* v, i64 n, double shrink, double rate, double root_) {
    adamw(p, g, m, v, n, (float)shrink, (float)rate, (float)root_, 0.9, 0.999, 1e-8f);
}
void c_squares(float* x, i64 n, double* sum) { *sum = sum_of_squares(x, n); }
void c_embedding(int32_t* ids, float* dx, float* gradient, i64 M, i64 D) { embedding_backward(ids, dx, gradient, M, D); }
}
"""


@pytest.fixture(scope="module", params=list(ISAS))
def kernels(request, tmp_path_factory):
    if not supported(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    return build(request.param, tmp_path_factory.mktemp("kernels"), SOURCE)


def normal(rng, *shape) -> np.ndarray:  # noqa: F811
    return rng.standard_normal(shape).astype(np.float32)


# M, N, K: both sides of a vector, a panel, a slice of 256 inputs, a tile, and of what is packed at a time.
SHAPES = [(1, 1, 1), (5, 17, 3), (6, 16, 256), (13, 70, 257), (125, 130, 40), (121, 15, 600), (2100, 9, 5), (7, 2100, 300)]


@pytest.mark.parametrize("M, N, K", SHAPES)
@pytest.mark.parametrize("turned", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("add_to", [0, 1])
def test_gemm(kernels, rng, M, N, K, turned, add_to):  # noqa: F811
    a, b = normal(rng, *((K, M) if turned[0] else (M, K))), normal(rng, *((N, K) if turned[1] else (K, N)))
    c = poisoned(M + 1, N + 2)
    exact = (a.T if turned[0] else a).astype(np.float64) @ (b.T if turned[1] else b)
    if add_to:
        c[:M, :N] = normal(rng, M, N)
        exact += c[:M, :N]
    kernels.gemm(a, turned[0], a.shape[1], b, turned[1], b.shape[1], c, N + 2, M, N, K, add_to)
    close(c[:M, :N], exact, np.sqrt(K) * np.ones((M, N)), 2e-6)
    assert np.isnan(c[M]).all() and np.isnan(c[:, N:]).all()


@pytest.mark.parametrize("bits, group", [(16, 128), (8, 128), (4, 128), (8, 8), (4, 8), (8, 72), (4, 40), (4, 64)])
@pytest.mark.parametrize("T, N, K", [(1, 5, 8), (7, 16, 64), (10, 33, 100), (3, 270, 530), (20, 17, 1000), (2, 2070, 24)])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("add_to", [0, 1])
def test_frozen_linear(kernels, rng, bits, group, T, N, K, ordered, add_to):  # noqa: F811
    weights, exact = random_weights(rng, bits, N, K, group, (N,) if ordered and bits < 16 else ())
    for call, inputs, outputs, w in (
        (kernels.linear_forward, K, N, exact.T),
        (kernels.linear_backward, N, K, exact),
    ):
        x, y = normal(rng, T, inputs), poisoned(T + 1, outputs)
        if add_to:
            y[:T] = normal(rng, T, outputs)
        added = y[:T].astype(np.float64) if add_to else np.zeros((T, outputs))
        product = x.astype(np.float64) @ w + added
        call(x, *weights, y, T, N, K, add_to)
        close(y[:T], product, np.sqrt(x.astype(np.float64) ** 2 @ w**2 + added**2), 2e-6)
        assert np.isnan(y[T]).all()


def mask(seed: int, count: int, dropout: float) -> np.ndarray:
    """splitmix64's numbers, the upper 24 bits of each as a fraction of 2^24."""
    z = np.uint64(seed) + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.where((z ^ z >> np.uint64(31)) >> np.uint64(40) < np.float32(dropout) * 2**24, 0, 1 / (1 - dropout))


@pytest.mark.parametrize(
    "T, N, K, rank, parts", [(1, 5, 8, 1, 0), (30, 48, 33, 7, 4), (65, 260, 300, 16, 0), (300, 24, 10, 3, 2)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapter(kernels, rng, T, N, K, rank, parts, dropout):  # noqa: F811
    x, y, dy, dx = normal(rng, T, K + 2), normal(rng, T, N + 3), normal(rng, T, N + 3), normal(rng, T, K + 2)
    a, b, da, db = normal(rng, rank, K), normal(rng, N, rank), normal(rng, rank, K), normal(rng, N, rank)
    seed = int(rng.integers(1 << 62))
    where = np.array([t.ctypes.data for t in (a, b, da, db)], np.uint64)
    # Row of b for each column: the official order of qkv_proj is, part by part, q, v, k.
    rows = np.arange(N)
    if parts:
        q, v, k = (np.concatenate(np.split(x, 3 * parts)[i::3]) for i, x in enumerate([rows] * 3))
        rows = np.concatenate([q, k, v])
    kept = mask(seed, T * K, dropout).reshape(T, K) if dropout else np.ones((T, K))
    dropped, slope, w = x[:, 2:] * kept, dy[:, 3:].astype(np.float64), b[rows].astype(np.float64)
    inner, size = dropped @ a.T.astype(np.float64), np.ones((1, 1)) * np.sqrt(K * rank)
    expected = {
        "y": y[:, 3:] + 1.7 * inner @ w.T,
        "dx": dx[:, 2:] + 1.7 * (slope @ w @ a) * kept,
        "da": da + 1.7 * (slope @ w).T @ dropped,
        "db": db.astype(np.float64),
    }
    expected["db"][rows] += 1.7 * slope.T @ inner
    before = [array.copy() for array in (y[:, :3], dx[:, :2])]
    numbers = (T, N, K, rank, parts, 1.7, dropout, seed, where)
    kernels.adapter_forward(x, y, *numbers)
    kernels.adapter_backward(x, dy, dx, *numbers)
    for name, found in (("y", y[:, 3:]), ("dx", dx[:, 2:]), ("da", da), ("db", db)):
        close(found, expected[name], np.maximum(abs(expected[name]), size), 1e-5)
    assert all((now == then).all() for now, then in zip((y[:, :3], dx[:, :2]), before))


def difference(f, x: np.ndarray, weights: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The derivative of the sum of weights f(x), element by element, in float64."""
    found = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        moved = x.copy()
        moved[i] += step
        more = f(moved)
        moved[i] -= 2 * step
        found[i] = (weights * (more - f(moved))).sum() / (2 * step)
    return found


@pytest.mark.parametrize("T, D", [(1, 8), (7, 17), (5, 300)])
@pytest.mark.parametrize("residual", [True, False])
def test_norm(kernels, rng, T, D, residual):  # noqa: F811
    x, w, b, dy, added = normal(rng, T, D) + 3, normal(rng, D), normal(rng, D), normal(rng, T, D), normal(rng, T, D)
    dw, db = normal(rng, D), normal(rng, D)
    y, stats, dx = poisoned(T + 1, D), poisoned(T, 2), poisoned(T + 1, D)

    def f(x, w, b):
        return reference.layer_norm(x, w, b, 1e-5)

    given = [a.astype(np.float64) for a in (x, w, b)]
    exact = [
        difference(lambda x: f(x, *given[1:]), given[0], dy) + (added if residual else 0),
        difference(lambda w: f(given[0], w, given[2]), given[1], dy) + dw,
        difference(lambda b: f(*given[:2], b), given[2], dy) + db,
    ]
    kernels.norm(x, w, b, y, stats, dy, added if residual else None, dw, db, dx, T, D, 1e-5)
    close(y[:T], f(*given), f(*given), 1e-5)
    for found, expected in zip((dx[:T], dw, db), exact):
        close(found, expected, expected, 2e-5)
    assert np.isnan(y[T]).all() and np.isnan(dx[T]).all()


def test_slope_of_gelu_new(kernels):
    x = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, 1e4, 0]]).astype(np.float32)
    y, exact = x.copy(), x.astype(np.float64)
    kernels.slope(y, y.size)
    exact = (reference.gelu_new(exact + 1e-4) - reference.gelu_new(exact - 1e-4)) / 2e-4
    assert np.abs(y - exact).max() < 2e-6


@pytest.mark.parametrize("B, T, H, S, rotary", [(1, 1, 4, 2, 2), (2, 7, 4, 5, 4), (1, 130, 8, 8, 6), (2, 300, 4, 3, 2)])
@pytest.mark.parametrize("official", [0, 1])
def test_attention(kernels, rng, B, T, H, S, rotary, official):  # noqa: F811
    d = H * S
    row, stride = 3 * d + 5, d + 3
    y, dz = normal(rng, B, T, row), normal(rng, B, T, stride)
    z, dy = poisoned(B, T, stride), poisoned(B, T, row)
    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, rotary, 2) / rotary)
    angles = np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)

    def f(y):
        """y (T, 3 D) -> (T, D)."""
        q, k, v = reference.split_qkv(y, H) if official else (reference.heads(x, H) for x in np.split(y, 3, axis=1))
        q, k = (reference.rotary(x, np.arange(T), rotary) for x in (q, k))
        return reference.attention(q, k, v).transpose(1, 0, 2).reshape(T, d)

    given = y.astype(np.float64)
    kernels.attention(y, z, stride, dz, dy, angles, B, T, H, S, rotary, row, official)
    for i in range(B):
        close(z[i, :, :d], f(given[i, :, : 3 * d]), f(given[i, :, : 3 * d]), 1e-5)
        for _ in range(4):  # a direction at a time: elements would take hours
            direction = rng.standard_normal((T, 3 * d)) * 1e-5
            ends = [(dz[i, :, :d] * f(given[i, :, : 3 * d] + way * direction)).sum() for way in (1, -1)]
            ours, size = (dy[i, :, : 3 * d] * direction).sum(), np.linalg.norm(dy[i, :, : 3 * d]) * 1e-5
            assert abs(ours - (ends[0] - ends[1]) / 2) < 1e-4 * size
    assert np.isnan(z[:, :, d:]).all() and np.isnan(dy[:, :, 3 * d :]).all()
    assert (y[:, :, 3 * d :] == given[:, :, 3 * d :]).all()


@pytest.mark.parametrize("V", [2, 17, 5000, 9001])
def test_cross_entropy(kernels, rng, V):  # noqa: F811
    x, target, found = normal(rng, V) * 5 + 40, int(rng.integers(V)), np.full(2, np.nan)
    exact = x.astype(np.float64)
    p = np.exp(exact - exact.max())
    p /= p.sum()
    kernels.cross_entropy(x, V, target, 0.3, found)
    assert abs(found[0] + np.log(p[target])) < 1e-5 and found[1] == (exact.argmax() == target)
    size = 0.3 * (p + (np.arange(V) == target))
    p[target] -= 1
    close(x, 0.3 * p, size, 1e-5)


def test_adamw_sums_and_embedding(kernels, rng):  # noqa: F811
    n = 40_001
    p, g, m, v = normal(rng, n), normal(rng, n) * 1e-3, normal(rng, n) * 1e-3, normal(rng, n) ** 2 * 1e-6
    v[::2] = 0  # as before the first step
    exact = [a.astype(np.float64) for a in (p, g, m, v)]
    new_m, new_v = 0.9 * exact[2] + 0.1 * exact[1], 0.999 * exact[3] + 0.001 * exact[1] ** 2
    new_p = exact[0] * 0.99 - 0.02 * new_m / (np.sqrt(new_v) / 0.3 + 1e-8)
    kernels.adamw(p, g, m, v, n, 0.99, 0.02, 0.3)
    for found, expected in ((p, new_p), (m, new_m), (v, new_v)):
        close(found, expected, expected, 1e-6)
    total = np.zeros(1)
    kernels.squares(p, n, total)
    assert abs(total[0] - (p.astype(np.float64) ** 2).sum()) < 1e-10 * total[0]
    x, sums = normal(rng, 50, 700), normal(rng, 600)
    expected = sums + x[:, :600].astype(np.float64).sum(0)
    kernels.add_rows(x, 700, 50, 600, sums)
    close(sums, expected, np.full(600, 7.0), 1e-6)
    ids, gradient = rng.integers(0, 9, 50).astype(np.int32), normal(rng, 9, 700)
    expected = gradient.astype(np.float64)
    np.add.at(expected, ids, x)
    kernels.embedding(ids, x, gradient, 50, 700)
    close(gradient, expected, expected, 1e-6)
