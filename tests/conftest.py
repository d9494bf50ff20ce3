"""What several tests share: where optional reference data lies, and small checkpoints made on the spot."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow, not wrong.
settings.register_profile("moss-jt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moss-jt")
# A shell that starts the tests in the background has Ctrl-C ignored, in them and in every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
# Reference data too large for the repository: golden outputs of the official code and trained small checkpoints.
SHARED = Path(os.environ.get("MOSS_JT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data; tests that need it skip where it is not."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("no reference data: set MOSS_JT_SHARED to the folder that holds golden/ and checkpoints/")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture(scope="session")
def official_checkpoint(shared: Path):
    """Call with a name, for example ``moss-tiny-sft``: unpacks that trained checkpoint once and returns its folder."""
    return lambda name: Path(subprocess.check_output([shared / "checkpoints" / "unpack", name], text=True).strip())
