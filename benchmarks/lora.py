"""What training an adapter takes: tokens a second, processor time, memory.

    python benchmarks/lora.py --layers 2 --dtype int8
    python benchmarks/lora.py --layers 2 --dtype int8 --ram 4GiB --tokens 256
    python benchmarks/lora.py --layers 34 --dtype int8 --device cuda --vram 12GiB --tokens 2048

Random weights in the shape of moss-moon-003, 4 GB of them for two blocks in int8. A step is forward, backward and the
optimizer's; all labels count. Prints the figures, also as JSON with ``--json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from moss_jt.bench import Shape, moon, random_checkpoint
from moss_jt.bench.about import machine_facts
from moss_jt.machine import peak_memory
from moss_jt.train import AdamW, Batch, Lora, Trainee
from moss_jt.weights import open_weights
from moss_jt.weights.layout import Coding


def measure(given: argparse.Namespace) -> dict:
    if given.folder:
        return measure_folder(given.folder, given)
    coding = Coding(given.dtype, "fp16" if given.dtype == "fp16" else "int8")  # as it is converted by default
    with random_checkpoint(Shape(moon(given.layers), coding), given.dir) as folder:
        return measure_folder(folder, given)


def measure_folder(folder: Path, given: argparse.Namespace) -> dict:
    """Of the weights that are there."""
    facts, weights, lora = machine_facts(), open_weights(folder), Lora(given.rank, 2 * given.rank)
    trainee = Trainee(weights, lora, device=given.device, ram=given.ram, vram=given.vram, tokens=given.tokens)
    optimizer = AdamW(trainee.parameters, lr=1e-4)
    ids = np.random.default_rng(0).integers(0, weights.config.vocab_size, (1, given.tokens)).astype(np.int32)
    seconds, processor, losses = [], [], []
    for _ in range(given.steps + 1):  # the first one touches all memory for the first time
        started, used = time.monotonic(), time.process_time()
        trainee.zero_gradients()
        measured = trainee.train(Batch(ids, ids), 1 / given.tokens)
        optimizer.step()
        seconds.append(time.monotonic() - started)
        processor.append(time.process_time() - used)
        losses.append(measured.loss / measured.tokens)
    return {
        "machine": facts,
        "dtype": str(weights.coding),
        "device": "cuda" if trainee.gpu else "cpu",
        "blocks": weights.config.n_layer,
        "rank": given.rank,
        "tokens": given.tokens,
        "budget": given.vram if trainee.gpu else given.ram,
        "streams": trainee.streams,
        "parameters": sum(p.value.size for p in trainee.parameters.values()),
        "tokens_s": round(given.tokens / statistics.median(seconds[1:]), 2),
        "seconds_a_step": [round(s, 2) for s in seconds],
        "processor_seconds_a_step": [round(s, 2) for s in processor],
        "losses": losses,
        "peak_memory_bytes": peak_memory(),
        **({"device_peak_bytes": trainee.gpu.peak, "planned_bytes": trainee.gpu.plan.budget} if trainee.gpu else {}),
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", choices=["fp16", "int8", "int4"], default="int8")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of the one sequence in a batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ram", help="a budget, like 4GiB; without one, all weights are mapped where they fit")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--vram", help="a budget of the GPU's memory")
    parser.add_argument("--folder", type=Path, help="weights that are there already, in place of random ones")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    given = options()
    found = measure(given)
    if given.json:
        print(json.dumps(found, indent=1))
        return
    where = "streamed" if found["streams"] else "in memory"
    print(f"{found['blocks']} blocks in {found['dtype']} {where}, {found['parameters']:,} numbers learned:")
    processor = found["processor_seconds_a_step"][-1]
    print(f"{found['tokens_s']} tokens/s, {processor:.1f} processor seconds a step of {found['tokens']} tokens;")
    print(f"at most {found['peak_memory_bytes'] / 1e9:.2f} GB of memory")
    if found["device"] == "cuda":
        print(f"at most {found['device_peak_bytes'] / 2**30:.2f} GiB of the GPU's memory")


if __name__ == "__main__":
    main()
