// Keys, or values, of the tokens that were evaluated: rows of S numbers, one for each of B sequences, H heads and C positions, in
// one of two codings. Attention is written once for both; what it needs of them:
//   put(row, x, S)         writes a row from S floats
//   load(i), load_n(i, n)  numbers i ... of all rows, as floats
//   scale(row)             what the numbers of a row are to be multiplied by
//   from(row, S)           the same, from that row on
// A row moves 2 S bytes as halves, and S + 4 in int8.
#pragma once
#include <algorithm>
#include "simd.h"

namespace moss {

struct CacheF16 {
    f16* numbers;  // (B, H, C, S)
    CacheF16 from(int64_t row, int64_t S) const { return {numbers + row * S}; }
    vec load(int64_t i) const { return load_f16(numbers + i); }
    vec load_n(int64_t i, int n) const { return load_f16_n(numbers + i, n); }
    float scale(int64_t) const { return 1; }  // and the multiplication is left out
    void put(int64_t row, const float* x, int64_t S) const {
        f16* to = numbers + row * S;
        int64_t i = 0;
        for (; i + VEC <= S; i += VEC) store_f16(to + i, moss::load(x + i));
        for (; i < S; i++) to[i] = to_f16(x[i]);
    }
};

// Symmetric: the entry of a row that is furthest from zero becomes 127 or -127.
struct CacheI8 {
    int8_t* numbers;  // (B, H, C, S)
    float* scales;    // (B, H, C)
    CacheI8 from(int64_t row, int64_t S) const { return {numbers + row * S, scales + row}; }
    vec load(int64_t i) const { return load_i8(numbers + i); }
    vec load_n(int64_t i, int n) const { return load_i8_n(numbers + i, n); }
    float scale(int64_t row) const { return scales[row]; }
    void put(int64_t row, const float* x, int64_t S) const {
        const int64_t whole = S / VEC * VEC;
        const int rest = (int)(S - whole);
        vec size = rest ? absolute(moss::load_n(x + whole, rest)) : zero();
        for (int64_t i = 0; i < whole; i += VEC) size = higher(size, absolute(moss::load(x + i)));
        const float most = highest(size);
        const bool nothing = most < 1e-35f;  // whose inverse would not be a float
        const vec by = all(nothing ? 0 : 127 / most);
        scales[row] = nothing ? 0 : most / 127;
        int8_t* to = numbers + row * S;
        for (int64_t i = 0; i < whole; i += VEC) store_i8_n(to + i, mul(moss::load(x + i), by), VEC);
        if (rest) store_i8_n(to + whole, mul(moss::load_n(x + whole, rest), by), rest);
    }
    static vec absolute(vec v) { return higher(v, sub(zero(), v)); }
};

}  // namespace moss
