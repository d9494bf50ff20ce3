"""Official checkpoints to ours, and back.

>>> import moss_jt
>>> moss_jt.convert.weights("moss-moon-003-sft", "moss-moon-003-sft-jt")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .job import Job, Progress

__all__ = ["export", "plan_export", "plan_weights", "weights"]


def weights(
    src: str | Path,
    dst: str | Path,
    dtype: str | None = None,
    head_dtype: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    method: str = "rtn",
    calibration: str | Path | None = None,
    group_size: int = 128,
    act_order: bool = False,
) -> Path:
    """Convert the official checkpoint ``src``, a folder or a Hub id (``revision``: its branch, tag or commit), to ``dst``.

    ``dtype``: what the blocks' matrices are stored as: fp16, int8 or int4; by default fp16. ``head_dtype``: the same for
    lm_head; by default int8, or fp16 where the blocks are. For int8 and int4 ``src`` may also be one of ours in fp16. One
    that is quantised with GPTQ keeps its numbers, and lm_head in fp16 unless ``head_dtype`` says otherwise.
    ``method``: how the blocks' matrices become int8 or int4: rtn (round to nearest) or gptq, which needs ``calibration``, a
    file of dialogues in the official format for fine-tuning. ``group_size``: inputs that share a scale in the blocks.
    ``act_order``: gptq takes the most active inputs first.
    ``progress(done, total)`` is called with bytes now and then. ``dst`` appears when it is complete; stopped before that, the
    same call goes on where it was. Does nothing if ``dst`` is already what this source gives. Returns ``dst``. Raises
    MossError for whatever the user can mend.
    """
    job = plan_weights(src, dst, dtype, head_dtype, revision, True, method, calibration, group_size, act_order)
    if not job.finished:
        job.run(progress)
    return job.dst


def export(
    src: str | Path,
    out: str | Path,
    format: str = "pytorch",
    shard_size: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the converted checkpoint ``src`` to ``out`` with the official names, layout and files, or as a GGUF file.

    ``format``: of one in fp16 pytorch (what the official code loads) or safetensors; of one in int8 or int4 gptq or
    gptq-safetensors, the layout of the official int8 and int4 checkpoints. What came from fp16, or from GPTQ, is then bit for
    bit the original. Of any: gguf-f16, gguf-q8_0 or gguf-q4_0, one file for llama.cpp. ``shard_size``: most bytes of tensors in
    a file; by default 10 GB, but all in one file for GPTQ's layout; GGUF's is always one. Otherwise as ``weights``.
    """
    job = plan_export(src, out, format, shard_size)
    job.run(progress)
    return job.dst


def plan_weights(
    src: str | Path,
    dst: str | Path,
    dtype: str | None = None,
    head_dtype: str | None = None,
    revision: str | None = None,
    download: bool = True,
    method: str = "rtn",
    calibration: str | Path | None = None,
    group_size: int = 128,
    act_order: bool = False,
) -> Job:
    """What ``weights`` would write: opens and checks the source, writes nothing. ``download=False`` also fetches nothing."""
    from .hub import locate
    from .to_moss_jt import plan

    dialogues = None if calibration is None else Path(calibration)
    return plan(locate(src, revision, download), Path(dst), dtype, head_dtype, method, dialogues, group_size, act_order)


def plan_export(src: str | Path, out: str | Path, format: str = "pytorch", shard_size: int | None = None) -> Job:
    """What ``export`` would write: opens and checks the source, writes nothing."""
    from ..errors import MossError
    from . import to_gguf
    from .to_official import plan

    if format in to_gguf.FORMATS:
        if shard_size is not None:
            raise MossError(f"{format} is one file, whatever its size; leave the shard size out")
        return to_gguf.plan(Path(src), Path(out), format)
    return plan(Path(src), Path(out), format, shard_size)
