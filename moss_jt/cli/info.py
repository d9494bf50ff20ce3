"""``moss-jt info``: what a model's folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object, each tensor included.")
@click.pass_context
def command(ctx: click.Context, folder: Path, as_json: bool) -> None:
    """Say what the model in FOLDER is, official or converted, and what is wrong with it. Exits with 1 if anything is."""
    from ..convert.describe import describe

    found = describe(folder)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        _draw(found)
    ctx.exit(1 if found["problems"] else 0)


def _draw(found: dict) -> None:
    from rich.console import Console

    console = Console()
    console.print(_summary(found))
    console.print(_files(found["files"]))
    for note in found.get("gptq", {}).get("notes", []):
        console.print(note, markup=False, soft_wrap=True)
    for problem in found["problems"][:20]:
        console.print(problem, style="red", markup=False, soft_wrap=True)
    if (more := len(found["problems"]) - 20) > 0:
        console.print(f"… and {more} more problems", style="red")
    if not found["problems"]:
        console.print("Nothing is wrong with it." if found["kind"] == "converted" else "It can be converted.", style="green")


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=bool(columns), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name == "file" else "right")
    return table


def _summary(found: dict) -> Table:
    from rich.text import Text

    c = found["config"]
    rows = {
        "folder": found["folder"],
        "kind": _kind(found),
        "parameters": f"{found['parameters']:,}",
        "on disk": f"{size(found['bytes'])} of weights",
        "blocks": f"{c['n_layer']}, each {c['n_embd']} wide with {c['n_head']} heads and an MLP of {c['n_inner']}",
        "vocabulary": f"{c['vocab_size']:,}",
        "KV cache": "\n".join(
            f"{count:,} bytes a token in {kv_cache}, {size(found['cache_bytes_at_n_ctx'][kv_cache])} at {c['n_ctx']}"
            for kv_cache, count in found["cache_bytes_per_token"].items()
        ),
    }
    if meta := found["meta_instruction"]:
        plugins = ", ".join(meta["plugins"]) or "no plugins"
        rows["system text"] = f"its own, {meta['characters']:,} characters, with {plugins}"
    table = _table()
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _kind(found: dict) -> str:
    if found["kind"] == "converted":
        dtypes = [found["dtype"], f"lm_head in {found['head_dtype']}"] if found["dtype"] else []
        if found["dtype"] in ("int8", "int4"):
            dtypes += [f"groups of {found['group_size']}", *(["act-order"] if found["act_order"] else [])]
        return ", ".join(["converted", f"format {found['format']}", *dtypes])
    dtypes = ", ".join(f"{n} tensors {dtype}" for dtype, n in found["dtypes"].items())
    if gptq := found.get("gptq"):
        dtypes += f"; GPTQ in {gptq['dtype']}, groups of {gptq['group_size']}" + (", act-order" if gptq["act_order"] else "")
    return ": ".join(x for x in ("official, " + (found["container"] or "cannot be opened"), dtypes) if x)


def _files(files: list[dict]) -> Table:
    """A row for each file; blocks, which are all alike, share one."""
    from rich.text import Text

    table = _table("file", "bytes", "tensors")
    blocks = [f for f in files if f["name"].startswith("block-")]
    for f in files:
        if f in blocks[1:-1]:
            continue
        held = f.get("tensors", "")
        table.add_row(Text(f["name"]), f"{f['bytes']:,}", str(held if isinstance(held, int) else len(held)))
        if blocks[2:] and f is blocks[0]:
            table.add_row(f"  … {len(blocks) - 2} more blocks", f"{sum(b['bytes'] for b in blocks[1:-1]):,}", "")
    return table


def size(count: int) -> str:
    """Bytes for people: decimal, as disks are sold."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"
