// How blocks of one launch can know of each other's accesses: __threadfence, an atomic access to a place, an atomic access of
// another block to the same place, __threadfence. Barriers pass on to a block's threads what one of them knows.
#include <algorithm>
#include <map>

#include "state.h"

namespace moss_emulation {

static std::map<const void*, std::vector<Publication>> meetings;

void forget_publications() { meetings.clear(); }

void fence() {
    std::vector<uint32_t>& fenced = block.fenced;
    for (unsigned i = 0; i < block.threads; i++) fenced[i] = std::max(fenced[i], block.seen[i]);
    fenced[current->number] = current->clock++;
    for (Publication& p : current->met) block.known.emplace_back(current->number, std::move(p));
    current->met.clear();
}

void meet_at(const void* address) {
    auto& here = meetings[address];
    for (const Publication& p : here)
        if (p.serial != block.serial) current->met.push_back(p);
    Publication mine{block.serial, block.fenced};
    for (unsigned i = 0; i < block.threads; i++)
        if (i != current->number) mine.clocks[i] = std::min(mine.clocks[i], block.seen[i]);
    if (std::any_of(mine.clocks.begin(), mine.clocks.end(), [](uint32_t c) { return c > 0; })) here.push_back(std::move(mine));
}

bool published(uint32_t serial, unsigned thread, uint32_t clock) {
    return std::any_of(block.known.begin(), block.known.end(), [&](const std::pair<unsigned, Publication>& k) {
        return (k.first == ALL || k.first == current->number) && k.second.serial == serial && clock <= k.second.clocks[thread];
    });
}

void share_publications() {
    for (auto& k : block.known) k.first = ALL;
}

}  // namespace moss_emulation
