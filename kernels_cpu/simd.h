// One set of vector operations over AVX-512, AVX2+FMA+F16C, or plain C++, so that each kernel is written once.
//
// `vec` holds VEC float lanes. `pairs` holds, in each of VEC lanes, two 16-bit numbers, or one 32-bit sum of products:
// dot(sums, a, b) adds the products of both pairs of numbers to each lane's sum. The instruction set is what the compiler was
// told to use (-march=...), and MOSS_PLAIN forces the plain one. Tails: load_..._n read n entries, VEC at most, and fill the rest
// with zeros; they read nothing past the n entries. store_i8_n rounds.
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
inline vec load_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline vec load_i8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline vec load_i8_n(const int8_t* p, int n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p)));
}
inline void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
inline void store_f16(f16* p, vec v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
inline void store_i8_n(int8_t* p, vec v, int n) {
    _mm_mask_storeu_epi8(p, (__mmask16)((1u << n) - 1), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}
inline void store_n(float* p, vec v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v); }
inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
inline vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
inline vec div(vec a, vec b) { return _mm512_div_ps(a, b); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
inline vec fms(vec a, vec b, vec c) { return _mm512_fmsub_ps(a, b, c); }  // a * b - c
inline vec lower(vec a, vec b) { return _mm512_min_ps(a, b); }
inline vec higher(vec a, vec b) { return _mm512_max_ps(a, b); }
inline vec nearest(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vec times_two_to(vec a, vec n) { return _mm512_scalef_ps(a, n); }  // n whole
inline float sum(vec a) { return _mm512_reduce_add_ps(a); }
inline float highest(vec a) { return _mm512_reduce_max_ps(a); }

typedef __m512i pairs;
inline pairs zero_pairs() { return _mm512_setzero_si512(); }
inline pairs load_pairs(const void* p) { return _mm512_loadu_si512(p); }
inline void store_pairs(void* p, pairs v) { _mm512_storeu_si512(p, v); }
inline pairs all_pairs(const void* p) {
    int32_t i;
    memcpy(&i, p, 4);
    return _mm512_set1_epi32(i);
}
inline pairs all_pairs(int16_t i) { return _mm512_set1_epi16(i); }
inline pairs both(pairs a, pairs b) { return _mm512_and_si512(a, b); }
template <int N> inline pairs right(pairs a) { return _mm512_srli_epi16(a, N); }
inline pairs sub(pairs a, pairs b) { return _mm512_sub_epi16(a, b); }
inline pairs add_sums(pairs a, pairs b) { return _mm512_add_epi32(a, b); }
inline pairs dot(pairs sums, pairs a, pairs b) {
#ifdef __AVX512VNNI__
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));  // the intrinsic makes gcc 12 copy each sum, and spill half of them
    return sums;
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
#endif
}
inline vec to_vec(pairs sums) { return _mm512_cvtepi32_ps(sums); }
inline pairs twice_u8(const uint8_t* p) {
    __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm512_or_si512(v, _mm512_slli_epi32(v, 16));
}
inline void store_i16(int16_t* p, vec v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v))); }
inline int32_t total(pairs sums) { return _mm512_reduce_add_epi32(sums); }
inline pairs pack(vec a, vec b) { return _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b)); }
inline pairs as_pairs(vec v) { return _mm512_castps_si512(v); }
inline vec as_vec(pairs v) { return _mm512_castsi512_ps(v); }
inline vec root(vec v) { return _mm512_sqrt_ps(v); }
inline void transpose(pairs v[16]) {  // lane i of v[j] <-> lane j of v[i]
    pairs t[16];
    MOSS_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    MOSS_UNROLL
    for (int i = 0; i < 16; i += 4)
        MOSS_UNROLL
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    // v[4 i + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 i ... 4 i + 3, 128 bits each.
    MOSS_UNROLL
    for (int c = 0; c < 4; c++) {
        pairs a = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88), b = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
        pairs d = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88), e = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(a, d, 0x88), t[c + 8] = _mm512_shuffle_i32x4(a, d, 0xdd);
        t[c + 4] = _mm512_shuffle_i32x4(b, e, 0x88), t[c + 12] = _mm512_shuffle_i32x4(b, e, 0xdd);
    }
    MOSS_UNROLL
    for (int i = 0; i < 16; i++) v[i] = t[i];
}

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
inline vec load_u8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline vec load_i8(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline vec load_i8_n(const int8_t* p, int n) {
    int8_t t[8] = {0};
    memcpy(t, p, n);
    return load_i8(t);
}
inline void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
inline void store_f16(f16* p, vec v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
inline void store_i8_n(int8_t* p, vec v, int n) {
    __m256i i = _mm256_cvtps_epi32(v);
    __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    const int64_t all = _mm_cvtsi128_si64(_mm_packs_epi16(w, w));
    memcpy(p, &all, n);
}
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
inline vec fms(vec a, vec b, vec c) { return _mm256_fmsub_ps(a, b, c); }
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

typedef __m256i pairs;
inline pairs zero_pairs() { return _mm256_setzero_si256(); }
inline pairs load_pairs(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store_pairs(void* p, pairs v) { _mm256_storeu_si256((__m256i*)p, v); }
inline pairs all_pairs(const void* p) {
    int32_t i;
    memcpy(&i, p, 4);
    return _mm256_set1_epi32(i);
}
inline pairs all_pairs(int16_t i) { return _mm256_set1_epi16(i); }
inline pairs both(pairs a, pairs b) { return _mm256_and_si256(a, b); }
template <int N> inline pairs right(pairs a) { return _mm256_srli_epi16(a, N); }
inline pairs sub(pairs a, pairs b) { return _mm256_sub_epi16(a, b); }
inline pairs add_sums(pairs a, pairs b) { return _mm256_add_epi32(a, b); }
inline pairs dot(pairs sums, pairs a, pairs b) {
#ifdef __AVXVNNI__
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b));
    return sums;
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#endif
}
inline vec to_vec(pairs sums) { return _mm256_cvtepi32_ps(sums); }
inline pairs twice_u8(const uint8_t* p) {
    __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    return _mm256_or_si256(v, _mm256_slli_epi32(v, 16));
}
inline void store_i16(int16_t* p, vec v) {
    __m256i i = _mm256_cvtps_epi32(v);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1)));
}
inline void transpose(pairs v[8]) {  // lane i of v[j] <-> lane j of v[i]
    pairs t[8];
    MOSS_UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    MOSS_UNROLL
    for (int i = 0; i < 8; i += 4)
        MOSS_UNROLL
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            v[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    MOSS_UNROLL
    for (int c = 0; c < 4; c++) {
        pairs low = v[c], high = v[4 + c];
        v[c] = _mm256_permute2x128_si256(low, high, 0x20), v[4 + c] = _mm256_permute2x128_si256(low, high, 0x31);
    }
}
inline pairs pack(vec a, vec b) { return _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b)); }
inline pairs as_pairs(vec v) { return _mm256_castps_si256(v); }
inline vec as_vec(pairs v) { return _mm256_castsi256_ps(v); }
inline vec root(vec v) { return _mm256_sqrt_ps(v); }
inline int32_t total(pairs sums) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
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
inline vec load_i8(const int8_t* p) { vec r; MOSS_LANES r.a[i] = p[i]; return r; }
inline vec load_i8_n(const int8_t* p, int n) { vec r = zero(); for (int i = 0; i < n; i++) r.a[i] = p[i]; return r; }
inline void store(float* p, vec v) { memcpy(p, v.a, sizeof v.a); }
inline void store_f16(f16* p, vec v) { MOSS_LANES p[i] = to_f16(v.a[i]); }
inline void store_i8_n(int8_t* p, vec v, int n) { for (int i = 0; i < n; i++) p[i] = (int8_t)lrintf(v.a[i]); }
inline void store_n(float* p, vec v, int n) { memcpy(p, v.a, 4 * n); }
inline vec add(vec a, vec b) { MOSS_LANES a.a[i] += b.a[i]; return a; }
inline vec sub(vec a, vec b) { MOSS_LANES a.a[i] -= b.a[i]; return a; }
inline vec mul(vec a, vec b) { MOSS_LANES a.a[i] *= b.a[i]; return a; }
inline vec div(vec a, vec b) { MOSS_LANES a.a[i] /= b.a[i]; return a; }
inline vec fma(vec a, vec b, vec c) { MOSS_LANES c.a[i] += a.a[i] * b.a[i]; return c; }
inline vec fms(vec a, vec b, vec c) { MOSS_LANES c.a[i] = a.a[i] * b.a[i] - c.a[i]; return c; }
inline vec lower(vec a, vec b) { MOSS_LANES a.a[i] = a.a[i] < b.a[i] ? a.a[i] : b.a[i]; return a; }
inline vec higher(vec a, vec b) { MOSS_LANES a.a[i] = a.a[i] > b.a[i] ? a.a[i] : b.a[i]; return a; }
inline vec nearest(vec a) { MOSS_LANES a.a[i] = rintf(a.a[i]); return a; }
inline vec times_two_to(vec a, vec n) { MOSS_LANES a.a[i] = ldexpf(a.a[i], (int)n.a[i]); return a; }
inline float sum(vec a) { float s = 0; MOSS_LANES s += a.a[i]; return s; }
inline float highest(vec a) { float m = a.a[0]; MOSS_LANES m = m > a.a[i] ? m : a.a[i]; return m; }

