"""``moss-jt bench vram``: speed and peak memory over a matrix of budgets."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..config import SWAPS
from ..errors import MossError
from . import ui
from .size import CONTEXT, KV_CACHE, SIZE

if TYPE_CHECKING:
    from ..bench.vram import Case

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


class _Budget(click.ParamType):
    """A size, or ``resident``."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        return None if value == "resident" else SIZE.convert(value, param, ctx)


@click.command("vram")
@click.option("-m", "--model", metavar="DIR", type=_FOLDER, help="A converted checkpoint, in place of random weights.")
@click.option("--layers", type=click.IntRange(1, 1000), help="Or random weights with so many blocks.  [default: 34]")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["fp16", "int8", "int4"]), help="Of them.  [default: all]")
@click.option("--dir", "parent", metavar="DIR", type=_FOLDER, help="Where they lie meanwhile.  [default: /tmp]")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="cpu: budgets of RAM.")
@click.option(
    "--budget", "budgets", multiple=True, type=_Budget(), metavar="SIZE", help="Or resident.  [default: resident, 4 … 24GiB]"
)
@click.option("--swap", "swaps", multiple=True, type=click.Choice(SWAPS), help="For the rest.  [default: auto, stream]")
@click.option(
    "--length", "lengths", multiple=True, type=click.Choice(["short", "full"]), help="Of what is in the cache.  [default: both]"
)
@CONTEXT
@KV_CACHE
@click.option("--seconds", type=click.FloatRange(0), default=2.0, show_default=True, help="How long tokens are counted.")
@click.option("--out", metavar="FILE", type=_FILE, help="Add each result as it comes; what FILE has is not measured again.")
@click.option("--plot", metavar="FILE.png", type=_FILE, help="Draw speeds and peaks over budgets (needs matplotlib).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every case.")
def command(
    model: Path | None,
    layers: int | None,
    dtypes: tuple[str, ...],
    parent: Path | None,
    device: str,
    budgets: tuple[int | None, ...],
    swaps: tuple[str, ...],
    lengths: tuple[str, ...],
    context: int,
    kv_cache: str,
    seconds: float,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Speed and peak memory within budgets of a GPU's memory, or of RAM, beside the speed of the link."""
    from ..bench import vram

    if model is not None and (layers or dtypes or parent):
        raise click.UsageError("--layers, --dtype and --dir belong to random weights, in place of -m")
    if device == "cuda":
        _check_gpu()
    if plot is not None:
        from . import bench_plot

        bench_plot.check(plot)
    found = _Results(out, {"model": str(model.resolve()) if model else "random", "layers": None if model else layers or 34})
    wanted = list(
        vram.cases(
            device,
            [_dtype(model)] if model else list(dtypes or ("fp16", "int8", "int4")),
            list(budgets or vram.BUDGETS),
            list(swaps or vram.SWAPS[device]),
            list(lengths or vram.LENGTHS),
            context,
            kv_cache,
        )
    )
    try:
        for dtype, some in groupby((case for case in wanted if not found.of(case)), lambda case: case.dtype):
            _measure(list(some), dtype, model, layers or 34, parent, seconds, found)
    finally:  # also what there is when it is interrupted
        rows = list(filter(None, map(found.of, wanted)))
        _show(rows, device, as_json)
    if plot is not None:
        bench_plot.draw(rows, plot)


def _check_gpu() -> None:
    """Raises MossError where there is none."""
    from .. import cuda

    if problem := cuda.driver().problem:
        raise MossError(f"{problem}: no GPU's memory to measure here; --device cpu measures budgets of RAM")


def _dtype(model: Path) -> str:
    from ..weights import open_weights

    return open_weights(model).coding.dtype


def _measure(
    those: list[Case], dtype: str, model: Path | None, layers: int, parent: Path | None, seconds: float, found: _Results
) -> None:
    """Cases of one dtype, over weights that are made for them where there is no model."""
    from ..bench import vram

    try:
        with _weights(dtype, model, layers, parent) as folder:
            for case in those:
                found.add(case, vram.measure(folder, case, seconds))
    except MossError as e:  # no room for the weights
        for case in those:
            found.add(case, {"why_not": str(e)})


@contextmanager
def _weights(dtype: str, model: Path | None, layers: int, parent: Path | None) -> Iterator[Path]:
    from .. import bench
    from ..weights.layout import Coding
    from .bench import stopping_cleanly

    if model is not None:
        yield model
        return
    shape = bench.Shape(bench.moon(layers), Coding(dtype, "fp16" if dtype == "fp16" else "int8"))
    with stopping_cleanly(), bench.random_checkpoint(shape, parent or Path(tempfile.gettempdir())) as folder:
        yield folder


class _Results:
    """The rows that there are: those of a file, one JSON object a line, to which new ones are added as they come."""

    def __init__(self, path: Path | None, of: dict):
        """``of``: what each row says of the model. Raises MossError for a file that holds something else."""
        self._path, self._of, self._rows = path, of, []
        if path is None or not path.exists():
            return
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as e:
            raise MossError(f"{path}: cannot be read: {getattr(e, 'strerror', 'not text')}") from None
        self._rows = list(filter(None, map(_row, text.splitlines())))
        if text.strip() and not self._rows:
            raise MossError(f"{path}: exists and holds no results of bench vram; choose another name")

    def of(self, case: Case) -> dict | None:
        """The newest row of a case."""
        key = {**self._of, **asdict(case)}
        return next((row for row in reversed(self._rows) if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, case: Case, figures: dict) -> None:
        from ..bench.about import machine_facts, now

        row = {"bench": "vram", **self._of, **asdict(case), **figures, "date": now(), "machine": machine_facts()}
        self._rows.append(row)
        ui.note(f"{case}: {figures.get('why_not') or _speed(figures)}")
        if self._path is not None:
            self._append(json.dumps(row, ensure_ascii=False))

    def _append(self, line: str) -> None:
        """On a line of its own, also after one that was cut off."""
        try:
            with self._path.open("a+b") as file:
                at = file.seek(0, os.SEEK_END)
                whole = not at or (file.seek(at - 1), file.read(1))[1] == b"\n"
                file.write((b"" if whole else b"\n") + line.encode() + b"\n")
        except OSError as e:
            raise MossError(f"{self._path}: cannot be written: {e.strerror}") from None


def _row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:  # cut off when the program was killed
        return None
    return row if isinstance(row, dict) and row.get("bench") == "vram" else None


def _speed(figures: dict) -> str:
    return f"{figures['tokens_s']:.3g} tokens/s, peak {_peak(figures) / 2**30:.2f} GiB"


def _peak(row: dict) -> int:
    """Of what the budget is of."""
    return row["peak_ram_bytes"] if row["peak_vram_bytes"] is None else row["peak_vram_bytes"]


def _show(rows: list[dict], device: str, as_json: bool) -> None:
    if as_json:
        from .. import __version__

        click.echo(json.dumps({"bench": "vram", "version": __version__, "device": device, "cases": rows}, ensure_ascii=False))
    elif rows and sys.stdout is not None:
        from .bench_table import draw_budgets

        on = rows[0]["machine"]
        ui.note(f"{rows[0]['model']}, {on['cpu']}, load average {on['load_average']:.1f}")
        draw_budgets(rows)
