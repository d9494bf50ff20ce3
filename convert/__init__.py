"""Official checkpoints to ours, and back.

>>> import moss_jt
>>> moss_jt.convert.weights("moss-moon-003-sft", "moss-moon-003-sft-jt")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .job import Job, Progress

__all__ = ["plan_weights", "weights"]


def plan_weights(
    src: str | Path, dst: str | Path, dtype: str = "fp16", revision: str | None = None, download: bool = True
) -> Job:
    """What ``weights`` would write: opens and checks the source, writes nothing. ``download=False`` also fetches nothing."""
    from .to_moss_jt import plan

    return plan(Path(src), Path(dst), dtype)


def weights(
    src: str | Path,
    dst: str | Path,
    dtype: str = "fp16",
    revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Convert an official checkpoint, and return ``dst``."""
    job = plan_weights(src, dst, dtype, revision)
    if not job.finished:
        job.run(progress)
    return Path(dst)
