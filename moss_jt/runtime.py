"""Makes Jittor importable and imports it, once."""

from __future__ import annotations

import os
import sys
from types import ModuleType

# Read by Jittor while it is imported. Each use_* avoids a download from its servers; nvcc_path="" keeps CUDA off.
_ENVIRONMENT = {
    "log_silent": "1",
    "use_mkl": "0",
    "use_cutt": "0",
    "use_cutlass": "0",
    "use_nccl": "0",
    "use_mpi": "0",
    "nvcc_path": "",
}


def jittor(device: str = "auto") -> ModuleType:
    """The imported ``jittor`` module. The first call may compile for minutes; later ones return at once."""
    if "jittor" not in sys.modules:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    import jittor

    return jittor
