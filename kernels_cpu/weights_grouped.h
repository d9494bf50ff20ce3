// Weights as whole numbers of BITS bits, 8 or 4, with a scale and a zero for each group of S inputs (a multiple of 8, at most
// 128): w[n, k] = (q[n, k] - zero[n, g] - 1) * scale[n, g], g = k / S. Sixteen rows, a panel, lie together, so that a vector's lanes
// are rows and no sum across lanes is ever needed. With P panels, G groups, and C = S BITS / 32 chunks of 64 bytes a group:
//   q      (P, G, C, 16, 4 bytes)  4 bytes of each row: 4 inputs of 8 bits, or 8 of 4 bits, the first one lowest
//   scale  (P, G, 16) halves
//   zero   (P, G, 16) bytes
// That is 131 or 67 bytes for 128 weights. Inputs come as 16-bit numbers with a scale for each group (inputs.h), so that all
// sums within a group are exact whole numbers: at most 256 * 32767 * 128 < 2^31, since q - zero - 1 is within -256 ... 254.
#pragma once
#include "inputs.h"

namespace moss {

const int PANEL = 16, LANES = PANEL / VEC;  // rows of a panel, and the vectors they take

template <int BITS>
struct WeightsGrouped {
    const uint8_t* q;
    const f16* scale;
    const uint8_t* zero_;
    int64_t panels, K, S;
    const int32_t* order;  // stored input k is input order[k]; null where they are in order
    int64_t orders;        // how many there are, each of K numbers: one, or one for q, k, v and one for fc_in

    static const int SLICES = 16 / BITS;  // what a 16-bit half of a lane holds: SLICES inputs, and the other half those SLICES on
    static const int64_t PIECE = 1 << 18;  // bytes that a thread takes at a time

    struct Pairs {
        static const int APART = SLICES;
        static int64_t first(int64_t j) { return j / SLICES * 2 * SLICES + j % SLICES; }
    };

    int64_t groups() const { return (K + S - 1) / S; }
    int64_t chunks() const { return S * BITS / 32; }
    const uint8_t* chunk(int64_t panel, int64_t g, int64_t c) const { return q + ((panel * groups() + g) * chunks() + c) * 64; }
    int64_t row_bytes() const { return groups() * S * BITS / 8; }
    float norm() const { return 1e30f; }  // sums stay in range whatever the inputs' norm

    // The inputs SLICES apart that slice j of a chunk's lanes holds.
    template <int J> static pairs slice(pairs v) { return both(right<J * BITS>(v), all_pairs((int16_t)((1 << BITS) - 1))); }

