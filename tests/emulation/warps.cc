// What warps compute together. The parts of matrices that each lane has are those of the pictures in the PTX ISA: "Matrix Fragments for
// mma.m16n8k16", "ldmatrix".
#include "warps.h"

#include "half.h"
#include "runtime.h"

namespace moss_emulation {

void complete_shuffle(void* const payload[32], unsigned arrived) {
    for (int l = 0; l < 32; l++) {
        if (!(arrived >> l & 1)) continue;
        Shuffle& s = *(Shuffle*)payload[l];
        if (!(arrived >> s.from & 1)) fail("a shuffle: lane %d takes the value of lane %d, which does not take part", l, s.from);
        s.received = ((const Shuffle*)payload[s.from])->sent;
    }
}

void complete_vote(void* const payload[32], unsigned arrived) {
    unsigned all = 0;
    for (int l = 0; l < 32; l++) all |= (unsigned)(arrived >> l & 1 && ((const Vote*)payload[l])->mine) << l;
    for (int l = 0; l < 32; l++)
        if (arrived >> l & 1) ((Vote*)payload[l])->all = all;
}

template <int MATRICES, bool TRANSPOSED>
void complete_ldmatrix(void* const payload[32], unsigned arrived) {
    if (arrived != ~0u) fail("ldmatrix needs all 32 lanes, and %08x came", arrived);
    for (int l = 0; l < 32; l++) {
        for (int m = 0; m < MATRICES; m++) {
            uint32_t both = 0;
            for (int e = 0; e < 2; e++) {
                int row = TRANSPOSED ? l % 4 * 2 + e : l / 4, column = TRANSPOSED ? l / 4 : l % 4 * 2 + e;
                both |= (uint32_t)((const Rows*)payload[m * 8 + row])->row[column] << 16 * e;
            }
            ((Rows*)payload[l])->received[m] = both;
        }
    }
}
template void complete_ldmatrix<4, false>(void* const payload[32], unsigned arrived);
template void complete_ldmatrix<4, true>(void* const payload[32], unsigned arrived);
template void complete_ldmatrix<2, false>(void* const payload[32], unsigned arrived);
template void complete_ldmatrix<2, true>(void* const payload[32], unsigned arrived);

static float half_at(const uint32_t* registers, int which, int e) { return half_to_float((uint16_t)(registers[which] >> 16 * e)); }

template <int K>
void complete_mma(void* const payload[32], unsigned arrived) {
    if (arrived != ~0u) fail("mma needs all 32 lanes, and %08x came", arrived);
    double a[16][K], b[K][8];
    for (int l = 0; l < 32; l++) {
        const Product& p = *(const Product*)payload[l];
        int group = l / 4, pair = l % 4 * 2;
        for (int e = 0; e < 2; e++) {
            for (int r = 0; r < K / 4; r++) a[group + r % 2 * 8][pair + r / 2 * 8 + e] = half_at(p.a, r, e);
            for (int r = 0; r < K / 8; r++) b[pair + r * 8 + e][group] = half_at(p.b, r, e);
        }
    }
    double c[16][8] = {};
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < K; k++)
            for (int n = 0; n < 8; n++) c[m][n] += a[m][k] * b[k][n];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) ((const Product*)payload[l])->c[i] += c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}
template void complete_mma<8>(void* const payload[32], unsigned arrived);
template void complete_mma<16>(void* const payload[32], unsigned arrived);

}  // namespace moss_emulation
