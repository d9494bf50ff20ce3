// Weights as whole numbers of BITS bits, 8 or 4, with a scale and a zero for each group of 128 inputs:
// w[n, k] = (q[n, k] - zero[n, g]) * scale[n, g], g = k / 128. With G groups a row (K rounded up):
//   q      128 G BITS/8 bytes a row. Eight bits: inputs in order. Four bits: byte j of a group's 64 holds input j in its
//          low half and input j + 64 in its high half, so that one load gives two runs of 64 inputs in order.
//   scale  G halves a row;  zero  G bytes a row
// That is 131 or 67 bytes for 128 weights.
//
// With VNNI the inputs of a token become 16-bit numbers with a scale for each group, cut into a high and a low signed
// byte: two byte products give the exact sum of 16-bit ones, and the error, 2^-16 of a group's largest input, is far below
// that of the weights. Without VNNI the arithmetic is in floats.
#pragma once
#include "inputs.h"
#include "lanes.h"
#if defined(MOSS_AVX512) && defined(__AVX512VNNI__)
#define MOSS_VNNI 1
#endif

namespace moss {

// Sum over g of scale[g] * zero[g] * sums[g]: what the zeros take away from a row's product. sums: of each group's inputs.
inline float zeros_part(const f16* scale, const uint8_t* zeros, const float* sums, int64_t G) {
    vec acc = zero();
    int64_t g = 0;
    for (; g + VEC <= G; g += VEC) acc = fma(mul(load_f16(scale + g), load_u8(zeros + g)), load(sums + g), acc);
    float rest = 0;
    for (; g < G; g++) rest += to_float(scale[g]) * zeros[g] * sums[g];
    return sum(acc) + rest;
}

// Inputs beside what few() needs of them.
struct GroupedInputs {
    const Inputs* x;
    int64_t G;
    float* sums;  // (T, G) of each group's inputs, as the product sees them
#ifdef MOSS_VNNI
    int8_t *high, *low;  // (T, 128 G)
    float* scale;        // (T, G)
#endif
};

#ifdef MOSS_VNNI
// One group of floats -> 16-bit numbers in two bytes each; returns their scale, and their sum in *total.
inline float split_group(const float* x, int8_t* high, int8_t* low, float* total) {
    vec top = zero();
    for (int i = 0; i < GROUP; i += 16) top = higher(top, _mm512_abs_ps(load(x + i)));
    const float most = 32639;  // 127 * 256 + 127: both bytes stay in range
    float largest = highest(top), scale = largest / most;
    vec inverse = all(largest > 1e-30f ? most / largest : 0.f);
    __m512i s = _mm512_setzero_si512();
    for (int i = 0; i < GROUP; i += 16) {
        __m512i v = _mm512_cvtps_epi32(mul(load(x + i), inverse));
        __m512i h = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
        _mm_storeu_si128((__m128i*)(high + i), _mm512_cvtepi32_epi8(h));
        _mm_storeu_si128((__m128i*)(low + i), _mm512_cvtepi32_epi8(_mm512_sub_epi32(v, _mm512_slli_epi32(h, 8))));
        s = _mm512_add_epi32(s, v);
    }
    *total = (float)_mm512_reduce_add_epi32(s) * scale;
    return scale;
}
#endif

template <int BITS>
struct WeightsGrouped {
    const uint8_t* q;
    const f16* scale;
    const uint8_t* zero_;
    int64_t K;

    int64_t groups() const { return (K + GROUP - 1) / GROUP; }
    int64_t row_bytes() const { return groups() * (GROUP * BITS / 8); }

    typedef FewBits Many;
    typedef const GroupedInputs& Few;
    Few prepare(const Inputs& x) const {
        static thread_local GroupedInputs in;
        static thread_local Scratch<float> sums;
        in.x = &x, in.G = groups(), in.sums = sums.get(x.T * in.G);
#ifdef MOSS_VNNI
        static thread_local Scratch<int8_t> high, low;
        static thread_local Scratch<float> scales;
        in.high = high.get(x.T * x.stride), in.low = low.get(x.T * x.stride), in.scale = scales.get(x.T * in.G);
#endif
        for (int64_t t = 0; t < x.T; t++)
            for (int64_t g = 0; g < in.G; g++) {
                const float* from = x.row(t) + g * GROUP;
#ifdef MOSS_VNNI
                int64_t at = t * x.stride + g * GROUP;
                in.scale[t * in.G + g] = split_group(from, in.high + at, in.low + at, in.sums + t * in.G + g);
#else
                vec s = moss::zero();
                for (int64_t i = 0; i < GROUP; i += VEC) s = add(s, load(from + i));
                in.sums[t * in.G + g] = sum(s);
#endif
            }
        return in;
    }

