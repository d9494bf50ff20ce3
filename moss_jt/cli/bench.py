"""``moss-jt bench``: how fast a model runs here, and how fast it could."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import click

from . import bench_vram
from .device import DEVICE
from .size import CONTEXT, KV_CACHE, SIZE, SWAP

if TYPE_CHECKING:
    from ..weights import Weights

_RANDOM = "Or random weights, in the shape of moss-moon-003 but with so many blocks."
_DTYPES = click.Choice(["fp16", "int8", "int4"])
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group("bench")
def command() -> None:
    """Measure speed. Each figure stands beside the limit of this machine, measured in turn with it."""


def _shared(samples: int) -> Callable[[Callable], Callable]:
    """The options that all of them have; ``samples``: how many are usual."""
    options = [
        click.option("-m", "--model", metavar="DIR", type=_FOLDER, help="Folder of a converted checkpoint."),
        click.option("--random", "blocks", metavar="BLOCKS", type=click.IntRange(1, 1000), help=_RANDOM),
        click.option("--dtype", type=_DTYPES, help="Of the random blocks.  [default: fp16]"),
        click.option("--head-dtype", type=_DTYPES, help="Of the random lm_head.  [default: fp16, int8 with int8 and int4]"),
        click.option("--dir", "parent", metavar="DIR", type=_FOLDER, help="Where they lie meanwhile.  [default: /tmp]"),
        click.option("--threads", type=click.IntRange(1, 4096), help="How many compute.  [default: one a core]"),
        click.option("--repeat", type=click.IntRange(1), default=samples, show_default=True, help="How many samples."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every sample."),
    ]

    def add(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return add


_batch = click.option("--batch", type=click.IntRange(1, 512), default=1, show_default=True, help="Tokens in each sweep.")


@command.command("decode")
@DEVICE
@click.option("--context-used", type=click.IntRange(0), default=128, show_default=True, help="Tokens in the cache.")
@_batch
@KV_CACHE
@SWAP
@_shared(samples=10)
def _decode(context_used: int, batch: int, kv_cache: str, swap: str, **options: Any) -> None:
    """One token after the other, beside the speed of reading memory."""
    from ..bench import Decode

    _measure(Decode(context_used, batch, kv_cache, swap), **options)


@command.command("prefill")
@DEVICE
@click.option("--prompt", type=click.IntRange(1), default=128, show_default=True, help="How many tokens it has.")
@KV_CACHE
@SWAP
@_shared(samples=5)
def _prefill(prompt: int, kv_cache: str, swap: str, **options: Any) -> None:
    """A prompt at once, beside the speed of multiplying and adding."""
    from ..bench import Prefill

    _measure(Prefill(prompt, kv_cache, swap), **options)


@command.command("swap")
@click.option("--ram", type=SIZE, required=True, metavar="SIZE", help="Most memory to use, like 6GiB.")
@CONTEXT
@_batch
@KV_CACHE
@_shared(samples=3)
def _swap(ram: int, context: int, batch: int, kv_cache: str, **options: Any) -> None:
    """One token after the other with weights from the disk, beside the speed of reading it."""
    from ..bench import Swap

    _measure(Swap(ram, context, batch, kv_cache), **options)


@command.command("load")
@_shared(samples=3)
def _load(**options: Any) -> None:
    """From opening a checkpoint to the first logits, with its files in the page cache and without."""
    from ..bench import Load

    _measure(Load(), **options)


command.add_command(bench_vram.command)


def _measure(work: Any, as_json: bool, threads: int | None, repeat: int, device: str | None = None, **source: Any) -> None:
    """device: where the work can be done on others than the CPU."""
    from .. import machine
    from ..bench.about import about
    from ..runtime import jittor

    threads = threads or machine.cores().usable
    with stopping_cleanly(), _weights(work, **source) as weights:
        found = {"bench": type(work).__name__.lower(), "model": str(source["model"] or "random"), **about(weights, threads)}
        jittor(device or "cpu", threads, save_mem=getattr(work, "swap", None) == "jittor")
        on = {"device": device} if device else {}
        found.update(work.run(weights, threads, repeat, **on))
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        from .bench_table import draw

        draw(found)


@contextmanager
def _weights(
    work: Any, model: Path | None, blocks: int | None, dtype: str | None, head_dtype: str | None, parent: Path | None
) -> Iterator[Weights]:
    """What the options name, once it is clear that it can be measured."""
    from ..bench import Shape, moon, random_checkpoint
    from ..weights import open_weights
    from ..weights.layout import Coding

    if (model is None) == (blocks is None):
        raise click.UsageError("say what to measure: either -m DIR or --random BLOCKS")
    if model is not None:
        if dtype or head_dtype or parent:
            raise click.UsageError("--dtype, --head-dtype and --dir belong to --random")
        weights = open_weights(model)
        work.check(Shape.of(weights), model)
        yield weights
        return
    dtype, parent = dtype or "fp16", parent or Path(tempfile.gettempdir())
    shape = Shape(moon(blocks), Coding(dtype, head_dtype or ("fp16" if dtype == "fp16" else "int8")))
    work.check(shape, parent)
    with random_checkpoint(shape, parent) as folder:
        yield open_weights(folder)


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Gigabytes of random weights must not stay behind: a request to end, or a closed terminal, stops us as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
