// CUDA's names for g++, with the meaning that the CUDA C++ Programming Guide gives them. device.cuh includes this where MOSS_EMULATED
// is defined; MOSS_EMULATED is the architecture, 750 for example, and becomes __CUDA_ARCH__.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "half.h"
#include "runtime.h"
#include "vectors.h"
#include "warps.h"

#define __CUDA_ARCH__ MOSS_EMULATED
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __constant__ const
#define __align__(n) alignas(n)
#define __shared__ static thread_local  // one for all threads of the block: they are one thread of the host

#define threadIdx (::moss_emulation::thread_index())
#define blockIdx (::moss_emulation::block_index())
#define blockDim (::moss_emulation::block_size())
#define gridDim (::moss_emulation::grid_size())
static constexpr int warpSize = 32;

#define MOSS_STRING_(x) #x
#define MOSS_STRING(x) MOSS_STRING_(x)
#define MOSS_SITE __FILE__ ":" MOSS_STRING(__LINE__)

typedef struct CUstream_st* cudaStream_t;

// ---- numbers -----------------------------------------------------------------------------------------------------------------

using std::max;
using std::min;
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __frsqrt_rn(float a) { return 1 / sqrtf(a); }
inline float rsqrtf(float a) { return 1 / sqrtf(a); }
inline float __saturatef(float a) { return a > 0 ? std::min(a, 1.0f) : 0; }
inline int __float_as_int(float f) { return (int)moss_emulation::bits_of(f); }
inline unsigned __float_as_uint(float f) { return moss_emulation::bits_of(f); }
inline float __int_as_float(int i) { return moss_emulation::float_of((unsigned)i); }
inline float __uint_as_float(unsigned u) { return moss_emulation::float_of(u); }
inline int __float2int_rn(float f) { return (int)std::nearbyint(f); }
inline float __int2float_rn(int i) { return (float)i; }
inline float __uint2float_rn(unsigned i) { return (float)i; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    uint64_t bytes = (uint64_t)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned s = selector >> 4 * i & 15, byte = bytes >> 8 * (s & 7) & 255;
        result |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (n & 31));
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
    return c;
}

// ---- memory ------------------------------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* p) {
    moss_emulation::reads_unchanging(p, sizeof(T));
    return *p;
}
template <typename T>
T __ldcs(const T* p) { return *p; }
template <typename T>
void __stcs(T* p, T value) { *p = value; }
inline void __threadfence() { ::moss_emulation::fence(); }
inline void __threadfence_block() {}

namespace moss_emulation {

// Loads and stores once checked, not seen by the compiler's instrumentation.
template <typename T, typename Change>
__attribute__((noinline, no_sanitize("thread"))) T update(T* p, Change change) {
    updates(p, sizeof(T));
    T before = *p;
    *p = change(before);
    return before;
}

}  // namespace moss_emulation

template <typename T, typename V>
T atomicAdd(T* p, V given) {
    T value = (T)given;
    return moss_emulation::update(p, [=](T v) { return (T)(v + value); });
}
template <typename T, typename V>
T atomicMax(T* p, V given) {
    T value = (T)given;
    return moss_emulation::update(p, [=](T v) { return std::max(v, value); });
}
template <typename T, typename V>
T atomicMin(T* p, V given) {
    T value = (T)given;
    return moss_emulation::update(p, [=](T v) { return std::min(v, value); });
}
template <typename T, typename V>
T atomicOr(T* p, V given) {
    T value = (T)given;
    return moss_emulation::update(p, [=](T v) { return v | value; });
}
template <typename T, typename V>
T atomicExch(T* p, V given) {
    T value = (T)given;
    return moss_emulation::update(p, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* p, T expected, T value) { return moss_emulation::update(p, [=](T v) { return v == expected ? value : v; }); }
inline unsigned atomicInc(unsigned* p, unsigned most) {
    return moss_emulation::update(p, [=](unsigned v) { return v >= most ? 0 : v + 1; });
}

inline int cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
    moss_emulation::fill(p, value, bytes);
    return 0;
}

// ---- threads that wait for each other ----------------------------------------------------------------------------------------

#define __syncthreads() ((void)::moss_emulation::barrier(false, MOSS_SITE))
#define __syncthreads_count(value) (::moss_emulation::barrier((value) != 0, MOSS_SITE))
#define __syncthreads_or(value) (::moss_emulation::barrier((value) != 0, MOSS_SITE) != 0)
#define __syncthreads_and(value) (::moss_emulation::barrier((value) == 0, MOSS_SITE) == 0)

