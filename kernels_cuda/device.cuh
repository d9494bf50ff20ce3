// What the kernels use beside CUDA's own names: launching, shared memory, 16-byte loads, copies that arrive later, products of small
// matrices, sums over a warp and a block. All PTX and all that depends on the architecture is here.
//
// sm_75: matrix products (mma.m16n8k8), ldmatrix. sm_80: m16n8k16, cp.async; before, cp_async16 copies at once.
// With MOSS_EMULATED defined, tests/emulation/ gives these and CUDA's names their meaning, on the host.
#pragma once
// Whether there are matrix instructions. The host's pass has none, but must read what uses them.
#define MOSS_TENSOR_CORES (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 750)

#ifdef MOSS_EMULATED
#include "emulated.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace moss_cuda {

inline void check(cudaError_t e, const char* what) {
    if (e != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(e));
}

inline void allow_shared(const void* kernel, const char* name, size_t bytes, size_t& allowed) {
    if (bytes <= allowed) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes), name);
    allowed = bytes;
}

}  // namespace moss_cuda

// Starts `kernel`, in parentheses where its template arguments have commas. Throws std::runtime_error if it cannot be started.
// More than 48 KB of shared memory have to be asked for, once for each kernel, so a launch's place must name one kernel only:
// in a template, its arguments have to be the template's.
#define MOSS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                       \
    do {                                                                                  \
        static size_t moss_allowed = 48 << 10;                                            \
        const size_t moss_shared = (shared_bytes);                                        \
        moss_cuda::allow_shared((const void*)(kernel), #kernel, moss_shared, moss_allowed); \
        kernel<<<(grid), (block), moss_shared, (stream)>>>(__VA_ARGS__);                  \
        moss_cuda::check(cudaGetLastError(), #kernel);                                    \
    } while (0)

// The block's dynamic shared memory: T* name, aligned to 16 bytes.
#define MOSS_DYNAMIC_SHARED(T, name)              \
    extern __shared__ uint4 moss_dynamic_shared[]; \
    T* const name = reinterpret_cast<T*>(moss_dynamic_shared)

namespace moss_cuda {

// What of the current device decides how work is divided. arch: 800 is compute capability 8.0.
struct Device {
    int arch, multiprocessors;
};

inline Device ask_device() {
    int number, major, minor, multiprocessors;
    check(cudaGetDevice(&number), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number), "compute capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number), "compute capability");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, number), "multiprocessors");
    return {100 * major + 10 * minor, multiprocessors};
}

inline Device& device() {  // asked once: a launch needs it several times. A test may make it another one
    static Device one = ask_device();
    return one;
}

// 16 bytes of what no thread writes while the kernel runs. `once`: they will not be needed again, and leave the L1 cache to others.
__device__ __forceinline__ uint4 load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
__device__ __forceinline__ uint4 load16_once(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies `bytes` (0 … 16) from global to shared memory, which gets zeros after them, up to 16. Both addresses are multiples of 16.
// What was copied may be read after a wait, and by other threads after a barrier too.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes = 16) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
#else
    uint4 v = make_uint4(0, 0, 0, 0);
    if (bytes == 16)
        v = *static_cast<const uint4*>(global);
    else
        for (int i = 0; i < bytes; i++) reinterpret_cast<uint8_t*>(&v)[i] = static_cast<const uint8_t*>(global)[i];
    *static_cast<uint4*>(shared) = v;
#endif
}

// Ends a group of copies; waits until at most N of this thread's groups are under way.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Bit by bit any function of three: LUT is its value for a = 0xf0, b = 0xcc, c = 0xaa.
template <unsigned LUT>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(LUT));
    return r;
}

#if MOSS_TENSOR_CORES

// Matrices of 8 rows of 16 bytes (8 halves) each from shared memory. Lane i gives the address of row i % 8 of matrix i / 8, and gets, of
// each matrix, the halves 2 (i % 4) and 2 (i % 4) + 1 of row i / 4; of the matrix transposed with _trans.
#define MOSS_LDMATRIX_4(name, trans)                                                                          \
    __device__ __forceinline__ void name(uint32_t r[4], const void* row) {                                    \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];"              \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                         \
                     : "r"(shared_address(row))                                                               \
                     : "memory");                                                                             \
    }
#define MOSS_LDMATRIX_2(name, trans)                                                          \
    __device__ __forceinline__ void name(uint32_t r[2], const void* row) {                    \
        asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0, %1}, [%2];"      \
                     : "=r"(r[0]), "=r"(r[1])                                                 \
                     : "r"(shared_address(row))                                               \
                     : "memory");                                                             \
    }
MOSS_LDMATRIX_4(ldmatrix_x4, "")
MOSS_LDMATRIX_4(ldmatrix_x4_trans, ".trans")
MOSS_LDMATRIX_2(ldmatrix_x2, "")
MOSS_LDMATRIX_2(ldmatrix_x2_trans, ".trans")
#undef MOSS_LDMATRIX_4
#undef MOSS_LDMATRIX_2

// c += a b: 16 x 8 floats, 16 x 8 and 8 x 8 halves. Lane i has, with g = i / 4 and t = 2 (i % 4):
// a[0] of row g, a[1] of row g + 8, the halves t and t + 1; b[0] of column g, the rows t and t + 1; c of rows g, g, g + 8, g + 8, columns
// t, t + 1, t, t + 1.
__device__ __forceinline__ void mma_1688(float c[4], const uint32_t a[2], const uint32_t b[1]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// c += a b: 16 x 8 floats, 16 x 16 and 16 x 8 halves; a[2], a[3] and b[1] are the second half, eight further on.
__device__ __forceinline__ void mma_16816(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_1688(c, a, b);
    mma_1688(c, a + 2, b + 1);
#endif
}

#endif  // sm_75

}  // namespace moss_cuda
#endif  // MOSS_EMULATED

namespace moss_cuda {

// Two halves lie in 32 bits, the first in the lower ones.
__device__ __forceinline__ half2 as_half2(uint32_t v) { return reinterpret_cast<const half2&>(v); }
__device__ __forceinline__ uint32_t as_uint32(half2 v) { return reinterpret_cast<const uint32_t&>(v); }

struct Sum {
    template <typename T>
    __device__ static T join(T a, T b) { return a + b; }
};
struct Max {
    template <typename T>
    __device__ static T join(T a, T b) { return a > b ? a : b; }
};

// Over each WIDTH lanes that lie together; all of them get it.
template <typename How, typename T, int WIDTH = 32>
__device__ __forceinline__ T warp_all(T v) {
#pragma unroll
    for (int o = WIDTH / 2; o; o /= 2) v = How::join(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}
template <typename T>
__device__ __forceinline__ T warp_sum(T v) { return warp_all<Sum>(v); }
template <typename T>
__device__ __forceinline__ T warp_max(T v) { return warp_all<Max>(v); }

// Over a one-dimensional block of THREADS, a multiple of 32; all threads get it. All must come.
template <typename How, int THREADS, typename T>
__device__ __forceinline__ T block_all(T v) {
    constexpr int WARPS = THREADS / 32;
    static_assert(THREADS % 32 == 0 && WARPS <= 32, "whole warps");
    __shared__ T of_warp[WARPS];
    v = warp_all<How>(v);
    __syncthreads();  // whoever still reads the last call's
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
    __syncthreads();
    T all = of_warp[0];
#pragma unroll
    for (int i = 1; i < WARPS; i++) all = How::join(all, of_warp[i]);
    return all;
}
template <int THREADS, typename T>
__device__ __forceinline__ T block_sum(T v) { return block_all<Sum, THREADS>(v); }
template <int THREADS, typename T>
__device__ __forceinline__ T block_max(T v) { return block_all<Max, THREADS>(v); }

}  // namespace moss_cuda
