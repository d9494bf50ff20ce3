"""Writes a folder, or a file, that appears complete or not at all, and goes on where it was stopped. docs/formats.md describes
it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Callable, ClassVar

from ..errors import MossError
from .copy import Advance
from .spill import SUFFIX

RECORD = "convert.json"
REPORT = "quantisation.json"  # only where something was calibrated
_SMALL_FILES = 32 << 20  # bytes of disk set aside for what is written besides the weights: mostly the tokenizer's files

# What file systems without locks answer, for example many clusters' Lustre: there it is up to the user not to run two at once.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True)
class Job:
    """A folder to be written. ``run`` does it; what is here can be asked before."""

    dst: Path
    record: dict  # what it is made from; a folder begun with another record is not continued
    files: dict[str, int]  # weights file -> bytes
    prepare: Callable[[Path], None]  # writes the small files into a folder
    write: Callable[[BinaryIO, str, Advance], None]  # writes one weights file
    notes: Sequence[str] = ()  # what whoever asked for it should know, a line each
    keep_record: bool = True
    spilled: int = 0  # bytes that take room only while it is written

    single: ClassVar[bool] = False  # whether ``files`` are the parts of a single file

    @property
    def partial(self) -> Path:
        return self.dst.with_name(self.dst.name + ".partial")

    @property
    def remaining(self) -> dict[str, int]:
        """The files that are still to be written: one with its final name is whole."""
        return {name: n for name, n in self.files.items() if not (self.partial / name).exists()}

    @property
    def free(self) -> int:
        """Bytes free for it, those included that are written anew, or were spilled before."""
        unfinished = sum(p.stat().st_size for end in (".tmp", SUFFIX) for p in self.partial.glob("*" + end))
        return shutil.disk_usage(self.dst.parent).free + unfinished

    @property
    def finished(self) -> bool:
        """Whether the folder is there already, made from the same source."""
        return self.keep_record and _read_record(self.dst / RECORD) == self.record

    @property
    def begun(self) -> bool:
        """Whether it was begun from the same source, and stopped."""
        return _read_record(self.partial / RECORD) == self.record

    def check(self) -> None:
        """Raises MossError where the folder cannot be written: it exists, or there is no room."""
        if os.path.lexists(self.dst):
            raise MossError(f"{self.dst}: exists already; choose another destination, or delete it first")
        if not self.dst.parent.is_dir():
            raise MossError(f"{self.dst.parent}: no such folder to write {self.dst.name} into")
        with _plain_errors(self):
            needed, free = sum(self.remaining.values()) + self.spilled + _SMALL_FILES, self.free
        if needed > free:
            raise MossError(f"{self.dst}: {needed / 1e9:.2f} GB are still to be written, but only {free / 1e9:.2f} GB are free")

    def run(self, progress: Progress | None = None) -> None:
        """Write what is not there yet. Raises MossError; whatever happens, what is done stays for the next run."""
        self.check()
        with _plain_errors(self), self._locked():
            self.prepare(self.partial)
            self._write_files(self._advance(progress or (lambda done, total: None)))
            self._publish()
            sync(self.dst.parent)

    def _advance(self, progress: Progress) -> Advance:
        total = sum(self.files.values())
        done = total - sum(self.remaining.values())

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(min(done, total), total)

        advance(0)
        return advance

    def _write_files(self, advance: Advance) -> None:
        for name in self.remaining:
            with whole_file(self.partial / name) as f:
                self.write(f, name, advance)

    def _publish(self) -> None:
        for path in self.partial.iterdir():
            sync(path)
        sync(self.partial)
        self.partial.rename(self.dst)
        if not self.keep_record:
            (self.dst / RECORD).unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Make DST.partial ours: nobody else writes into it, and it was begun from the same source."""
        self.partial.mkdir(exist_ok=True)
        with open(self.partial / RECORD, "a+", encoding="utf-8") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MossError(f"{self.partial}: another conversion is writing there; wait for it, or stop it") from None
            except OSError as e:
                if e.errno not in _NO_LOCKS:
                    raise
            self._check_record(f)
            yield

    def _check_record(self, f) -> None:
        path = self.partial / RECORD
        if not path.exists() or not os.path.samestat(os.fstat(f.fileno()), path.stat()):
            raise MossError(f"{self.dst}: another conversion has just finished it")
        found = _read_record(path)
        if found is None and [p.name for p in self.partial.iterdir()] == [RECORD]:
            f.truncate(0)
            f.write(json.dumps(self.record, indent=1) + "\n")
            f.flush()
            os.fsync(f.fileno())
        elif found != self.record:
            raise MossError(
                f"{self.partial}: begun from another source or with other settings; delete it to start anew, "
                "or choose another destination"
            )


@dataclass(frozen=True)
class FileJob(Job):
    """A single file, of which ``files`` are the parts, in order. It grows in DST.partial; each part is on the disk before the
    next one is begun."""

    keep_record: bool = False

    single: ClassVar[bool] = True

    @property
    def _body(self) -> Path:
        return self.partial / self.dst.name

    @property
    def remaining(self) -> dict[str, int]:
        """The parts that are not certainly whole: the last one that was written may not have reached the disk."""
        written = min(self._written, sum(self.files.values()))
        return {name: n for (name, n), end in zip(self.files.items(), accumulate(self.files.values())) if end >= written}

    @property
    def free(self) -> int:
        return shutil.disk_usage(self.dst.parent).free + self._written - self._kept

    @property
    def _written(self) -> int:
        return self._body.stat().st_size if self._body.exists() else 0

    @property
    def _kept(self) -> int:
        return sum(self.files.values()) - sum(self.remaining.values())

    def _write_files(self, advance: Advance) -> None:
        remaining, kept = self.remaining, self._kept
        self._body.touch()
        with open(self._body, "r+b") as f:
            f.truncate(kept)
            f.seek(kept)
            for name in remaining:
                self.write(f, name, advance)
                f.flush()
                os.fsync(f.fileno())

    def _publish(self) -> None:
        self._body.rename(self.dst)
        (self.partial / RECORD).unlink()
        self.partial.rmdir()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name only once it is whole and on the disk."""
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    tmp.rename(path)
    sync(path.parent)


def source_record(paths: list[Path]) -> list[dict]:
    """What tells whether source files are the same as before: their names, sizes and times."""
    stats = [(p.name, p.stat()) for p in paths]
    return [{"name": name, "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for name, s in stats]


def recorded_source(folder: Path) -> set[str]:
    """The names of the files that a folder was made from, as far as it says so."""
    try:
        return {f["name"] for f in _read_record(folder / RECORD)["source"]}
    except (TypeError, KeyError):
        return set()


def _read_record(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _plain_errors(job: Job) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            kept = f"what is done is kept in {job.partial}; make room and run the same command again"
            raise MossError(f"{job.dst}: the disk is full; {kept}") from None
        raise MossError(f"{e.filename or job.dst}: cannot be written: {e.strerror}") from None
