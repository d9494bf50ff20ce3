// The device's memory and what is known of each of its bytes: may it be read or written, was it, and by whom last.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace moss_emulation {

typedef uint8_t State;
static constexpr State ACCESSIBLE = 1, INITIALISED = 2, CONSTANT = 4, ARRIVING = 8;

// An access: the block's serial number (22 bits), atomic (1), thread (10), its clock (16), where in the code (15). 0: none.
typedef uint64_t Access;
struct Accesses {
    Access write, read, other_read;  // the reads by different threads, and if there are such, of different warps
};
static constexpr uint32_t MOST_CLOCKS = 1 << 16, MOST_PLACES = 1 << 15;

struct Region {
    char* base = nullptr;
    size_t size = 0;
    State* state = nullptr;
    Accesses* accesses = nullptr;
    bool has(const void* p) const { return (size_t)((const char*)p - base) < size; }
};

struct Allocation {
    std::string name;
    char* start;
    size_t bytes, element;
};

static constexpr size_t MEMORY = 128 << 20, GLOBAL = 1 << 20, GUARD = 64 << 10;
static Region device;                 // dynamic shared memory at GUARD, and from GLOBAL on what is allocated
static Region fixed;                  // __shared__ variables, which are this library's thread-local ones, of whoever launches
static char *image, *image_end;       // this library: its constants may be read
static std::vector<Allocation> allocations;
static char* next_free;

static void* reserve(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        fprintf(stderr, "emulation: no %zu bytes of address space\n", bytes);
        abort();
    }
    return p;
}

static Region region(char* base, size_t size) {
    Region r;
    r.base = base, r.size = size;
    r.state = (State*)reserve(size);
    r.accesses = (Accesses*)reserve(size * sizeof(Accesses));
    return r;
}

struct Index {
    unsigned long module, offset;
};
extern "C" void* __tls_get_addr(Index*);
static Index thread_local_ones;

static int find_library(dl_phdr_info* info, size_t, void*) {
    char *low = (char*)~0ull, *high = nullptr;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& h = info->dlpi_phdr[i];
        if (h.p_type != PT_LOAD) continue;
        low = std::min(low, (char*)info->dlpi_addr + h.p_vaddr);
        high = std::max(high, (char*)info->dlpi_addr + h.p_vaddr + h.p_memsz);
    }
    char* here = (char*)&find_library;
    if (here < low || here >= high) return 0;
    image = low, image_end = high;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& h = info->dlpi_phdr[i];
        if (h.p_type != PT_TLS) continue;
        thread_local_ones = {info->dlpi_tls_modid, 0};
        fixed = region((char*)__tls_get_addr(&thread_local_ones), h.p_memsz);
    }
    return 1;
}

static void start() {
    if (device.base) return;
    device = region((char*)reserve(MEMORY), MEMORY);
    next_free = device.base + GLOBAL;
    dl_iterate_phdr(find_library, nullptr);
}

static char* dynamic() { return device.base + GUARD; }

void new_shared_memory(size_t bytes) {
    if (fixed.size) {
        memset(fixed.base, 0xff, fixed.size);
        memset(fixed.state, ACCESSIBLE, fixed.size);
    }
    State* state = device.state + GUARD;
    static size_t before = 0;
    if (before > bytes) memset(state + bytes, 0, before - bytes);
    before = bytes;
    memset(dynamic(), 0xff, bytes);
    memset(state, ACCESSIBLE, bytes);
}

void* dynamic_shared(size_t) { return dynamic(); }

static bool is_dynamic(const void* p) { return device.has(p) && (const char*)p < device.base + GLOBAL; }
bool is_shared(const void* p) { return fixed.has(p) || is_dynamic(p); }

void forget_accesses() {
    madvise(device.accesses, MEMORY * sizeof(Accesses), MADV_DONTNEED);
    if (fixed.size) madvise(fixed.accesses, fixed.size * sizeof(Accesses), MADV_DONTNEED);
    block.serial = 0;
}

// ---- what is wrong -----------------------------------------------------------------------------------------------------------

// Python puts the file and the line in its place.
static std::string code(const void* p) {
    char buffer[40];
    snprintf(buffer, sizeof buffer, "{code %zx}", (size_t)((const char*)p - image));
    return buffer;
}

