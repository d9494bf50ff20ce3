// Runs a kernel's threads: blocks one after the other, in a block each thread until it waits for others, in a random order.
#include <sys/mman.h>
#include <xmmintrin.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

#ifndef __x86_64__
#error "the emulation switches between threads by x86-64 instructions"
#endif

extern "C" void moss_switch(void** from, void* to);
__asm__(R"(
.text
.globl moss_switch
.hidden moss_switch
.type moss_switch, @function
moss_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace moss_emulation {

Thread* current = nullptr;
Block block;
Launch launched;
Call call;
char *stacks = nullptr, *stacks_end = nullptr;
std::string error;
uint64_t random_state = 1;
size_t shared_limit = 48 << 10;

static constexpr unsigned MOST_THREADS = 1024;
static constexpr size_t STACK = 128 << 10;
static std::vector<Thread> threads;  // by number, those of former launches with more threads too
static std::vector<Thread*> ready;
static void* host_stack;

uint64_t random_number() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

uint3 thread_index() { return current->index; }
uint3 block_index() { return block.index; }
uint3 block_size() { return {launched.size.x, launched.size.y, launched.size.z}; }
uint3 grid_size() { return {launched.grid.x, launched.grid.y, launched.grid.z}; }
int lane() { return current->number % 32; }

// ---- what is wrong -----------------------------------------------------------------------------------------------------------

static std::string text(const char* format, va_list arguments) {
    char buffer[2000];
    vsnprintf(buffer, sizeof buffer, format, arguments);
    return buffer;
}

static std::string place(const uint3& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

static std::string file_name(const char* site) {
    const char* slash = strrchr(site, '/');
    return slash ? slash + 1 : site;
}

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    error = std::string(launched.name) + ", block " + place(block.index) + ", thread " + place(current->index) + ": " +
            text(format, arguments);
    va_end(arguments);
    void* abandoned;
    moss_switch(&abandoned, host_stack);
    abort();
}

void host_fails(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (error.empty()) error = text(format, arguments);
    va_end(arguments);
}

// The threads that do not run, in groups: "32 of its threads, the first (0, 0, 0): waits at …".
static std::string whereabouts() {
    std::vector<std::pair<std::string, std::vector<Thread*>>> groups;
    for (unsigned i = 0; i < block.threads; i++) {
        Thread& t = threads[i];
        if (t.waits == Waits::no) continue;
        std::string where = t.waits == Waits::done ? "returned" : "waits at " + std::string(t.what) + " (" + file_name(t.site) + ")";
        auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == where; });
        if (group == groups.end()) group = groups.insert(group, {where, {}});
        group->second.push_back(&t);
    }
    std::string all;
    for (auto& g : groups)
        all += (all.empty() ? "" : "; ") + std::to_string(g.second.size()) + " of its threads, the first " +
               place(g.second[0]->index) + ": " + g.first;
    return all;
}

// ---- threads -----------------------------------------------------------------------------------------------------------------

static void resume_another(void** from) {
    if (ready.empty()) {
        current = nullptr;
        moss_switch(from, host_stack);
        return;
    }
    size_t i = random_number() % ready.size();
    Thread* next = ready[i];
    ready[i] = ready.back();
    ready.pop_back();
    if (from == &next->stack_pointer) return;
    moss_switch(from, (current = next)->stack_pointer);
}

static void wait(Waits why, const char* what, const char* site) {
    Thread* me = current;
    me->waits = why, me->what = what, me->site = site;
    resume_another(&me->stack_pointer);
    current = me;
}

static void wake(Thread* t) {
    t->waits = Waits::no;
    ready.push_back(t);
}

static void try_to_complete(Warp& warp, unsigned number);
static void wake_all_at_barrier();

static void thread_runs() {
    call.run(call.arguments);
    if (block.at_barrier) fail("returns while others wait: %s", whereabouts().c_str());
    block.alive--;
    unsigned number = current->number / 32;
    Warp& warp = block.warps[number];
    warp.exited |= 1u << lane();
    current->waits = Waits::done;
    try_to_complete(warp, number);
    void* abandoned;
    resume_another(&abandoned);
    abort();
}

int barrier(bool value, const char* site) {
    if (block.alive < block.threads)
        fail("waits at __syncthreads (%s) after others have returned: %s", file_name(site).c_str(), whereabouts().c_str());
    current->value = value;
    current->what = "__syncthreads", current->site = site;
    if (++block.at_barrier < block.threads) {
        wait(Waits::barrier, "__syncthreads", site);
    } else {
        for (unsigned i = 0; i < block.threads; i++) {
            if (strcmp(threads[i].site, site) != 0) {
                current->waits = Waits::barrier;
                fail("not all wait at the same __syncthreads: %s", whereabouts().c_str());
            }
        }
        wake_all_at_barrier();
        wait(Waits::no, "", "");
    }
    return block.brought;
}

static void wake_all_at_barrier() {
    block.at_barrier = 0;
    block.brought = 0;
    for (unsigned i = 0; i < block.threads; i++) {
        block.brought += threads[i].value;
        block.seen[i] = threads[i].clock++;
        wake(&threads[i]);
    }
    share_publications();
}

// ---- warps -------------------------------------------------------------------------------------------------------------------

