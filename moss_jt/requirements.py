"""What Jittor needs of this machine before it can be imported, each named with its fix where it is missing.

Jittor itself finds out late, in a traceback, or (numpy 2) not at all. Nothing here imports it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from .errors import MossError
from .machine import MIB, disk_free, existing_parent

JITTOR = "1.3.11.0"  # the version that moss-jt is written for and tested with
PYTHONS = ((3, 9), (3, 12))  # numpy 1.26, the last below 2, has no wheels for later ones
_ROOM = 200 * MIB  # Jittor's core takes 21 MB, and each compiler at work 4 MB of temporary files; kernels come on top
_PYTHON = f"python3.{sys.version_info[1]}"

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One thing looked at. A ``problem`` keeps moss-jt from running; ``fix`` is a command where one will do."""

    name: str
    verdict: str
    text: str
    fix: str = ""
    values: dict = field(default_factory=dict)  # the figures in ``text``, for programs


def require() -> None:
    """Raise MossError, in one line with the fix, for the first thing that Jittor needs and that is not here."""
    for finding in findings():
        if finding.verdict == PROBLEM:
            raise MossError(f"{finding.text}: {finding.fix}" if finding.fix else finding.text)


def findings() -> list[Finding]:
    """Everything that Jittor needs, looked at in the order in which it would stumble over it. Takes milliseconds."""
    return [system(), python(), numpy(), jittor(), compiler(), headers(), cache()]


def system() -> Finding:
    name, machine = platform.system(), platform.machine()
    values = {"system": name, "machine": machine}
    if name != "Linux":
        return Finding("system", PROBLEM, f"this is {name}, and moss-jt runs on Linux only", values=values)
    if machine != "x86_64":
        return Finding("system", WARNING, f"Linux on {machine}: moss-jt is tested on x86_64 only", values=values)
    return Finding("system", OK, f"{_distribution()}, Linux {platform.release()}, {machine}", values=values)


def _distribution() -> str:
    try:
        lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown distribution"
    names = [line.partition("=")[2].strip('"') for line in lines if line.startswith("PRETTY_NAME=")]
    return names[0] if names else "unknown distribution"


def python() -> Finding:
    version, (oldest, newest) = sys.version_info[:2], PYTHONS
    text = f"Python {platform.python_version()} at {sys.executable}"
    if oldest <= version <= newest:
        return Finding("Python", OK, text)
    name = f"python3.{newest[1]}"
    return Finding(
        "Python",
        PROBLEM,
        f"{text} is not supported: moss-jt needs Python 3.{oldest[1]} to 3.{newest[1]}",
        f"make a virtual environment with one of them, for example: {name} -m venv venv",
    )


def numpy() -> Finding:
    fix = f"{sys.executable} -m pip install 'numpy<2'"
    try:
        import numpy
    except ImportError as e:
        return Finding("numpy", PROBLEM, f"numpy cannot be imported ({(str(e).splitlines() or [''])[0]})", fix)
    if int(numpy.__version__.split(".")[0]) >= 2:
        text = f"numpy {numpy.__version__} is installed, and with numpy 2 Jittor computes garbage without a word"
        return Finding("numpy", PROBLEM, text, fix)
    return Finding("numpy", OK, f"numpy {numpy.__version__}")


def jittor() -> Finding:
    fix = f"{sys.executable} -m pip install jittor=={JITTOR}"
    found = importlib.util.find_spec("jittor")
    if not found:
        return Finding("Jittor", PROBLEM, "Jittor is not installed", fix)
    # It pastes both paths into shell commands as they are.
    for path in (sys.executable, str(found.origin)):
        if not re.fullmatch(r"[\w/.,:=@%+-]+", path):
            text = f"Jittor cannot compile where a path has a space or the like: {path}"
            return Finding("Jittor", PROBLEM, text, "make the virtual environment in another folder")
    try:
        version = importlib.metadata.version("jittor")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    if version != JITTOR:
        return Finding("Jittor", WARNING, f"Jittor {version}: moss-jt is tested with {JITTOR}", fix)
    return Finding("Jittor", OK, f"Jittor {version}")


def compiler() -> Finding:
    """Jittor takes the environment variable cc_path, or else g++ on the PATH, and tells its kind by its name."""
    named = os.environ.get("cc_path")  # noqa: SIM112 (Jittor's own name)
    path, fix = shutil.which(named or "g++"), "sudo apt-get install g++"
    if not path:
        missing = f"the C++ compiler {named}, which cc_path names," if named else "a C++ compiler (g++)"
        return Finding("compiler", PROBLEM, f"{missing} is missing, and Jittor compiles everything it runs", fix)
    if not any(kind in os.path.basename(path) for kind in ("g++", "clang", "icc", "icpc")):
        text = f"cc_path names {named}, whose name does not tell Jittor whether it is g++ or clang++"
        return Finding("compiler", PROBLEM, text, "unset cc_path")
    return Finding("compiler", OK, path, values={"path": path})


