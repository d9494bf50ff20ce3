"""Everything that needs a GPU, in one command: build, test, measure, and one table at the end.

    python benchmarks/gpu_suite.py             # under nine minutes from an empty cache, on 16 cores
    python benchmarks/gpu_suite.py --quick     # the whole models' tests only, and two blocks in place of 34

Installs nothing. Writes benchmarks/results/DATE-gpu.json, with every sample and what the machine is. Where PyTorch with CUDA
and transformers are there, eager CodeGen of the same shape is measured, too. With --sanitize, compute-sanitizer watches the
kernels' tests.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable

import gpu_swap
from rich import box
from rich.console import Console
from rich.table import Table

from moss_jt import MossError, cuda, cudart, machine, runtime
from moss_jt.bench import Decode, Prefill, Shape, device_limits, moon, random_checkpoint
from moss_jt.bench.about import machine_facts, now
from moss_jt.cli.bench_table import draw_budgets
from moss_jt.weights import open_weights
from moss_jt.weights.layout import Coding

HERE = Path(__file__).resolve().parent
ROOT, RESULTS = HERE.parent, HERE / "results"
CODINGS = {"fp16": Coding("fp16", "fp16"), "int8": Coding("int8", "int8"), "int4": Coding("int4", "int8")}
PROMPT = 1024
# Seconds after the beginning. No budget is begun later than the first, so that there is time for what comes then, and
# nothing takes longer than the second: what there is by then is drawn and written.
_SWAP_UNTIL, LIMIT = 400, 530
LORA, LORA_BUDGET, LORA_TOKENS = "int8", "12GiB", 2048  # of which weights an adapter is trained, and within what
WANTED = {"fp16": (0.80, 0.60), "int8": (0.75, 0.45), "int4": (0.65, 0.45)}  # shares of the copy, and of cuBLAS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two blocks, and no tests of single kernels")
    parser.add_argument("--sanitize", action="store_true", help="also run the kernels' tests under compute-sanitizer")
    parser.add_argument("--layers", type=int, help="blocks that are measured (default: 34, 2 with --quick)")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where random weights lie meanwhile")
    parser.add_argument("--repeat", type=int, default=5, help="samples of each figure")
    arguments = parser.parse_args()
    layers = arguments.layers or (2 if arguments.quick else 34)
    start = time.monotonic()
    found = {"date": now(), "machine": machine_facts(), "gpu": gpu_facts(), "layers": layers, "tests": {}}
    found.update({name: {"why_not": "no time was left", "swap": {"cases": []}} for name in (*CODINGS, "peer")})
    say(start, f"{found['gpu']['name']}, CUDA {found['gpu']['toolkit']}")
    signal.signal(signal.SIGALRM, _end)
    signal.alarm(LIMIT)
    try:
        fill(found, arguments, layers, start)
    except TimeIsUp:
        say(start, "time is up, and this is what there is")
    signal.alarm(0)
    found["seconds"] = time.monotonic() - start
    path = RESULTS / f"{found['date'][:10]}-gpu.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    draw(found)
    print(f"{os.path.relpath(path)}, {found['seconds']:.0f} s")
    sys.exit(not found["tests"] or any(result["code"] for result in found["tests"].values()))


class TimeIsUp(BaseException):
    """No Exception, so that nothing takes it for a measurement that failed."""


def _end(*_: object) -> None:
    raise TimeIsUp


def fill(found: dict, arguments: argparse.Namespace, layers: int, start: float) -> None:
    """Everything, each part as soon as it is there."""
    found["build_seconds"] = build()
    say(start, f"Jittor and the kernels are built ({found['build_seconds']:.0f} s)")
    found["tests"] = tests(arguments.quick, arguments.sanitize)
    say(start, "tests: " + ", ".join(f"{name} {result['summary']}" for name, result in found["tests"].items()))
    runtime.jittor("cuda")

    def left() -> float:
        return _SWAP_UNTIL - (time.monotonic() - start)

    found["link_GB_s"] = device_limits.to_device().measure() / 1e9
    found["link_in_place_GB_s"] = link_in_place(arguments.dir)
    for name, coding in CODINGS.items():
        turns = 50 if arguments.quick else 500
        measure(found[name], name, coding, layers, arguments.dir, arguments.repeat, left, turns)
        say(start, f"{name} is measured")
    found["peer"] = peer(layers)


def link_in_place(folder: Path) -> float | str:
    """The link's GB/s from pages of a file that are pinned where they are, or why there is none."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(256 << 20)
        try:
            return device_limits.to_device(Path(file.name)).measure() / 1e9
        except MossError as e:
            return str(e)


def say(start: float, text: str) -> None:
    print(f"[{time.monotonic() - start:4.0f} s] {text}", file=sys.stderr, flush=True)


