"""What quantising with GPTQ takes: time a block, processor time, memory, room on the disk.

    python benchmarks/gptq.py --model moss-moon-003-sft --calibration train.jsonl
    python benchmarks/gptq.py --model moss-moon-003-sft --calibration train.jsonl --layers 2 --act-order

Random weights in the shape of moss-moon-003, 4.4 GB of them for two blocks; of the model only the tokenizer is used. Prints
the figures, also as JSON with ``--json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from moss_jt import convert
from moss_jt.bench import Shape, moon, random_checkpoint
from moss_jt.bench.about import machine_facts
from moss_jt.machine import peak_memory
from moss_jt.tokenizer import write_tokenizer
from moss_jt.weights.layout import Coding


def measure(given: argparse.Namespace) -> dict:
    with (
        random_checkpoint(Shape(moon(given.layers), Coding()), given.dir) as src,
        tempfile.TemporaryDirectory(prefix="moss-jt-bench-", dir=given.dir) as place,
    ):
        write_tokenizer(given.model, src)
        how = {"method": "gptq", "calibration": given.calibration, "act_order": given.act_order}
        job = convert.plan_weights(src, Path(place) / "dst", given.dtype, **how)
        started = time.process_time()
        job.run()
        processor = time.process_time() - started
        report = json.loads((job.dst / "quantisation.json").read_text(encoding="utf-8"))
    return {
        "machine": machine_facts(),
        "dtype": given.dtype,
        "act_order": given.act_order,
        "tokens": report["tokens"],
        "seconds_a_block": [block["seconds"] for block in report["blocks"]],
        "processor_seconds": round(processor, 1),  # of all blocks, and of wte and lm_head
        "peak_memory_bytes": peak_memory(),
        "spilled_bytes": job.spilled,
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder with MOSS's tokenizer")
    parser.add_argument("--calibration", type=Path, required=True, help="a file of dialogues")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtype", choices=["int8", "int4"], default="int4")
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    given = options()
    found = measure(given)
    if given.json:
        print(json.dumps(found, indent=1))
        return
    blocks = ", ".join(f"{seconds:.1f}" for seconds in found["seconds_a_block"])
    print(f"{found['tokens']:,} tokens: {blocks} seconds a block; {found['processor_seconds']:.0f} of processor time in all;")
    print(f"at most {found['peak_memory_bytes'] / 1e9:.2f} GB of memory, and {found['spilled_bytes'] / 1e9:.2f} GB spilled")


if __name__ == "__main__":
    main()
