"""What this machine has, as far as this process may use it, and how fast its memory and disks are.

Nothing here needs Jittor or a compiler. Sizes are bytes, speeds bytes a second.
"""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import MossError

_SYS, _PROC = Path("/sys"), Path("/proc")
MIB, GIB = 1 << 20, 1 << 30

# What simd.h asks of the compiler, which is told -march=native, for each of its two vector paths.
_PATHS = {"AVX-512": {"avx512f", "avx512bw", "avx512vl"}, "AVX2": {"avx2", "fma", "f16c"}}


@dataclass(frozen=True)
class Cpu:
    model: str
    flags: frozenset[str]  # as Linux names them, for example avx512_vnni

    @property
    def kernels(self) -> str:
        """Which of the CPU kernels' instruction sets is used here: ``AVX-512``, ``AVX2`` or ``plain C++``."""
        return next((path for path, needed in _PATHS.items() if needed <= self.flags), "plain C++")


@dataclass(frozen=True)
class Cores:
    logical: int  # that the scheduler lets this process run on (affinity)
    physical: int  # distinct cores among them
    quota: float | None  # CPUs' worth of time that the control group allows; None: no limit

    @property
    def usable(self) -> int:
        """Threads worth starting: arithmetic gains nothing from a core's second thread, and a quota stalls what exceeds it."""
        return max(1, min(self.physical, int(self.quota) if self.quota else self.physical))


@dataclass(frozen=True)
class Memory:
    total: int  # of the machine, or of the control group where that is less
    available: int  # what could be taken now without swapping; file pages that can be dropped count as available


