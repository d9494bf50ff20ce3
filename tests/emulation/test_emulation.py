"""The emulated device itself: what is right passes, and each planted mistake is found and named."""

from __future__ import annotations

import numpy as np
import pytest

from .build import KernelError, build, inout, unwritten

# Each kernel, and what a mistake changes in it: MISTAKE is the number of one, 0 is right.
KERNELS = r"""
#define THREADS 64
template <int MISTAKE>
__global__ void rotate(const float* x, float* y, int n) {  // y[i] = x[i + 1], through shared memory
    MOSS_DYNAMIC_SHARED(float, tile);
    int i = threadIdx.x;
    if (i < n || MISTAKE == 1) tile[i] = x[i];                                    // 1: reads past x
    if (MISTAKE != 2) __syncthreads();                                            // 2: race in shared memory
    if (i < n) y[MISTAKE == 3 ? i + 1 : i] = tile[MISTAKE == 4 ? i + 1 : (i + 1) % n];  // 3: past y; 4: never written
    if (MISTAKE == 5) tile[i] = 0;                                                // 5: while another may still read it
    if (MISTAKE == 6) const_cast<float*>(x)[i % n] = 0;                           // 6: writes an input
    if (MISTAKE == 7) tile[i + THREADS] = 0;                                      // 7: past the end of shared memory
    if (MISTAKE == 8 && i < n) y[i] += y[(i + 1) % n];                            // 8: race in global memory
}

__global__ void fixed_array(float* y, int off) {
    __shared__ float tile[THREADS];
    tile[threadIdx.x] = threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x + off];
}

__global__ void leaves_early(float* y, int n) {
    if ((int)threadIdx.x >= n) return;
    __syncthreads();
    y[threadIdx.x] = 1;
}

__global__ void two_barriers(float* y, int n) {
    if ((int)threadIdx.x < n) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    y[threadIdx.x] = 1;
}

__global__ void warp_and_block(float* y, int n) {
    if ((int)threadIdx.x < n)
        __syncwarp();
    else
        __syncthreads();
    y[threadIdx.x] = 1;
}

__global__ void through_warp(float* y, int synchronised) {  // neighbours in a warp exchange
    MOSS_DYNAMIC_SHARED(float, tile);
    tile[threadIdx.x] = threadIdx.x;
    if (synchronised) __syncwarp();
    y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void half_of_warp(float* y, unsigned mask) {
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(mask, (float)threadIdx.x, 1);
    else y[threadIdx.x] = __shfl_xor_sync(0xffff0000u, (float)threadIdx.x, 2);
}

__global__ void from_a_lane_that_left(float* y) {
    if (threadIdx.x % 32 == 7) return;
    y[threadIdx.x] = __shfl_sync(0xffffffffu, (float)threadIdx.x, 7);
}

template <int WAIT, bool BARRIER>
__global__ void async(const half* x, half* y) {
    MOSS_DYNAMIC_SHARED(half, tile);
    int i = threadIdx.x;
    cp_async16(tile + i * 8, x + i * 8);
    cp_async_commit();
    cp_async16(tile + (THREADS + i) * 8, x + (THREADS + i) * 8, i % 3 ? 16 : 6);
    cp_async_commit();
    if (WAIT >= 0) cp_async_wait<WAIT < 0 ? 0 : WAIT>();
    if (BARRIER) __syncthreads();
    for (int e = i; e < 2 * THREADS * 8; e += THREADS) y[e] = tile[e];
}

__global__ void vectors(const float* x, float* y, int off) {
    float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + off);
    *reinterpret_cast<float4*>(y + 4 * threadIdx.x) = make_float4(v.w, v.z, v.y, v.x);
}

__global__ void blocks_share(float* y) { y[0] = blockIdx.x; }
__global__ void add_up(float* y, int atomic) {
    if (atomic) atomicAdd(y, 1.0f);
    else y[0] += 1;
}
// The block that comes last adds up what all blocks have written.
// MISTAKE 1: no fence before the atomic, 2: none after it, 3: another block than the last.
template <int MISTAKE>
__global__ void last_adds(float* partial, unsigned* count, float* y) {
    __shared__ bool last;
    partial[blockIdx.x * THREADS + threadIdx.x] = blockIdx.x + 1;
    if (MISTAKE != 1) __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(count, 1u) == gridDim.x - 1 || MISTAKE == 3;
        if (MISTAKE != 2) __threadfence();
    }
    __syncthreads();
    if (!last) return;
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; b++) sum += partial[b * THREADS + (threadIdx.x + 1) % THREADS];
    y[threadIdx.x] = sum;
}
__global__ void reads_what_it_wrote(float* y) {
    y[threadIdx.x] = 1;
    y[threadIdx.x] = __ldg(y + threadIdx.x);
}
__global__ void reads_workspace(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void local_array(float* y, int n) {
    float a[4] = {1, 2, 3, 4};
    y[threadIdx.x] = a[(threadIdx.x + n) % 5];
}
__global__ void too_large(float* y) { MOSS_DYNAMIC_SHARED(float, tile); tile[0] = 1; y[0] = tile[0]; }

#define SIX(M) case M: MOSS_LAUNCH(rotate<M>, 1, THREADS, shared, 0, x, y, n); break;
void c_rotate(int mistake, int shared, const float* x, float* y, int n) {
    switch (mistake) { SIX(0) SIX(1) SIX(2) SIX(3) SIX(4) SIX(5) SIX(6) SIX(7) SIX(8) }
}
void c_fixed_array(float* y, int off) { MOSS_LAUNCH(fixed_array, 1, THREADS, 0, 0, y, off); }
void c_leaves_early(float* y, int n) { MOSS_LAUNCH(leaves_early, 1, THREADS, 0, 0, y, n); }
void c_two_barriers(float* y, int n) { MOSS_LAUNCH(two_barriers, 1, THREADS, 0, 0, y, n); }
void c_warp_and_block(float* y, int n) { MOSS_LAUNCH(warp_and_block, 1, THREADS, 0, 0, y, n); }
void c_through_warp(float* y, int synchronised) { MOSS_LAUNCH(through_warp, 1, THREADS, 256, 0, y, synchronised); }
void c_half_of_warp(float* y, int mask) { MOSS_LAUNCH(half_of_warp, 1, THREADS, 0, 0, y, (unsigned)mask); }
void c_from_a_lane_that_left(float* y) { MOSS_LAUNCH(from_a_lane_that_left, 1, THREADS, 0, 0, y); }
void c_async(const half* x, half* y, int wait, bool barrier) {
    if (wait == 0 && barrier) MOSS_LAUNCH((async<0, true>), 1, THREADS, 2048, 0, x, y);
    if (wait == 0 && !barrier) MOSS_LAUNCH((async<0, false>), 1, THREADS, 2048, 0, x, y);
    if (wait == 1) MOSS_LAUNCH((async<1, true>), 1, THREADS, 2048, 0, x, y);
    if (wait == -1) MOSS_LAUNCH((async<-1, true>), 1, THREADS, 2048, 0, x, y);
}
void c_vectors(const float* x, float* y, int off) { MOSS_LAUNCH(vectors, 1, THREADS, 0, 0, x, y, off); }
void c_blocks_share(float* y, int blocks) { MOSS_LAUNCH(blocks_share, blocks, 1, 0, 0, y); }
void c_add_up(float* y, int blocks, int atomic) {
    cudaMemsetAsync(y, 0, 4, 0);
    MOSS_LAUNCH(add_up, blocks, atomic ? THREADS : 1, 0, 0, y, atomic);
}
void c_last_adds(int mistake, int blocks, float* partial, uint32_t* count, float* y) {
    cudaMemsetAsync(count, 0, 4, 0);
    if (mistake == 0) MOSS_LAUNCH(last_adds<0>, blocks, THREADS, 0, 0, partial, count, y);
    if (mistake == 1) MOSS_LAUNCH(last_adds<1>, blocks, THREADS, 0, 0, partial, count, y);
    if (mistake == 2) MOSS_LAUNCH(last_adds<2>, blocks, THREADS, 0, 0, partial, count, y);
    if (mistake == 3) MOSS_LAUNCH(last_adds<3>, blocks, THREADS, 0, 0, partial, count, y);
}
void c_reads_what_it_wrote(float* y) { MOSS_LAUNCH(reads_what_it_wrote, 1, THREADS, 0, 0, y); }
void c_one_after_the_other(float* y) {
    MOSS_LAUNCH(blocks_share, 1, 1, 0, 0, y);
    MOSS_LAUNCH(add_up, 1, 1, 0, 0, y, 0);
    MOSS_LAUNCH(add_up, 1, 1, 0, 0, y, 0);
}
void c_reads_workspace(float* workspace, float* y) { MOSS_LAUNCH(reads_workspace, 1, THREADS, 0, 0, workspace, y); }
void c_local_array(float* y, int n) { MOSS_LAUNCH(local_array, 1, 4, 0, 0, y, n); }
void c_too_large(float* y, int bytes, int threads) { MOSS_LAUNCH(too_large, 1, threads, bytes, 0, y); }
void c_host_reads(float* y) { y[0] += 1; }
void c_null(float* y) { MOSS_LAUNCH(blocks_share, 1, 1, 0, 0, (float*)nullptr); }
"""


