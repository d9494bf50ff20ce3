"""linear.cuh's products against float64, on the emulated device."""

from __future__ import annotations

import numpy as np
import pytest

from .. import dequantise, reference
from ..emulation.build import build, inout, unwritten

WRAPPERS = """
#include "linear.cuh"
int64_t workspace(int multiprocessors, int64_t T, int64_t N, int64_t K) {
    device().multiprocessors = multiprocessors;
    return linear_workspace(T, N, K);
}
void linear_in(const float* x, const float* norm_weight, const float* norm_bias, int bits, const void* q, const half* scale,
               const uint8_t* zero, const int32_t* order, int orders, int n, int k, int group, const float* bias, half* qkv,
               half* both, int64_t T, int64_t D, int64_t I, uint8_t* workspace) {
    const Weights w = {bits, q, scale, zero, order, orders, n, k, group};
    launch_linear_in(x, {norm_weight, norm_bias, 1e-5f}, w, bias, qkv, both, T, D, I, workspace, 0);
}
void linear_out(const half* both, int bits, const void* q, const half* scale, const uint8_t* zero, const int32_t* order,
                int orders, int n, int k, int group, const float* bias, const float* x, float* y, int64_t T, int64_t D,
                int64_t I, uint8_t* workspace) {
    launch_linear_out(both, {bits, q, scale, zero, order, orders, n, k, group}, bias, x, y, T, D, I, workspace, 0);
}
void linear_out_in_place(const half* both, int bits, const void* q, const half* scale, const uint8_t* zero,
                         const int32_t* order, int orders, int n, int k, int group, const float* bias, float* x, int64_t T,
                         int64_t D, int64_t I, uint8_t* workspace) {
    launch_linear_out(both, {bits, q, scale, zero, order, orders, n, k, group}, bias, x, x, T, D, I, workspace, 0);
}
void head(const float* x, const float* norm_weight, const float* norm_bias, int bits, const void* q, const half* scale,
          const uint8_t* zero, const int32_t* order, int orders, int n, int k, int group, const float* bias, float* logits,
          int64_t T, int64_t D, int64_t V, uint8_t* workspace) {
    const Weights w = {bits, q, scale, zero, order, orders, n, k, group};
    launch_head(x, {norm_weight, norm_bias, 1e-5f}, w, bias, logits, T, D, V, workspace, 0);
}
"""

GROUPS = pytest.mark.parametrize("bits, group", [(16, 0), (8, 128), (4, 128), (8, 72), (4, 40), (4, 8)])


@pytest.fixture(scope="module")
def kernels():
    return build(WRAPPERS)


@pytest.fixture(scope="module", params=[700, 750], ids=["no tensor cores", "m16n8k8"])
def older(request):
    return build(WRAPPERS, request.param)


