"""Weights that do not fit: what streaming them costs in memory, what drafts gain, and that the answers stay the same.

    python benchmarks/streaming.py --layers 6 --ram 4GiB                  # with the same model in memory beside it
    python benchmarks/streaming.py --layers 34 --ram 6GiB --used 2000     # the whole shape in fp16: 33 GB of disk

Random weights in the shape of moss-moon-003, a prompt of a few ids again and again, the likeliest token each time. Prints a
table and writes benchmarks/results/DATE-streaming-LAYERS.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from moss_jt import machine
from moss_jt.bench import Shape, limits, moon, page_cache, random_checkpoint
from moss_jt.bench.about import machine_facts, now
from moss_jt.bench.answer import answer
from moss_jt.model import Model
from moss_jt.runtime import jittor
from moss_jt.sizes import gib, parse_size
from moss_jt.swap import make_plan
from moss_jt.weights import open_weights
from moss_jt.weights.layout import Coding

HERE = Path(__file__).resolve().parent


def figures(model: Model, prompt: list[int], new: int, drafts: bool) -> dict:
    ids, stats = answer(model, prompt, new, drafts)
    return {
        "ids": ids,
        "prefill_tokens_s": stats.prefill_tokens_s,
        "tokens_s": stats.decode_tokens_s,
        "sweeps": stats.sweeps,
        "peak_memory_bytes": machine.peak_memory(),
    }


def measure(args: argparse.Namespace) -> dict:
    jittor("cpu", args.threads)
    head = "fp16" if args.dtype == "fp16" else "int8"
    shape, budget = Shape(moon(args.layers), Coding(args.dtype, head)), parse_size(args.ram)
    prompt = np.resize(np.random.default_rng(0).integers(10, shape.config.vocab_size, 12), args.used).tolist()
    with random_checkpoint(shape, Path(args.dir)) as folder:
        weights = open_weights(folder)
        page_cache.drop(weights)
        plan = make_plan(shape.config, shape.coding, 2048, budget)
        if not plan.streams:
            raise SystemExit(f"streaming: everything fits in {args.ram}; take a smaller budget")
        disk = limits.disk_read(folder)
        before = disk.measure()
        model = Model(weights, 2048, plan)
        found = {"streamed": figures(model, prompt, args.new, drafts=False)}
        # Its prompt is cached now, so that only what is new of it is evaluated again.
        found["streamed, with drafts"] = figures(model, prompt, args.new, drafts=True)
        after = disk.measure()
        del model
        if shape.token_bytes + (3 << 30) < machine.memory().available:
            found["in memory"] = figures(Model(weights, 2048), prompt, args.new, drafts=False)
    return {
        "date": now(),
        "machine": machine_facts(),
        **{name: getattr(args, name) for name in ("layers", "dtype", "used", "new", "threads")},
        "budget_bytes": budget,
        "disk_bytes_per_sweep": plan.disk_bytes,
        "disk_GB_s": [before / 1e9, after / 1e9],
        "answers": found,
    }


def draw(result: dict) -> None:
    console = Console(soft_wrap=True, highlight=False)
    answers = result["answers"]
    first = answers["streamed"]
    moved = result["disk_bytes_per_sweep"] * first["tokens_s"] / 1e9
    disk = sum(result["disk_GB_s"]) / 2
    console.print(f"{result['machine']['cpu']}, {result['threads']} threads; {result['layers']} blocks in {result['dtype']}")
    console.print(f"prompt of {result['used']} ids, {result['new']} more; budget {gib(result['budget_bytes'])}")
    console.print(f"without drafts {moved:.2f} GB/s come from a disk of {disk:.2f} GB/s: {100 * moved / disk:.0f} %")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "tokens/s", "sweeps", "× streamed", "peak memory", "ids"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, found in answers.items():
        same = "same" if found["ids"] == first["ids"] else "DIFFERENT"
        peak = gib(found["peak_memory_bytes"]) if name != "in memory" else ""
        times = f"{found['tokens_s'] / first['tokens_s']:.2f}"
        table.add_row(name, f"{found['tokens_s']:.3f}", str(found["sweeps"]), times, peak, same)
    console.print(table)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--layers", type=int, default=6, help="blocks; moss-moon-003 has 34")
    p.add_argument("--dtype", choices=["fp16", "int8", "int4"], default="fp16")
    p.add_argument("--ram", default="4GiB", help="the budget")
    p.add_argument("--used", type=int, default=120, help="tokens of the prompt")
    p.add_argument("--new", type=int, default=40, help="tokens of the answer")
    p.add_argument("--threads", type=int, default=machine.cores().usable)
    p.add_argument("--dir", default=tempfile.gettempdir(), help="for the weights meanwhile; on a disk")
    p.add_argument("--results", type=Path, default=HERE / "results", help="folder for the JSON file")
    args = p.parse_args()
    start = time.monotonic()
    result = measure(args)
    draw(result)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{result['date'][:10]}-streaming-{args.layers}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.monotonic() - start:.0f} s; written to {path}")


if __name__ == "__main__":
    main()