def gpu_facts() -> dict:
    """Ends the program where there is no GPU to use."""
    driver = cuda.driver()
    choice = cuda.choose(driver)
    if not driver.devices or choice.why:
        sys.exit(f"gpu_suite: {choice.reason or driver.problem}")
    device = driver.devices[0]
    return {
        "name": device.name,
        "memory_bytes": device.memory,
        "capability": cuda.show(device.capability),
        "arithmetic": cuda.arithmetic(device.capability),
        "driver": cuda.show(driver.version),
        "toolkit": cuda.show(choice.kit.version),
    }


def build() -> float:
    """Seconds until a model of a few bytes has run: nothing is to be compiled after that."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import sys, numpy as np\n"
            "sys.path.insert(0, sys.argv[2])\n"
            "from pathlib import Path\n"
            "from tests.swap import models\n"
            "from moss_jt.devices import open_device\n"
            "from moss_jt.model import Model\n"
            "weights = models.write(Path(sys.argv[1]) / 'model')\n"
            "Model(weights, 64, device=open_device(weights, 64, device='cuda')).logits(np.arange(9))\n"
            "from moss_jt.train import Lora, Trainee\n"
            "Trainee(weights, Lora(), 'cuda', tokens=64)\n"
        )
        subprocess.run([sys.executable, "-c", code, folder, str(ROOT)])  # what goes wrong here, the tests say, too
    return time.monotonic() - start


# ---- tests -------------------------------------------------------------------------------------------------------------------


def tests(quick: bool, sanitize: bool) -> dict:
    """Each file in a process of its own, all at once: most of their time nvcc takes. name -> code, seconds, last line."""
    files = [ROOT / "tests/test_gpu_model.py"]
    if not quick:
        files += [path for path in sorted((ROOT / "tests/kernels_cuda").glob("test_*.py")) if path.name != "test_compile.py"]
    found = _run_all({path.stem: [sys.executable, "-m", "pytest", "-q", str(path)] for path in files})
    if sanitize:
        tool = shutil.which("compute-sanitizer")
        for check in ("memcheck", "racecheck") if tool else ():
            watched = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
            found.update(_run_all({f"{check} {path.stem}": [*watched, str(path)] for path in files[1:]}))
    return found


def _run_all(commands: dict[str, list[str]]) -> dict:
    environment = {**os.environ, "MOSS_JT_KERNELS": "gpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = {name: subprocess.Popen(c, cwd=ROOT, env=environment, **pipes) for name, c in commands.items()}
    found = {}
    try:
        for name, process in running.items():
            output = process.communicate()[0]
            if process.returncode:
                print(output, file=sys.stderr)
            found[name] = {"code": process.returncode, "summary": (output.strip().splitlines() or [""])[-1]}
    finally:  # time may be up
        for process in running.values():
            process.kill()
    return found


# ---- speed -------------------------------------------------------------------------------------------------------------------


def measure(
    into: dict, name: str, coding: Coding, layers: int, parent: Path, repeat: int, left: Callable[[], float], turns: int
) -> None:
    """Decode and prefill of random weights in the shape of moss-moon-003, all of them on the device; then within budgets."""
    try:
        with random_checkpoint(Shape(moon(layers), coding), parent) as folder:
            resident = _resident(folder, repeat)
            del into["why_not"]
            into.update(resident)
            if name == LORA:
                into["lora"] = gpu_swap.in_time(left, lambda: lora(folder))
            gpu_swap.measure(into["swap"], folder, name, left, turns)
    except MossError as e:
        into["why_not"] = str(e)


def _resident(folder: Path, repeat: int) -> dict:
    weights, threads = open_weights(folder), machine.cores().usable
    before = cudart.memory_info()[0]
    try:
        decode = Decode(used=128).run(weights, threads, repeat, "cuda")
        taken = before - cudart.memory_info()[0]
        prefill = Prefill(PROMPT).run(weights, threads, repeat, "cuda")
    except MossError as e:
        return {"why_not": str(e)}
    finally:
        gc.collect()  # the device's memory is wanted next
    return {"decode": decode, "prefill": prefill, "device_bytes": taken}


def lora(folder: Path) -> dict:
    """Training an adapter within a budget of the device's memory, in a process of its own: as lora.py says it."""
    command = [sys.executable, str(HERE / "lora.py"), "--folder", str(folder), "--device", "cuda", "--vram", LORA_BUDGET]
    done = subprocess.run([*command, "--tokens", str(LORA_TOKENS), "--json"], capture_output=True, text=True)
    if done.returncode:
        return {"why_not": (done.stderr.strip().splitlines() or ["it failed"])[-1]}
    return json.loads(done.stdout)


