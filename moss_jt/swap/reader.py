"""Reading weights files into memory past the page cache, in a thread of its own.

What measured fastest, on a disk of 2.9 GB/s: one read for a whole block, with O_DIRECT. The kernel cuts it up and keeps the
disk's queue full by itself, at 2 % of a core; smaller reads, several at a time, were no faster. Above all it needs the
interpreter once a block: Jittor's ops hold its lock for as long as they compute, seconds in a prefill, and no other Python
thread gets further meanwhile. Through the page cache it was half as fast and took half a core.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Callable

import numpy as np

from ..errors import MossError

_MADV_POPULATE_READ = 22  # of Linux 5.14: read all of it now, in large requests


def allocate(nbytes: int) -> np.ndarray:
    """Memory of this process alone, page-aligned, in huge pages where Linux gives them: uint8 (nbytes,)."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


class File:
    """A file to read whole pages of."""

    def __init__(self, path: Path):
        """Raises MossError where it cannot be opened."""
        self.path = path
        self._open(direct=True)

    def _open(self, direct: bool) -> None:
        self._file, self._direct = _open(self.path, direct)
        self.close = weakref.finalize(self, os.close, self._file)  # when called, or else when this is no longer used

    def read(self, offset: int, memory: np.ndarray, nbytes: int) -> None:
        """Fill ``memory`` (uint8, whole pages) from ``offset`` (a multiple of a page) on; ``nbytes`` of it must come, the
        rest may lie behind the end. Raises MossError for a disk's error, or a file that has become shorter."""
        done = 0
        while done < nbytes:
            try:
                got = os.preadv(self._file, [memory[done:]], offset + done)
            except OSError as e:
                if e.errno != errno.EINVAL or not self._direct:
                    raise MossError(f"{self.path}: cannot be read: {e.strerror}") from None
                self.close()  # O_DIRECT was taken when opening, and is refused only now
                self._open(direct=False)
                continue
            if not got:
                raise MossError(f"{self.path}: ends at byte {offset + done}: it was changed; convert the checkpoint again")
            done += got

    def mapped(self, offset: int, nbytes: int) -> np.ndarray:
        """What the page cache has of the file, read into it first where it has not: uint8 (nbytes,), not to be written to.
        ``offset``: a multiple of a page. Raises MossError for a disk's error, or a file that has become shorter."""
        try:
            memory = mmap.mmap(self._file, nbytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset)
            memory.madvise(_MADV_POPULATE_READ)
        except (OSError, ValueError) as e:
            raise MossError(f"{self.path}: cannot be mapped: {e}") from None
        return np.frombuffer(memory, np.uint8)


def _open(path: Path, direct: bool) -> tuple[int, bool]:
    """A file descriptor, and whether it reads past the page cache: some file systems, such as tmpfs, cannot."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    except OSError as e:
        if direct and e.errno == errno.EINVAL:
            return _open(path, direct=False)
        raise MossError(f"{path}: cannot be opened: {e.strerror}") from None
    if not direct:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file, direct


class Worker:
    """One thread that does what it is given, one thing after the other. It holds no reference to whoever gives."""

    def __init__(self, name: str):
        self._tasks: SimpleQueue = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._tasks,), name=name, daemon=True)
        self._thread.start()

    def start(self, task: Callable, *arguments: Any) -> Future:
        if not self._thread.is_alive():  # closed, or left behind by a fork
            raise RuntimeError(f"{self._thread.name} has ended")
        future: Future = Future()
        self._tasks.put((future, task, arguments))
        return future

    def close(self) -> None:
        """Leave out what has not begun, wait for what has, and end the thread. May be called again, and from anywhere."""
        while True:
            try:
                task = self._tasks.get_nowait()
            except Empty:
                break
            if task:
                task[0].cancel()
        self._tasks.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()


def _work(tasks: SimpleQueue) -> None:
    while task := tasks.get():
        future, call, arguments = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call(*arguments))
            except BaseException as e:
                future.set_exception(e)
        del task, future, call, arguments  # what they refer to may go now, not when the next one comes
