// One set of vector operations over AVX-512, AVX2+FMA+F16C, or plain C++, so that each kernel is written once.
//
// `vec` holds VEC float lanes. The instruction set is what the compiler was told to use (-march=...), and
// MOSS_PLAIN forces the plain one. Tails: load_n / load_f16_n read n < VEC entries and fill the rest with zeros;
// they read nothing past the n entries.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(MOSS_PLAIN) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MOSS_AVX512 1
#elif !defined(MOSS_PLAIN) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MOSS_AVX2 1
#endif
#if defined(MOSS_AVX512) || defined(MOSS_AVX2)
#include <immintrin.h>
#endif

// Before a loop over rows or tokens of a tile: unrolled at once and whole, so that the tile's sums live in registers. Left to
// itself, gcc 12 kept some of them in memory from step to step, and half of the speed with them.
#define MOSS_UNROLL _Pragma("GCC unroll 32")

namespace moss {

typedef uint16_t f16;  // the bits of an IEEE half

inline float to_float(f16 h) {
#if defined(MOSS_AVX512) || defined(MOSS_AVX2)
    return _cvtsh_ss(h);
#else
    // On integers, except for subnormals, whose floats are normal: nothing here depends on flush-to-zero modes.
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits;
    if (rest >= 0x7c00) bits = 0x7f800000 | (rest & 0x3ff) << 13;
    else if (rest >= 0x400) bits = (rest << 13) + 0x38000000;
    else {  // subnormal: rest * 2^-24, exact in float
        float f = (float)rest * 5.9604644775390625e-8f;
        memcpy(&bits, &f, 4);
    }
    bits |= sign;
    float f;
    memcpy(&f, &bits, 4);
    return f;
#endif
}

inline f16 to_f16(float f) {  // round to nearest, ties to even; what exceeds the range becomes infinity
#if defined(MOSS_AVX512) || defined(MOSS_AVX2)
    return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest >= 0x7f800000) return (f16)(sign | 0x7c00 | (rest > 0x7f800000 ? 0x200 : 0));
    if (rest >= 0x477ff000) return (f16)(sign | 0x7c00);
    if (rest < 0x33000000) return (f16)sign;  // below half of the smallest subnormal
    if (rest < 0x38800000) {                  // subnormal half: shift the full mantissa down, rounding
        uint32_t shift = 126 - (rest >> 23), mantissa = (rest & 0x7fffff) | 0x800000;
        uint32_t kept = mantissa >> shift, lost = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
        return (f16)(sign | (kept + (lost > half || (lost == half && (kept & 1)))));
    }
    uint32_t kept = (rest - 0x38000000) >> 13, lost = rest & 0x1fff;
    return (f16)(sign | (kept + (lost > 0x1000 || (lost == 0x1000 && (kept & 1)))));
#endif
}

#if defined(MOSS_AVX512)