    // sums[t][16 r ...] of panels first + r apart, for a block of T tokens whose values start at x.
    template <int R, int T>
    void few(const Sixteen& x, int64_t b, int64_t first, int64_t apart, float sums[T][16 * R]) const {
        const int A = T == 1 ? SLICES : T == 2 ? 2 : 1;  // sums of a group that are kept apart, for their latency's sake
        vec whole[R][LANES][T];
        MOSS_UNROLL
        for (int r = 0; r < R; r++)
            MOSS_UNROLL
            for (int v = 0; v < LANES; v++)
                MOSS_UNROLL
                for (int t = 0; t < T; t++) whole[r][v][t] = moss::zero();
        for (int64_t g = 0; g < x.G; g++) {
            pairs acc[R][LANES][T][A];
            MOSS_UNROLL
            for (int r = 0; r < R; r++)
                MOSS_UNROLL
                for (int v = 0; v < LANES; v++)
                    MOSS_UNROLL
                    for (int t = 0; t < T; t++)
                        MOSS_UNROLL
                        for (int a = 0; a < A; a++) acc[r][v][t][a] = zero_pairs();
            const uint8_t* from[R];
            MOSS_UNROLL
            for (int r = 0; r < R; r++) from[r] = chunk(first + r * apart, g, 0);
            const int16_t* values = x.values_of(g, b);
            for (int64_t c = 0; c < chunks(); c++, values += 2 * SLICES * T) {
                pairs w[R][LANES];
                MOSS_UNROLL
                for (int r = 0; r < R; r++) {
                    prefetch(from[r] + 64 * c + AHEAD);
                    MOSS_UNROLL
                    for (int v = 0; v < LANES; v++) w[r][v] = load_pairs(from[r] + 64 * c + 4 * VEC * v);
                }
                add_slice<R, T, A, 0>(w, values, acc);
                add_slice<R, T, A, 1>(w, values, acc);
                add_slice<R, T, A, 2>(w, values, acc);
                add_slice<R, T, A, 3>(w, values, acc);
            }
            MOSS_UNROLL
            for (int r = 0; r < R; r++)
                MOSS_UNROLL
                for (int v = 0; v < LANES; v++) {
                    const int64_t at = ((first + r * apart) * x.G + g) * PANEL + v * VEC;
                    const vec s = load_f16(scale + at), z = add(load_u8(zero_ + at), all(1.f));
                    prefetch(scale + at + 256);
                    prefetch(zero_ + at + 256);
                    MOSS_UNROLL
                    for (int t = 0; t < T; t++) {
                        pairs all_of_it = acc[r][v][t][0];
                        MOSS_UNROLL
                        for (int a = 1; a < A; a++) all_of_it = add_sums(all_of_it, acc[r][v][t][a]);
                        vec zeros = mul(z, all(x.offsets[x.at(g, b) + t]));
                        vec sum = fms(to_vec(all_of_it), all(x.scales[x.at(g, b) + t]), zeros);
                        whole[r][v][t] = fma(sum, s, whole[r][v][t]);
                    }
                }
        }
        MOSS_UNROLL
        for (int r = 0; r < R; r++)
            MOSS_UNROLL
            for (int v = 0; v < LANES; v++)
                MOSS_UNROLL
                for (int t = 0; t < T; t++) store(&sums[t][16 * r + v * VEC], whole[r][v][t]);
    }

    // Group g of ROWS rows from row n on, as 16-bit numbers and their scales: values [S / 2][ROWS pairs], scales [ROWS].
    template <int ROWS>
    void unpack(int64_t n, int64_t g, int16_t* values, float* scales) const {
        for (int64_t row = 0; row < ROWS; row += VEC) {
            const int64_t panel = std::min((n + row) / PANEL, panels - 1), lane = (n + row) % PANEL;
            const int64_t at = (panel * groups() + g) * PANEL + lane;
            store(scales + row, load_f16(scale + at));
            const pairs z = sub(twice_u8(zero_ + at), all_pairs((int16_t)-1));
            const uint8_t* from = chunk(panel, g, 0) + 4 * lane;
            int16_t* to = values + 2 * row;
            for (int64_t c = 0; c < chunks(); c++, from += 64, to += 2 * SLICES * ROWS) {
                const pairs v = load_pairs(from);
                prefetch(from + AHEAD);
                store_pairs(to, sub(slice<0>(v), z));
                store_pairs(to + 2 * ROWS, sub(slice<1>(v), z));
                if (SLICES == 4) {
                    store_pairs(to + 4 * ROWS, sub(slice<2 % SLICES>(v), z));
                    store_pairs(to + 6 * ROWS, sub(slice<3 % SLICES>(v), z));
                }
            }
        }
    }

private:
    static const int AHEAD = 3072;  // bytes of q, and what belongs to them of scales and zeros: 256 each

    template <int R, int T, int A, int J>
    static void add_slice(const pairs w[R][LANES], const int16_t* values, pairs acc[R][LANES][T][A]) {
        if (J >= SLICES) return;
        pairs part[R][LANES];
        MOSS_UNROLL
        for (int r = 0; r < R; r++)
            MOSS_UNROLL
            for (int v = 0; v < LANES; v++) part[r][v] = slice<J % SLICES>(w[r][v]);
        MOSS_UNROLL
        for (int t = 0; t < T; t++) {
            const pairs xs = in_register(all_pairs(values + 2 * (J * T + t)));
            MOSS_UNROLL
            for (int r = 0; r < R; r++)
                MOSS_UNROLL
                for (int v = 0; v < LANES; v++) acc[r][v][t][J % A] = dot(acc[r][v][t][J % A], part[r][v], xs);
        }
    }
};

}  // namespace moss
