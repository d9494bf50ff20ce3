"""moss-jt beside llama.cpp and PyTorch on the same shape, taking turns sample by sample, since a machine's speed changes.

    python benchmarks/peers.py --dtype int4 --llama-python venv-llama/bin/python --torch-python venv-torch/bin/python

Prints a table and writes everything to benchmarks/results/DATE-cpu-DTYPE.json. README.md here says how to read it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from moss_jt import machine
from moss_jt.bench import moon
from moss_jt.bench.about import machine_facts, now
from moss_jt.bench.pairs import ratios, spread

HERE = Path(__file__).resolve().parent
NEEDS = {"llama.cpp": ("llama_cpp", "gguf"), "PyTorch": ("torch", "transformers")}  # modules of each peer
MEMORY = "memory read"  # bytes a second, among the samples of the programs
SCRIPTS = {"moss-jt": "ours.py", "llama.cpp": "llama.py", "PyTorch": "pytorch.py"}


class Program:
    """One of those measured: a process that takes samples when it is told to, and sleeps otherwise."""

    def __init__(self, name: str, python: str, ask: dict):
        script = str(HERE / "programs" / SCRIPTS[name])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.name = name
        self._process = subprocess.Popen([python, script, json.dumps(ask)], **pipes)
        self.facts = json.loads(self._answer())

    def sample(self, what: str) -> float:
        """For example ``prefill 128``: tokens a second."""
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"peers: {self.name} has ended ({self._process.wait()}); what it said stands above")
        return line

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def missing(name: str, python: str) -> str:
    """What keeps a peer from running; empty if nothing does."""
    code = f"import importlib.util as u; print(*(m for m in {NEEDS[name]} if not u.find_spec(m)))"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as e:
        return f"a Python ({e})"


@contextmanager
def started(pythons: dict[str, str], ask: dict) -> Iterator[list[Program]]:
    """The programs, one after the other made ready; ended, and what they wrote removed, whatever happens."""
    programs: list[Program] = []
    with tempfile.TemporaryDirectory(prefix="moss-jt-peers-", dir=ask["folder"]) as folder:
        try:
            for name, python in pythons.items():
                print(f"peers: preparing {name} ...", file=sys.stderr)
                programs.append(Program(name, python, {**ask, "folder": folder}))
            yield programs
        finally:
            for program in programs:
                program.close()


def rounds(programs: list[Program], what: str, count: int) -> dict[str, list[float]]:
    """``count`` samples of each program, in turn, each round begun by another one; and of the speed of reading memory."""
    found: dict[str, list[float]] = {MEMORY: [], **{program.name: [] for program in programs}}
    for i in range(count):
        found[MEMORY].append(programs[0].sample("memory"))
        for program in programs[i % len(programs) :] + programs[: i % len(programs)]:
            found[program.name].append(program.sample(what))
    return found


def compared(samples: dict[str, list[float]]) -> dict[str, dict]:
    """For each program: its tokens/s, and how many times as fast ours was in the same round."""
    found = {}
    for name, speeds in samples.items():
        if name != MEMORY:
            times = ratios(samples["moss-jt"], speeds)
            found[name] = {
                "tokens_s": speeds,
                "median": median(speeds),
                "times": median(times),
                "times_samples": times,
            }
    return found


def shares(samples: dict[str, list[float]], facts: dict[str, dict]) -> dict[str, float]:
    """Of each program's decode: the share of the memory's speed, as far as bytes of weights account for it."""
    return {
        name: median(ratios([facts[name]["bytes_per_token"] * speed for speed in speeds], samples[MEMORY]))
        for name, speeds in samples.items()
        if name != MEMORY
    }


def draw(result: dict) -> None:
    console = Console(soft_wrap=True, highlight=False)
    m = result["machine"]
    console.print(f"{m['cpu']}, {result['threads']} threads, load average {m['load_average']:.1f}", markup=False)
    console.print(f"{result['layers']} blocks, {result['used']} tokens in the cache while decoding")
    for name, facts in result["programs"].items():
        console.print(f"{name} ({facts['version']}): {facts['weights']}", markup=False, style="dim")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "", "tokens/s", "of memory read", "moss-jt ÷ it"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for what, programs in result["measured"].items():
        for name, found in programs.items():
            speed = f"{found['median']:.2f} ± {spread(found['tokens_s']):.2f}"
            share = f"{100 * result['decode_shares'][name]:.0f} %" if what == "decode" else ""
            times = "" if name == "moss-jt" else f"{found['times']:.2f} ± {spread(found['times_samples']):.2f}"
            table.add_row(what if name == "moss-jt" else "", name, speed, share, times)
    console.print(table)


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--dtype", choices=["fp16", "int8", "int4"], default="int4", help="ours; llama.cpp: F16, Q8_0, Q4_0; PyTorch: fp16"
    )
    p.add_argument("--layers", type=int, default=4, help="blocks; moss-moon-003 has 34")
    p.add_argument("--threads", type=int, default=machine.cores().usable)
    p.add_argument("--used", type=int, default=128, help="tokens in the cache while decoding")
    p.add_argument("--prompt", type=int, nargs="*", default=[128], help="lengths of prompts")
    p.add_argument("--repeat", type=int, default=10, help="rounds")
    p.add_argument("--llama-python", default=sys.executable, metavar="PATH", help="with llama-cpp-python and gguf")
    p.add_argument("--torch-python", default=sys.executable, metavar="PATH", help="with torch and transformers")
    p.add_argument("--without", choices=list(NEEDS), action="append", default=[], help="leave this one out")
    p.add_argument("--dir", default=tempfile.gettempdir(), help="for the weights meanwhile")
    p.add_argument("--results", type=Path, default=HERE / "results", help="folder for the JSON file")
    return p.parse_args()


def available(args: argparse.Namespace) -> dict[str, str]:
    """Each program that can run here -> its Python; a line on stderr for each peer that cannot."""
    pythons = {"moss-jt": sys.executable, "llama.cpp": args.llama_python, "PyTorch": args.torch_python}
    for name, option in (("llama.cpp", "--llama-python"), ("PyTorch", "--torch-python")):
        if name in args.without:
            del pythons[name]
        elif lacks := missing(name, pythons[name]):
            print(f"peers: without {name}: {pythons[name]} lacks {lacks}; name another with {option}", file=sys.stderr)
            del pythons[name]
    return pythons


def measure(args: argparse.Namespace) -> dict:
    head = "fp16" if args.dtype == "fp16" else "int8"
    ask = {"config": asdict(moon(args.layers)), "dtype": args.dtype, "head_dtype": head}
    ask.update(threads=args.threads, used=args.used, folder=args.dir)
    about = {"date": now(), "machine": machine_facts()}
    with started(available(args), ask) as programs:
        facts = {program.name: program.facts for program in programs}
        taken = {what: rounds(programs, what, args.repeat) for what in ["decode", *(f"prefill {n}" for n in args.prompt)]}
    return {
        **about,
        **{name: ask[name] for name in ("threads", "used", "dtype", "head_dtype")},
        "layers": args.layers,
        "programs": facts,
        "memory_read": {what: samples[MEMORY] for what, samples in taken.items()},
        "measured": {what: compared(samples) for what, samples in taken.items()},
        "decode_shares": shares(taken["decode"], facts),
    }


def main() -> None:
    args = options()
    result = measure(args)
    draw(result)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{result['date'][:10]}-cpu-{args.dtype}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"peers: written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
