"""What the operating system reports stays within the budget."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moss_jt.machine import memory
from tests.conftest import ROOT

from .models import plan, write

CONTEXT = 560  # more than a chunk
SCRIPT = """
import json, sys
import numpy as np
from moss_jt.model import Model
from moss_jt.swap import plan_for
from moss_jt.weights import open_weights

def status(name):
    with open("/proc/self/status") as file:
        return int(dict(line.split(":", 1) for line in file)[name].split()[0]) * 1024

weights, context = open_weights(sys.argv[1]), int(sys.argv[2])
plan = plan_for(weights, context, sys.argv[3])
model = Model(weights, context, plan)
ids = np.random.default_rng(0).integers(0, weights.config.vocab_size, context)
answers = [model.logits(ids[:n], last)[-1].argmax() for n, last in ((300, 1), (context - 8, 1), (context - 7, 1), (context, 8))]
for n in (1, 77):
    model.sequence.truncate(0)
    model.logits(ids[:n])
print(json.dumps({"peak": status("VmHWM"), "plan": plan.peak, "answers": list(map(int, answers))}))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """170 MB of weights, in files that go when the tests are done."""
    if memory().available < 2 << 30:
        pytest.skip("less than 2 GiB of memory are available")
    folder = tmp_path_factory.mktemp("model")
    yield write(folder, n_layer=8, n_embd=768, n_head=12, vocab_size=20_000, n_ctx=CONTEXT, n_positions=CONTEXT)
    for file in folder.iterdir():
        file.unlink()


def run(weights, budget: int) -> dict:
    arguments = [sys.executable, "-c", SCRIPT, weights.folder, str(CONTEXT), str(budget)]
    done = subprocess.run(list(map(str, arguments)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_peak_memory(weights):
    results = [run(weights, plan(weights, share, CONTEXT).budget) for share in (0, 0.5, 1)]
    for share, found in zip((0, 0.5, 1), results):
        assert found["peak"] <= found["plan"] == pytest.approx(plan(weights, share, CONTEXT).budget, rel=0.02)
        assert found["peak"] > found["plan"] - (160 << 20)  # the plan is no guess far above what is needed
        assert found["answers"] == results[0]["answers"]
    assert results[0]["peak"] + (80 << 20) < results[2]["peak"]
