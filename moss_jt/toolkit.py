"""CUDA toolkits: found wherever they lie, and laid out as Jittor expects one.

Jittor wants an nvcc with ``include/`` and ``lib64/`` beside its real path, compiles for compute capability 9.0 at most, and
uses what CUDA 13 no longer has. So it always gets a folder of ours: links to what the toolkit and PyPI's nvidia-* wheels have,
two small headers, and an ``nvcc`` that calls the real one. Nothing that is installed is changed. docs/cuda.md says more.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import MossError
from .requirements import cache_folder

Version = tuple  # (major, minor)

# What Jittor compiles and links with when it is told (conv_opt=1) to do without cudnn, cufft and cusparse.
_NEEDED_LIBRARIES = ("cudart", "cudadevrt", "cublas", "cublasLt", "curand")
_NEEDED_HEADERS = ("cuda_runtime.h", "driver_types.h", "crt/host_config.h", "cub/cub.cuh", "cublas_v2.h", "curand.h")
_LIBRARIES = (*_NEEDED_LIBRARIES, "nvrtc", "nvrtc-builtins", "nvJitLink")  # these load the last three, where there are any
_PLACES = ("/usr/local/cuda", "/usr/local/cuda-*", "/opt/cuda", "/usr")
_SYSTEM = Path("/usr")  # Debian's own package spreads over it

# Jittor's helper_cuda.h reads two fields that CUDA 13 has dropped, in functions that nothing calls. This one is 0 on Linux.
_DRIVER_TYPES = """#pragma once
#include "{}"
#define computeMode tccDriver
#define clockRate tccDriver
"""
# NVIDIA's image library, of which Jittor takes these limits and nothing else.
_NPP = """#pragma once
#define NPP_MIN_32U 0u
#define NPP_MAX_32U 4294967295u
#define NPP_MIN_32S (-2147483647 - 1)
#define NPP_MAX_32S 2147483647
#define NPP_MIN_64U 0ull
#define NPP_MAX_64U 18446744073709551615ull
#define NPP_MIN_64S (-9223372036854775807ll - 1)
#define NPP_MAX_64S 9223372036854775807ll
"""
# Jittor's own -arch and -code stop at 9.0, and leave out its core. The cub of CUDA 13 wants C++17.
_NVCC = """#!/bin/sh
here=${{0%/bin/nvcc}}
for argument do
    shift
    case $argument in
    -arch=* | -code=*) ;;
    -std=*) set -- "$@" {standard} ;;
    *) set -- "$@" "$argument" ;;
    esac
