// What emulated kernels and the wrappers around them call: fibers.cc runs the threads, memory.cc watches their memory.
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace moss_emulation {

// ---- in a kernel ----
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) uint3 block_size();
__attribute__((const)) uint3 grid_size();
__attribute__((const)) int lane();
void* dynamic_shared(size_t alignment);

// Waits until all threads of the block are here; returns how many came with `value`. `site` is "file:line".
int barrier(bool value, const char* site);

// One operation of a warp's lanes. Each lane of `mask` comes with a payload of its own, and when all have come, `complete` is
// called once with the payloads of those that did; the others' are null.
typedef void (*Complete)(void* const payload[32], unsigned arrived);
void collective(const char* name, unsigned mask, void* payload, Complete complete, const char* site);
// collective, and what was written before it is seen after it.
void warp_barrier(unsigned mask, const char* site);
// Stops the kernel: the text says what is wrong with the thread that runs.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- memory: called before the access ----
void reads(const void* address, size_t bytes);
void writes(void* address, size_t bytes);
void updates(void* address, size_t bytes);  // atomically
void reads_unchanging(const void* address, size_t bytes);  // fails if the kernel has written it; then comes `reads`
bool is_shared(const void* address);
void copy_async(void* shared, const void* global, size_t bytes, size_t zeros);
void commit_copies();
void wait_for_copies(int groups_left);
void fence();

// ---- launching ----
struct Call {
    void (*run)(const void* arguments);
    const void* arguments;
    size_t bytes;
};
void launch(const char* name, dim3 grid, dim3 block, size_t shared, Call call);
void fill(void* address, int value, size_t bytes);  // cudaMemsetAsync

}  // namespace moss_emulation
