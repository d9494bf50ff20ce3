// cuda_fp16.h's half and half2, rounded as a GPU does: to the nearest, ties to even, subnormals kept.
#pragma once
#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace moss_emulation {

inline uint32_t bits_of(float f) {
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    return u;
}
inline float float_of(uint32_t u) {
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
}

inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    float f = (float)fraction * 5.9604644775390625e-8f;
    return sign ? -f : f;
}

inline uint16_t double_to_half(double d) {
    uint64_t u;
    __builtin_memcpy(&u, &d, 8);
    uint16_t sign = u >> 48 & 0x8000;
    double a = std::fabs(d);
    if (a != a) return 0x7fff;
    if (a >= 65520) return sign | 0x7c00;
    if (a < 6.103515625e-5) return sign | (uint16_t)(int)std::nearbyint(a * 16777216);  // 1024 is the least normal number
    u &= 0x7fffffffffffffff;
    uint64_t up = 0x1ffffffffff + (u >> 42 & 1);  // 42 bits of the fraction go
    return sign | (uint16_t)(((u + up) >> 42) - ((uint64_t)1008 << 10));
}

// a * b + c rounded once: the double sum is made odd where it is not exact, so that rounding it again cannot go wrong.
inline uint16_t half_fma(float a, float b, float c) {
    double p = (double)a * b, s = p + c, back = s - p;
    double rest = (p - (s - back)) + (c - back);
    uint64_t u;
    __builtin_memcpy(&u, &s, 8);
    if (rest != 0 && std::isfinite(s) && !(u & 1)) u += (rest > 0) == (s > 0) ? 1 : -1;
    __builtin_memcpy(&s, &u, 8);
    return double_to_half(s);
}

}  // namespace moss_emulation

struct alignas(2) half {
    uint16_t bits;
    half() = default;
    half(float f) : bits(moss_emulation::double_to_half(f)) {}
    half(double d) : bits(moss_emulation::double_to_half(d)) {}
    half(int i) : bits(moss_emulation::double_to_half(i)) {}
    operator float() const { return moss_emulation::half_to_float(bits); }
};
typedef half __half;

struct alignas(4) half2 {
    half x, y;
    half2() = default;
    half2(half x, half y) : x(x), y(y) {}
};
typedef half2 __half2;

inline float __half2float(half h) { return h; }
inline half __float2half(float f) { return f; }
inline half __float2half_rn(float f) { return f; }
inline half __int2half_rn(int i) { return i; }
inline half __ushort2half_rn(unsigned short i) { return (int)i; }
inline half __short2half_rn(short i) { return (int)i; }
inline int __half2int_rn(half h) { return (int)std::nearbyint((float)h); }
inline unsigned short __half_as_ushort(half h) { return h.bits; }
inline half __ushort_as_half(unsigned short u) {
    half h;
    h.bits = u;
    return h;
}

// Sums, products and quotients of halves are exact enough in float that rounding twice is rounding once.
inline half __hadd(half a, half b) { return (float)a + (float)b; }
inline half __hsub(half a, half b) { return (float)a - (float)b; }
inline half __hmul(half a, half b) { return (float)a * (float)b; }
inline half __hdiv(half a, half b) { return (float)a / (float)b; }
inline half __hfma(half a, half b, half c) { return __ushort_as_half(moss_emulation::half_fma(a, b, c)); }
inline half __hneg(half a) { return __ushort_as_half(a.bits ^ 0x8000); }
inline half __habs(half a) { return __ushort_as_half(a.bits & 0x7fff); }
inline bool __hisnan(half a) { return (a.bits & 0x7fff) > 0x7c00; }
inline half __hmax(half a, half b) { return __hisnan(a) ? b : __hisnan(b) || (float)a > (float)b ? a : b; }
inline half __hmin(half a, half b) { return __hisnan(a) ? b : __hisnan(b) || (float)a < (float)b ? a : b; }
inline bool __heq(half a, half b) { return (float)a == (float)b; }
inline bool __hne(half a, half b) { return (float)a != (float)b; }
inline bool __hlt(half a, half b) { return (float)a < (float)b; }
inline bool __hle(half a, half b) { return (float)a <= (float)b; }
inline bool __hgt(half a, half b) { return (float)a > (float)b; }
inline bool __hge(half a, half b) { return (float)a >= (float)b; }

inline half operator+(half a, half b) { return __hadd(a, b); }
inline half operator-(half a, half b) { return __hsub(a, b); }
inline half operator*(half a, half b) { return __hmul(a, b); }
inline half operator/(half a, half b) { return __hdiv(a, b); }
inline half operator-(half a) { return __hneg(a); }
inline half& operator+=(half& a, half b) { return a = a + b; }
inline half& operator-=(half& a, half b) { return a = a - b; }
inline half& operator*=(half& a, half b) { return a = a * b; }
inline bool operator==(half a, half b) { return __heq(a, b); }
inline bool operator!=(half a, half b) { return __hne(a, b); }
inline bool operator<(half a, half b) { return __hlt(a, b); }
inline bool operator<=(half a, half b) { return __hle(a, b); }
inline bool operator>(half a, half b) { return __hgt(a, b); }
inline bool operator>=(half a, half b) { return __hge(a, b); }

inline half2 make_half2(half x, half y) { return {x, y}; }
inline half2 __halves2half2(half x, half y) { return {x, y}; }
inline half2 __half2half2(half a) { return {a, a}; }
inline half2 __float2half2_rn(float f) { return {f, f}; }
inline half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(half2 a) { return {a.x, a.y}; }
inline half2 __float22half2_rn(float2 a) { return {a.x, a.y}; }
inline half __low2half(half2 a) { return a.x; }
inline half __high2half(half2 a) { return a.y; }
inline float __low2float(half2 a) { return a.x; }
inline float __high2float(half2 a) { return a.y; }
inline half2 __low2half2(half2 a) { return {a.x, a.x}; }
inline half2 __high2half2(half2 a) { return {a.y, a.y}; }
inline half2 __lows2half2(half2 a, half2 b) { return {a.x, b.x}; }
inline half2 __highs2half2(half2 a, half2 b) { return {a.y, b.y}; }
inline half2 __lowhigh2highlow(half2 a) { return {a.y, a.x}; }
inline half2 __hadd2(half2 a, half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline half2 __hsub2(half2 a, half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline half2 __hmul2(half2 a, half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline half2 __hfma2(half2 a, half2 b, half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline half2 __hneg2(half2 a) { return {__hneg(a.x), __hneg(a.y)}; }
inline half2 __habs2(half2 a) { return {__habs(a.x), __habs(a.y)}; }
inline half2 __hmax2(half2 a, half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
inline half2 __hmin2(half2 a, half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
inline half2 operator+(half2 a, half2 b) { return __hadd2(a, b); }
inline half2 operator-(half2 a, half2 b) { return __hsub2(a, b); }
inline half2 operator*(half2 a, half2 b) { return __hmul2(a, b); }
