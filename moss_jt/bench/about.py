"""What was measured, where and when: a figure without it means nothing."""

from __future__ import annotations

import os
from datetime import datetime

from .. import __version__, machine
from ..weights import Weights


def about(weights: Weights, threads: int) -> dict:
    return {
        "date": now(),
        "version": __version__,
        "machine": machine_facts(),
        "threads": threads,
        "layers": weights.config.n_layer,
        "n_embd": weights.config.n_embd,
        "dtype": weights.coding.dtype,
        "head_dtype": weights.coding.head_dtype,
    }


def machine_facts() -> dict:
    cpu = machine.cpu()
    return {
        "cpu": cpu.model,
        "kernels": cpu.kernels,
        "cores": machine.cores().physical,
        "memory_bytes": machine.memory().total,
        "load_average": os.getloadavg()[0],  # of the minute before: near 0 where nothing else was running
    }


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
