"""What gpu_suite.py measures of memory swapping: budgets, modes, several sequences, drafts, growth, and accelerate beside it.

python benchmarks/gpu_swap.py FOLDER BUDGET TURNS      # one JSON object, of the weights in FOLDER: what needs one process
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Callable

import numpy as np

from moss_jt import cudart, machine
from moss_jt.bench import decode, moon, vram
from moss_jt.bench.answer import answer
from moss_jt.bench.apart import run_apart
from moss_jt.bench.pairs import rate
from moss_jt.devices import open_device
from moss_jt.machine import GIB
from moss_jt.model import Model, Request
from moss_jt.runtime import jittor
from moss_jt.weights import open_weights

HERE = Path(__file__).resolve().parent
SMALL = 4 * GIB
TOGETHER = 16
# (dtype, budget, swap, length): the first of each dtype matters most, since time may run out.
CASES = [
    ("fp16", SMALL, "stream", "full"),
    ("fp16", SMALL, "auto", "short"),
    ("fp16", SMALL, "host", "short"),
    ("fp16", 2 * SMALL, "stream", "short"),
    ("fp16", 4 * SMALL, "stream", "short"),
    ("int4", SMALL, "auto", "full"),
    ("int4", SMALL, "stream", "short"),
]


def measure(into: dict, folder: Path, dtype: str, left: Callable[[], float], turns: int) -> dict:
    """All of a dtype, for as long as ``left`` (seconds) allows: ``cases`` as bench vram has them, and ``process``. Each is in
    ``into``, which is returned, as soon as it is measured."""
    into["cases"] = []
    for case in (vram.Case("cuda", *case) for case in CASES if case[0] == dtype):
        into["cases"].append({**asdict(case), **in_time(left, lambda case=case: vram.measure(folder, case, 1.0))})
    if dtype == "fp16":
        into["process"] = in_time(left, lambda: _one_process(folder, turns))
        into["accelerate"] = in_time(left, lambda: accelerate(open_weights(folder).config.n_layer, SMALL))
    return into


def in_time(left: Callable[[], float], work: Callable[[], dict]) -> dict:
    """What ``work`` measures, unless no time is left for it."""
    return work() if left() > 0 else {"why_not": "no time was left"}


def _one_process(folder: Path, turns: int) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), str(folder), str(SMALL), str(turns)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"why_not": "it failed"}


def accelerate(layers: int, budget: int) -> dict:
    """tokens/s of transformers' CodeGen of the same shape, of which accelerate keeps so much on the GPU."""
    missing = run_apart("import accelerate, torch, transformers; assert torch.cuda.is_available()", errors=True)
    if missing.returncode:
        return {"why_not": (missing.stderr.strip().splitlines() or ["it cannot be imported"])[-1]}
    ask = {"config": asdict(moon(layers)), "threads": machine.cores().usable, "used": 64, "device": "cuda", "budget": budget}
    command = [sys.executable, str(HERE / "programs/pytorch.py"), json.dumps(ask)]
    done = subprocess.run(command, input="decode\n", capture_output=True, text=True)
    if done.returncode:
        return {"why_not": (done.stderr.strip().splitlines() or ["it failed"])[-1]}
    facts, tokens_s = done.stdout.splitlines()
    return {**json.loads(facts), "tokens_s": float(tokens_s)}


# ---- in one process ----------------------------------------------------------------------------------------------------------


def one_process(folder: Path, budget: int, turns: int) -> dict:
    """Of weights that are streamed: one token beside those of several sequences together, drafts, growth over turns."""
    jittor("cuda")
    weights = open_weights(folder)
    context = min(512, weights.config.n_ctx)
    device = open_device(weights, context, device="cuda", vram=budget, swap="stream")
    model = Model(weights, context, device=device)
    one = decode.Sweeps(model, 64, 1).tokens_s(1.0)
    ids = np.random.default_rng(0).integers(10, weights.config.vocab_size, (TOGETHER, 65))
    sequences = model.cache(TOGETHER).sequences
    requests = [Request(s, row, 1, decode.GREEDY) for s, row in zip(sequences, ids)]
    model.evaluate(requests)

    def token() -> None:
        for row in ids:
            row[-1] = (row[-1] + 1) % weights.config.vocab_size
        model.evaluate(requests)

    found = {"one_tokens_s": one, "together": TOGETHER, "together_tokens_s": rate(token, TOGETHER, 1.0)}
    return {**found, "drafts": _drafts(model), "growth": _growth(model, turns)}


def _drafts(model: Model) -> dict:
    """The same greedy answer to a prompt that repeats itself, with drafts and without: tokens a sweep."""
    prompt, found = np.resize(np.arange(100, 112), 96).tolist(), {}
    for name, drafts in (("without", False), ("with", True)):
        ids, stats = answer(model, prompt, min(16, model.context - len(prompt)), drafts)
        found[name] = {"ids": ids, "tokens_s": stats.decode_tokens_s, "sweeps": stats.sweeps}
    return {"same": found["with"].pop("ids") == found["without"].pop("ids"), **found}


def _growth(model: Model, turns: int) -> dict:
    """What so many turns of a few tokens add to the device's memory, and to RAM, after the first tenth of them."""
    ids, before, start = list(range(20)), None, time.monotonic()
    for turn in range(turns):
        ids[-1] = turn % model.config.vocab_size
        model.sequence.truncate(0)
        model.logits(ids)
        if turn == turns // 10:
            before = cudart.memory_info()[0], machine.peak_memory()
    free, ram = cudart.memory_info()[0], machine.peak_memory()
    grown = {"device_bytes": before[0] - free, "ram_bytes": ram - before[1]}
    return {"turns": turns, **grown, "seconds": time.monotonic() - start}


if __name__ == "__main__":
    print(json.dumps(one_process(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
