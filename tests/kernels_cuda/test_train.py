"""train.cuh's kernels against float64, on the emulated device."""

from __future__ import annotations

import numpy as np
import pytest

from moss_jt.ops import rotary_angles
from moss_jt.train.gpu_ops import CALL

from .. import dequantise, reference
from ..emulation.build import build, inout, unwritten

WRAPPERS = """
#include "train.cuh"
int64_t call_bytes(int calls) { return calls * sizeof(TrainCall); }
void run(int what, int64_t rows, int64_t n0, int64_t n1, int64_t n2, int64_t n3, int64_t n4, float one, float two, void* a,
         void* b, void* c, void* d, void* e, void* f) {
    TrainCall call = {what, {rows, n0, n1, n2, n3, n4}, {one, two}, {a, b, c, d, e, f}};
    run_train(call, 0);
}
"""
WHATS = [
    *("dequantise", "embed", "norm", "norm_backward", "turn", "weigh", "weigh_backward", "gelu", "gelu_backward", "residual"),
    *("drop", "cross_entropy", "zero"),
]  # as train.cuh numbers them


@pytest.fixture(scope="module")
def run():
    kernels = build(WRAPPERS)

    def call(what: str, rows: int, *given, n=(), f=()):
        """Arrays as they are given; whatever is not written must stay as it is."""
        places = [x if x is None or not isinstance(x, np.ndarray) else inout(x.copy()) for x in given]
        kernels.run(WHATS.index(what), rows, *n, *[0] * (5 - len(n)), *f, *[0.0] * (2 - len(f)),
                    *places, *[None] * (6 - len(places)))  # fmt: skip
        for x, place in zip(given, places):
            if isinstance(x, np.ndarray):
                assert np.array_equal(x, place.array)

    return call


def test_a_call_is_laid_out_alike():
    assert build(WRAPPERS).call_bytes(3) == 3 * CALL.itemsize