@pytest.fixture(scope="module")
def kernels():
    return build(KERNELS)


@pytest.fixture
def x():
    return np.random.default_rng().standard_normal(64).astype(np.float32)


def output(n=64, dtype=np.float32):
    return unwritten(n, dtype)


@pytest.mark.parametrize("n", [64, 33, 1])
def test_a_right_kernel_passes(kernels, x, n):
    y = output(n)
    for _ in range(5):
        kernels.c_rotate(0, 256, x[:n], y, n)
        assert np.array_equal(y.array, np.roll(x[:n], -1))


@pytest.mark.parametrize(
    ("mistake", "n", "says"),
    [
        (
            1,
            33,
            r"rotate<1>, block \(0, 0, 0\), thread \(\d+, 0, 0\): reads x\[\d+\] \(of 33\) \(wrappers:\d+\): out of bounds",
        ),
        (
            2,
            64,
            r"race: (reads|writes) byte \d+ of dynamic shared memory|reads byte \d+ of dynamic shared memory .*never written",
        ),
        (3, 64, r"thread \(63, 0, 0\): writes y\[64\] \(of 64\) .*out of bounds"),
        (4, 33, r"thread \(32, 0, 0\): reads byte 132 of dynamic shared memory .*never written"),
        (5, 64, r"race: (writes byte \d+ of dynamic.* read|reads byte \d+ of dynamic.* wrote)"),
        (6, 64, r"writes x\[\d+\] .*an input that is not to be written"),
        (7, 64, r"writes byte \d+ of dynamic shared memory .*out of bounds"),
        (8, 64, r"reads y\[\d+\].*never written|race: (reads|writes) y\[\d+\]"),
    ],
)
def test_mistakes_with_memory(kernels, x, mistake, n, says):
    for _ in range(3):  # in whatever order threads run
        with pytest.raises(KernelError, match=says):
            kernels.c_rotate(mistake, 256, x[:n], output(n), n)


