"""The plot of ``moss-jt bench vram``: speed and peak memory over budgets."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import MossError


def check(path: Path) -> None:
    """Raises MossError, before anything is measured, where a plot could not be drawn or written."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MossError(f"--plot needs matplotlib: {sys.executable} -m pip install matplotlib") from None
    if path.suffix.lower() != ".png":
        raise MossError(f"{path}: --plot writes a PNG file: give it a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise MossError(f"{path}: cannot be written: there is no such folder")


def draw(rows: list[dict], path: Path) -> None:
    """Raises MossError where there is nothing to draw, or it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _lines(rows)
    if not lines:
        raise MossError(f"{path}: nothing was measured that could be drawn")
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    speeds, peaks = figure.subplots(1, 2)
    for (dtype, swap, length), points in lines.items():
        style = {"label": f"{dtype}, {swap}, {length}", "marker": "o", "linestyle": "-" if length == "short" else "--"}
        x = [point["planned"] for point in points]
        speeds.plot(x, [point["tokens_s"] for point in points], **style)
        peaks.plot(x, [point["peak"] for point in points], **style)
    most = max(point["planned"] for points in lines.values() for point in points)
    peaks.plot([0, most], [0, most], color="grey", linewidth=0.8, label="the budget")
    speeds.set_yscale("log")
    speeds.yaxis.set_major_formatter("{x:g}")
    speeds.yaxis.set_minor_formatter("{x:g}")
    what = "RAM" if rows[0]["device"] == "cpu" else "GPU memory"
    for axes, name in ((speeds, "tokens/s"), (peaks, f"peak, GiB of {what}")):
        axes.set_xlabel(f"budget, GiB of {what}")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    speeds.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except OSError as e:
        raise MossError(f"{path}: cannot be written: {e.strerror}") from None


def _lines(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(dtype, swap, length) -> points in the order of their budgets. What is resident ends each line of its dtype."""
    found: dict[tuple, list[dict]] = {}
    measured = [row for row in rows if "why_not" not in row]
    for row in measured:
        swaps = (
            {r["swap"] for r in measured if r["dtype"] == row["dtype"] and r["swap"]} if row["swap"] is None else {row["swap"]}
        )
        for swap in swaps or {"resident"}:
            peak = row["peak_ram_bytes"] if row["peak_vram_bytes"] is None else row["peak_vram_bytes"]
            point = {
                "planned": (row["budget"] or row["planned_peak_bytes"]) / 2**30,
                "peak": peak / 2**30,
                "tokens_s": row["tokens_s"],
            }
            found.setdefault((row["dtype"], swap, row["length"]), []).append(point)
    return {key: sorted(points, key=lambda point: point["planned"]) for key, points in sorted(found.items())}
