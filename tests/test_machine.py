from __future__ import annotations

import os
import re
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from moss_jt import machine
from moss_jt.errors import MossError
from moss_jt.machine import GIB, MIB


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Call with {path: text}: from then on /proc and /sys are these files and nothing else."""

    def make(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
        monkeypatch.setattr(machine, "_SYS", tmp_path / "sys")

    return make


MEMINFO = "MemTotal:  8388608 kB\nMemFree:  1 kB\nMemAvailable:  4194304 kB\nHugePages_Total:  0\n"


def test_this_machine():
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    memory, cores = machine.memory(), machine.cores()
    assert 0 < memory.available <= memory.total <= int(info["MemTotal"].split()[0]) * 1024
    assert cores.logical == len(os.sched_getaffinity(0)) and 1 <= cores.usable <= cores.physical <= cores.logical
    assert machine.cpu().model and machine.cpu().flags


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        ("sse2 avx avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni", "AVX-512"),
        ("sse2 avx avx2 fma f16c avx512f avx512cd", "AVX2"),  # Knights Landing
        ("sse2 avx avx2 f16c", "plain C++"),
        ("", "plain C++"),
    ],
)
def test_cpu(fake, flags, kernels):
    fake({"/proc/cpuinfo": f"processor : 0\nmodel name : A : B\nflags : {flags}\n\nprocessor : 1\nmodel name : C\n"})
    assert (machine.cpu().model, machine.cpu().kernels) == ("A : B", kernels)


def test_kernel_paths_are_those_of_the_header():
    """simd.h chooses by the compiler's macros, which -march=native sets from the CPU's flags."""
    text = (Path(find_spec("moss_jt.kernels_cpu").origin).parent / "simd.h").read_text()
    conditions = re.findall(r"^#(?:el)?if !defined\(MOSS_PLAIN\)(.*)$", text, re.MULTILINE)
    macros = [{m.strip("_").lower() for m in re.findall(r"defined\((\w+)\)", line)} for line in conditions[:2]]
    assert macros == list(machine._PATHS.values())


@pytest.mark.parametrize(
    ("files", "usable"),
    [
        ({}, 4),  # nothing known but the affinity: each is a core
        ({f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 2},{n % 2 + 2}\n" for n in range(4)}, 2),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 2),  # a limit of the group above
        ({"/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 4),
        ({"/proc/self/cgroup": "0::/docker/x\n", "/sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),  # the path is not mounted
        (
            {
                "/proc/self/cgroup": "3:memory:/\n4:cpu,cpuacct:/a\n",
                "/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "300000\n",
                "/sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_usable_cores(fake, monkeypatch, files, usable):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    fake(files)
    assert machine.cores().usable == usable


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 8 * GIB, 4 * GIB),
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/b/memory.max": "max\n",
                "/sys/fs/cgroup/a/b/memory.current": str(GIB),
                "/sys/fs/cgroup/a/memory.max": str(3 * GIB),
                "/sys/fs/cgroup/a/memory.current": str(2 * GIB),
                "/sys/fs/cgroup/a/memory.stat": f"anon 5\nactive_file {GIB // 4}\ninactive_file {GIB // 4}\n",
            },
            3 * GIB,
            GIB + GIB // 2,
        ),
        (
            {
                "/proc/self/cgroup": "4:memory:/a\n2:cpu:/\n",
                "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(2 * GIB),
                "/sys/fs/cgroup/memory/a/memory.usage_in_bytes": str(2 * GIB),
                "/sys/fs/cgroup/memory/a/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
            },
            2 * GIB,
            GIB,
        ),
    ],
)
def test_memory_limits(fake, files, total, available):
    fake({"/proc/meminfo": MEMINFO, **files})
    assert machine.memory() == machine.Memory(total, available)


def test_filesystem(tmp_path):
    assert machine.filesystem("/proc/self") == "proc"
    assert machine.filesystem("/dev/shm") in ("tmpfs", "unknown")


def test_filesystem_of_the_closest_mount(fake, tmp_path):
    lines = [
        "1 0 8:1 / / rw - ext4 /dev/a rw",
        "2 1 8:2 / /mnt rw - xfs /dev/b rw",
        r"3 2 8:3 / /mnt/a\040b rw - btrfs /dev/c rw",
    ]
    fake({"/proc/self/mountinfo": "\n".join(lines)})
    places = ["/", "/mntx", "/mnt", "/mnt/x", "/mnt/a b/c"]
    assert [machine.filesystem(place) for place in places] == ["ext4", "ext4", "xfs", "xfs", "btrfs"]


def test_disk_free_of_a_folder_that_is_not_there_yet(tmp_path):
    assert machine.disk_free(tmp_path / "a/b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.01)


def test_memory_bandwidth(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(GIB, 512 * MIB))  # so a part of 128 MiB is read
    assert 3e8 < machine.memory_bandwidth(1) < 1e12


@pytest.fixture
def small_sample(monkeypatch):
    monkeypatch.setattr(machine, "_SAMPLE", 24 * MIB)


@pytest.mark.parametrize("size", [None, MIB, 64 * MIB])
def test_disk_bandwidth_leaves_nothing(tmp_path, small_sample, size):
    if size:
        with open(tmp_path / "weights", "wb") as file:
            file.truncate(size)
    before = [(entry.name, entry.stat().st_size) for entry in os.scandir(tmp_path)]
    start = time.monotonic()
    assert 1e6 < machine.disk_bandwidth(tmp_path) < 1e12
    assert time.monotonic() - start < 8
    assert [(entry.name, entry.stat().st_size) for entry in os.scandir(tmp_path)] == before


def test_disk_bandwidth_reads_the_large_file_there_is(tmp_path, monkeypatch):
    """A checkpoint's folder may be read-only."""
    with open(tmp_path / "weights", "wb") as file:
        file.truncate(64 * MIB)
    monkeypatch.setattr(machine, "_fill", lambda *_: pytest.fail("nothing is to be written"))
    assert machine.disk_bandwidth(tmp_path) > 0


@pytest.mark.parametrize(("size", "blocks"), [(64, [16] * 4), (108, [24] * 4), (1100, [256] * 4), (1600, [256] * 6)])
def test_disk_bandwidth_counts_each_block_once(tmp_path, monkeypatch, size, blocks):
    """MiB read by two threads, in whole blocks, in a time that is given."""
    with open(tmp_path / "weights", "wb") as file:
        file.truncate(size * MIB)
    clock, reads = iter([100.0, 100.5]), []
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: reads.append((at, len(buffers[0]))) or len(buffers[0]))
    assert machine.disk_bandwidth(tmp_path) == sum(blocks) * MIB / 0.5
    assert sorted(reads) == [(i * n * MIB, n * MIB) for i, n in enumerate(blocks)]


def test_disk_bandwidth_without_o_direct(tmp_path, small_sample, monkeypatch):
    real = os.open

    def refuse(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    assert machine.disk_bandwidth(tmp_path) > 0


@pytest.mark.parametrize("name", ["missing", "file"])
def test_disk_bandwidth_where_it_cannot_be(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MossError, match=rf"{name}: its disk's speed cannot be measured: (No such|Not a dir)"):
        machine.disk_bandwidth(tmp_path / name)
