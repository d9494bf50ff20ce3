"""Makes Jittor importable on this machine and imports it, once.

Everything that computes gets it from here: ``jt = runtime.jittor()``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import signal
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from . import cuda, first_compile, requirements, toolkit
from .errors import MossError
from .machine import cores
from .mpirun import started

# Read by Jittor while it is imported; what the user has set stays.
_ENVIRONMENT = {
    "log_silent": "1",
    "use_mkl": "0",  # this and the next four: no downloads from its servers
    "use_cutt": "0",
    "use_cutlass": "0",
    "use_nccl": "0",
    "use_mpi": "0",
    "conv_opt": "1",  # of CUDA's libraries only cublas and curand
    "gdb_path": "",  # no debugger attached to a crash
    "FIX_TORCH_ERROR": "0",  # does not import torch where that is installed
    "use_parallel_op_compiler": "0",  # whose progress lines nothing silences
    # OpenMP threads wait for each other by spinning for this long, then sleep. Its default of milliseconds made answers
    # ten times slower as soon as another program wanted a core; this little costs nothing on an idle machine.
    "GOMP_SPINCOUNT": "1000",
    "DISABLE_MULTIPROCESSING": "1",  # no pool of compiler processes, kept until the end even where all is compiled
}
_SAVE_MEM = "-DJT_SAVE_MEM"  # compiles its own swapping in: docs/memory.md
# Jittor takes these over, and then ends the process on Ctrl-C or when any child of it is killed.
_SIGNALS = ("SIGINT", "SIGCHLD", "SIGQUIT", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL")

_lock = threading.RLock()
_module: ModuleType | None = None


def jittor(device: str = "auto", threads: int | None = None, save_mem: bool = False) -> ModuleType:
    """The imported ``jittor`` module. The first call on a machine compiles for minutes and says so; later ones return at once.

    device: ``cuda`` has CUDA compiled in, ``cpu`` has not, ``auto`` has it where a device answers and Jittor can use its
    toolkit; where only the toolkit is wanting, one line on stderr says why. What is imported first stays for the process.
    threads: for OpenMP, of the calling thread's ops from now on. By default OMP_NUM_THREADS, or else every usable core, or of
    those a share where mpirun started several processes.
    save_mem: with CUDA, whatever the device, and Jittor's own swapping compiled in, which is a core of its own.
    Raises MossError where something is missing, naming the fix, before Jittor is imported.
    """
    global _module
    if device not in ("auto", "cpu", "cuda"):
        raise MossError(f"device is {device!r}, expected auto, cpu or cuda")
    device = "cuda" if save_mem else device
    with _lock:
        if _module is None:
            _module = _adopted() if "jittor" in sys.modules else _imported(device, threads, save_mem)
    if device == "cuda" and not _module.has_cuda:
        why = cuda.choose(cuda.driver()).reason or "start a new process for it"
        raise MossError(f"device cuda: Jittor was imported without CUDA in this process: {why}")
    if save_mem and _SAVE_MEM not in _module.flags.cc_flags:
        raise MossError("swap jittor: Jittor was imported without its own swapping in this process: start a new process for it")
    if threads:
        ctypes.CDLL(None).omp_set_num_threads(threads)
    return _module


def _adopted() -> ModuleType:
    """The Jittor that this process had imported before, unless it computes garbage."""
    numpy = requirements.numpy()
    if numpy.verdict == requirements.PROBLEM:
        raise MossError(f"{numpy.text}: {numpy.fix}")
    return sys.modules["jittor"]


def _imported(device: str, threads: int | None, save_mem: bool) -> ModuleType:
    requirements.require()
    nvcc = _nvcc(device)
    try:
        return _import(nvcc, threads, save_mem)
    except MossError as e:
        if not nvcc or device == "cuda":
            raise
        _say(f"using the CPU, because with CUDA: {e}")
        return _import("", threads, False)


def _nvcc(device: str) -> str:
    """The nvcc to compile with, laid out for Jittor; empty for the CPU. Raises MossError where ``cuda`` cannot be."""
    if device == "cpu" or (device == "auto" and os.environ.get("nvcc_path") == ""):  # noqa: SIM112 (Jittor's own name)
        return ""
    driver = cuda.driver()
    if not driver.devices and device == "auto":
        return ""
    choice = cuda.choose(driver)
    if choice.why and device == "cuda":
        raise MossError(f"device cuda: {choice.reason}")
    if choice.why:
        _say(f"using the CPU, not the {driver.devices[0].name}: {choice.reason}")
        return ""
    return str(toolkit.assemble(choice.kit, [found.capability for found in driver.devices]))


def _import(nvcc: str, threads: int | None, save_mem: bool) -> ModuleType:
    chosen = {"nvcc_path": nvcc, "python_config_path": str(requirements.python_config()), **_core(nvcc, save_mem), **_mpi()}
    if threads or "OMP_NUM_THREADS" not in os.environ:
        chosen["OMP_NUM_THREADS"] = str(threads or _threads())
    cache = requirements.cache_folder()
    with _environment(chosen), _process_kept():
        try:
            import jittor_utils.install_cuda

            # A toolkit that it once downloaded would have it start this process anew.
            jittor_utils.install_cuda.has_installation = lambda: False
            cache = Path(jittor_utils.cache_path)  # this compiler's, Python's and processor's part of it
            package = Path(jittor_utils.__file__).parent.parent / "jittor"
            first_compile.ensure(cache, package, bool(nvcc), "Jittor with its own swapping" if save_mem else "Jittor")
            import jittor

            jittor.flags.python_path = _python()
        except MossError:
            raise
        except (Exception, SystemExit) as e:  # whatever its loading may raise, damaged files included
            why = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
            raise MossError(f"Jittor cannot be imported ({why}); to compile it afresh: rm -r '{cache}'") from e
    return jittor


def _threads() -> int:
    """Every usable core; where mpirun bound this process to none in particular, its share of them."""
    here = cores()
    bound = here.logical < (os.cpu_count() or 1)
    return here.usable if bound else max(1, here.usable // started().here)


def _mpi() -> dict[str, str]:
    """What Jittor needs in a process that Open MPI's mpirun started: it asks for its MPI then, whether that is on or not."""
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return {}
    if not (os.environ.get("mpicc_path") or shutil.which("mpicc")):  # noqa: SIM112 (Jittor's own name)
        raise MossError(
            "mpirun started this, and mpicc, to compile Jittor's MPI with, is missing: sudo apt-get install libopenmpi-dev"
        )
    return {"use_mpi": "1"}


