"""What this machine can do at most: loops that do nothing else, with the threads and the vectors of the kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import machine
from ..errors import MossError
from ..machine import GIB, MIB
from ..ops.kernel import header
from ..runtime import compiling, float_environment_kept, jittor
from .apart import run_apart
from .pairs import Limit, rate

# Work is handed out in pieces as threads come for them: one that is slowed down must not pass for the machine's limit.
_SOURCE = r"""
namespace moss {
// Reads all of n floats in pieces, each from four places at once, as the kernels read rows.
inline float read_all(const float* from, int64_t n) {
    const int64_t PIECE = 1 << 20, PART = PIECE / 4;
    float total = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : total)
    for (int64_t i = 0; i < n / PIECE; i++) {
        vec sums[4] = {zero(), zero(), zero(), zero()};
        const float* piece = from + i * PIECE;
        for (int64_t k = 0; k < PART; k += VEC)
            for (int p = 0; p < 4; p++) sums[p] = add(sums[p], load(piece + p * PART + k));
        total += sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    }
    return total;
}

const int64_t ROUNDS = 1 << 16;
const int CHAINS = 12;  // enough to keep two units of four cycles busy, few enough for 16 registers

// x = x / 2 + 1 over and over, in registers.
inline float multiply_add(int64_t pieces) {
    float total = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : total)
    for (int64_t i = 0; i < pieces; i++) {
        vec x[CHAINS], half = all(0.5f), one = all(1.f);
        for (int c = 0; c < CHAINS; c++) x[c] = all((float)c);
        for (int64_t r = 0; r < ROUNDS; r++)
            for (int c = 0; c < CHAINS; c++) x[c] = fma(x[c], half, one);
        for (int c = 0; c < CHAINS; c++) total += sum(x[c]);
    }
    return total;
}
}  // namespace moss
"""
_SECONDS = 0.1  # a measurement lasts
_PIECE = 4 * MIB  # of read_all
_PIECES = 64  # of multiply_add in one call: some milliseconds


def memory_read(threads: int) -> Limit:
    """Bytes a second that ``threads`` threads together read from memory that was written before and is in no cache.

    It is 1 GiB, less where memory is short, in huge pages where Linux gives them: an upper limit for what reads weights.
    """
    size = max(_PIECE, min(GIB, machine.memory().available // 4) // _PIECE * _PIECE)
    values = np.empty(size // 4, np.float32)
    values.fill(1)
    var = jittor().core.reuse_np_array(values)

    def measure() -> float:
        return rate(lambda: _call("out_p[0] = moss::read_all(in0_p, in0_shape0);", [var]), values.nbytes, _SECONDS)

    measure()  # compiles, the first time
    return Limit(f"memory read, {size / 1e9:.2f} GB by {_threads(threads)}", "GB_s", measure)


def multiply_add(threads: int) -> Limit:
    """Floating-point operations a second in fp32 that ``threads`` threads reach together on numbers in registers."""
    call = f"out_p[0] = moss::multiply_add({_PIECES}); out_p[1] = 2. * moss::VEC * moss::CHAINS * moss::ROUNDS * {_PIECES};"
    operations = float(_call(call, [])[1])
    name = f"fp32 multiply-add in registers, {machine.cpu().kernels}, {_threads(threads)}"
    return Limit(name, "GFLOP_s", lambda: rate(lambda: _call(call, []), operations, _SECONDS))


def disk_read(folder: Path) -> Limit:
    """Bytes a second at which the folder's files are read in sequence, past the page cache.

    Measured by a process of its own, since its memory belongs to no budget. Raises MossError where it cannot be.
    """
    code = "import sys; from moss_jt.machine import disk_bandwidth as b; print(b(sys.argv[1]))"

    def measure() -> float:
        done = run_apart(code, str(folder), errors=True)
        if done.returncode:
            raise MossError(done.stderr.strip().rpartition("MossError: ")[2])
        return float(done.stdout)

    return Limit("disk read, in sequence", "GB_s", measure)


def _call(call: str, inputs: list) -> np.ndarray:
    jt, source = jittor(), header("simd.h") + _SOURCE
    with float_environment_kept(), compiling(source, call), jt.flag_scope(lazy_execution=0, no_grad=1):
        return jt.code((2,), "float32", inputs, cpu_header=source, cpu_src=call).numpy()


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