static void try_to_complete(Warp& warp, unsigned number) {
    for (size_t i = 0; i < warp.pending.size();) {
        Operation op = warp.pending[i];  // a copy, on the stack, where kernels may read it
        if (op.arrived != (op.mask & ~warp.exited)) {
            i++;
            continue;
        }
        warp.pending.erase(warp.pending.begin() + i);
        op.complete(op.payload, op.arrived);
        for (unsigned l = 0; l < 32; l++)
            if (op.arrived >> l & 1 && &threads[number * 32 + l] != current) wake(&threads[number * 32 + l]);
    }
}

void collective(const char* name, unsigned mask, void* payload, Complete complete, const char* site) {
    unsigned number = current->number / 32, me = 1u << lane();
    Warp& warp = block.warps[number];
    if (!(mask & me)) fail("%s (%s) with mask %08x, which lane %d is not in", name, file_name(site).c_str(), mask, lane());
    auto op = std::find_if(warp.pending.begin(), warp.pending.end(),
                           [&](const Operation& o) { return o.mask == mask && strcmp(o.name, name) == 0; });
    if (op == warp.pending.end()) op = warp.pending.insert(op, Operation{name, site, mask, 0, {}, complete});
    op->payload[lane()] = payload;
    op->arrived |= me;
    if (op->arrived == (mask & ~warp.exited))
        try_to_complete(warp, number);
    else
        wait(Waits::warp, name, site);
}

static void join_clocks(void* const*, unsigned arrived) {
    unsigned number = current->number / 32;
    Warp& warp = block.warps[number];
    Thread* lanes = &threads[number * 32];
    uint32_t joined[32] = {};
    for (unsigned l = 0; l < 32; l++) {
        if (!(arrived >> l & 1)) continue;
        for (unsigned j = 0; j < 32; j++) joined[j] = std::max(joined[j], warp.seen[l][j]);
    }
    for (unsigned l = 0; l < 32; l++)
        if (arrived >> l & 1) joined[l] = lanes[l].clock++;
    for (unsigned l = 0; l < 32; l++)
        if (arrived >> l & 1) memcpy(warp.seen[l], joined, sizeof joined);
}

void warp_barrier(unsigned mask, const char* site) { collective("__syncwarp", mask, nullptr, join_clocks, site); }

// ---- blocks ------------------------------------------------------------------------------------------------------------------

static void make_stacks() {
    char* memory = (char*)mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    for (unsigned i = 0; i < MOST_THREADS; i++) mprotect(memory + i * STACK, 4096, PROT_NONE);
    stacks = memory, stacks_end = memory + STACK * MOST_THREADS;
    threads.resize(MOST_THREADS);
}

static void start_thread(unsigned i) {
    Thread& t = threads[i];
    const dim3& size = launched.size;
    t.number = i;
    t.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    t.clock = 1;
    t.copies.assign(1, {});
    t.met.clear();
    void** top = (void**)(stacks + (i + 1) * STACK) - 1;
    *top = nullptr;  // as if thread_runs had been called from nowhere
    *--top = (void*)thread_runs;
    for (int r = 0; r < 6; r++) *--top = nullptr;
    t.stack_pointer = top;
    wake(&t);
}

static void run_block(const uint3& index) {
    block.serial++;
    block.index = index;
    block.alive = block.threads;
    block.at_barrier = 0;
    block.seen.assign(block.threads, 0);
    block.fenced.assign(block.threads, 0);
    block.known.clear();
    block.warps.resize((block.threads + 31) / 32);
    for (Warp& w : block.warps) {
        w.exited = 0;
        w.pending.clear();
        memset(w.seen, 0, sizeof w.seen);
    }
    if (block.threads % 32) block.warps.back().exited = ~0u << block.threads % 32;
    new_shared_memory(launched.shared);
    ready.clear();
    for (unsigned i = 0; i < block.threads; i++) start_thread(i);
    resume_another(&host_stack);
    current = nullptr;
    if (error.empty() && block.alive)
        host_fails("%s, block %s: nothing can go on: %s", launched.name, place(index).c_str(), whereabouts().c_str());
}

static bool possible(const char* name, const dim3& grid, const dim3& size, size_t shared) {
    uint64_t threads_of_block = (uint64_t)size.x * size.y * size.z;
    if (!threads_of_block || threads_of_block > MOST_THREADS || size.z > 64)
        host_fails("%s: a block of (%u, %u, %u) threads is not possible", name, size.x, size.y, size.z);
    else if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        host_fails("%s: a grid of (%u, %u, %u) blocks is not possible", name, grid.x, grid.y, grid.z);
    else if (shared > shared_limit)
        host_fails("%s: %zu bytes of shared memory are more than the %zu that this architecture has", name, shared, shared_limit);
    return error.empty();
}

void launch(const char* name, dim3 grid, dim3 size, size_t shared, Call what) {
    if (!error.empty() || !possible(name, grid, size, shared)) return;
    if (!stacks) make_stacks();
    launched.name = name, launched.grid = grid, launched.size = size, launched.shared = shared;
    call = what;
    uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    if (block.serial + blocks >= MOST_SERIALS) forget_accesses();
    launched.first_serial = block.serial + 1;
    forget_publications();
    block.threads = size.x * size.y * size.z;
    std::vector<uint32_t> order(blocks);
    for (uint64_t i = 0; i < blocks; i++) {
        uint64_t j = random_number() % (i + 1);
        order[i] = order[j], order[j] = i;
    }
    unsigned environment = _mm_getcsr();
    _mm_setcsr(environment | 0x8040);  // denormals are zero, as with nvcc's --use_fast_math
    for (uint32_t b : order) {
        run_block({b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y});
        if (!error.empty()) break;
    }
    _mm_setcsr(environment);
    current = nullptr;
}

}  // namespace moss_emulation