std::string described(const void* p) {
    const char* address = (const char*)p;
    if (!p) return "what a null pointer leads to";
    if (is_dynamic(p)) return "byte " + std::to_string(address - dynamic()) + " of dynamic shared memory";
    if (fixed.has(p)) return "byte " + std::to_string(address - fixed.base) + " of static shared memory";
    for (const Allocation& a : allocations) {
        if (address < a.start - GUARD / 2 || address >= a.start + a.bytes + GUARD / 2) continue;
        long byte = address - a.start, element = a.element;
        long index = byte >= 0 ? byte / element : -((-byte + element - 1) / element);
        std::string text = a.name + "[" + std::to_string(index) + "]";
        if (byte >= 0 && byte < (long)a.bytes) return text;
        return text + " (of " + std::to_string(a.bytes / element) + ")";
    }
    char buffer[60];
    snprintf(buffer, sizeof buffer, "%p, which is not the device's memory", p);
    return buffer;
}

static const char* const VERBS[] = {"reads", "writes", "updates"};

static const void* places[MOST_PLACES];  // of the code, by a hash of them: there are far fewer than have room

static unsigned place_number(const void* pc) {
    unsigned i = (size_t)pc * 0x9e3779b97f4a7c15ull >> 49;
    while (places[i] && places[i] != pc) i = (i + 1) % MOST_PLACES;
    places[i] = pc;
    return i;
}

static Access stamp(bool atomic, const void* pc) {
    if (current->clock >= MOST_CLOCKS) fail("waits for others more often than the emulation can count");
    return (Access)block.serial << 42 | (Access)atomic << 41 | (Access)current->number << 31 | (Access)current->clock << 15 |
           place_number(pc);
}
static uint32_t serial(Access a) { return a >> 42; }
static bool is_atomic(Access a) { return a >> 41 & 1; }
static unsigned thread(Access a) { return a >> 31 & 1023; }
static uint32_t clock_of(Access a) { return a >> 15 & 0xffff; }
static bool same_thread(Access a, Access b) { return (a ^ b) >> 42 == 0 && thread(a) == thread(b); }
static bool same_warp(Access a, Access b) { return serial(a) == serial(b) && thread(a) / 32 == thread(b) / 32; }

// The first block whose accesses can be at odds with those of this one: of shared memory, itself.
static uint32_t first_serial;

// Whether an earlier access is known to be over for the thread that runs.
static bool over(Access a) {
    if (serial(a) < first_serial) return true;
    unsigned t = thread(a);
    if (serial(a) != block.serial) return published(serial(a), t, clock_of(a));
    if (t == current->number || clock_of(a) <= block.seen[t]) return true;
    return t / 32 == current->number / 32 && clock_of(a) <= block.warps[t / 32].seen[current->number % 32][t % 32];
}

[[noreturn]] static void race(const void* p, Kind kind, const char* verb, Access a, const void* pc) {
    std::string who = serial(a) != block.serial ? "another block" : "thread " + std::to_string(thread(a));
    if (serial(a) == block.serial && thread(a) / 32 == current->number / 32) who += " of the same warp";
    fail("race: %s %s%s, which %s %s%s, and nothing orders the two", VERBS[kind], described(p).c_str(), code(pc).c_str(), who.c_str(),
         verb, code(places[a & (MOST_PLACES - 1)]).c_str());
}

static void note_read(Accesses& seen, Access me) {
    if (same_thread(seen.read, me) || over(seen.read)) {
        seen.read = me;
    } else if (same_thread(seen.other_read, me) || over(seen.other_read) ||
               (same_warp(seen.read, seen.other_read) && !same_warp(seen.read, me))) {
        seen.other_read = me;
    }
}

static void check_race(const void* p, Accesses& seen, Kind kind, Access me, const void* pc) {
    if (seen.write && !(kind == UPDATE && is_atomic(seen.write)) && !over(seen.write))
        race(p, kind, is_atomic(seen.write) ? "updated" : "wrote", seen.write, pc);
    if (kind == READ) return note_read(seen, me);
    for (Access read : {seen.read, seen.other_read})
        if (read && !over(read)) race(p, kind, "read", read, pc);
    seen.write = me;
}