const int VEC = 16;
typedef __m512 vec;
inline vec zero() { return _mm512_setzero_ps(); }
inline vec all(float f) { return _mm512_set1_ps(f); }
inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline vec load_n(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
inline vec load_f16(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline vec load_f16_n(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p)); }
inline vec to_vec(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }
inline vec load_u8(const uint8_t* p) { return to_vec(_mm_loadu_si128((const __m128i*)p)); }
inline vec load_low4(const uint8_t* p) { return to_vec(_mm_and_si128(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8(15))); }
inline vec load_high4(const uint8_t* p) {
    return to_vec(_mm_and_si128(_mm_srli_epi16(_mm_loadu_si128((const __m128i*)p), 4), _mm_set1_epi8(15)));
}
inline void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
inline void store_n(float* p, vec v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v); }
inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
inline vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
inline vec div(vec a, vec b) { return _mm512_div_ps(a, b); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
inline vec lower(vec a, vec b) { return _mm512_min_ps(a, b); }
inline vec higher(vec a, vec b) { return _mm512_max_ps(a, b); }
inline vec nearest(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vec times_two_to(vec a, vec n) { return _mm512_scalef_ps(a, n); }  // n whole
inline float sum(vec a) { return _mm512_reduce_add_ps(a); }
inline float highest(vec a) { return _mm512_reduce_max_ps(a); }

#elif defined(MOSS_AVX2)

const int VEC = 8;
typedef __m256 vec;
inline vec zero() { return _mm256_setzero_ps(); }
inline vec all(float f) { return _mm256_set1_ps(f); }
inline vec load(const float* p) { return _mm256_loadu_ps(p); }
inline vec load_n(const float* p, int n) {
    float t[8] = {0};
    memcpy(t, p, 4 * n);
    return load(t);
}
inline vec load_f16(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline vec load_f16_n(const f16* p, int n) {
    f16 t[8] = {0};
    memcpy(t, p, 2 * n);
    return load_f16(t);
}
inline vec to_vec(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)); }
inline vec load_u8(const uint8_t* p) { return to_vec(_mm_loadl_epi64((const __m128i*)p)); }
inline vec load_low4(const uint8_t* p) { return to_vec(_mm_and_si128(_mm_loadl_epi64((const __m128i*)p), _mm_set1_epi8(15))); }
inline vec load_high4(const uint8_t* p) {
    return to_vec(_mm_and_si128(_mm_srli_epi16(_mm_loadl_epi64((const __m128i*)p), 4), _mm_set1_epi8(15)));
}
inline void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
inline void store_n(float* p, vec v, int n) {
    float t[8];
    store(t, v);
    memcpy(p, t, 4 * n);
}
inline vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
inline vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
inline vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
inline vec div(vec a, vec b) { return _mm256_div_ps(a, b); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline vec lower(vec a, vec b) { return _mm256_min_ps(a, b); }
inline vec higher(vec a, vec b) { return _mm256_max_ps(a, b); }
inline vec nearest(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vec times_two_to(vec a, vec n) {
    __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_add_epi32(e, _mm256_set1_epi32(127 << 23))));
}
inline float sum(vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float highest(vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

#else

const int VEC = 8;  // short loops that the compiler turns into whatever vectors the machine has
struct vec { float a[VEC]; };
#define MOSS_LANES for (int i = 0; i < VEC; i++)
inline vec all(float f) { vec r; MOSS_LANES r.a[i] = f; return r; }
inline vec zero() { return all(0); }
inline vec load(const float* p) { vec r; memcpy(r.a, p, sizeof r.a); return r; }
inline vec load_n(const float* p, int n) { vec r = zero(); memcpy(r.a, p, 4 * n); return r; }
inline vec load_f16(const f16* p) { vec r; MOSS_LANES r.a[i] = to_float(p[i]); return r; }
inline vec load_f16_n(const f16* p, int n) { vec r = zero(); for (int i = 0; i < n; i++) r.a[i] = to_float(p[i]); return r; }
inline vec load_u8(const uint8_t* p) { vec r; MOSS_LANES r.a[i] = p[i]; return r; }
inline vec load_low4(const uint8_t* p) { vec r; MOSS_LANES r.a[i] = p[i] & 15; return r; }
inline vec load_high4(const uint8_t* p) { vec r; MOSS_LANES r.a[i] = p[i] >> 4; return r; }
inline void store(float* p, vec v) { memcpy(p, v.a, sizeof v.a); }
inline void store_n(float* p, vec v, int n) { memcpy(p, v.a, 4 * n); }
inline vec add(vec a, vec b) { MOSS_LANES a.a[i] += b.a[i]; return a; }
inline vec sub(vec a, vec b) { MOSS_LANES a.a[i] -= b.a[i]; return a; }
inline vec mul(vec a, vec b) { MOSS_LANES a.a[i] *= b.a[i]; return a; }
inline vec div(vec a, vec b) { MOSS_LANES a.a[i] /= b.a[i]; return a; }
inline vec fma(vec a, vec b, vec c) { MOSS_LANES c.a[i] += a.a[i] * b.a[i]; return c; }
inline vec lower(vec a, vec b) { MOSS_LANES a.a[i] = a.a[i] < b.a[i] ? a.a[i] : b.a[i]; return a; }
inline vec higher(vec a, vec b) { MOSS_LANES a.a[i] = a.a[i] > b.a[i] ? a.a[i] : b.a[i]; return a; }
inline vec nearest(vec a) { MOSS_LANES a.a[i] = rintf(a.a[i]); return a; }
inline vec times_two_to(vec a, vec n) { MOSS_LANES a.a[i] = ldexpf(a.a[i], (int)n.a[i]); return a; }
inline float sum(vec a) { float s = 0; MOSS_LANES s += a.a[i]; return s; }
inline float highest(vec a) { float m = a.a[0]; MOSS_LANES m = m > a.a[i] ? m : a.a[i]; return m; }
#undef MOSS_LANES

#endif

// The same value, which the compiler may then not load again from memory for each use. Where one load feeds several
// multiplications, those loads would be the limit.
inline vec in_register(vec v) {
#if defined(MOSS_AVX512) || defined(MOSS_AVX2)
    asm("" : "+v"(v));
#endif
    return v;
}

// e^x for x <= 88, relative error below 2e-7; what lies below -87 gives about 1e-38. x = n ln2 + r, |r| <= ln2 / 2,
// e^r by its Taylor series up to r^7 (the first term left out is 5e-9 at most).
inline vec exp(vec x) {
    x = higher(x, all(-87.f));
    vec n = nearest(mul(x, all(1.44269504f)));
    vec r = fma(n, all(-0.693145752f), x);  // ln2 in two parts, the first one exact in few bits
    r = fma(n, all(-1.42860677e-6f), r);
    vec p = all(1.f / 5040);
    p = fma(p, r, all(1.f / 720));
    p = fma(p, r, all(1.f / 120));
    p = fma(p, r, all(1.f / 24));
    p = fma(p, r, all(1.f / 6));
    p = fma(p, r, all(0.5f));
    p = fma(p, r, all(1));
    p = fma(p, r, all(1));
    return times_two_to(p, n);
}

// gelu_new(x) = x/2 (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3).
inline vec gelu_new(vec x) {
    vec u2 = mul(mul(x, all(1.5957691216f)), fma(mul(x, x), all(0.044715f), all(1)));
    vec e = exp(lower(sub(zero(), u2), all(88.f)));
    return div(x, add(all(1), e));
}

// y[i] = f(y[i]) for n entries, a vector at a time.
template <class F>
inline void map(float* y, int64_t n, F f) {
    int64_t i = 0;
    for (; i + VEC <= n; i += VEC) store(y + i, f(load(y + i), i, VEC));
    if (i < n) store_n(y + i, f(load_n(y + i, (int)(n - i)), i, (int)(n - i)), (int)(n - i));
}

}  // namespace moss