    template <int R, int T>
    void few(Few x, int64_t n, float sums[R][T]) const {
        vec acc[R][T];
        MOSS_UNROLL
        for (int r = 0; r < R; r++)
            MOSS_UNROLL
            for (int t = 0; t < T; t++) acc[r][t] = moss::zero();
        scaled_sums<R, T>(x, n, acc);
        MOSS_UNROLL
        for (int r = 0; r < R; r++)
            MOSS_UNROLL
            for (int t = 0; t < T; t++)
                sums[r][t] = sum(acc[r][t]) - zeros_part(scale + (n + r) * x.G, zero_ + (n + r) * x.G, x.sums + t * x.G, x.G);
    }

    // Inputs [k, k + depth) of row n as floats; k and depth whole numbers of groups, within 128 G.
    void unpack(int64_t n, int64_t k, int64_t depth, float* to) const {
        int64_t G = groups();
        for (int64_t g = k / GROUP; g < (k + depth) / GROUP; g++, to += GROUP) {
            const uint8_t* from = q + n * row_bytes() + g * (GROUP * BITS / 8);
            vec s = all(to_float(scale[n * G + g])), z = all(zero_[n * G + g]);
            MOSS_UNROLL
            for (int i = 0; i < GROUP; i += VEC) {
                vec v = BITS == 8 ? load_u8(from + i) : i < 64 ? load_low4(from + i) : load_high4(from + i - 64);
                store(to + i, mul(sub(v, z), s));
            }
        }
    }

private:
#ifdef MOSS_VNNI
    // acc[r][t] += scale * sum of q x over each group, the group's sum an exact 32-bit number.
    template <int R, int T>
    void scaled_sums(Few x, int64_t n, vec acc[R][T]) const {
        for (int64_t g0 = 0; g0 < x.G; g0 += 16) {
            int count = (int)std::min<int64_t>(16, x.G - g0);
            float both[R][T][16];  // the weights' scale times the inputs', for 16 groups
            MOSS_UNROLL
            for (int r = 0; r < R; r++) {
                vec s = load_f16_n(scale + (n + r) * x.G + g0, count);
                MOSS_UNROLL
                for (int t = 0; t < T; t++) store(both[r][t], mul(s, load_n(x.scale + t * x.G + g0, count)));
            }
            for (int i = 0; i < count; i++) {
                __m512i a[R], b[R];  // inputs 0 … 63 and 64 … 127
                MOSS_UNROLL
                for (int r = 0; r < R; r++) {
                    const uint8_t* from = q + (n + r) * row_bytes() + (g0 + i) * (GROUP * BITS / 8);
                    a[r] = _mm512_loadu_si512(from);
                    if (BITS == 8) b[r] = _mm512_loadu_si512(from + 64);
                    else {
                        b[r] = _mm512_and_si512(_mm512_srli_epi16(a[r], 4), _mm512_set1_epi8(15));
                        a[r] = _mm512_and_si512(a[r], _mm512_set1_epi8(15));
                    }
                }
                MOSS_UNROLL
                for (int t = 0; t < T; t++) {
                    const int8_t* high = x.high + t * x.x->stride + (g0 + i) * GROUP;
                    const int8_t* low = x.low + t * x.x->stride + (g0 + i) * GROUP;
                    __m512i high_a = _mm512_load_si512(high), high_b = _mm512_load_si512(high + 64);
                    __m512i low_a = _mm512_load_si512(low), low_b = _mm512_load_si512(low + 64);
                    MOSS_UNROLL
                    for (int r = 0; r < R; r++) {
                        __m512i s = _mm512_dpbusd_epi32(_mm512_setzero_si512(), a[r], high_a);
                        s = _mm512_slli_epi32(_mm512_dpbusd_epi32(s, b[r], high_b), 8);
                        s = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(s, a[r], low_a), b[r], low_b);
                        acc[r][t] = fma(_mm512_cvtepi32_ps(s), all(both[r][t][i]), acc[r][t]);
                    }
                }
            }
        }
    }
#else
    template <int R, int T>
    void scaled_sums(Few x, int64_t n, vec acc[R][T]) const {
        for (int64_t g = 0; g < x.G; g++)
            MOSS_UNROLL
            for (int r = 0; r < R; r++) {
                const uint8_t* from = q + (n + r) * row_bytes() + g * (GROUP * BITS / 8);
                vec s = all(to_float(scale[(n + r) * x.G + g]));
                vec group[T];
                MOSS_UNROLL
                for (int t = 0; t < T; t++) group[t] = moss::zero();
                for (int i = 0; i < GROUP; i += VEC) {
                    vec v = BITS == 8 ? load_u8(from + i) : i < 64 ? load_low4(from + i) : load_high4(from + i - 64);
                    MOSS_UNROLL
                    for (int t = 0; t < T; t++) group[t] = fma(v, load(x.x->row(t) + g * GROUP + i), group[t]);
                }
                MOSS_UNROLL
                for (int t = 0; t < T; t++) acc[r][t] = fma(group[t], s, acc[r][t]);
            }
    }
#endif
};

}  // namespace moss