namespace moss_emulation {

struct SyncWarp {
    const char* site;
    void operator()(unsigned mask = ~0u) const { warp_barrier(mask, site); }
};

template <typename T>
T shuffle(const char* name, const char* site, unsigned mask, T value, int from, int width) {
    static_assert(sizeof(T) <= 8, "shuffles take up to eight bytes");
    if (width < 1 || width > 32 || (width & (width - 1))) fail("%s of width %d", name, width);
    Shuffle s{0, 0, from};
    __builtin_memcpy(&s.sent, &value, sizeof value);
    collective(name, mask, &s, complete_shuffle, site);
    __builtin_memcpy(&value, &s.received, sizeof value);
    return value;
}

template <typename T>
T shuffle_from(const char* site, unsigned mask, T value, int from, int width = 32) {
    return shuffle("__shfl_sync", site, mask, value, (lane() & ~(width - 1)) | (from & (width - 1)), width);
}
template <typename T>
T shuffle_up(const char* site, unsigned mask, T value, unsigned delta, int width = 32) {
    int from = lane() - (int)delta;
    return shuffle("__shfl_up_sync", site, mask, value, from < (lane() & ~(width - 1)) ? lane() : from, width);
}
template <typename T>
T shuffle_down(const char* site, unsigned mask, T value, unsigned delta, int width = 32) {
    int from = lane() + (int)delta;
    return shuffle("__shfl_down_sync", site, mask, value, from > (lane() | (width - 1)) ? lane() : from, width);
}
template <typename T>
T shuffle_xor(const char* site, unsigned mask, T value, int other, int width = 32) {
    int from = lane() ^ other;
    return shuffle("__shfl_xor_sync", site, mask, value, from > (lane() | (width - 1)) ? lane() : from, width);
}

inline unsigned vote(const char* name, const char* site, unsigned mask, bool mine) {
    Vote v{mine, 0};
    collective(name, mask, &v, complete_vote, site);
    return v.all;
}

}  // namespace moss_emulation

#define __syncwarp (::moss_emulation::SyncWarp{MOSS_SITE})
#define __shfl_sync(...) (::moss_emulation::shuffle_from(MOSS_SITE, __VA_ARGS__))
#define __shfl_up_sync(...) (::moss_emulation::shuffle_up(MOSS_SITE, __VA_ARGS__))
#define __shfl_down_sync(...) (::moss_emulation::shuffle_down(MOSS_SITE, __VA_ARGS__))
#define __shfl_xor_sync(...) (::moss_emulation::shuffle_xor(MOSS_SITE, __VA_ARGS__))
#define __ballot_sync(mask, value) (::moss_emulation::vote("__ballot_sync", MOSS_SITE, mask, (value) != 0))
#define __any_sync(mask, value) (::moss_emulation::vote("__any_sync", MOSS_SITE, mask, (value) != 0) != 0)
#define __all_sync(mask, value) (::moss_emulation::vote("__all_sync", MOSS_SITE, mask, (value) == 0) == 0)

// ---- launching ---------------------------------------------------------------------------------------------------------------

namespace moss_emulation {

template <typename... P>
struct Arguments {
    void (*kernel)(P...);
    std::tuple<P...> values;
    template <size_t... I>
    void spread(std::index_sequence<I...>) const { kernel(std::get<I>(values)...); }
    static void run(const void* self) { ((const Arguments*)self)->spread(std::index_sequence_for<P...>()); }
};

template <typename... P, typename... A>
void launch_kernel(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... given) {
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel takes");
    Arguments<P...> arguments{kernel, std::tuple<P...>(given...)};
    launch(name, grid, block, shared, Call{Arguments<P...>::run, &arguments, sizeof arguments});
}

}  // namespace moss_emulation

#define MOSS_DYNAMIC_SHARED(T, name) T* const name = (T*)::moss_emulation::dynamic_shared(alignof(T))
#define MOSS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ((void)(cudaStream_t)(stream), ::moss_emulation::launch_kernel(#kernel, kernel, grid, block, shared_bytes, __VA_ARGS__))

namespace moss_cuda {

struct Device {
    int arch, multiprocessors;
};
inline Device& device() {  // a test may make it another one
    static Device one = {__CUDA_ARCH__, 4};
    return one;
}

}  // namespace moss_cuda

// ---- device.cuh's instructions -----------------------------------------------------------------------------------------------

#include "matrix.h"
