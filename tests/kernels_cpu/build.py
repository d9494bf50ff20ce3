"""Compiles kernels_cpu/ by itself, without Jittor, for each instruction set, and calls it through ctypes."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np

from moss_jt.runtime import float_environment_kept

KERNELS = Path(__file__).resolve().parents[2] / "kernels_cpu"

# Jittor's own flags for an operator, so that what is tested is what runs: -Ofast reorders sums and assumes finite numbers.
FLAGS = ["-std=c++14", "-Ofast", "-fopenmp", "-fPIC", "-shared"]
ISAS = {
    "avx512": ["-march=native"],  # with VNNI and BF16, where the CPU has them
    "avx512-first": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "plain": ["-DMOSS_PLAIN"],
}

SOURCE = r"""
#include "block.h"
using namespace moss;
typedef int64_t i64;
extern "C" {
int lanes() { return VEC; }
void c_to_float(const f16* h, float* f, i64 n) { for (i64 i = 0; i < n; i++) f[i] = to_float(h[i]); }
void c_load_f16(const f16* h, float* f, i64 n) {
    i64 i = 0;
    for (; i + VEC <= n; i += VEC) store(f + i, load_f16(h + i));
    if (i < n) store_n(f + i, load_f16_n(h + i, (int)(n - i)), (int)(n - i));
}
void c_to_f16(const float* f, f16* h, i64 n) { for (i64 i = 0; i < n; i++) h[i] = to_f16(f[i]); }
void c_exp(float* f, i64 n) { map(f, n, [](vec v, i64, int) { return moss::exp(v); }); }
void c_gelu_new(float* f, i64 n) { map(f, n, [](vec v, i64, int) { return gelu_new(v); }); }
void c_layer_norm(const float* x, const float* w, const float* b, float* y, i64 T, i64 D, double eps) {
    layer_norm(x, w, b, y, T, D, (float)eps);
}
// Each product takes bits, q, scale, zero, group, order, orders: for bits 16 the halves are q, and the rest is not looked at.
#define WEIGHTS i64 bits, const uint8_t *q, const f16 *s, const uint8_t *z, i64 S, const int32_t *order, i64 orders
#define WITH_WEIGHTS(call) \
    if (bits == 16) { WeightsF16 w{(const f16*)q, N, K}; call; } \
    else if (bits == 8) { WeightsGrouped<8> w{q, s, z, (N + 15) / 16, K, S, orders ? order : nullptr, orders}; call; } \
    else { WeightsGrouped<4> w{q, s, z, (N + 15) / 16, K, S, orders ? order : nullptr, orders}; call; }
#define LOW_RANK(name) const float *name##_down, const float *name##_up, i64 name##_R
#define THIS_LOW_RANK(name) (LowRank{name##_down, name##_up, name##_R})
void c_linear_in(const float* x, WEIGHTS, LOW_RANK(l), const float* b, float* y, i64 T, i64 N, i64 K, i64 I) {
    WITH_WEIGHTS(linear_in(x, w, THIS_LOW_RANK(l), b, y, T, N, I))
}
void c_linear_out(const float* a, const float* m, WEIGHTS, LOW_RANK(l), const float* b, const float* r, float* y, i64 T, i64 N,
                  i64 K, i64 A, i64 M) { WITH_WEIGHTS(linear_out(a, m, w, THIS_LOW_RANK(l), b, r, y, T, N, A, M)) }
void c_linear_head(const float* x, WEIGHTS, const float* b, float* y, i64 T, i64 N, i64 K) {
    WITH_WEIGHTS(linear_head(x, w, b, y, T, N))
}
// A cache takes bits, keys, values and, where they are int8, the scales of both.
#define CACHE i64 cache, void *k, void *v, float *ks, float *vs
#define WITH_CACHE(call) \
    if (cache == 16) { CacheF16 keys{(f16*)k}, values{(f16*)v}; call; } \
    else { CacheI8 keys{(int8_t*)k, ks}, values{(int8_t*)v, vs}; call; }
void c_block(const float* x, const float* nw, const float* nb, double eps, WEIGHTS, LOW_RANK(l), const float* in_bias,
             const uint8_t* q2, const f16* s2, const uint8_t* z2, const int32_t* order2, LOW_RANK(l2), const float* out_bias,
             const float* angles, CACHE, i64 H, i64 rotary, i64 C, const Sequence* sequences, i64 n, float* out, i64 T, i64 K,
             i64 I) {
    const i64 D = K, N = 3 * D + I, rows = (N + 15) / 16, columns = (D + 15) / 16;
    const Norm norm{nw, nb, (float)eps};
    const Heads heads{H, D / H, rotary, C};
    const int32_t *o = orders ? order : nullptr, *o2 = orders ? order2 : nullptr;
#define BLOCK(in, out_w) \
    WITH_CACHE(block(x, norm, in, THIS_LOW_RANK(l), in_bias, out_w, THIS_LOW_RANK(l2), out_bias, angles, keys, values, heads, \
                     sequences, n, out, T, D, I))
    if (bits == 16) { BLOCK((WeightsF16{(const f16*)q, N, D}), (WeightsF16{(const f16*)q2, D, D + I})) }
    else if (bits == 8) {
        BLOCK((WeightsGrouped<8>{q, s, z, rows, D, S, o, orders}),
              (WeightsGrouped<8>{q2, s2, z2, columns, D + I, S, o2, orders ? 1 : 0}))
    } else {
        BLOCK((WeightsGrouped<4>{q, s, z, rows, D, S, o, orders}),
              (WeightsGrouped<4>{q2, s2, z2, columns, D + I, S, o2, orders ? 1 : 0}))
    }
}
void c_attention(const float* y, i64 Y, const float* angles, CACHE, float* out, i64 H, i64 S, i64 rotary, i64 C,
                 const Sequence* sequences, i64 n) {
    WITH_CACHE(attention(y, Y, angles, keys, values, out, Heads{H, S, rotary, C}, sequences, n))
}
void c_put(const float* x, CACHE, i64 rows, i64 S) { for (i64 r = 0; r < rows; r++) WITH_CACHE(keys.put(r, x + r * S, S)) }
}
"""


def supported(isa: str) -> bool:
    """Whether this machine can run code compiled for the instruction set."""
    flags = Path("/proc/cpuinfo").read_text().split()
    avx512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    needs = {"avx512": avx512, "avx512-first": avx512, "avx2": {"avx2", "fma", "f16c"}, "plain": set()}
    return needs[isa] <= set(flags)


def build(isa: str, folder: Path, code: str = SOURCE) -> Kernels:
    source, library = folder / f"{isa}.cc", folder / f"{isa}.so"
    source.write_text(code)
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *FLAGS, *ISAS[isa], f"-I{KERNELS}", str(source), "-o", str(library)], check=True)
    with float_environment_kept():
        return Kernels(ctypes.CDLL(str(library)))


class Kernels:
    """Calls ``c_NAME`` of the library: numpy arrays and None go as pointers, whole numbers as int64, floats as double."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def __getattr__(self, name: str):
        function = getattr(self._library, f"c_{name}")
        function.restype = None

        def call(*args):
            converted = []
            for a in args:
                if a is None:
                    converted.append(ctypes.c_void_p())
                elif isinstance(a, np.ndarray):
                    assert a.flags.c_contiguous
                    converted.append(ctypes.c_void_p(a.ctypes.data))
                else:
                    converted.append(ctypes.c_double(a) if isinstance(a, float) else ctypes.c_int64(a))
            function(*converted)

        return call

    @property
    def lanes(self) -> int:
        return self._library.lanes()