def peer(layers: int) -> dict:
    """Eager CodeGen of transformers in fp16 on the same GPU, and PyTorch's own copy and product."""
    try:
        import torch
        import transformers  # noqa: F401

        assert torch.cuda.is_available()
    except Exception as e:  # not installed, of another CUDA, broken: whatever it is, there is no peer
        return {"why_not": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no CUDA in PyTorch'}"}
    from dataclasses import asdict

    ask = {"config": asdict(moon(layers)), "threads": machine.cores().usable, "used": 128, "device": "cuda"}
    command = [sys.executable, str(HERE / "programs/pytorch.py"), json.dumps(ask)]
    wanted = "\n".join(["decode", f"prefill {PROMPT}", "copy", "multiply"]) + "\n"
    done = subprocess.run(command, input=wanted, capture_output=True, text=True)
    if done.returncode:
        return {"why_not": (done.stderr.strip().splitlines() or ["it failed"])[-1]}
    facts, *samples = done.stdout.splitlines()
    return {**json.loads(facts), **dict(zip(("decode", "prefill", "copy", "multiply"), map(float, samples)))}


# ---- what it shows -----------------------------------------------------------------------------------------------------------


def draw(found: dict) -> None:
    gpu = found["gpu"]
    title = f"{gpu['name']} ({gpu['capability']}), driver {gpu['driver']}, CUDA {gpu['toolkit']}: {found['layers']} blocks"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("", "tokens/s", "limit", "share", "wanted"):
        table.add_column(column, justify="left" if not column else "right")
    for name in CODINGS:
        if "why_not" in found[name]:
            continue
        for kind, wanted in zip(("decode", "prefill"), WANTED[name]):
            row = found[name][kind]
            unit = "GB_s" if "GB_s" in row else "GFLOP_s"
            limit = f"{row[f'limit_{unit}']:,.0f} {unit.replace('_', '/')}"
            speed = sorted(row["tokens_s"])[len(row["tokens_s"]) // 2]
            table.add_row(f"{name} {kind}", f"{speed:,.1f}", limit, f"{row['share']:.1%}", f"{wanted:.0%}")
    peer = found["peer"]
    if "why_not" not in peer:
        for kind in ("decode", "prefill"):
            table.add_row(f"transformers {kind}", f"{peer[kind]:,.1f}", "", "", "")
    Console().print(table)
    if "link_GB_s" in found:
        in_place = found["link_in_place_GB_s"]
        in_place = in_place if isinstance(in_place, str) else f"{in_place:.1f} GB/s"
        print(f"link: {found['link_GB_s']:.1f} GB/s from pinned memory; from a file's pages, pinned there: {in_place}")
    draw_swap([case for name in CODINGS for case in found[name]["swap"]["cases"]], found["fp16"]["swap"])
    draw_lora(found[LORA].get("lora", {}))
    for name in (*CODINGS, "peer"):
        if "why_not" in found[name]:
            print(f"{name}: not measured: {found[name]['why_not']}")
    for name, result in found["tests"].items():
        print(f"{'ok  ' if not result['code'] else 'FAIL'} {name}: {result['summary']}")


def draw_lora(found: dict) -> None:
    if "why_not" in found:
        print(f"{LORA}, an adapter: not measured: {found['why_not']}")
    elif found:
        speed = f"{found['tokens_s']:,.0f} tokens/s, {found['tokens']} at a time"
        print(f"{LORA}, an adapter within {LORA_BUDGET}: {speed}, at most {found['device_peak_bytes'] / 2**30:.2f} GiB taken")


def draw_swap(cases: list[dict], fp16: dict) -> None:
    """Budgets as bench vram draws them, and below them what was measured in one process."""
    if cases:
        draw_budgets(cases)
    for name in ("process", "accelerate"):
        if "why_not" in fp16.get(name, {}):
            print(f"fp16, {name}: not measured: {fp16[name]['why_not']}")
    if "one_tokens_s" in (found := fp16.get("process", {})):
        drafts, growth = found["drafts"], found["growth"]
        together = f"{found['together']} sequences together {found['together_tokens_s']:.3g}"
        print(f"fp16, streamed: {found['one_tokens_s']:.3g} tokens/s, {together}")
        counts = f"{drafts['with']['sweeps']} sweeps, not {drafts['without']['sweeps']}"
        print(f"drafts where a prompt repeats itself: {counts}; the ids are {'the same' if drafts['same'] else 'DIFFERENT'}")
        grown = f"{growth['device_bytes'] / 2**20:.1f} MiB of the device's memory, {growth['ram_bytes'] / 2**20:.1f} MiB of RAM"
        print(f"{growth['turns']} turns took {grown} more")
    if "tokens_s" in (found := fp16.get("accelerate", {})):
        print(f"accelerate within {gpu_swap.SMALL >> 30} GiB: {found['tokens_s']:.3g} tokens/s")


if __name__ == "__main__":
    main()
