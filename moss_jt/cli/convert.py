"""``moss-jt convert``: official checkpoints to ours, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import MossError
from . import progress
from .convert_table import draw_errors
from .size import SIZE, gigabytes

if TYPE_CHECKING:
    from ..convert.job import Job

_DTYPES = ["fp16", "int8", "int4"]
_FORMATS = ["pytorch", "safetensors", "gptq", "gptq-safetensors", "gguf-f16", "gguf-q8_0", "gguf-q4_0"]
_dry_run = click.option("--dry-run", is_flag=True, help="Print what would be written; write and download nothing.")


@click.group()
def command() -> None:
    """Convert official checkpoints, and back."""


@command.command()
@click.argument("src")
@click.argument("dst", type=click.Path())
@click.option("--dtype", type=click.Choice(_DTYPES), help="How weights are stored.  [default: fp16; from GPTQ, as they are]")
@click.option("--head-dtype", type=click.Choice(_DTYPES), help="How lm_head is.  [default: int8; fp16 with fp16 or GPTQ]")
@click.option(
    "--method",
    type=click.Choice(["rtn", "gptq"]),
    default="rtn",
    show_default=True,
    help="How blocks become int8 or int4: round to nearest, or GPTQ, which takes hours and comes nearer to fp16.",
)
@click.option("--calibration", type=click.Path(), metavar="FILE", help="Dialogues for gptq to calibrate with, in JSON lines.")
@click.option("--group-size", type=int, default=128, show_default=True, help="Inputs that share a scale in a block.")
@click.option("--act-order", is_flag=True, help="With gptq: take the most active inputs first.")
@click.option("--revision", metavar="NAME", help="A branch, tag or commit, where SRC is a Hub id.")
@_dry_run
def weights(src: str, dst: str, revision: str | None, dry_run: bool, **coding) -> None:
    """Convert an official checkpoint to the folder DST.

    SRC is a folder that holds config.json, the tokenizer's files and pytorch_model*.bin or *.safetensors, or a Hub id such as
    fnlp/moss-moon-003-sft; for int8 and int4 also an fp16 folder that this command wrote. Weights that GPTQ has quantised keep
    every bit. No code of the checkpoint is run. Stopped at any moment, the same command goes on where it was.

    FILE has one conversation a line, in the format of MOSS's official fine-tuning.
    """
    from .. import convert

    _check_usage(**coding)
    with _stoppable():
        job = convert.plan_weights(src, dst, revision=revision, download=not dry_run, **coding)
        if job.finished:
            click.echo(f"{dst}: already converted from {src}")
        else:
            _do(job, dry_run, f"Chat with it: moss-jt chat -m {dst}")
            if coding["method"] == "gptq" and not dry_run:
                draw_errors(Path(dst))


@command.command()
@click.argument("src", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--format", type=click.Choice(_FORMATS), default="pytorch", show_default=True)
@click.option("--shard-size", type=SIZE, help="Most bytes of tensors in a file.  [default: 10GB; GPTQ and GGUF are one file]")
@_dry_run
def export(src: str, out: str, format: str, shard_size: int | None, dry_run: bool) -> None:
    """Write the converted checkpoint SRC to the folder OUT with the official names and layout.

    What came from fp16 comes out bit for bit. pytorch is what the official code loads; safetensors is safer to open. From int8
    and int4, gptq and gptq-safetensors are the layout of the official int8 and int4 checkpoints, and as exact. With gguf-… OUT
    is a file, for llama.cpp, and SRC may be of any dtype.
    """
    from .. import convert

    with _stoppable():
        _do(convert.plan_export(src, out, format, shard_size), dry_run, "")


def _check_usage(method: str, calibration: str | None, group_size: int, act_order: bool, **others) -> None:
    """Raises click.UsageError for options that do not go together, whatever the checkpoint is."""
    from ..convert.to_moss_jt import check_method
    from ..weights.layout import Coding

    try:
        check_method(method, calibration, act_order)
        Coding(group=group_size)
    except MossError as e:
        raise click.UsageError(str(e)) from None


def _do(job: Job, dry_run: bool, afterwards: str) -> None:
    for note in job.notes:
        click.echo(note, err=True)
    if dry_run:
        job.check()
        _print_plan(job)
        return
    if job.begun:
        click.echo(f"{job.partial}: going on, {len(job.remaining)} of {_count(job)} are left", err=True)
    with progress.of_bytes("written") as advance:
        job.run(advance)
    click.echo(f"{job.dst}: {gigabytes(sum(job.files.values()))} in {_count(job)}. {afterwards}".rstrip())


def _count(job: Job) -> str:
    count = len(job.files)
    return f"{count} {'part' if job.single else 'file'}{'' if count == 1 else 's'}"


def _print_plan(job: Job) -> None:
    width = max(map(len, job.files))
    for name, size in job.files.items():
        click.echo(f"{name:<{width}}  {size:>15,} bytes{'' if name in job.remaining else '  (there already)'}")
    left, total = sum(job.remaining.values()), sum(job.files.values())
    others = "" if job.single else ", and config.json and the tokenizer's files"
    click.echo(f"{job.dst}: {_count(job)}, {gigabytes(total)}{others}")
    spilled = f" and {gigabytes(job.spilled)} to keep until then" if job.spilled else ""
    click.echo(f"{gigabytes(left)} to write{spilled}, {gigabytes(job.free)} free there; nothing was written")


@contextmanager
def _stoppable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo("\nmoss-jt: stopped; the same command goes on where it was", err=True)
        click.get_current_context().exit(130)