class Weights:
    """Random ones of N outputs and K inputs, as the kernels take them and exactly. parts: how many rows each order of the
    inputs is for."""

    def __init__(self, rng, bits, group, n, k, parts=()):
        self.shape = (len(parts), n, k, group)
        size = 10.0 ** rng.integers(-3, 1, (n, 1))  # rows of very different size
        if bits == 16:
            w = (rng.standard_normal((n, k)) * size).astype(np.float16)
            w.reshape(-1)[:: max(1, w.size // 7)] = 3e-7  # subnormal halves
            self.arguments = (16, w, None, None, None, *self.shape)
            self.exact = w.astype(np.float64)
            return
        panels, groups, chunks = -(-n // 16), -(-k // group), group * bits // 32
        q = rng.integers(0, 256, (panels, groups, chunks, 64), dtype=np.uint8)
        scale = np.zeros((panels, groups, 16))
        scale += rng.random(scale.shape) * np.resize(size, (panels, 1, 16)) / 2**bits
        zero = rng.integers(0, 256 if bits == 8 else 16, scale.shape, dtype=np.uint8)
        scale = scale.astype(np.float16)
        orders = np.array([rng.permutation(k) for _ in parts], np.int32).reshape(len(parts), k)
        self.arguments = (bits, q, scale, zero, orders if parts else None, *self.shape)
        self.exact = dequantise.dequantise(q, scale, zero, bits, n, k)
        if parts:
            cut = np.split(self.exact, np.cumsum(parts)[:-1])
            self.exact = np.concatenate([dequantise.in_order(w, order) for w, order in zip(cut, orders)])

    def workspace(self, kernels, T, multiprocessors):
        """On a device of so many multiprocessors, which it becomes."""
        return unwritten(kernels.workspace(multiprocessors, T, *self.shape[1:3]), np.uint8)


def normed(rng, T, D):
    """Random states, a norm's weight and bias, and the normed states as a product's inputs: rounded to halves."""
    x = (rng.standard_normal((T, D)) * 3 + 1).astype(np.float32)
    weight, bias = rng.standard_normal((2, D)).astype(np.float32)
    h = reference.layer_norm(x.astype(np.float64), weight, bias, 1e-5)
    return (x, weight, bias), h.astype(np.float16).astype(np.float64)


def close(ours, x, w, added, tolerance, after=lambda y: y):
    """Relative L2 error of after(x wᵀ + added), the size being that of sums of such terms of random signs."""
    exact, size = after(x @ w.T + added), np.sqrt(x**2 @ (w**2).T + added**2)
    error = np.linalg.norm(ours.astype(np.float64) - exact) / np.linalg.norm(size)
    assert np.isfinite(ours).all() and error < tolerance, f"relative error {error:.2e}"


# Tokens, outputs, inputs, multiprocessors: outputs that are no whole panels, inputs that are no whole groups or vectors,
# products in several slices (many multiprocessors) and in one.
SHAPES = [
    (1, 1, 8, 1),
    (1, 300, 2056, 4),
    (3, 130, 1032, 100),
    (8, 70, 1048, 2),
    (9, 67, 2064, 100),
    (17, 75, 520, 1),
    (32, 33, 2312, 60),
    (33, 150, 264, 1),
    (40, 20, 1304, 60),
    (70, 40, 136, 1),
    (130, 140, 136, 2),
    (200, 16, 264, 7),
]


def check_head(kernels, rng, bits, group, T, V, D, multiprocessors):
    states, h = normed(rng, T, D)
    w, bias, y = Weights(rng, bits, group, V, D), rng.standard_normal(V).astype(np.float32), unwritten((T, V), np.float32)
    kernels.head(*states, *w.arguments, bias, y, T, D, V, w.workspace(kernels, T, multiprocessors))
    close(y.array, h, w.exact, bias, 3e-4)  # near the middle of two halves, the kernel's input may be the other one


@GROUPS
@pytest.mark.parametrize("T, V, D, multiprocessors", SHAPES)
def test_head(kernels, rng, bits, group, T, V, D, multiprocessors):
    check_head(kernels, rng, bits, group, T, V, D, multiprocessors)


@pytest.mark.parametrize("N, K", [(6144, 30720), (43008, 6144), (300, 2056)])
@pytest.mark.parametrize("multiprocessors", [1, 28, 132])
def test_workspace_is_for_fewer_tokens_too(kernels, N, K, multiprocessors):
    needed = [kernels.workspace(multiprocessors, T, N, K) for T in (1, 2, 8, 9, 32, 33, 64, 65, 128, 129, 192, 256, 257, 1024)]
    assert needed == sorted(needed) and needed[0] >= 2 * K


def test_head_with_a_workspace_for_more_tokens(kernels, rng):
    T, V, D = 5, 40, 4104
    states, h = normed(rng, T, D)
    w, bias, y = Weights(rng, 8, 128, V, D), rng.standard_normal(V).astype(np.float32), unwritten((T, V), np.float32)
    kernels.head(*states, *w.arguments, bias, y, T, D, V, w.workspace(kernels, 7, 60))
    close(y.array, h, w.exact, bias, 3e-4)


@pytest.mark.parametrize("bits, group", [(16, 0), (8, 72), (4, 128)])
@pytest.mark.parametrize("T, V, D, multiprocessors", [SHAPES[i] for i in (0, 3, 4, 7)])
def test_head_on_older_cards(older, rng, bits, group, T, V, D, multiprocessors):
    check_head(older, rng, bits, group, T, V, D, multiprocessors)


@GROUPS
@pytest.mark.parametrize("orders", [0, 2])
@pytest.mark.parametrize("T, D, I, multiprocessors", [(1, 16, 5, 1), (8, 64, 100, 2), (40, 272, 37, 100), (65, 80, 60, 1)])
def test_linear_in(kernels, rng, bits, group, orders, T, D, I, multiprocessors):  # noqa: E741
    states, h = normed(rng, T, D)
    w = Weights(rng, bits, group, 3 * D + I, D, (3 * D, I) if orders and bits < 16 else ())
    bias = rng.standard_normal(I).astype(np.float32)
    qkv, both = (
        unwritten((T, 3 * D), np.float16),
        inout(np.full((T, D + I), 7, np.float16), np.arange(D + I) < np.full((T, 1), D)),
    )
    kernels.linear_in(*states, *w.arguments, bias, qkv, both, T, D, I, w.workspace(kernels, T, multiprocessors))
    close(qkv.array, h, w.exact[: 3 * D], 0, 1e-3)
    close(both.array[:, D:], h, w.exact[3 * D :], bias, 1e-3, reference.gelu_new)
    assert (both.array[:, :D] == 7).all()


@GROUPS
@pytest.mark.parametrize("orders", [0, 1])
@pytest.mark.parametrize(
    "T, D, I, multiprocessors",
    [(1, 16, 48, 1), (2, 40, 1500, 50), (8, 72, 285, 2), (30, 24, 2201, 80), (40, 8, 1300, 9), (100, 136, 99, 1)],
)
def test_linear_out(kernels, rng, bits, group, orders, T, D, I, multiprocessors):  # noqa: E741
    both, x = rng.standard_normal((T, D + I)).astype(np.float16), rng.standard_normal((T, D)).astype(np.float32)
    w = Weights(rng, bits, group, D, D + I, (D,) if orders and bits < 16 else ())
    bias, y = rng.standard_normal(D).astype(np.float32), unwritten((T, D), np.float32)
    workspace = w.workspace(kernels, T, multiprocessors)
    kernels.linear_out(both, *w.arguments, bias, x, y, T, D, I, workspace)
    close(y.array, both.astype(np.float64), w.exact, bias + x.astype(np.float64), 1e-5)
    kernels.linear_out_in_place(both, *w.arguments, bias, state := inout(x.copy()), T, D, I, workspace)
    assert np.array_equal(state.array, y.array)
