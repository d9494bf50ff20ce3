"""How far a quantised model's products are from those in fp16, block by block: what ``quantisation.json`` has, drawn."""

from __future__ import annotations

import json
from pathlib import Path


def draw_errors(folder: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..convert.job import REPORT

    found = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    title = f"Errors of outputs in %: round to nearest, GPTQ ({found['tokens']:,} tokens)"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="", pad_edge=False)
    names = (name.rpartition(".")[2] for name in found["blocks"][0]["errors"])
    for name in ("block", *names, "seconds"):
        table.add_column(name, justify="right")
    for block in found["blocks"]:
        errors = (f"{100 * e['rtn']:.2f} {100 * e['gptq']:.2f}" for e in block["errors"].values())
        table.add_row(str(block["block"]), *errors, f"{block['seconds']:.0f}")
    Console().print(table)