def _core(nvcc: str, save_mem: bool) -> dict[str, str]:
    """What a core is compiled with, and its cache: where the CPU's has been compiled, Jittor imports that one in place of
    CUDA's in the same cache. Without a name it would be the git branch that Jittor's own folder happens to be in."""
    name, flags = (os.environ.get(variable) for variable in ("cache_name", "cc_flags"))
    if save_mem:
        return {"cache_name": f"{name}-save-mem" if name else "save-mem", "cc_flags": f"{flags or ''} {_SAVE_MEM}=1".strip()}
    return {"cache_name": name or ("cuda" if nvcc else "default")}


def _python() -> str:
    """This interpreter by one name, however it was started: Jittor compiles an op again when the name, a part of the command
    that compiles it, differs."""
    versioned = Path(sys.executable).with_name(f"python3.{sys.version_info.minor}")
    return str(versioned) if versioned.exists() else sys.executable


@contextmanager
def _environment(chosen: dict[str, str]) -> Iterator[None]:
    """Set the variables of ``chosen``, and those of _ENVIRONMENT that are not set, for a while."""
    before = dict(os.environ)
    os.environ.update({**_ENVIRONMENT, **before, **chosen})
    try:
        yield
    finally:  # Jittor adds to it, too
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _process_kept() -> Iterator[None]:
    """Put back what importing Jittor changes in the process: signal handlers, https without certificates, recursion's limit."""
    libc, size = ctypes.CDLL(None), 1024  # a struct sigaction has 152 bytes
    handlers = {getattr(signal, name): ctypes.create_string_buffer(size) for name in _SIGNALS}
    for number, handler in handlers.items():
        libc.sigaction(number, None, handler)
    https, depth = ssl._create_default_https_context, sys.getrecursionlimit()
    try:
        with float_environment_kept():
            yield
    finally:
        for number, handler in handlers.items():
            libc.sigaction(number, handler, None)
        ssl._create_default_https_context = https
        sys.setrecursionlimit(depth)


@contextmanager
def float_environment_kept() -> Iterator[None]:
    """Around loading what was compiled with -Ofast, as Jittor and its ops are: that makes the thread, and so all of the
    user's own arithmetic in it, flush subnormal numbers to zero."""
    libm, environment = ctypes.CDLL("libm.so.6"), ctypes.create_string_buffer(64)  # an fenv_t has 32 bytes
    libm.fegetenv(environment)
    try:
        yield
    finally:
        libm.fesetenv(environment)


@contextmanager
def compiling(*sources: str) -> Iterator[None]:
    """Around the first use of ops compiled from ``sources``, any texts: says on stderr that this machine now compiles them.

    Says nothing where the same were compiled before. Raises MossError, naming the log, where a kernel does not compile.
    """
    key = hashlib.md5("\0".join(sources).encode()).hexdigest()[:16]
    stamp = Path(jittor().flags.cache_path) / f"moss-jt-{key}.compiled"
    if stamp.exists():
        yield
        return
    _say("compiling kernels (first run only) ...")
    start, log = time.monotonic(), stamp.with_suffix(".log")
    try:
        with _interrupt_held(), _stderr_into(log):
            yield
    except RuntimeError as e:
        if "Run cmd failed" not in str(e):
            raise
        raise MossError(f"a kernel cannot be compiled: {first_compile.reason(log)} (all of it: {log})") from None
    log.unlink(missing_ok=True)  # another process may have compiled the same at the same time
    stamp.touch()
    _say(f"kernels are compiled ({time.monotonic() - start:.0f} s)")


@contextmanager
def _stderr_into(log: Path) -> Iterator[None]:
    """What Jittor and the compilers it starts print on stderr, which nothing else silences, goes to a file for a while."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with log.open("wb") as out:
            os.dup2(out.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Ctrl-C, which ends the compilers by itself, raises KeyboardInterrupt at the end and not anywhere in between."""
    if threading.current_thread() is not threading.main_thread():  # no other thread is ever interrupted
        yield
        return
    came = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: came.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came.is_set():
            raise KeyboardInterrupt


def _say(line: str) -> None:
    print(f"moss-jt: {line}", file=sys.stderr, flush=True)
