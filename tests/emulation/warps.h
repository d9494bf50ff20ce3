// What is computed for a whole warp at once, when all its lanes have come: each has brought one of these.
#pragma once
#include <cstdint>

namespace moss_emulation {

struct Shuffle {
    uint64_t sent, received;
    int from;
};
void complete_shuffle(void* const payload[32], unsigned arrived);

struct Vote {
    bool mine;
    unsigned all;
};
void complete_vote(void* const payload[32], unsigned arrived);

struct Rows {
    uint16_t row[8];  // what the lane's address leads to
    uint32_t* received;
};
template <int MATRICES, bool TRANSPOSED>
void complete_ldmatrix(void* const payload[32], unsigned arrived);

struct Product {
    float* c;
    const uint32_t *a, *b;
};
template <int K>
void complete_mma(void* const payload[32], unsigned arrived);

}  // namespace moss_emulation
