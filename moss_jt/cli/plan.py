"""``moss-jt plan``: where everything would live, and how fast that would be."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..sizes import gib
from .size import CONTEXT, KV_CACHE, RAM

if TYPE_CHECKING:
    from rich.table import Table

    from ..swap.plan import Expected, Plan, Speeds


@click.command("plan")
@click.argument("folder", type=click.Path(path_type=Path))
@RAM
@CONTEXT
@KV_CACHE
@click.option("--measure/--no-measure", default=None, help="Measure speeds again, or not at all.  [default: once a day]")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def command(folder: Path, ram: int | None, context: int, kv_cache: str, measure: bool | None, as_json: bool) -> None:
    """Say where the converted checkpoint in FOLDER would live here, what a token moves, and how fast that would be."""
    from ..swap import plan_for
    from ..swap.speeds import measured
    from ..weights import open_weights

    weights = open_weights(folder)
    plan = plan_for(weights, min(context, weights.config.n_ctx), ram, kv_cache)
    speeds = None if measure is False else measured(folder, afresh=bool(measure))
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **_as_json(plan, speeds)}, ensure_ascii=False, indent=1))
    else:
        _draw(folder, plan, speeds, "--ram" if ram else "what can be spared here")


def _as_json(plan: Plan, speeds: Speeds | None) -> dict:
    return {
        "dtype": plan.coding.dtype,
        "head_dtype": plan.coding.head_dtype,
        "context": plan.context,
        "kv_cache": plan.kv_cache,
        "budget": plan.budget,
        "peak": plan.peak,
        "memory": plan.memory,
        "blocks": plan.blocks,
        "lm_head": {"rows": plan.config.vocab_size, "resident_rows": plan.head_rows, "streamed": plan.head_ranges()},
        "slots": plan.slots,
        "slot": plan.slot,
        "bytes_per_token": {"disk": plan.disk_bytes, "memory": plan.memory_bytes},
        "speeds": speeds and asdict(speeds),
        "decode": speeds and asdict(plan.decode(speeds)),
        "prefill": speeds and asdict(plan.prefill(speeds)),
    }


def _draw(folder: Path, plan: Plan, speeds: Speeds | None, budget: str) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"{folder}: {len(plan.blocks)} blocks in {plan.coding}, context {plan.context}", markup=False, soft_wrap=True)
    console.print(_places(plan, budget))
    console.print(_moved(plan, speeds))


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=bool(columns), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "where") else "right")
    return table


def _places(plan: Plan, budget: str) -> Table:
    """What lives where, and what it takes of the budget."""
    table = _table("", "where", "memory")
    where = {
        "KV cache": f"{plan.context} tokens in {plan.kv_cache}",
        "blocks": _blocks(plan),
        "lm_head": _head(plan),
        "slots": f"{plan.slots} that streamed weights take turns in" if plan.streams else "none",
    }
    for name, size in plan.memory.items():
        table.add_row(name, where.get(name, ""), gib(size) if size else "")
    table.add_row("wte", "on disk, a row is read for each token", "", end_section=True)
    table.add_row("peak", f"of {gib(plan.budget)}, {budget}", gib(plan.peak), style="bold")
    return table


def _blocks(plan: Plan) -> str:
    streamed = len(plan.streamed_blocks)
    if not streamed:
        return f"{len(plan.blocks)} resident"
    picture = "".join("□" if i in plan.streamed_blocks else "■" for i in range(len(plan.blocks)))
    return f"{len(plan.blocks) - streamed} resident ■, {streamed} streamed □\n{picture}"


def _head(plan: Plan) -> str:
    rows = plan.config.vocab_size
    if plan.head_rows == rows:
        return "resident"
    return f"{plan.head_rows / rows:.0%} resident, the rest streamed" if plan.head_rows else "streamed"


def _moved(plan: Plan, speeds: Speeds | None) -> Table:
    """What a token costs, and what may be hoped for."""
    table = _table()
    rows = [("read from disk", plan.disk_bytes, speeds and speeds.disk)] if plan.streams else []
    for name, moved, speed in [*rows, ("read from memory", plan.memory_bytes, speeds and speeds.memory)]:
        at = f", at {speed / 1e9:.1f} GB/s {moved / speed:.2f} s" if speed else ""
        table.add_row(name, f"{moved / 1e9:.2f} GB a token{at}")
    if speeds:
        table.add_row("decode", _expected(plan.decode(speeds)), style="bold")
        table.add_row("prefill", _expected(plan.prefill(speeds)), style="bold")
    return table


def _expected(expected: Expected) -> str:
    speed = f"{expected.tokens_s:.3g}" if expected.tokens_s < 100 else f"{expected.tokens_s:,.0f}"
    return f"{speed} tokens/s; the limit is {expected.limit}"