def cpu() -> Cpu:
    """The first CPU's model and instruction sets."""
    fields: dict[str, str] = {}
    for line in (_read(_PROC / "cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return Cpu(model, frozenset((fields.get("flags") or fields.get("Features") or "").split()))


def cores() -> Cores:
    """How many cores this process may use: affinity and control groups are respected."""
    allowed = os.sched_getaffinity(0)
    siblings = {_read(_SYS / f"devices/system/cpu/cpu{n}/topology/thread_siblings_list") or str(n) for n in allowed}
    return Cores(len(allowed), len(siblings), _cpu_quota())


def memory() -> Memory:
    """How much memory this process may use: limits of its control groups are respected."""
    lines = (_read(_PROC / "meminfo") or "").splitlines()
    info = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    total, available = info["MemTotal"], info["MemAvailable"]
    for limit, free in _memory_limits():
        total, available = min(total, limit), min(available, free)
    return Memory(total, max(0, available))


def peak_memory() -> int:
    """The most memory that this process has had, as the operating system counts it."""
    lines = (_PROC / "self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def disk_free(folder: str | Path) -> int:
    """Bytes an ordinary user can still write where ``folder`` is, or will be: it need not exist yet."""
    return shutil.disk_usage(existing_parent(folder)).free


def existing_parent(path: str | Path) -> Path:
    """``path`` itself, or the closest thing above it that exists."""
    path = Path(path).absolute()
    return next(p for p in (path, *path.parents) if os.path.lexists(p))


def filesystem(folder: str | Path) -> str:
    """The type of the file system ``folder`` is on, for example ``ext4``; ``unknown`` where Linux does not say."""
    folder, best, kind = os.path.realpath(folder), "", "unknown"
    for line in (_read(_PROC / "self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        if len(point) >= len(best) and (folder + "/").startswith(point.rstrip("/") + "/"):
            best, kind = point, right.split()[0]
    return kind


def memory_bandwidth(threads: int | None = None) -> float:
    """Bytes a second at which ``threads`` threads (default: every usable core) together read memory, best of five sweeps.

    Each thread reads its own part of 1 GiB (less where memory is short), larger than any cache, that it wrote first, in
    huge pages where Linux gives them: an upper limit for a kernel that reads weights once. Needs numpy, whose reductions
    release the interpreter's lock and read as fast as C++ does. Takes about a second.
    """
    import numpy as np

    threads = threads or cores().usable
    words = min(GIB, memory().available // 4) // 8
    parts = np.array_split(np.empty(words, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part.fill(1), parts))
        return 8 * words / min(_seconds(lambda: list(pool.map(np.bitwise_or.reduce, parts))) for _ in range(5))


_BLOCK, _READERS = 8 * MIB, 2  # two large reads in flight keep a disk busy; more gained nothing
_SAMPLE, _LARGEST = 256 * MIB, 256 * MIB


def disk_bandwidth(folder: str | Path) -> float:
    """Bytes a second at which files in ``folder`` are read in sequence, past the page cache, in large reads, two at a time.

    What is read is the folder's largest file, or, where none has 64 MiB, a nameless temporary one of at most 256 MiB, which
    no kill can leave behind. At most 2 seconds of writing, and 1.5 of reading, or two reads. Raises MossError where neither
    can be done.
    """
    try:
        with _sample(Path(folder)) as sample:
            return _read_speed(sample.fileno())
    except OSError as e:
        raise MossError(f"{folder}: its disk's speed cannot be measured: {e.strerror}") from None


@contextmanager
def _sample(folder: Path) -> Iterator[BinaryIO]:
    """An open file of ``folder`` worth reading."""
    files = [entry.path for entry in os.scandir(folder) if entry.is_file() and os.access(entry.path, os.R_OK)]
    largest = max(files, key=os.path.getsize, default=None)
    if largest and os.path.getsize(largest) >= 64 * MIB:
        with open(largest, "rb") as sample:
            yield sample
    else:
        with tempfile.TemporaryFile(dir=folder) as sample:
            _fill(sample, min(_SAMPLE, disk_free(folder) // 2))
            yield sample


def _fill(file: BinaryIO, size: int) -> None:
    """Write random bytes (some disks compress): up to ``size``, for about two seconds, one block at least."""
    block, until = os.urandom(_BLOCK), time.monotonic() + 2
    while (file.tell() < size and time.monotonic() < until) or not file.tell():
        file.write(block)
        file.flush()
        os.fdatasync(file.fileno())


def _read_speed(file: int) -> float:
    size = os.fstat(file).st_size
    with _uncached(file) as source, ThreadPoolExecutor(_READERS) as pool:
        block = _read_size(size)
        buffers = [_pages(block) for _ in range(_READERS)]
        until = time.monotonic() + 1.5

        def read(first: int) -> int:
            done = 0
            for at in range(first * block, size // block * block, _READERS * block):
                if done and time.monotonic() > until:
                    break
                done += os.preadv(source.fileno(), [buffers[first]], at)
            return done

        start = time.perf_counter()
        done = sum(pool.map(read, range(_READERS)))
        return done / (time.perf_counter() - start)


def _read_size(size: int) -> int:
    """Large, because short reads wait again and again where others use the disk, too; several for each reader."""
    most = min(_LARGEST, size // (2 * _READERS), memory().available // 16)
    return max(_BLOCK, most // _BLOCK * _BLOCK)


def _pages(size: int) -> mmap.mmap:
    """Memory that starts at a page, as O_DIRECT asks, and is there before it is read into. Private, since Linux gives shared
    memory no huge pages, and with them, which take fewer requests, a disk was up to twice as fast."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, size, mmap.PAGESIZE):
        pages[at] = 0
    return pages


def _uncached(file: int):
    """The same file, opened again so that reading goes to the disk: with O_DIRECT, or else with its pages dropped first."""
    path = f"/proc/self/fd/{file}"
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_DIRECT), "rb", buffering=0)
    except OSError:  # a file system without O_DIRECT
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return open(path, "rb", buffering=0)


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _cgroups(controller: str) -> Iterator[tuple[int, Path]]:
    """(version 1 or 2, folder) of each control group that limits this process, from its own up to the root."""
    for line in (_read(_PROC / "self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = _SYS / "fs/cgroup" / (controller if controllers else "")
        below = base / path.lstrip("/")  # in a container this may name what is not mounted; then only the root is here
        for folder in (below, *below.parents):
            if folder.is_dir():
                yield (1 if controllers else 2), folder
            if folder == base:
                break


def _cpu_quota() -> float | None:
    quotas = []
    for version, folder in _cgroups("cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if version == 1 else ("cpu.max",)
        words = " ".join(_read(folder / name) or "" for name in names).split()
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, still free below it) of each control group that has a limit."""
    for version, folder in _cgroups("memory"):
        limit_file, usage_file = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
        )
        limit, usage = _read(folder / limit_file), _read(folder / usage_file)
        if limit and usage and limit != "max":
            yield int(limit), int(limit) - int(usage) + _file_pages(folder / "memory.stat")


def _file_pages(stat: Path) -> int:
    """Pages of files that count as used and can be dropped."""
    fields = dict(line.split() for line in (_read(stat) or "").splitlines())
    return sum(int(fields.get(f"total_{name}", fields.get(name, 0))) for name in ("active_file", "inactive_file"))
