"""What ``moss-jt bench`` shows people: the figures that its JSON has, each in a row."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

from rich import box
from rich.console import Console
from rich.table import Table

from ..bench.pairs import spread
from ..sizes import gib


def draw(found: dict) -> None:
    console = Console()
    head = "" if found["head_dtype"] == found["dtype"] else f", lm_head {found['head_dtype']}"
    head += ", KV cache int8" if found.get("kv_cache") == "int8" else ""
    console.print(f"{found['bench']}: {found['layers']} blocks, {found['dtype']}{head}, {found['model']}", markup=False)
    m = found["machine"]
    where = f"{m['cpu']}, {m['kernels']} kernels, {found['threads']} threads, load average {m['load_average']:.1f}"
    console.print(where, markup=False, style="dim")
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    for row in _ROWS[found["bench"]](found):
        table.add_row(*row)
    console.print(table)


_SPEEDS = ("tokens/s", "planned", "of the\nlink")


def draw_budgets(rows: list[dict]) -> None:
    """A row for each case of ``bench vram``, and below the table why some have no figures."""
    console, gpu = Console(), rows[0]["device"] == "cuda"
    memory = ["VRAM", "RAM"] if gpu else ["RAM"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("", "budget\nGiB", "swap", "tokens\nin use", *[f"peak GiB\nof {m}" for m in memory], *_SPEEDS):
        table.add_column(name, justify="left" if name in ("", "swap") else "right", no_wrap=True)
    for row in rows:
        if "why_not" not in row:
            budget = "all" if row["budget"] is None else _gib(row["budget"])
            peaks = [_gib(row[name]) for name in ("peak_vram_bytes", "peak_ram_bytes") if row[name] is not None]
            share = "" if row["share"] is None else percent(row["share"])
            speeds = [f"{row[name]:.3g}" for name in ("tokens_s", "predicted_tokens_s")]
            table.add_row(row["dtype"], budget, row["swap"] or "resident", str(row["used"]), *peaks, *speeds, share)
    if table.row_count:
        console.print(table)
    for row in rows:
        if "why_not" in row:
            budget = "resident" if row["budget"] is None else f"{gib(row['budget'])}, {row['swap']}"
            line = f"{row['dtype']}, {budget}, {row['length']}: not measured: {row['why_not']}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


def _decode(found: dict) -> Iterator[tuple[str, str]]:
    yield "tokens/s", plus_minus(found["tokens_s"])
    yield "bytes a token", size(found["bytes_per_token"])
    yield from _compared(found)
    yield "of a token's time, outside the kernels", percent(found["overhead_share"])
    yield "choosing by the default sampling would add", f"{found['sampling_seconds'] * 1e3:.2f} ms"


def _prefill(found: dict) -> Iterator[tuple[str, str]]:
    yield f"tokens/s, prompt of {found['prompt']}", plus_minus(found["tokens_s"])
    yield "operations a token", f"{found['GFLOP_per_token']:.2f} GFLOP"
    yield from _compared(found)


def _swap(found: dict) -> Iterator[tuple[str, str]]:
    yield "tokens/s", plus_minus(found["tokens_s"])
    yield "the plan expects, of this disk and memory", f"{found['predicted_tokens_s']:.3g}"
    yield "from the disk for a token", size(found["bytes_per_token"])
    yield from _compared(found)
    yield f"most memory used, of {gib(found['budget_bytes'])}", gib(found["peak_memory_bytes"])


def _load(found: dict) -> Iterator[tuple[str, str]]:
    for state, what in (("warm", "files in the page cache"), ("cold", "files on the disk")):
        if found[state]:
            yield f"seconds, {what}", plus_minus(found[state]["seconds"])
            yield from _compared(found[state])
        else:
            yield f"seconds, {what}", "the page cache cannot be emptied here"


def _compared(found: dict) -> Iterator[tuple[str, str]]:
    unit = "GB_s" if "GB_s" in found else "GFLOP_s"
    shown = unit.replace("_", "/")
    yield "that is", f"{found[unit]:.1f} {shown}"
    yield found["limit"], f"{plus_minus(found[f'limit_{unit}_samples'])} {shown}"
    yield "share of that limit", f"{percent(found['share'])} ± {percent(spread(found['share_samples']))}"


_ROWS = {"decode": _decode, "prefill": _prefill, "swap": _swap, "load": _load}


def plus_minus(samples: list[float]) -> str:
    """Mean ± standard deviation, to what the deviation leaves certain: two decimals below 100."""
    digits = 1 if mean(samples) >= 100 else 2
    return f"{mean(samples):.{digits}f} ± {spread(samples):.{digits}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
