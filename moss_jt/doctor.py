"""What ``moss-jt doctor`` says: one finding for each thing that decides whether and how fast MOSS runs here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from . import cuda, machine, requirements
from .errors import MossError
from .machine import GIB
from .requirements import OK, PROBLEM, WARNING, Finding

# Names of the vector units worth knowing, and the flags Linux gives them.
_UNITS = {
    "AVX2": ("avx2",),
    "FMA": ("fma",),
    "F16C": ("f16c",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "BF16": ("avx512_bf16",),
    "AMX": ("amx_tile",),
}
_CUPY = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")


def findings(model: Path | None = None, measure: bool = True, run: bool = False) -> Iterator[Finding]:
    """Each finding as soon as it is known. ``model``: a checkpoint's folder to look at, too.

    measure: speeds, which takes a second for memory and up to four for the disk. run: import Jittor and compute.
    """
    for finding in requirements.findings():
        yield {"compiler": _compiler, "cache": _cache}.get(finding.name, lambda same: same)(finding)
    if platform.system() != "Linux":
        return
    yield _cpu()
    yield _cores()
    yield _memory(model)
    driver = cuda.driver()
    yield _cuda(driver, cuda.choose(driver))
    yield from _cupy()
    if measure:
        yield _speed("memory read", machine.memory_bandwidth, f"by {machine.cores().usable} threads")
        yield _disk(model)
        yield from (_link(index) for index in range(len(driver.devices)))
    if run:
        yield _import()


def _import() -> Finding:
    from . import runtime

    try:
        jt = runtime.jittor()
        right = (jt.array([1.0, 2.0]) + 1).numpy().tolist() == [2.0, 3.0]
    except MossError as e:
        return Finding("import", PROBLEM, str(e))
    return Finding("import", OK if right else PROBLEM, "Jittor computes" if right else "Jittor's 1 + 1 and 2 + 1 are wrong")


def size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / machine.MIB:.0f} MiB"


def _compiler(finding: Finding) -> Finding:
    """The same with the compiler's version."""
    if finding.verdict != OK:
        return finding
    path = finding.values["path"]
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as e:
        return replace(finding, verdict=PROBLEM, text=f"{path} does not run: {e}", fix="sudo apt-get install g++")
    version = (answer.splitlines() or ["unknown version"])[0]
    return replace(finding, text=f"{version} ({path})", values={"path": path, "version": version})


def _cache(finding: Finding) -> Finding:
    """The same with what the cache holds."""
    if finding.verdict != OK:
        return finding
    folder = Path(finding.values["path"])
    free, compiled = machine.disk_free(folder), requirements.compiled(folder)
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    state = f"Jittor is compiled ({size(used)})" if compiled else "Jittor is not compiled yet: the first start takes minutes"
    values = {"path": str(folder), "compiled": compiled, "bytes": used, "free": free}
    return replace(finding, text=f"{folder}: {state}; {size(free)} free", values=values)


def _cpu() -> Finding:
    cpu = machine.cpu()
    units = [name for name, flags in _UNITS.items() if cpu.flags & set(flags)]
    text = f"{cpu.model}, {' '.join(units) or 'no vector units'}: {cpu.kernels} kernels"
    verdict = WARNING if cpu.kernels == "plain C++" else OK
    return Finding("CPU", verdict, text, values={"model": cpu.model, "units": units, "kernels": cpu.kernels})


def _cores() -> Finding:
    cores, there = machine.cores(), os.cpu_count()
    values = {"machine": there, "logical": cores.logical, "physical": cores.physical, "quota": cores.quota}
    quota = f", a quota of {cores.quota:g} CPUs" if cores.quota else ""
    text = f"{cores.usable} threads compute: {cores.physical} cores, {cores.logical} of {there} hardware threads{quota}"
    return Finding("cores", OK, text, values={**values, "usable": cores.usable})


def _memory(model: Path | None) -> Finding:
    memory = machine.memory()
    text = f"{size(memory.available)} available of {size(memory.total)}"
    values = {"total": memory.total, "available": memory.available}
    if not model:
        return Finding("memory", OK, text, values=values)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    values["weights"] = weights
    if weights > memory.available:
        text += f"; the {size(weights)} of {model} do not fit, and come from the disk for every token"
        return Finding("memory", WARNING, text, values=values)
    return Finding("memory", OK, f"{text}; {size(weights)} of weights fit", values=values)


def _cuda(driver: cuda.Driver, choice: cuda.Choice) -> Finding:
    kit = choice.kit
    values = {
        "driver": driver.version and cuda.show(driver.version),
        "devices": [{"name": d.name, "memory": d.memory, "capability": cuda.show(d.capability)} for d in driver.devices],
        "nvcc": kit and kit.nvcc,
        "toolkit": kit and cuda.show(kit.version),
    }
    has = f"nvcc {cuda.show(kit.version)} at {kit.nvcc}" if kit else "no nvcc"
    if not driver.devices:
        # A driver that is installed and does not answer is worth a look; none at all is the usual machine without a GPU.
        verdict = WARNING if driver.version else OK
        return Finding("CUDA", verdict, f"none, so the CPU computes: {choice.why}; {has}", values=values)
    text = f"{', '.join(map(_device, driver.devices))}; driver for CUDA up to {cuda.show(driver.version)}; {has}"
    if choice.why:
        return Finding("CUDA", WARNING, f"{text}; the CPU computes, because {choice.why}", choice.fix, values)
    return Finding("CUDA", OK, text, values=values)


def _device(device: cuda.Device) -> str:
    capability = f"compute capability {cuda.show(device.capability)}: {cuda.arithmetic(device.capability)}"
    return f"{device.name} ({size(device.memory)}, {capability})"


def _cupy() -> Iterator[Finding]:
    for name in _CUPY:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        too_new = int(version.split(".")[0]) >= 14
        text = f"{name} {version}" + (" needs numpy 2, and Jittor numpy 1" if too_new else "")
        yield Finding("cupy", WARNING if too_new else OK, text, f"pip install '{name}<14'" if too_new else "")


def _speed(name: str, measure, how: str) -> Finding:
    try:
        speed = measure()
    except (MossError, ImportError, MemoryError) as e:
        return Finding(name, WARNING, f"not measured: {e}")
    return Finding(name, OK, f"{speed / 1e9:.1f} GB/s {how}", values={"bytes_per_second": round(speed)})


def _disk(model: Path | None) -> Finding:
    try:
        folder = model or machine.existing_parent(requirements.cache_folder())
    except MossError as e:
        return Finding("disk read", WARNING, f"not measured: {e}")
    note = ", which is memory and no disk" if machine.filesystem(folder) in ("tmpfs", "ramfs") else ""
    return _speed("disk read", lambda: machine.disk_bandwidth(folder), f"in sequence, at {folder}{note}")


def _link(index: int) -> Finding:
    try:
        to_device, to_host = cuda.link_bandwidth(index)
    except MossError as e:
        return Finding("link", WARNING, f"device {index}: not measured: {e}")
    text = f"device {index}: {to_device / 1e9:.1f} GB/s to it, {to_host / 1e9:.1f} GB/s from it, pinned memory"
    return Finding("link", OK, text, values={"to_device": round(to_device), "to_host": round(to_host)})
