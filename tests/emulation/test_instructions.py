"""What the emulated device's instructions compute: halves, shuffles, votes, matrix products in fragments, bits."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from .build import KernelError, build, inout, unwritten

KERNELS = r"""
__global__ void shuffle(const int* x, int* y, int how, int by, int width) {
    int v = x[threadIdx.x];
    const unsigned all = 0xffffffffu;
    y[threadIdx.x] = how == 0   ? __shfl_sync(all, v, by, width)
                     : how == 1 ? __shfl_up_sync(all, v, by, width)
                     : how == 2 ? __shfl_down_sync(all, v, by, width)
                                : __shfl_xor_sync(all, v, by, width);
}
__global__ void shuffle_wide(const int64_t* x, int64_t* y) { y[threadIdx.x] = __shfl_down_sync(~0u, x[threadIdx.x], 1); }
__global__ void vote(const int32_t* x, int64_t* y) {
    bool mine = x[threadIdx.x];
    y[threadIdx.x * 3] = __ballot_sync(~0u, mine);
    y[threadIdx.x * 3 + 1] = __any_sync(~0u, mine);
    y[threadIdx.x * 3 + 2] = __all_sync(~0u, mine);
}
__global__ void block_vote(const int32_t* x, int32_t* y) {
    bool mine = x[threadIdx.x];
    y[threadIdx.x * 3] = __syncthreads_count(mine);
    y[threadIdx.x * 3 + 1] = __syncthreads_or(mine);
    y[threadIdx.x * 3 + 2] = __syncthreads_and(mine);
}
template <int THREADS>
__global__ void sums(const float* x, float* y) {
    y[threadIdx.x] = block_sum<THREADS>(x[threadIdx.x]) + 1000 * block_max<THREADS>(x[threadIdx.x]);
}
__global__ void half_arithmetic(const half* a, const half* b, const half* c, half* y, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        half* to = y + 6 * i;
        to[0] = __hadd(a[i], b[i]), to[1] = __hsub(a[i], b[i]), to[2] = __hmul(a[i], b[i]), to[3] = __hdiv(a[i], b[i]);
        half2 both = __hfma2(__half2half2(a[i]), __halves2half2(b[i], c[i]), __halves2half2(c[i], b[i]));
        to[4] = __low2half(both), to[5] = __high2half(both);
    }
}
__global__ void from_float(const float* x, half* y, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = __float2half_rn(x[i]);
}
__global__ void to_float(const half* x, float* y, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = __half2float(x[i]);
}
// c (16, 8) += a (16, K) b (K, 8): a is in shared memory as it is, b as it is, and transposed, too.
template <int K, bool TRANSPOSED>
__global__ void product(const half* a, const half* b, float* c) {
    MOSS_DYNAMIC_SHARED(half, tile);
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4 * 2;
    half *sa = tile, *sb = tile + 16 * K;
    for (int i = lane; i < 16 * K; i += 32) sa[i] = a[i];
    for (int i = lane; i < 8 * K; i += 32) sb[TRANSPOSED ? i % 8 * K + i / 8 : i] = b[i];
    __syncthreads();
    float sum[4] = {c[g * 8 + t], c[g * 8 + t + 1], c[(g + 8) * 8 + t], c[(g + 8) * 8 + t + 1]};
    uint32_t fa[4], fb[2];
    if (K == 16) {
        ldmatrix_x4(fa, sa + lane % 16 * K + lane / 16 * 8);
        if (TRANSPOSED) ldmatrix_x2(fb, sb + lane % 8 * K + lane / 8 % 2 * 8);
        else ldmatrix_x2_trans(fb, sb + lane % 16 * 8);
        mma_16816(sum, fa, fb);
    } else {
        ldmatrix_x2(fa, sa + lane % 16 * K);
        uint32_t of_both[4];
        if (TRANSPOSED) ldmatrix_x4(of_both, sb + lane % 8 * K);
        else ldmatrix_x4_trans(of_both, sb + lane % 8 * 8);
        mma_1688(sum, fa, of_both);
    }
    c[g * 8 + t] = sum[0], c[g * 8 + t + 1] = sum[1], c[(g + 8) * 8 + t] = sum[2], c[(g + 8) * 8 + t + 1] = sum[3];
}
__global__ void ldmatrix_of_few(const half* a, float* c, int lanes) {
    MOSS_DYNAMIC_SHARED(half, tile);
    for (int i = threadIdx.x; i < 256; i += blockDim.x) tile[i] = a[i];
    __syncthreads();
    uint32_t r[4];
    if ((int)threadIdx.x < lanes) ldmatrix_x4(r, tile + threadIdx.x * 8 + (lanes == 32));
}
__global__ void bits(const uint32_t* x, uint32_t* y) {
    uint32_t a = x[0], b = x[1], c = x[2];
    y[0] = lop3<0xea>(a, b, c), y[1] = lop3<0x1b>(a, b, c), y[2] = __byte_perm(a, b, 0x7c25);
    y[3] = __dp4a((int)a, (int)b, (int)c), y[4] = __popc(a), y[5] = __clz((int)b), y[6] = __ffs((int)c);
    y[7] = __funnelshift_r(a, b, 7);
}

