"""What Open MPI's mpirun tells the processes that it starts. Without it, a process is alone."""

from __future__ import annotations

import os
from typing import NamedTuple


class Started(NamedTuple):
    rank: int  # from 0; that one speaks for all
    processes: int
    here: int  # of them, on this machine


def started() -> Started:
    """This process among those that mpirun started together."""
    alone = {"RANK": 0, "SIZE": 1, "LOCAL_SIZE": 1}
    return Started(*(int(os.environ.get(f"OMPI_COMM_WORLD_{name}", number)) for name, number in alone.items()))
