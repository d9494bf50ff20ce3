"""Training on the toolkit of stubs, where kernels and products do nothing: what is copied and launched, in which order."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from moss_jt.train import Lora
from moss_jt.train.gpu_plan import Space, needs

from .swap import models
from .test_cuda_stub import STUB, copied, pytestmark  # noqa: F401 (skips where there is no such toolkit)

TOKENS = 128
LORA = Lora(4, 8.0)
PROGRAM = r"""
import json, os, sys
import numpy as np
from moss_jt import cudart
from moss_jt.train import AdamW, Batch, Lora, Trainee, gpu_check
from moss_jt.weights import open_weights

def mark(text):
    with open(os.environ["MOSS_STUB_LOG"], "a") as log:
        log.write(f"--- {text}\n")

gpu_check.check = lambda coding: None  # kernels do nothing here
weights = open_weights(sys.argv[1])
mark("load")
trainee = Trainee(weights, Lora(4, 8.0, dropout=float(sys.argv[3])), "cuda", vram=int(sys.argv[2]), tokens=128)
optimizer = AdamW(trainee.parameters, 1e-4)
ids = np.arange(60, dtype=np.int32).reshape(2, 30)
np.seterr(all="ignore")
free = []
for step in ("first", "second", "third"):
    mark(step)
    trainee.zero_gradients()
    measured = trainee.train(Batch(ids, ids), 1 / 58)
    for p in trainee.parameters.values():
        p.gradient.fill(0)
    optimizer.step()
    free.append(cudart.memory_info()[0])
mark("measure")
trainee.measure(Batch(ids, ids))
mark("end")
print(json.dumps({
    "tokens": measured.tokens, "free": free, "peak": trainee.gpu.peak, "streamed": trainee.gpu.plan.streamed_blocks,
    "slot": trainee.gpu.plan.slot, "learned": sum(p.value.nbytes for p in trainee.parameters.values()),
    "state": trainee.dropout_state,
}))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return models.write(tmp_path_factory.mktemp("stub-train") / "model", "int4", "int8", n_embd=512, n_head=4, n_layer=6)


def run(weights, vram: int, dropout: float = 0) -> tuple[dict, dict]:
    """What the program answers, and for each of its marks what the stubs wrote."""
    log = weights.folder.parent / "log"
    log.unlink(missing_ok=True)
    env = {**os.environ, "LD_LIBRARY_PATH": str(STUB / "lib64"), "nvcc_path": str(STUB / "bin/nvcc"), "MOSS_STUB_LOG": str(log)}
    command = [sys.executable, "-c", PROGRAM, str(weights.folder), str(vram), str(dropout)]
    ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    assert ran.returncode == 0
    parts = re.split(r"^--- (.+)\n", log.read_text(), flags=re.MULTILINE)
    return json.loads(ran.stdout.splitlines()[-1]), dict(zip(parts[1::2], parts[2::2]))


@pytest.mark.parametrize("streamed", [True, False])
def test_steps(weights, streamed):
    """Each streamed block crosses the link twice a step, on a stream of its own; the adapter goes there once and comes back."""
    needed = needs(weights, Space(weights.config, LORA, TOKENS))
    answer, log = run(weights, needed.smallest + (0 if streamed else 6 * needed.block))
    assert answer["tokens"] == 58 and answer["state"] == 3 and answer["free"] == answer["free"][:1] * 3
    assert len(answer["streamed"]) == 6 * streamed and answer["peak"] <= needed.smallest + 6 * needed.block
    step = log["second"]
    over = re.findall(r"copy kind 1 (\d+) stream (0x[0-9a-f]+)", step)
    assert len(over) == 12 * streamed and all(int(size) <= answer["slot"] for size, _ in over)
    assert step.count("wait stream (nil)") == 12 * streamed
    if streamed:
        assert len({stream for _, stream in over}) == 1 and step.count(f"wait stream {over[0][1]}") == 12
    assert copied(step, 1).count(answer["learned"]) == copied(step, 2).count(answer["learned"]) == 1
    assert "malloc" not in step and "pinned" not in step
    assert log["third"].count("launch") == step.count("launch") == log["first"].count("launch") > log["measure"].count("launch")
    products = [line for line in step.splitlines() if line.startswith("cublas")]
    # A block's products forwards: in.weight, out.weight, attention's 2 for each sequence, and 2 for each target. Backwards
    # again those of the inside; then derivatives: 1 for each matrix, of attention the weights again and 4 for each sequence,
    # and 5 for each target, one of them, of A's inputs, again.
    inside = 1 + 2 * 2 + 2 * 2
    forwards, backwards = inside + 1 + 2 * 2, inside + 2 + 2 * 5 + 4 * 5
    assert len(products) == 6 * (forwards + backwards) + 2  # lm_head's, there and back
