"""Matrix products of floats on the device, by the cuBLAS that Jittor has loaded, on Jittor's stream.

Jittor's own product takes whole Vars. These take memory anywhere, rows any distance apart, and add to what is there, so nothing
is copied to be multiplied.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import byref, c_float, c_int, c_longlong, c_void_p
from typing import NamedTuple

from . import cudart
from .errors import MossError

_FLOATS, _DEFAULT = 0, -1  # CUDA_R_32F, CUBLAS_GEMM_DEFAULT
_EXACT, _TF32 = 68, 77  # CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32


class Matrix(NamedTuple):
    """Floats at an address, rows ``stride`` of them apart. ``turned``: it is the transpose of what lies there."""

    address: int
    stride: int
    turned: bool = False


class Blas:
    """``tf32``: whether factors may be rounded to TF32's 11 bits, as cards from 8.0 on can. Sums are fp32."""

    def __init__(self, tf32: bool):
        self._library, self._kind, handle = cudart.loaded("libcublas"), _TF32 if tf32 else _EXACT, c_void_p()
        self._call("cublasCreate_v2", byref(handle))
        self._handle = handle
        weakref.finalize(self, _quietly, self._library, handle)

    def multiply(
        self,
        a: Matrix,
        b: Matrix,
        c: Matrix,
        size: tuple[int, int, int],
        *,
        scale: float = 1,
        add: bool = False,
        exact: bool = False,
        many: int = 1,
        steps: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """c (m, n) = or += scale a (m, k) b (k, n), for ``size`` m, n, k; ``many`` times, each time ``steps`` floats of a, b
        and c further on. ``exact``: factors are not rounded. Raises MossError where cuBLAS refuses."""
        m, n, k = size
        # Columns are contiguous for cuBLAS: it is told to compute the transpose of c from those of b and a.
        shape = (self._handle, c_int(b.turned), c_int(a.turned), c_int(n), c_int(m), c_int(k), byref(c_float(scale)))
        places = [(c_void_p(x.address), c_int(_FLOATS), c_int(x.stride)) for x in (b, a, c)]
        if many > 1:
            places = [(*place, c_longlong(step)) for place, step in zip(places, (steps[1], steps[0], steps[2]))]
        how = (*([c_int(many)] if many > 1 else []), c_int(_EXACT if exact else self._kind), c_int(_DEFAULT))
        name = "cublasGemmStridedBatchedEx" if many > 1 else "cublasGemmEx"
        self._call(name, *shape, *places[0], *places[1], byref(c_float(add)), *places[2], *how)

    def _call(self, name: str, *args) -> None:
        if code := getattr(self._library, name)(*args):
            raise MossError(f"cuBLAS answers {code} to {name}")


def _quietly(library: ctypes.CDLL, handle: c_void_p) -> None:
    """At the end, when the runtime may be gone already."""
    library.cublasDestroy_v2(handle)