done
exec {nvcc} "-I$here/include" -isystem "$here/include/cccl" "-L$here/lib64" {targets} "$@"
"""


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: Version
    codes: tuple[int, ...] = ()  # what it compiles for: 86 is sm_86, compute capability 8.6; empty: it does not say
    newest_gcc: int = 0  # the newest g++ that its headers take; 0: they do not say
    headers: tuple[Path, ...] = ()  # folders, the first that has a file is the one
    libraries: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()  # headers and libraries that Jittor needs and that none of them has


def toolkits() -> Iterator[Toolkit]:
    """Every toolkit of this machine, in the order of preference; the one that the variable nvcc_path names leaves no other."""
    seen = set()
    for nvcc in _nvccs():
        real = os.path.realpath(nvcc)
        if real not in seen and os.access(real, os.X_OK) and os.path.isfile(real):
            seen.add(real)
            found = _toolkit(nvcc)
            if found:
                yield found


def _nvccs() -> Iterator[str]:
    named = os.environ.get("nvcc_path")  # noqa: SIM112 (Jittor's own name)
    if named:
        yield shutil.which(named) or named
        return
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    yield from (f"{home}/bin/nvcc" for home in homes if home)
    yield from filter(None, [shutil.which("nvcc")])
    for place in _PLACES:
        folder = Path(place)
        yield from (str(path / "bin/nvcc") for path in sorted(folder.parent.glob(folder.name), reverse=True))
    yield from (f"{prefix}/bin/nvcc" for prefix in (os.environ.get("CONDA_PREFIX"), sys.prefix) if prefix)
    with suppress(MossError):  # a cache that cannot be found is another's to report
        yield from map(str, sorted(cache_folder().glob("jtcuda/*/bin/nvcc"), reverse=True))  # downloaded by Jittor
    for root in _wheels():
        yield from map(str, sorted(root.glob("cu[0-9]*/bin/nvcc"), reverse=True))


def _toolkit(nvcc: str) -> Toolkit | None:
    release = re.search(r"release (\d+)\.(\d+)", _answer(nvcc, "--version"))
    if not release:
        return None
    version = (int(release[1]), int(release[2]))
    headers, libraries = _own_folders(nvcc)
    for root in _wheels():
        folders = _wheel_folders(root, version[0])
        headers += [folder / "include" for folder in folders]
        libraries += [folder / "lib" for folder in folders]
    headers, libraries = _existing(headers), _existing(libraries)
    missing = [name for name in _NEEDED_HEADERS if not _header(headers, name)]
    missing += [f"lib{name}" for name in _NEEDED_LIBRARIES if not _files_of(libraries, name)]
    codes = map(int, re.findall(r"sm_(\d+)\b", _answer(nvcc, "--list-gpu-code")))
    return Toolkit(nvcc, version, tuple(sorted(codes)), _newest_gcc(headers), headers, libraries, tuple(missing))


def _answer(*command: str) -> str:
    """What a program says on both streams; nothing where it cannot be started."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def _own_folders(nvcc: str) -> tuple[list[Path], list[Path]]:
    """Where nvcc itself looks. It says so, which beats guessing: distributions, conda and wheels each have a layout of theirs,
    and what is on the PATH may be a script that calls it."""
    said = _answer(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    home = Path(os.path.realpath(top[1].strip() if top else Path(nvcc).resolve().parent.parent))
    headers = [*map(Path, re.findall(r'"-I([^"]+)"', said)), home / "include", home / "targets/x86_64-linux/include"]
    libraries = [*map(Path, re.findall(r'"-L([^"]+)"', said)), *(home / name for name in ("lib64", "lib"))]
    if _SYSTEM in (home, *home.parents) and _SYSTEM / "local" not in (home, *home.parents):
        headers.append(_SYSTEM / "include")
        libraries.append(_SYSTEM / "lib/x86_64-linux-gnu")
    ours = [path for path in headers if any((path / name).is_file() for name in _NEEDED_HEADERS)]
    return ours, [path for path in libraries if path.name != "stubs"]


def _wheels() -> list[Path]:
    """The folders that hold what PyPI's nvidia-* wheels install."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(path) for path in spec.submodule_search_locations or ()] if spec else []


def _wheel_folders(root: Path, major: int) -> list[Path]:
    """The folders of one CUDA: one in all from 13 on, one for each wheel before, which does not say for which CUDA."""
    one = root / f"cu{major}"
    if one.is_dir():
        return [one]
    mine = any(root.glob(f"cuda_runtime/lib/libcudart.so.{major}*")) or any(root.glob(f"cublas/lib/libcublas.so.{major}*"))
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("cu1")) if mine else []


def _existing(folders: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(Path(os.path.realpath(path)) for path in folders if path.is_dir()))


def _header(folders: Iterable[Path], name: str) -> Path | None:
    """CUDA 13 has those of CCCL in a folder of their own."""
    paths = (path for folder in folders for path in (folder / name, folder / "cccl" / name))
    return next((path for path in paths if path.is_file()), None)


def _files_of(folders: Iterable[Path], library: str) -> list[Path]:
    """A library's files under all its names, from the first folder that has it."""
    suffix = ".a" if library == "cudadevrt" else ".so*"
    each = (sorted(folder.glob(f"lib{library}{suffix}")) for folder in folders)
    return next((files for files in each if files), [])


def _newest_gcc(headers: Iterable[Path]) -> int:
    path = _header(headers, "crt/host_config.h")
    found = re.search(r"#if __GNUC__ > (\d+)", path.read_text(errors="replace")) if path else None
    return int(found[1]) if found else 0


# ---- the folder for Jittor --------------------------------------------------------------------------------------------------


def assemble(kit: Toolkit, capabilities: Iterable[Version]) -> Path:
    """The nvcc of a folder in the user's cache that is laid out for Jittor and compiles for devices of these capabilities.

    Made where it is not there yet. Raises MossError where it cannot be written.
    """
    links = {f"include/{name}": path for name, path in _merged(kit.headers).items()}
    links.update((f"lib64/{name}", path) for name, path in _library_links(kit.libraries).items())
    standard = '"$argument"' if kit.version < (13,) else "-std=c++17"
    call = _NVCC.format(nvcc=shlex.quote(kit.nvcc), targets=targets(kit, capabilities), standard=standard)
    files = {"include/npp.h": _NPP, "bin/nvcc": call}
    if kit.version >= (13,):
        files["include/driver_types.h"] = _DRIVER_TYPES.format(_header(kit.headers, "driver_types.h"))
    links = {name: path for name, path in links.items() if name not in files}
    described = json.dumps([files, {name: str(path) for name, path in links.items()}], sort_keys=True)
    digest = hashlib.sha256(described.encode()).hexdigest()[:12]
    folder = cache_folder() / "moss-jt-cuda" / f"{kit.version[0]}.{kit.version[1]}-{digest}"
    if not folder.is_dir():
        try:
            _write(folder, files, links)
        except OSError as e:
            raise MossError(f"{folder}: the CUDA toolkit for Jittor cannot be laid out: {e.strerror}") from None
    return folder / "bin/nvcc"


def targets(kit: Toolkit, capabilities: Iterable[Version]) -> str:
    """nvcc's options that compile for these devices; for one newer than the toolkit, what the driver translates for it.

    A device that is older than all it compiles for gets nothing.
    """
    options = []
    for code in sorted({10 * major + minor for major, minor in capabilities}):
        older = [known for known in kit.codes or (code,) if known <= code]
        if older:
            kind = "sm" if older[-1] == code else "compute"
            options.append(f"-gencode=arch=compute_{older[-1]},code={kind}_{older[-1]}")
    return " ".join(dict.fromkeys(options))


def _merged(folders: Iterable[Path]) -> dict[str, Path]:
    """Relative name -> what to link there, for one folder that has what all of them have, the first's where several do."""
    parts: dict[str, list[Path]] = {}
    for folder in folders:
        # The compiler finds the system's own by itself; links to all of them would hide the C++ library's from it.
        for path in sorted(folder.iterdir()) if folder != _SYSTEM / "include" else ():
            parts.setdefault(path.name, []).append(path)
    links = {}
    for name, paths in parts.items():
        if len(paths) > 1 and all(path.is_dir() for path in paths):
            links.update((f"{name}/{below}", path) for below, path in _merged(paths).items())
        else:
            links[name] = paths[0]
    return links


def _library_links(folders: Iterable[Path]) -> dict[str, Path]:
    """Each library under all names it has, and under the one without a version, which the wheels lack."""
    links = {}
    for library in _LIBRARIES:
        files = _files_of(folders, library)
        links.update((path.name, path) for path in files)
        if files and library != "cudadevrt":
            links.setdefault(f"lib{library}.so", files[-1])
    return links


def _write(folder: Path, files: dict[str, str], links: dict[str, Path]) -> None:
    beside = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for name, target in links.items():
            path = beside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target)
        for name, text in files.items():
            path = beside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (beside / "bin/nvcc").chmod(0o755)
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():  # and not because another process has just made the same
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
