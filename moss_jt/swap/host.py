"""What everything that lends weights does alike in host memory."""

from __future__ import annotations

import os
import weakref

import numpy as np

from ..errors import MossError
from ..runtime import jittor
from ..weights.store import Region


class Rows:
    """Rows of wte, read from the file when they are needed: a token needs one, and a page that was mapped and touched would
    count as memory from then on."""

    def __init__(self, region: Region):
        self._path, self._start = region.path, region.start
        self._width = region.tensors[0].shape[1]
        try:
            self._file = os.open(region.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise MossError(f"{region.path}: cannot be opened: {e.strerror}") from None
        self.close = weakref.finalize(self, os.close, self._file)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """float32 (T, D). Raises MossError as read_into does."""
        rows = np.empty((len(ids), self._width), np.float16)
        self.read_into(rows, ids)
        return rows.astype(np.float32)

    def read_into(self, rows: np.ndarray, ids: np.ndarray) -> None:
        """Fill float16 (T, D). Raises MossError for a disk's error, or a file that has become shorter."""
        for i, row in zip(ids.tolist(), rows):
            try:
                got = os.preadv(self._file, [row], self._start + i * row.nbytes)
            except OSError as e:
                raise MossError(f"{self._path}: cannot be read: {e.strerror}") from None
            if got < row.nbytes:
                raise MossError(f"{self._path}: ends before row {i}: it was changed; convert the checkpoint again")


def as_vars(arrays: dict[str, np.ndarray]) -> dict:
    """Name -> Jittor Var over the same memory, which it does not keep alive: the caller must."""
    wrap = jittor().core.reuse_np_array
    return {name: wrap(np.asarray(array)) for name, array in arrays.items()}  # it takes no np.memmap