def gcc() -> int:
    """The major version of the g++ that Jittor will call; 0 where it calls another compiler, or none."""
    path = compiler().values.get("path", "")
    if "g++" not in os.path.basename(path) or "clang" in os.path.basename(path):
        return 0
    try:
        answer = subprocess.run([path, "-dumpversion"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return int(re.match(r"\d*", answer)[0] or 0)


def headers() -> Finding:
    config = python_config()
    include = Path(sysconfig.get_path("include"))
    places = [*([config.parent.parent / "include" / _PYTHON] if config else []), include]
    found = next((place for place in places if (place / "Python.h").is_file()), None)
    fix = f"sudo apt-get install {_PYTHON}-dev"
    if not found:
        return Finding("headers", PROBLEM, f"the headers of this Python are missing ({include / 'Python.h'})", fix)
    if not config:
        return Finding("headers", PROBLEM, f"{_PYTHON}-config, which tells Jittor where the headers are, is missing", fix)
    return Finding("headers", OK, f"Python.h in {found}")


def python_config() -> Path | None:
    """The python3.X-config that Jittor finds (its own search, in its order), or else this interpreter's own."""
    named = os.environ.get("python_config_path")  # noqa: SIM112 (Jittor's own name)
    beside = Path(sys.executable).parent
    own = Path(sysconfig.get_config_var("BINDIR") or "/usr/bin")
    places = [
        *([Path(named)] if named else []),
        beside / f"{_PYTHON}-config",
        Path(sys.executable + "-config"),
        Path(f"/usr/bin/{_PYTHON}-config"),
        Path(f"/usr/local/bin/{_PYTHON}-config"),
        beside / "python3-config",
        own / f"{_PYTHON}-config",
        Path(sys.base_prefix) / "bin" / f"{_PYTHON}-config",
    ]
    return next((place for place in places if place.is_file()), None)


def cache_folder() -> Path:
    """Where Jittor keeps what it compiled. It remembers JITTOR_HOME in ~/.cache/jittor/config.json once it was set.

    Raises MossError where that file is broken, or there is no home directory.
    """
    memory = _home() / ".cache/jittor/config.json"
    try:
        remembered = json.loads(memory.read_text())["JITTOR_HOME"]
    except (FileNotFoundError, NotADirectoryError, KeyError):
        remembered = _home()
    except (OSError, ValueError, TypeError) as e:
        raise MossError(f"{memory}, which Jittor reads first, is broken ({e}): rm {memory}") from None
    return Path(os.environ.get("JITTOR_HOME", remembered)).absolute() / ".cache/jittor"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise MossError("there is no home directory for Jittor's cache: set HOME to a folder that is writable") from None


def cache() -> Finding:
    try:
        folder = cache_folder()
        for place in (_home() / ".cache/jittor", folder):  # Jittor makes the first in any case
            _check_writable(place)
        _check_room(folder)
    except MossError as e:
        return Finding("cache", PROBLEM, str(e))
    return Finding("cache", OK, str(folder), values={"path": str(folder)})


def _check_writable(place: Path) -> None:
    parent = existing_parent(place)
    what = ""
    if not parent.is_dir():
        what = "is not a folder"
    elif not os.access(parent, os.W_OK | os.X_OK):
        what = "is not writable"
    elif os.statvfs(parent).f_flag & os.ST_NOEXEC:
        what = "is mounted noexec, and Jittor runs what it compiles from there"
    if what:
        raise MossError(f"{parent} {what}: set HOME (and JITTOR_HOME, if it is used) to another folder, for {place}")


def _check_room(folder: Path) -> None:
    for place in (folder, Path(tempfile.gettempdir())):
        free = disk_free(place)
        needed = _ROOM if free >= _ROOM or not compiled(folder) else _ROOM // 10  # then only a few kernels are compiled
        if free < needed:
            raise MossError(f"{existing_parent(place)} has {free // MIB} MiB free, compiling needs {needed // MIB}: make room")


def compiled(folder: Path) -> bool:
    """Whether this Python's Jittor was once completely compiled into ``folder``. The compiler may have changed since."""
    mine = f"jt{JITTOR.rpartition('.')[0]}/*/py{platform.python_version()}"
    return any(any(path.rglob("jittor_core*.so.key")) for path in folder.glob(mine))
