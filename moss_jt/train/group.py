"""The processes that train one model together, each on batches of its own: started by Open MPI's mpirun, with Jittor's MPI."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from ..mpirun import started
from ..runtime import jittor


class Group:
    """One process alone. What a method says is of all processes together; each of them has to call it, in the same order."""

    size, rank = 1, 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def sums(self, *numbers: float) -> tuple[float, ...]:
        """Of each number, in float64."""
        return numbers

    def add(self, arrays: Iterable[np.ndarray]) -> None:
        """Make each array (float32, contiguous) the sum of all processes' ones, in place."""

    def any(self, here: bool) -> bool:
        return bool(self.sums(here)[0])

    def agrees(self, text: str) -> bool:
        """Whether it is the same in all of them."""
        mine = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")  # float64 holds it exactly
        return len(set(self.sums(*(mine if rank == self.rank else 0 for rank in range(self.size))))) == 1

    def wait(self) -> None:
        """Until all have come here."""
        self.sums(0)


class _Mpi(Group):
    def __init__(self) -> None:
        self._jt = jittor("cpu")
        self._mpi = self._jt.compile_extern.mpi
        self.size, self.rank = self._mpi.world_size(), self._mpi.world_rank()

    def sums(self, *numbers: float) -> tuple[float, ...]:
        found = np.array(numbers, np.float64)
        self.add([found])
        return tuple(found.tolist())

    def add(self, arrays: Iterable[np.ndarray]) -> None:
        for x in arrays:
            self._mpi.var_all_reduce(self._jt.core.reuse_np_array(x))


def join() -> Group:
    """All processes that mpirun started with this one; imports Jittor where there are several. Raises MossError."""
    return _Mpi() if started().processes > 1 else Group()
