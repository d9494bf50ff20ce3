"""What a training can go on from: folders ``checkpoint-STEP`` that are there complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..convert.job import sync, whole_file
from ..errors import MossError
from .arrays import read_arrays, write_arrays
from .loop import Position

STATE, OPTIMIZER, LOCK = "training.json", "optimizer.safetensors", "training.lock"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_SMALL_FILES = 32 << 20  # bytes: mostly the tokenizer's


class Trained(Protocol):
    """What is learned, as it lies in a checkpoint beside the optimizer's state."""

    nbytes: int

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Checkpoints:
    """Those in ``folder``, which is made if need be. ``record``: what the training depends on; one that was begun with another
    record is not continued. ``keep``: how many stay."""

    def __init__(self, folder: Path, record: dict, keep: int):
        self.folder, self.record, self._keep = folder, json.loads(json.dumps(record)), keep

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder ours. Raises MossError where another training is writing there."""
        with _plain_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self.folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise MossError(f"{self.folder}: another training is writing there; wait for it, or stop it") from None
            yield
        finally:
            os.close(file)

    def all(self) -> list[Path]:
        """The complete ones, the oldest first."""
        numbered = [(int(m[1]), p) for p in self.folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
        return [path for _, path in sorted(numbered)]

    def latest(self) -> Path | None:
        """The last one. Raises MossError where it was made with other settings, data or weights."""
        if not (found := self.all()):
            return None
        record = self._state(found[-1])["record"]
        for name in [*record, *self.record]:
            before, now = (r.get(name) for r in (record, self.record))
            if before != now:
                there = f"{found[-1]}: was made with " + _difference(name, before, now)
                raise MossError(f"{there}; go on with that, choose another output_dir, or start anew with --no_resume")
        return found[-1]

    def clear(self) -> None:
        """Delete all of them."""
        with _plain_errors(self.folder):
            for path in [*self.folder.glob("checkpoint-*")]:
                shutil.rmtree(path)

    def check_room(self, trained: Trained, optimizer: Any) -> None:
        """Raises MossError where the next one would not fit."""
        needed = trained.nbytes + sum(x.nbytes for x in optimizer.state().values()) + _SMALL_FILES
        with _plain_errors(self.folder):
            free = shutil.disk_usage(self.folder).free
        if needed > free:
            sizes = f"a checkpoint takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
            raise MossError(f"{self.folder}: {sizes}; make room, or choose another output_dir")

    def save(self, position: Position, trained: Trained, optimizer: Any) -> Path:
        """Write one; then older ones go. Raises MossError where it cannot be written: then nothing has changed."""
        path = self.folder / f"checkpoint-{position.step:08d}"
        partial = path.with_name(path.name + ".tmp")
        with _plain_errors(path, self._kept()):
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                trained.save(partial)
                write_arrays(partial / OPTIMIZER, optimizer.state())
                with whole_file(partial / STATE) as file:
                    state = {"format": FORMAT, "position": asdict(position), "record": self.record}
                    file.write(json.dumps(state, indent=1).encode() + b"\n")
                sync(partial)
                partial.rename(path)
                sync(self.folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            for old in self.all()[: -self._keep]:
                shutil.rmtree(old)
        return path

    def load(self, path: Path, trained: Trained, optimizer: Any) -> Position:
        """Put everything back as it was, bit for bit. Raises MossError for a damaged one."""
        state = self._state(path)
        trained.load(path)
        optimizer.load_state({name: np.asarray(x) for name, x in read_arrays(path / OPTIMIZER).items()})
        try:
            return Position(**state["position"])
        except TypeError:
            raise MossError(f"{path / STATE}: damaged") from None

    def _state(self, path: Path) -> dict:
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if state["format"] != FORMAT:
                raise MossError(f"{path}: its format is {state['format']!r}, this moss-jt reads {FORMAT}")
            return {name: dict(state[name]) for name in ("position", "record")}
        except OSError as e:
            raise MossError(f"{path / STATE}: cannot be read: {e.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise MossError(f"{path / STATE}: damaged; delete {path} to go on from an earlier one") from None

    def _kept(self) -> str:
        found = self.all()
        return f"{found[-1].name} is whole" if found else "there is none before it"


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, (dict, list)) or isinstance(now, (dict, list)):
        return f"another {name}" if before and now else f"{name} {'left out' if now else 'given'}"
    return f"another {name}" if name.endswith(".jsonl") else f"{name} {before}, not {now}"


@contextmanager
def _plain_errors(path: Path, kept: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            before = f" ({kept})" if kept else ""
            raise MossError(f"{path}: the disk is full{before}; make room and run the same command again") from None
        raise MossError(f"{e.filename or path}: cannot be written: {e.strerror}") from None