void c_shuffle(const int32_t* x, int32_t* y, int how, int by, int width) {
    MOSS_LAUNCH(shuffle, 1, 64, 0, 0, x, y, how, by, width);
}
void c_shuffle_wide(const int64_t* x, int64_t* y) { MOSS_LAUNCH(shuffle_wide, 1, 32, 0, 0, x, y); }
void c_vote(const int32_t* x, int64_t* y) { MOSS_LAUNCH(vote, 1, 64, 0, 0, x, y); }
void c_block_vote(const int32_t* x, int32_t* y) { MOSS_LAUNCH(block_vote, 1, 64, 0, 0, x, y); }
void c_sums(const float* x, float* y) { MOSS_LAUNCH(sums<96>, 1, 96, 0, 0, x, y); }
void c_half_arithmetic(const half* a, const half* b, const half* c, half* y, int n) {
    MOSS_LAUNCH(half_arithmetic, 1, 32, 0, 0, a, b, c, y, n);
}
void c_from_float(const float* x, half* y, int n) { MOSS_LAUNCH(from_float, 1, 32, 0, 0, x, y, n); }
void c_to_float(const half* x, float* y, int n) { MOSS_LAUNCH(to_float, 1, 32, 0, 0, x, y, n); }
void c_product(const half* a, const half* b, float* c, int K, bool transposed) {
    const int bytes = 48 * K;
    if (K == 16 && transposed) MOSS_LAUNCH((product<16, true>), 1, 32, bytes, 0, a, b, c);
    if (K == 16 && !transposed) MOSS_LAUNCH((product<16, false>), 1, 32, bytes, 0, a, b, c);
    if (K == 8 && transposed) MOSS_LAUNCH((product<8, true>), 1, 32, bytes, 0, a, b, c);
    if (K == 8 && !transposed) MOSS_LAUNCH((product<8, false>), 1, 32, bytes, 0, a, b, c);
}
void c_ldmatrix_of_few(const half* a, float* c, int lanes) { MOSS_LAUNCH(ldmatrix_of_few, 1, 32, 512, 0, a, c, lanes); }
void c_bits(const uint32_t* x, uint32_t* y) { MOSS_LAUNCH(bits, 1, 1, 0, 0, x, y); }
"""


@pytest.fixture(scope="module", params=[750, 800])
def kernels(request):
    return build(KERNELS, request.param)


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"np.random.default_rng({seed})")
    return np.random.default_rng(seed)


@pytest.mark.parametrize("width", [32, 16, 4, 1])
@pytest.mark.parametrize("by", [0, 1, 5, 16, 31])
def test_shuffles(kernels, rng, by, width):
    x, lanes = rng.integers(-(2**31), 2**31, 64, dtype=np.int32), np.arange(64)
    first, last = lanes // width * width, lanes // width * width + width - 1
    sources = [first + by % width, lanes - by, lanes + by, lanes ^ by]
    sources[1] = np.where(sources[1] < first, lanes, sources[1])
    for how in (2, 3):
        sources[how] = np.where(sources[how] > last, lanes, sources[how])
    for how, source in enumerate(sources):
        y = unwritten(64, np.int32)
        kernels.c_shuffle(x, y, how, by, width)
        assert np.array_equal(y.array, x[source]), how


def test_a_shuffle_of_an_impossible_width(kernels):
    with pytest.raises(KernelError, match="__shfl_sync of width 12"):
        kernels.c_shuffle(np.zeros(64, np.int32), unwritten(64, np.int32), 0, 1, 12)


def test_shuffles_of_eight_bytes(kernels, rng):
    x, y = rng.integers(-(2**62), 2**62, 32), unwritten(32, np.int64)
    kernels.c_shuffle_wide(x, y)
    assert np.array_equal(y.array, [*x[1:], x[31]])


@pytest.mark.parametrize("share", [0, 0.1, 0.9, 1])
def test_votes(kernels, rng, share):
    x, y = (rng.random(64) < share).astype(np.int32), unwritten((64, 3), np.int64)
    kernels.c_vote(x, y)
    for warp in (slice(32), slice(32, 64)):
        ballot = sum(1 << i for i, mine in enumerate(x[warp]) if mine)
        assert (y.array[warp] == [ballot, x[warp].any(), x[warp].all()]).all()
    y = unwritten((64, 3), np.int32)
    kernels.c_block_vote(x, y)
    assert (y.array == [x.sum(), x.any(), x.all()]).all()


def test_sums_and_maxima_of_a_block(kernels, rng):
    x, y = rng.integers(-50, 50, 96).astype(np.float32), unwritten(96, np.float32)
    kernels.c_sums(x, y)
    assert (y.array == x.sum() + 1000 * x.max()).all()


def equal(ours: np.ndarray, exact: np.ndarray) -> None:
    same = (ours.view(np.uint16) == exact.view(np.uint16)) | (np.isnan(ours) & np.isnan(exact))
    assert same.all(), (ours[~same], exact[~same])


def halves(rng, n: int) -> np.ndarray:
    """Any bits, and numbers of like size, whose sums and quotients need rounding."""
    any_bits = rng.integers(0, 2**16, n, dtype=np.uint16).view(np.float16)
    return np.where(rng.random(n) < 0.5, any_bits, rng.standard_normal(n).astype(np.float16))


@pytest.mark.filterwarnings("ignore:(overflow|invalid|divide)")
def test_arithmetic_of_halves(kernels, rng):
    n = 20000
    a, b, c = halves(rng, n), halves(rng, n), halves(rng, n)
    y = unwritten((n, 6), np.float16)
    kernels.c_half_arithmetic(a, b, c, y, n)
    for i, exact in enumerate((a + b, a - b, a * b, a / b)):
        equal(y.array[:, i], exact)
    finite = np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))[:4000]
    for i in finite:
        x, y_, z = (Fraction(float(v[i])) for v in (a, b, c))
        assert y.array[i, 4] == nearest_half(x * y_ + z) and y.array[i, 5] == nearest_half(x * z + y_), (a[i], b[i], c[i])


def nearest_half(x: Fraction) -> np.float16:
    if abs(x) >= 65520:
        return np.float16(np.inf if x > 0 else -np.inf)
    near = np.float16(min(max(float(x), -65504), 65504))
    around = [near, np.nextafter(near, np.float16(-np.inf)), np.nextafter(near, np.float16(np.inf))]
    return min((h for h in around if np.isfinite(h)), key=lambda h: (abs(Fraction(float(h)) - x), h.view(np.uint16) & 1))


@pytest.mark.filterwarnings("ignore:overflow")
def test_rounding_to_halves(kernels, rng):
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    floats = unwritten(every.size, np.float32)
    kernels.c_to_float(every, floats, every.size)
    expected = every.astype(np.float32)
    assert np.array_equal(floats.array, expected, equal_nan=True) and (np.signbit(floats.array) == np.signbit(expected)).all()
    between = expected[np.isfinite(expected)]
    between = np.concatenate(
        [between, np.nextafter(between, np.inf), (between[:-1] + between[1:]) / 2, [np.inf, 65519.99, 65520]]
    )
    x = np.concatenate([between, rng.standard_normal(4000) * 10.0 ** rng.integers(-9, 6, 4000)]).astype(np.float32)
    x = x[(np.abs(x) >= np.finfo(np.float32).tiny) | (x == 0)]  # others are 0 to a kernel
    y = unwritten(x.size, np.float16)
    kernels.c_from_float(x, y, x.size)
    equal(y.array, x.astype(np.float16))


@pytest.mark.parametrize("K", [8, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_products_in_fragments(kernels, rng, K, transposed):
    a, b = rng.standard_normal((16, K)).astype(np.float16), rng.standard_normal((K, 8)).astype(np.float16)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    exact = c + a.astype(np.float64) @ b.astype(np.float64)
    kernels.c_product(a, b, inout(c), K, transposed)
    assert np.abs(c - exact).max() < 4e-6


def test_ldmatrix_wants_all_lanes_and_aligned_rows(kernels, rng):
    a = rng.standard_normal(256).astype(np.float16)
    with pytest.raises(KernelError, match="ldmatrix needs all 32 lanes, and 0000ffff came"):
        kernels.c_ldmatrix_of_few(a, unwritten(1, np.float32), 16)
    with pytest.raises(KernelError, match="a row starts at an address that is no multiple of 16"):
        kernels.c_ldmatrix_of_few(a, unwritten(1, np.float32), 32)


def test_bits(kernels, rng):
    x, y = rng.integers(1, 2**32, 3, dtype=np.uint32), unwritten(8, np.uint32)
    a, b, c = map(int, x)
    kernels.c_bits(x, y)
    by_bit = sum((0x1B >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))
    source = [a >> 8 * i & 255 for i in range(4)] + [b >> 8 * i & 255 for i in range(4)]
    permuted = source[5] | source[2] << 8 | (255 if source[4] & 128 else 0) << 16 | source[7] << 24
    dot = c + int(x[:1].view(np.int8).astype(int) @ x[1:2].view(np.int8).astype(int))
    shifted = (b << 32 | a) >> 7 & 0xFFFFFFFF
    expected = [
        (a & b) | c,
        by_bit,
        permuted,
        dot % 2**32,
        bin(a).count("1"),
        32 - b.bit_length(),
        (c & -c).bit_length(),
        shifted,
    ]
    assert y.array.tolist() == expected