struct pairs { int16_t a[2 * VEC]; };
#define MOSS_HALVES for (int i = 0; i < 2 * VEC; i++)
inline pairs load_pairs(const void* p) { pairs r; memcpy(r.a, p, sizeof r.a); return r; }
inline void store_pairs(void* p, pairs v) { memcpy(p, v.a, sizeof v.a); }
inline pairs all_pairs(int16_t v) { pairs r; MOSS_HALVES r.a[i] = v; return r; }
inline pairs zero_pairs() { return all_pairs((int16_t)0); }
inline pairs all_pairs(const void* p) { pairs r; MOSS_LANES memcpy(r.a + 2 * i, p, 4); return r; }
inline pairs both(pairs a, pairs b) { MOSS_HALVES a.a[i] &= b.a[i]; return a; }
template <int N> inline pairs right(pairs a) { MOSS_HALVES a.a[i] = (int16_t)((uint16_t)a.a[i] >> N); return a; }
inline pairs sub(pairs a, pairs b) { MOSS_HALVES a.a[i] = (int16_t)(a.a[i] - b.a[i]); return a; }
inline void get_sums(pairs s, int32_t* to) { memcpy(to, s.a, sizeof s.a); }
inline pairs add_sums(pairs a, pairs b) {
    int32_t x[VEC], y[VEC];
    get_sums(a, x), get_sums(b, y);
    MOSS_LANES x[i] += y[i];
    return load_pairs(x);
}
inline pairs dot(pairs sums, pairs a, pairs b) {
    int32_t s[VEC];
    get_sums(sums, s);
    MOSS_LANES s[i] += a.a[2 * i] * b.a[2 * i] + a.a[2 * i + 1] * b.a[2 * i + 1];
    return load_pairs(s);
}
inline vec to_vec(pairs sums) { int32_t s[VEC]; vec r; get_sums(sums, s); MOSS_LANES r.a[i] = (float)s[i]; return r; }
inline pairs twice_u8(const uint8_t* p) { pairs r; MOSS_LANES r.a[2 * i] = r.a[2 * i + 1] = p[i]; return r; }
inline void store_i16(int16_t* p, vec v) { MOSS_LANES p[i] = (int16_t)lrintf(v.a[i]); }
inline void transpose(pairs v[VEC]) {
    int32_t t[VEC][VEC];
    for (int j = 0; j < VEC; j++) get_sums(v[j], t[j]);
    for (int j = 0; j < VEC; j++) MOSS_LANES memcpy(v[j].a + 2 * i, &t[i][j], 4);
}
inline int16_t nearest_i16(float f) { return (int16_t)lrintf(f); }
inline pairs pack(vec a, vec b) {
    pairs r;
    for (int i = 0; i < VEC; i++) {
        r.a[i / 4 * 8 + i % 4] = nearest_i16(a.a[i]);
        r.a[i / 4 * 8 + 4 + i % 4] = nearest_i16(b.a[i]);
    }
    return r;
}
inline pairs as_pairs(vec v) { pairs r; memcpy(r.a, v.a, sizeof r.a); return r; }
inline vec as_vec(pairs v) { vec r; memcpy(r.a, v.a, sizeof r.a); return r; }
inline vec root(vec v) { MOSS_LANES v.a[i] = std::sqrt(v.a[i]); return v; }
inline int32_t total(pairs sums) { int32_t s[VEC], t = 0; get_sums(sums, s); MOSS_LANES t += s[i]; return t; }
#undef MOSS_HALVES
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
inline pairs in_register(pairs v) {
#if defined(MOSS_AVX512) || defined(MOSS_AVX2)
    asm("" : "+v"(v));
#endif
    return v;
}

// What pack(a, b), 2 VEC rounded floats as 16-bit numbers, has at pair j: the floats first and first + 1 of a and b together.
inline int64_t first_packed(int64_t j) { return j % 4 / 2 * VEC + j / 4 * 4 + j % 2 * 2; }

// Lane i: the sum of v[i]'s lanes. v is lost.
inline vec sums_of(vec v[VEC]) {
    pairs t[VEC];
    MOSS_UNROLL
    for (int i = 0; i < VEC; i++) t[i] = as_pairs(v[i]);
    transpose(t);
    vec s = as_vec(t[0]);
    MOSS_UNROLL
    for (int i = 1; i < VEC; i++) s = add(s, as_vec(t[i]));
    return s;
}

// to[i][j] = from[j][i]: VEC rows of VEC floats as columns.
inline void turn(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    pairs v[VEC];
    MOSS_UNROLL
    for (int i = 0; i < VEC; i++) v[i] = load_pairs(from + i * from_stride);
    transpose(v);
    MOSS_UNROLL
    for (int i = 0; i < VEC; i++) store_pairs(to + i * to_stride, v[i]);
}

// Bring what will be read once: into the L1 cache, past the others, which keep what is read again.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 0); }

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