def floats(rng, *shape) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def close(ours, exact, tolerance=2e-6):
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert np.isfinite(ours).all() and error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("bits, group", [(16, 0), (8, 128), (4, 128), (8, 72), (4, 40), (4, 8)])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("n, k, first, count", [(1, 8, 0, 1), (40, 1032, 16, 24), (67, 264, 32, 32), (33, 77, 0, 33)])
def test_dequantise(run, rng, bits, group, ordered, n, k, first, count):
    """Exactly."""
    to, order = unwritten((count, k), np.float32), rng.permutation(k).astype(np.int32) if ordered and bits < 16 else None
    if bits == 16:
        w = floats(rng, n, k).astype(np.float16)
        w[0, 0] = 3e-7  # subnormal
        stored, exact = (w, None, None), w
    else:
        shape = (-(-n // 16), -(-k // group), 16)
        q = rng.integers(0, 256, (*shape[:2], group * bits // 32, 64), dtype=np.uint8)
        scale = rng.random(shape).astype(np.float16)
        zero = rng.integers(0, 1 << bits, shape, dtype=np.uint8)
        stored, exact = (q, scale, zero), dequantise.in_order(dequantise.dequantise(q, scale, zero, bits, n, k), order)
    run("dequantise", count, *stored, order, to, n=(first, bits, n, k, group))
    assert np.array_equal(to.array, exact[first : first + count].astype(np.float32))


@pytest.mark.parametrize("rows, d", [(1, 1), (5, 300), (3, 1031)])
@pytest.mark.parametrize("some", [False, True])
def test_norm(run, rng, rows, d, some):
    x = 3 * floats(rng, rows + 4, d) + 1
    which = np.sort(rng.choice(len(x), rows, replace=False)).astype(np.int32) if some else None
    at = np.arange(rows) if which is None else which
    weight, bias, dy, before = *floats(rng, 2, d), floats(rng, rows, d), floats(rng, *x.shape)
    y, stats = unwritten((rows, d), np.float32), unwritten((rows, 2), np.float32)
    run("norm", rows, x, which, weight, bias, y, stats, n=(d,), f=(1e-5,))
    wide = x[at].astype(np.float64)
    if d > 1:
        close(y.array, reference.layer_norm(wide, weight, bias, 1e-5))
    inverse = 1 / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    hat, g = (wide - wide.mean(1, keepdims=True)) * inverse, dy.astype(np.float64) * weight
    exact = before.astype(np.float64)
    exact[at] += inverse * (g - g.mean(1, keepdims=True) - hat * (g * hat).mean(1, keepdims=True))
    run("norm_backward", rows, x, which, stats.array, weight, dy, dx := inout(before.copy()), n=(d,))
    close(dx.array, exact, 1e-5 if d > 1 else 1e-3)


@pytest.mark.parametrize("b, t, h, s, rotary, beside", [(1, 1, 4, 2, 2, 0), (2, 7, 4, 10, 6, 13), (3, 40, 12, 8, 8, 1)])
def test_turn_there_and_back(run, rng, b, t, h, s, rotary, beside):
    d = h * s
    x, angles = floats(rng, b * t, 3 * d + beside), rotary_angles(t, rotary)
    n = (x.shape[1], t, 2 * h, s, rotary)
    run("turn", b * t, y := inout(x.copy()), angles, n=n, f=(1.0,))
    exact = x.astype(np.float64)
    heads = exact[:, : 2 * d].reshape(b, t, 2 * h, s)
    cos, sin = (a.astype(np.float64)[None, :, None] for a in angles)
    even, odd = heads[..., :rotary:2].copy(), heads[..., 1:rotary:2].copy()
    heads[..., :rotary:2], heads[..., 1:rotary:2] = even * cos - odd * sin, odd * cos + even * sin
    exact[:, : 2 * d] = heads.reshape(b * t, -1)
    close(y.array, exact)
    run("turn", b * t, y, angles, n=n, f=(-1.0,))
    close(y.array, x)


@pytest.mark.parametrize("heads, t", [(1, 1), (3, 7), (2, 300)])
def test_attention_s_weights(run, rng, heads, t):
    x, d, scale = 20 * floats(rng, heads * t, t), floats(rng, heads * t, t), 0.3
    seen = np.tile(np.tri(t, dtype=bool), (heads, 1))
    exact = np.where(seen, x * np.float64(scale), -np.inf)
    exact = np.exp(exact - exact.max(1, keepdims=True))
    exact /= exact.sum(1, keepdims=True)
    run("weigh", heads * t, w := inout(x.copy()), n=(t,), f=(scale,))
    close(w.array, exact)
    assert not w.array[~seen].any()
    run("weigh_backward", heads * t, w.array, found := inout(d.copy()), n=(t,), f=(scale,))
    dx = w.array * (d - (w.array.astype(np.float64) * d).sum(1, keepdims=True)) * scale
    assert np.abs(found.array - dx).max() < 1e-6 and not found.array[~seen].any()


@pytest.mark.parametrize("rows, n, f_before, g_before", [(1, 1, 0, 0), (3, 700, 9, 5)])
def test_gelu(run, rng, rows, n, f_before, g_before):
    f, dg, bias = 3 * floats(rng, rows, f_before + n), floats(rng, rows, g_before + n), floats(rng, n)
    f[0, 0] = -60 if n > 1 else 1
    # The kernels get addresses of the first column: here rows begin with it, and what is beside it comes after.
    strides = (f.shape[1], g_before + n, n)
    g = inout(np.full((rows, g_before + n), 7, np.float32))
    run("gelu", rows, y := inout(f.copy()), bias, g, n=strides)
    exact = f[:, :n].astype(np.float64) + bias
    close(y.array[:, :n], exact)
    close(g.array[:, :n], reference.gelu_new(exact))
    assert np.array_equal(y.array[:, n:], f[:, n:]) and (g.array[:, n:] == 7).all()
    df = inout(np.full(f.shape, 7, np.float32))
    run("gelu_backward", rows, y.array, dg, df, n=strides)
    step = 1e-5
    slope = (reference.gelu_new(exact + step) - reference.gelu_new(exact - step)) / (2 * step)
    assert np.abs(df.array[:, :n] - slope * dg[:, :n]).max() < 1e-5 and (df.array[:, n:] == 7).all()


@pytest.mark.parametrize("rows, n, beside", [(1, 1, 0), (4, 700, 9)])
def test_residual_and_zero(run, rng, rows, n, beside):
    x, bias = floats(rng, rows, n), floats(rng, n)
    run("residual", rows, x, bias, y := unwritten((rows, n), np.float32), n=(n,))
    assert np.array_equal(y.array, x + bias)
    run("zero", rows, y, n=(n,))
    assert not y.array.any()


def mask(seed: int, share: float, count: int) -> np.ndarray:
    """splitmix64, in Python's numbers."""
    found, most = np.empty(count), 1 << 64
    for i in range(count):
        z = (seed + i * 0x9E3779B97F4A7C15) % most
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % most
        z = (z ^ z >> 27) * 0x94D049BB133111EB % most
        found[i] = 0 if (z ^ z >> 31) >> 40 < share * 2**24 else 1 / (1 - share)
    return found


@pytest.mark.parametrize("rows, n, beside", [(1, 1, 0), (4, 300, 9)])
@pytest.mark.parametrize("seed", [0, (1 << 64) - 3])
def test_dropout(run, rng, rows, n, beside, seed):
    x, before = floats(rng, rows, n + beside), floats(rng, rows, n + beside)
    exact = x[:, :n] * mask(seed, 0.25, rows * n).reshape(rows, n)
    numbers = (n + beside, n, n, 0, int(np.uint64(seed).view(np.int64)))
    run("drop", rows, x, y := unwritten((rows, n), np.float32), n=numbers, f=(0.25 * 2**24, 1 / 0.75))
    close(y.array, exact) if exact.any() else None
    assert (y.array == 0).sum() == (exact == 0).sum()
    run("drop", rows, x, y := inout(before.copy()), n=(n + beside, n + beside, n, 1, numbers[4]), f=(0.25 * 2**24, 1 / 0.75))
    close(y.array[:, :n], before[:, :n] + exact)
    assert np.array_equal(y.array[:, n:], before[:, n:])


@pytest.mark.parametrize("rows, v", [(1, 1), (5, 90), (3, 1100)])
@pytest.mark.parametrize("derive", [False, True])
def test_cross_entropy(run, rng, rows, v, derive):
    x, bias, targets = 5 * floats(rng, rows, v), floats(rng, v), rng.integers(0, v, rows).astype(np.int32)
    targets[0] = (x[0] + bias).argmax()
    if v > 1:  # two that are the largest: the first one counts
        x[-1], x[-1, [3, v - 1]], bias[[3, v - 1]], targets[-1] = 0, 50, 0, v - 1
    found = unwritten((rows, 4), np.float32)
    run("cross_entropy", rows, y := inout(x.copy()), bias, targets, found, n=(v, derive), f=(0.5,))
    exact = x.astype(np.float64) + bias
    top, total, wanted, right = found.array.astype(np.float64).T
    log_sum = np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1)) + exact.max(1)
    chosen = exact[np.arange(rows), targets]
    assert np.abs(np.log(total) + top - wanted - (log_sum - chosen)).max() < 1e-5
    assert np.array_equal(right, (x + bias).argmax(1) == targets)
    if derive:
        p = np.exp(exact - log_sum[:, None])
        p[np.arange(rows), targets] -= 1
        assert np.abs(y.array - 0.5 * p).max() < 1e-6
