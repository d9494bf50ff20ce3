// CUDA's vector types, aligned as it aligns them.
#pragma once
#include "runtime.h"

#define MOSS_VECTORS(name, type, align)                                                          \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                     \
    struct name##3 { type x, y, z; };                                                            \
    struct alignas(align) name##4 { type x, y, z, w; };                                          \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                             \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                  \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define uint3 moss_uint3  // runtime.h has it
MOSS_VECTORS(uint, unsigned, 16)
#undef uint3
MOSS_VECTORS(float, float, 16)
MOSS_VECTORS(int, int, 16)
MOSS_VECTORS(char, signed char, 4)
MOSS_VECTORS(uchar, unsigned char, 4)
MOSS_VECTORS(short, short, 8)
MOSS_VECTORS(ushort, unsigned short, 8)
#undef MOSS_VECTORS
struct alignas(16) longlong2 { long long x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