def test_a_race_shows_with_its_seed_again(kernels, x):
    with pytest.raises(KernelError) as first:
        kernels.c_rotate(5, 256, x, output(), 64)
    seed = int(str(first.value).partition("seed=")[2].rstrip("]"))
    with pytest.raises(KernelError) as second:
        kernels.c_rotate(5, 256, x, output(), 64, seed=seed)
    assert str(first.value) == str(second.value)


def test_fixed_shared_arrays(kernels):
    y = output()
    kernels.c_fixed_array(y, 0)
    assert np.array_equal(y.array, np.arange(64))
    with pytest.raises(KernelError, match=r"thread \(63, 0, 0\): index 64 is outside of the array \(wrappers:\d+\)"):
        kernels.c_fixed_array(y, 1)


@pytest.mark.parametrize(
    ("name", "n", "says"),
    [
        ("leaves_early", 32, r"__syncthreads|returns while others wait"),
        ("two_barriers", 20, r"not all wait at the same __syncthreads: \d+ of its threads, the first \(\d+, 0, 0\): waits at"),
        ("warp_and_block", 16, r"nothing can go on: .*__syncwarp"),
    ],
)
def test_divergent_barriers(kernels, name, n, says):
    for _ in range(3):
        with pytest.raises(KernelError, match=says):
            getattr(kernels, f"c_{name}")(output(), n)
    y = output()
    if name != "warp_and_block":
        getattr(kernels, f"c_{name}")(y, 64)
        assert (y.array == 1).all()


def test_syncwarp_orders_a_warp(kernels):
    y = output()
    kernels.c_through_warp(y, 1)
    assert np.array_equal(y.array, np.arange(64) ^ 1)
    with pytest.raises(KernelError, match=r"of the same warp|never written"):
        kernels.c_through_warp(y, 0)


def test_masks(kernels):
    y = output()
    kernels.c_half_of_warp(y, 0x0000FFFF)
    lanes = np.arange(64)
    assert np.array_equal(y.array, np.where(lanes % 32 < 16, lanes ^ 1, lanes ^ 2))
    with pytest.raises(KernelError, match=r"with mask 00007fff, which lane 15 is not in"):
        kernels.c_half_of_warp(y, 0x00007FFF)
    with pytest.raises(KernelError, match="takes the value of lane 7, which does not take part"):
        kernels.c_from_a_lane_that_left(y)


