"""``moss-jt plan``: where everything would live, and how fast that would be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..sizes import gib
from .size import CONTEXT, KV_CACHE, RAM, SIZE, SWAP

if TYPE_CHECKING:
    from rich.table import Table

    from ..swap.plan import Expected, Plan, Speeds


_SIGNS = {"host": "▤", "host or streamed": "◧", "resident": "■", "streamed": "□"}


@click.command("plan")
@click.argument("folder", type=click.Path(path_type=Path))
@RAM
@click.option("--vram", type=SIZE, metavar="SIZE", help="Plan for a GPU, with so much of its memory.")
@SWAP
@CONTEXT
@KV_CACHE
@click.option("--measure/--no-measure", default=None, help="Measure speeds again, or not at all.  [default: once a day]")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def command(
    folder: Path,
    ram: int | None,
    vram: int | None,
    swap: str,
    context: int,
    kv_cache: str,
    measure: bool | None,
    as_json: bool,
) -> None:
    """Say where the converted checkpoint in FOLDER would live here, what a token moves, and how fast that would be."""
    from ..swap import plan_for, plan_for_gpu, spare_memory
    from ..swap.speeds import measured, of_gpu
    from ..weights import open_weights

    if swap != "auto" and not vram:
        raise click.UsageError("--swap says what becomes of blocks that do not fit a GPU: give --vram, too")
    weights = open_weights(folder)
    context = min(context, weights.config.n_ctx)
    if vram:
        known = cache(lambda: None if measure is False else of_gpu(folder, afresh=bool(measure)))
        plan = plan_for_gpu(weights, context, vram, kv_cache, swap, ram or spare_memory(), known)
        speeds = known() if plan.streams or plan.host_blocks else None
    else:
        plan = plan_for(weights, context, ram, kv_cache)
        speeds = None if measure is False else measured(folder, afresh=bool(measure))
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **_as_json(plan, speeds)}, ensure_ascii=False, indent=1))
    else:
        _draw(folder, plan, speeds, "--vram" if vram else "--ram" if ram else "what can be spared here")


def in_short(folder: Path, plan: Plan) -> Iterator[str]:
    """Lines about a plan that is about to be carried out, with speeds where they are known already."""
    from ..swap import speeds

    known = speeds.at_hand(plan, folder)
    what = "of the GPU's memory" if plan.gpu else "of RAM"
    places = _blocks(plan).splitlines()[0]
    yield f"  plan {places}; lm_head {_head(plan)}; KV cache {gib(plan.memory['KV cache'])}; peak {gib(plan.peak)} {what}"
    yield "  " + ", ".join(f"{name} {moved}" for name, moved in _moves(plan, known))
    if known:
        yield f"  decode {_expected(plan.decode(known))}"


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
        "bytes_per_token": _bytes(plan),
        "speeds": speeds and _speeds(asdict(speeds)),
        "decode": speeds and asdict(plan.decode(speeds)),
        "prefill": (speeds and (plan.streams or not plan.gpu) and asdict(plan.prefill(speeds))) or None,
        **(_of_gpu(plan) if plan.gpu else {}),
    }


def _of_gpu(plan: Plan) -> dict:
    streams_from = plan.streams_from if plan.computes_on_host(1) and plan.streamed_blocks else None
    return {
        "swap": plan.swap,
        "streams_from": streams_from,
        "kept": plan.kept,
        "head_slot": plan.head_slot,
        "waiting": plan.waiting,
        "host_memory": plan.host_memory,
    }


def _bytes(plan: Plan) -> dict:
    if plan.gpu:
        return {"link": plan.disk_bytes, "memory": plan.memory_bytes, "host": plan.host_bytes}
    return {"disk": plan.disk_bytes, "memory": plan.memory_bytes}


def _speeds(known: dict) -> dict:
    """Those that are known."""
    found = {name: _speeds(speed) if isinstance(speed, dict) else speed for name, speed in known.items() if speed is not None}
    return {name: speed for name, speed in found.items() if isinstance(speed, dict) or isfinite(speed)}


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
        "slots": f"{plan.slots} {_turns(plan)}" if plan.streams else "none",
    }
    for name, size in plan.memory.items():
        table.add_row(name, where.get(name, ""), gib(size) if size else "")
    table.add_row("wte", "on disk, a row is read for each token", "", end_section=True)
    if plan.gpu and plan.waiting:
        beside = f"; {gib(plan.host_memory)} with what the CPU needs to compute" if plan.host_blocks else ""
        beyond = "" if plan.swap == "jittor" else ", as far as there is room; the rest on disk"
        table.add_row("in RAM", f"{gib(plan.waiting)} of weights{beyond}{beside}", "")
    table.add_row("peak", f"of {gib(plan.budget)}, {budget}", gib(plan.peak), style="bold")
    return table


def _turns(plan: Plan) -> str:
    if plan.swap == "jittor":
        return "at a time, which is Jittor's limit"
    kept = f"; they keep {len(plan.kept)} blocks while the CPU computes" if plan.kept else ""
    head = f"; {plan.slots} for lm_head" if plan.head_slot else ""
    return f"that streamed weights take turns in{kept}{head}"


def _blocks(plan: Plan) -> str:
    counts = Counter(plan.blocks)
    if counts["resident"] == len(plan.blocks):
        return f"{len(plan.blocks)} resident"
    by_cpu = f"on the host {_SIGNS['host or streamed']}, streamed from {plan.streams_from} tokens in a sweep on"
    said = {"host": "computed by the CPU ▤", "host or streamed": by_cpu}
    if plan.swap == "jittor":
        said["streamed"] = f"moved by Jittor {_SIGNS['streamed']}"
    kinds = ", ".join(f"{counts[kind]} {said.get(kind, f'{kind} {sign}')}" for kind, sign in _SIGNS.items() if counts[kind])
    return f"{kinds}\n{''.join(map(_SIGNS.get, plan.blocks))}"


def _head(plan: Plan) -> str:
    rows = plan.config.vocab_size
    if plan.head_rows == rows:
        return "resident"
    if plan.swap == "jittor":
        return "moved by Jittor"
    return f"{plan.head_rows / rows:.0%} resident, the rest streamed" if plan.head_rows else "streamed"


def _moved(plan: Plan, speeds: Speeds | None) -> Table:
    """What a token costs, and what may be hoped for."""
    table = _table()
    for name, moved in _moves(plan, speeds):
        table.add_row(name, moved)
    if speeds:
        table.add_row("decode", _expected(plan.decode(speeds)), style="bold")
        if plan.streams or not plan.gpu:
            table.add_row("prefill", _expected(plan.prefill(speeds)), style="bold")
    return table


def _moves(plan: Plan, speeds: Speeds | None) -> Iterator[tuple[str, str]]:
    """What a token moves, and how long that takes."""
    brought, read = ("over the link", "read from its memory") if plan.gpu else ("read from disk", "read from memory")
    rows = [(brought, plan.disk_bytes, speeds and speeds.disk)] if plan.streams else []
    rows.append((read, plan.memory_bytes, speeds and speeds.memory))
    if plan.host_blocks:
        rows.append(("read from RAM", plan.host_bytes, speeds and speeds.host and speeds.host.memory))
    for name, moved, speed in rows:
        at = f", at {speed / 1e9:.1f} GB/s {moved / speed:.2f} s" if speed and isfinite(speed) else ""
        yield name, f"{moved / 1e9:.2f} GB a token{at}"


def _expected(expected: Expected) -> str:
    speed = f"{expected.tokens_s:.3g}" if expected.tokens_s < 100 else f"{expected.tokens_s:,.0f}"
    return f"{speed} tokens/s; the limit is {expected.limit}"
