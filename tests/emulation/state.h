// What the emulation's files know of each other.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "runtime.h"

namespace moss_emulation {

struct Operation {
    const char* name;
    const char* site;
    unsigned mask, arrived;
    void* payload[32];
    Complete complete;
};

struct Warp {
    unsigned exited = 0;                  // lanes that have returned, or never were
    std::vector<Operation> pending;
    uint32_t seen[32][32];                // the clock of each lane up to which each lane has seen its accesses
};

struct Copy {
    void* to;
    const void* from;
    unsigned bytes, zeros;
};

enum class Waits { no, barrier, warp, done };

// What another block has published: the clock of each of its threads up to which its accesses are over.
struct Publication {
    uint32_t serial;
    std::vector<uint32_t> clocks;
};

struct Thread {
    void* stack_pointer;
    unsigned number;                      // in the block
    uint3 index;
    Waits waits;
    const char *what, *site;              // of what it waits for
    bool value;                           // brought to the barrier
    uint32_t clock;                       // rises at whatever orders its accesses with those of others
    std::vector<Publication> met;         // at an atomic access, and not yet known, for want of a fence
    std::vector<std::vector<Copy>> copies;  // by group, oldest first; the last one is not committed
};

static constexpr unsigned ALL = ~0u;

struct Block {
    uint32_t serial = 0;                  // over all launches
    uint3 index;
    unsigned threads = 0, at_barrier = 0, alive = 0;
    int brought = 0;                      // how many came to the last barrier with a value
    std::vector<uint32_t> seen;           // the clock of each thread at the last barrier
    std::vector<uint32_t> fenced;         // the clock of each thread up to which a fence has brought out its accesses
    std::vector<std::pair<unsigned, Publication>> known;  // of other blocks, by which thread, or since a barrier by all: ALL
    std::vector<Warp> warps;
};

struct Launch {
    const char* name = nullptr;
    dim3 grid, size;
    size_t shared = 0;
    uint32_t first_serial = 0;
};

static constexpr uint32_t MOST_SERIALS = 1u << 22;

extern Thread* current;                   // null while the host runs
extern Block block;
extern Launch launched;
extern Call call;
extern char *stacks, *stacks_end;
extern std::string error;
extern uint64_t random_state;
extern size_t shared_limit;

uint64_t random_number();
// Makes the shared memory of a new block: nothing in it is written yet.
void new_shared_memory(size_t dynamic);
void forget_accesses();

enum Kind { READ, WRITE, UPDATE };
// Before each access: whether it may be, and what is known of the bytes after it. `pc`: where in the code.
void watch(const char* p, size_t bytes, Kind kind, const void* pc);
#define CALLER __builtin_return_address(0)
std::string described(const void* address);  // "x[12]"

// Whether an access of another block is over for the thread that runs, because that block published it (order.cc).
bool published(uint32_t serial, unsigned thread, uint32_t clock);
void meet_at(const void* address);
void share_publications();
void forget_publications();
void host_fails(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace moss_emulation