[[noreturn]] static void forbidden(const char* p, State state, Kind kind, const void* pc) {
    const char* why = !(state & ACCESSIBLE)                 ? "out of bounds"
                      : state & ARRIVING                    ? "a cp.async to it has not been waited for"
                      : kind != READ && (state & CONSTANT)  ? "an input that is not to be written"
                                                            : "never written";
    fail("%s %s%s: %s", VERBS[kind], described(p).c_str(), code(pc).c_str(), why);
}

// For each kind of access which bits of the state count, and what they have to be.
static constexpr State COUNTS[] = {ACCESSIBLE | INITIALISED | ARRIVING, ACCESSIBLE | CONSTANT | ARRIVING,
                                   ACCESSIBLE | INITIALISED | CONSTANT | ARRIVING};
static constexpr State REQUIRED[] = {ACCESSIBLE | INITIALISED, ACCESSIBLE, ACCESSIBLE | INITIALISED};

// All of the bytes that an integer W covers may be accessed: then they are, else nothing is done.
template <typename W>
static bool access_all(State* state, Kind kind) {
    constexpr W EACH = (W)0x0101010101010101;
    W all;
    memcpy(&all, state, sizeof all);
    if ((W)(all & COUNTS[kind] * EACH) != (W)(REQUIRED[kind] * EACH)) return false;
    all |= kind == WRITE ? (W)(INITIALISED * EACH) : 0;
    memcpy(state, &all, sizeof all);
    return true;
}

static void check_state(char* p, State* state, size_t bytes, Kind kind, const void* pc) {
    size_t i = 0;
    while (i + 8 <= bytes && access_all<uint64_t>(state + i, kind)) i += 8;
    if (i + 4 <= bytes && access_all<uint32_t>(state + i, kind)) i += 4;
    for (; i < bytes; i++) {
        if ((state[i] & COUNTS[kind]) != REQUIRED[kind]) forbidden(p + i, state[i], kind, pc);
        if (kind == WRITE) state[i] |= INITIALISED;
    }
}

// Bytes that had the same accesses before have the same afterwards.
static void check_races(char* p, Accesses* accesses, size_t bytes, Kind kind, Access me, const void* pc) {
    Accesses before{}, after{};
    for (size_t i = 0; i < bytes; i++) {
        Accesses& a = accesses[i];
        if (!i || a.write != before.write || a.read != before.read || a.other_read != before.other_read) {
            before = after = a;
            check_race(p + i, after, kind, me, pc);
        }
        a = after;
    }
}

void watch(const char* p, size_t bytes, Kind kind, const void* pc) {
    if (!bytes || (p >= stacks && p < stacks_end)) return;
    Region* r = device.has(p) ? &device : fixed.has(p) ? &fixed : nullptr;
    if (!current) {
        if (r) host_fails("the host %s the device's memory: %s%s", VERBS[kind], described(p).c_str(), code(pc).c_str());
        return;
    }
    if (!r) {
        bool argument = (size_t)(p - (const char*)call.arguments) < call.bytes;
        if (kind == READ && (argument || (p >= image && p < image_end))) return;
        fail("%s %s%s", VERBS[kind], described(p).c_str(), code(pc).c_str());
    }
    size_t at = p - r->base;
    if (at + bytes > r->size) fail("%s %s%s: out of bounds", VERBS[kind], described(p).c_str(), code(pc).c_str());
    check_state(r->base + at, r->state + at, bytes, kind, pc);
    if (r->state[at] & CONSTANT) return;
    first_serial = is_shared(p) ? block.serial : launched.first_serial;
    check_races(r->base + at, r->accesses + at, bytes, kind, stamp(kind == UPDATE, pc), pc);
}

void reads(const void* p, size_t bytes) { watch((const char*)p, bytes, READ, CALLER); }
void writes(void* p, size_t bytes) { watch((const char*)p, bytes, WRITE, CALLER); }
void updates(void* p, size_t bytes) {
    watch((const char*)p, bytes, UPDATE, CALLER);
    if (current && !is_shared(p)) meet_at(p);
}

void reads_unchanging(const void* p, size_t bytes) {
    if (!current || (size_t)((const char*)p - device.base - GLOBAL) >= MEMORY - GLOBAL - bytes) return;
    const Accesses* a = device.accesses + ((const char*)p - device.base);
    for (size_t i = 0; i < bytes; i++)
        if (serial(a[i].write) >= launched.first_serial)
            fail("reads %s%s as if it never changed, but the kernel writes it%s", described((const char*)p + i).c_str(), code(CALLER).c_str(),
                 code(places[a[i].write & (MOST_PLACES - 1)]).c_str());
}