def test_asynchronous_copies(kernels):
    x = np.random.default_rng().standard_normal(1024).astype(np.float16)
    y, expected = output(1024, np.float16), x.copy()
    for i in range(0, 64, 3):
        expected[512 + i * 8 + 3 : 512 + i * 8 + 8] = 0
    kernels.c_async(x, y, 0, True)
    assert np.array_equal(y.array, expected)
    for wait in (1, -1):
        with pytest.raises(KernelError, match=r"reads byte \d+ of dynamic .*a cp.async to it has not been waited for"):
            kernels.c_async(x, y, wait, True)
    with pytest.raises(KernelError, match=r"cp.async to it has not|race|never written"):
        kernels.c_async(x, y, 0, False)


def test_copies_of_older_architectures_come_at_once():
    x = np.random.default_rng().standard_normal(1024).astype(np.float16)
    y = output(1024, np.float16)
    build(KERNELS, arch=750).c_async(x, y, -1, True)
    assert np.array_equal(y.array[:512], x[:512])


def test_alignment(kernels):
    x, y = np.arange(260, dtype=np.float32), output(256)
    kernels.c_vectors(x, y, 4)
    assert np.array_equal(y.array, x[4:].reshape(64, 4)[:, ::-1].ravel())
    with pytest.raises(KernelError, match=r"x\[\d+\] is not aligned to 16 bytes \(wrappers:\d+\)"):
        kernels.c_vectors(x, y, 1)


def test_blocks_are_not_ordered(kernels):
    y = output(1)
    kernels.c_blocks_share(y, 1)
    for call in (lambda: kernels.c_blocks_share(y, 2), lambda: kernels.c_add_up(y, 2, 0)):
        with pytest.raises(KernelError, match=r"race: \w+ y\[0\] .*another block wrote"):
            call()
    kernels.c_add_up(y, 3, 1)
    assert y.array[0] == 192
    kernels.c_one_after_the_other(y)
    assert y.array[0] == 2


def test_blocks_that_tell_each_other(kernels):
    for blocks in (1, 2, 7):
        y = output()
        kernels.c_last_adds(0, blocks, output(blocks * 64), output(1, np.uint32), y)
        assert (y.array == blocks * (blocks + 1) / 2).all()
    for mistake, says in ((1, "another block wrote"), (2, "another block wrote"), (3, "never written|another block")):
        with pytest.raises(KernelError, match=rf"reads partial\[\d+\] .*({says})"):
            kernels.c_last_adds(mistake, 5, output(5 * 64), output(1, np.uint32), output())


def test_what_a_kernel_writes_is_not_unchanging(kernels):
    with pytest.raises(
        KernelError, match=r"reads y\[\d+\] \(wrappers:\d+\) as if it never changed, but the kernel writes it \(wrappers"
    ):
        kernels.c_reads_what_it_wrote(output())


def test_what_was_written_is_remembered(kernels, x):
    y, workspace = output(), output()
    with pytest.raises(KernelError, match=r"reads workspace\[\d+\] .*never written"):
        kernels.c_reads_workspace(workspace, y)
    kernels.c_rotate(0, 256, x, workspace, 64)
    kernels.c_reads_workspace(workspace, y)
    assert np.array_equal(y.array, np.roll(x, -1))
    with pytest.raises(KernelError, match=r"thread \(5, 0, 0\): reads workspace\[5\] .*never written"):
        kernels.c_reads_workspace(inout(x, np.arange(64) != 5), y)


def test_local_arrays(kernels):
    kernels.c_local_array(output(4), 0)
    with pytest.raises(KernelError, match=r"thread \(0, 0, 0\): index 4 is outside of the array"):
        kernels.c_local_array(output(4), 4)


@pytest.mark.parametrize(
    ("bytes_", "threads", "says"),
    [
        (164 << 10, 1, "167936 bytes of shared memory are more than the 166912"),
        (16, 1025, r"a block of \(1025, 1, 1\) threads is not possible"),
        (0, 1, "writes byte 0 of dynamic shared memory .*out of bounds"),
    ],
)
def test_launches(kernels, bytes_, threads, says):
    with pytest.raises(KernelError, match=says):
        kernels.c_too_large(output(1), bytes_, threads)


def test_pointers_of_the_other_side(kernels):
    with pytest.raises(KernelError, match=r"the host reads the device's memory: y\[0\]"):
        kernels.c_host_reads(inout(np.ones(1, np.float32)))
    with pytest.raises(KernelError, match=r"writes what a null pointer leads to \(wrappers:\d+\)"):
        kernels.c_null(output(1))
