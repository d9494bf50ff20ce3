// What products of many tokens multiply: floats, or, for weights of few bits and where the CPU has it, bfloat16 in pairs, twice
// as fast. Rounding weights and inputs to bfloat16 makes a product wrong by 1.6e-3 of its size; halves keep more than that,
// so they are multiplied as floats.
#pragma once
#include "simd.h"
#if defined(MOSS_AVX512) && defined(__AVX512BF16__)
#define MOSS_BF16 1
#endif

namespace moss {

struct Float32 {
    typedef float E;
    static const int STEP = VEC;  // elements in a vector
    typedef vec V;
    static V get(const E* p) { return load(p); }
    static V keep(V v) { return in_register(v); }
    static vec dot(V a, V b, vec sums) { return fma(a, b, sums); }
    static void from_float(const float* x, E* to, int64_t n) { memcpy(to, x, 4 * n); }
};

#ifdef MOSS_BF16
struct BFloat16 {
    typedef uint16_t E;
    static const int STEP = 32;
    typedef __m512i V;
    static V get(const E* p) { return _mm512_loadu_si512(p); }
    static V keep(V v) {
        asm("" : "+v"(v));
        return v;
    }
    static vec dot(V a, V b, vec sums) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
    static void from_float(const float* x, E* to, int64_t n) {
        for (int64_t i = 0; i < n; i += 32)
            _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(load(x + i + 16), load(x + i)));
    }
};
#endif

#ifdef MOSS_BF16
typedef BFloat16 FewBits;
#else
typedef Float32 FewBits;
#endif

}  // namespace moss