// ---- cp.async ----------------------------------------------------------------------------------------------------------------

void copy_async(void* to, const void* from, size_t bytes, size_t zeros) {
    if (!is_shared(to) || is_shared(from)) fail("cp.async goes from global to shared memory only%s", code(CALLER).c_str());
    if (((size_t)to | (size_t)from) % 16) fail("cp.async of 16 bytes needs aligned addresses%s", code(CALLER).c_str());
    watch((const char*)from, bytes, READ, CALLER);
    watch((const char*)to, bytes + zeros, WRITE, CALLER);
    Region& r = fixed.has(to) ? fixed : device;
    for (size_t i = 0; i < bytes + zeros; i++) r.state[(char*)to - r.base + i] |= ARRIVING;
    memset(to, 0xff, bytes + zeros);
    current->copies.back().push_back({to, from, (unsigned)bytes, (unsigned)zeros});
}

void commit_copies() { current->copies.emplace_back(); }

static void arrive(const Copy& c, const void* pc) {
    Region& r = fixed.has(c.to) ? fixed : device;
    for (size_t i = 0; i < c.bytes + c.zeros; i++) r.state[(char*)c.to - r.base + i] &= ~ARRIVING;
    watch((const char*)c.to, c.bytes + c.zeros, WRITE, pc);
    memcpy(c.to, c.from, c.bytes);
    memset((char*)c.to + c.bytes, 0, c.zeros);
}

void wait_for_copies(int groups_left) {
    auto& groups = current->copies;
    while ((int)groups.size() - 1 > groups_left) {
        for (const Copy& c : groups.front()) arrive(c, CALLER);
        groups.erase(groups.begin());
    }
}

void fill(void* p, int value, size_t bytes) {
    if (!error.empty() || !bytes) return;
    size_t at = (char*)p - device.base;
    for (size_t i = 0; i < bytes; i++) {
        if (!device.has((char*)p + i) || (device.state[at + i] & (ACCESSIBLE | CONSTANT)) != ACCESSIBLE)
            return host_fails("cudaMemsetAsync writes %s", described((char*)p + i).c_str());
        device.state[at + i] |= INITIALISED;
    }
    memset(p, value, bytes);
}

}  // namespace moss_emulation

// ---- for Python --------------------------------------------------------------------------------------------------------------

using namespace moss_emulation;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Frees everything, and forgets what went wrong.
EXPORT void emulation_begin(uint64_t seed, uint64_t most_shared) {
    start();
    if (fixed.size) fixed.base = (char*)__tls_get_addr(&thread_local_ones);
    size_t used = next_free + GUARD - device.base;
    memset(device.state + GLOBAL, 0, used - GLOBAL);
    allocations.clear();
    next_free = device.base + GLOBAL;
    error.clear();
    random_state = seed | 1;
    shared_limit = most_shared;
}

// `written` says of each byte whether it may be read; null: all may.
EXPORT void* emulation_allocate(const char* name, const void* data, const uint8_t* written, size_t bytes, size_t element, int constant) {
    char* p = next_free + GUARD;
    if (p + bytes + GUARD > device.base + MEMORY) {
        host_fails("%s: the emulated device has %zu MB only", name, MEMORY >> 20);
        return nullptr;
    }
    next_free = p + (bytes + 255) / 256 * 256;
    State* state = device.state + (p - device.base);
    memcpy(p, data, bytes);
    memset(state, ACCESSIBLE | INITIALISED | (constant ? CONSTANT : 0), bytes);
    for (size_t i = 0; written && i < bytes; i++)
        if (!written[i]) state[i] &= ~INITIALISED, p[i] = (char)0xff;
    allocations.push_back({name, p, bytes, element});
    return p;
}

EXPORT void emulation_fetch(const void* p, void* data, uint8_t* written, size_t bytes) {
    const State* state = device.state + ((const char*)p - device.base);
    memcpy(data, p, bytes);
    for (size_t i = 0; i < bytes; i++) written[i] = (state[i] & INITIALISED) != 0;
}

EXPORT const char* emulation_error() { return error.c_str(); }
