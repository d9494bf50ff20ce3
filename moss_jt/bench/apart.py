"""Measuring in a process of its own: what it takes of memory belongs to it alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import moss_jt


def run_apart(code: str, *arguments: str, errors: bool = False) -> subprocess.CompletedProcess:
    """Run Python ``code`` with this program's modules; its output is captured, and with ``errors`` what it says on stderr."""
    environment = {**os.environ, "PYTHONPATH": str(Path(moss_jt.__file__).parents[1])}
    same = f"import moss_jt; moss_jt.__path__ = {list(moss_jt.__path__)!r}; "  # in a checkout it is in several places
    command = [sys.executable, "-c", same + code, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE if errors else None}
    return subprocess.run(command, text=True, env=environment, **pipes)
