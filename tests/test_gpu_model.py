"""Whole models on a real GPU: ``MOSS_JT_KERNELS=gpu pytest tests/test_gpu_model.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moss_jt
from moss_jt.config import SWAPS
from moss_jt.devices import Host, open_device
from moss_jt.model import Model, Request
from moss_jt.sampling import Sampling, likeliest, penalised
from moss_jt.swap import Plan, make_plan, smallest
from moss_jt.weights import open_weights

from .swap import models

pytestmark = pytest.mark.skipif(os.environ.get("MOSS_JT_KERNELS") != "gpu", reason="needs a GPU, and MOSS_JT_KERNELS=gpu")

CODINGS = {"fp16": ("fp16", "fp16"), "int8": ("int8", "int8"), "int4": ("int4", "int8")}
CONTEXT = 256
MOST = {**models.MOST, "fp16": 1e-2}  # relative error beside the CPU, which takes prompts through bfloat16 where it can


def error(ours, exact) -> float:
    return np.linalg.norm(np.asarray(ours) - exact) / np.linalg.norm(exact)


def both(weights, kv_cache: str = "fp16", context: int = CONTEXT) -> tuple[Model, Model]:
    """The model on the GPU, and on the CPU."""
    gpu = open_device(weights, context, kv_cache=kv_cache, device="cuda")
    return (
        Model(weights, context, kv_cache=kv_cache, device=gpu),
        Model(weights, context, kv_cache=kv_cache, device=Host(weights, context, kv_cache=kv_cache)),
    )


@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
@pytest.mark.parametrize("coding", list(CODINGS))
@pytest.mark.parametrize("sizes", [{}, {"n_embd": 256, "n_head": 4, "n_inner": 520, "rotary_dim": 32}])
def test_as_on_the_cpu(tmp_path, coding, kv_cache, sizes):
    weights = models.write(tmp_path / "model", *CODINGS[coding], **sizes)
    gpu, cpu = both(weights, kv_cache)
    rng = np.random.default_rng()
    ids = rng.integers(0, 2100, 200)
    for end in (1, 2, 10, 75, 140, 141, 200):
        assert error(gpu.logits(ids[:end], 1), cpu.logits(ids[:end], 1)) < MOST[kv_cache]
    assert error(gpu.logits(ids[50:], 40), cpu.logits(ids[50:], 40)) < MOST[kv_cache]
    sequences = [m.cache(5).sequences for m in (gpu, cpu)]
    for lengths in ([3, 1, 90, 20, 7], [4, 9, 91, 60, 8]):
        ours, exact = (
            m.evaluate([Request(s, ids[i:][:n], 2) for i, (s, n) in enumerate(zip(of, lengths))])
            for m, of in zip((gpu, cpu), sequences)
        )
        for a, b in zip(ours, exact):
            assert error(a, np.stack(b)) < MOST[kv_cache]


@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
@pytest.mark.parametrize("swap", [swap for swap in SWAPS if swap != "jittor"])
@pytest.mark.parametrize("share", [0, 0.4])
def test_blocks_that_do_not_fit(tmp_path, monkeypatch, swap, kv_cache, share):
    """Within the least there may be, and with some blocks resident; auto with tokens for both of its ways."""
    settled = Plan.settled
    monkeypatch.setattr(Plan, "settled", lambda plan, speeds: replace(settled(plan, speeds), streams_from=8))
    weights = models.write(tmp_path / "model", "int4", "int8", n_embd=256, n_head=4, n_layer=8)
    how = (weights.config, weights.coding, CONTEXT)
    least = smallest(*how, kv_cache, True, swap)
    most = make_plan(*how, 1 << 40, kv_cache, True, swap).peak
    budget = least + int(share * (most - least))
    gpu = open_device(weights, CONTEXT, kv_cache=kv_cache, device="cuda", vram=budget, swap=swap)
    gpu = Model(weights, CONTEXT, kv_cache=kv_cache, device=gpu)
    cpu = Model(weights, CONTEXT, kv_cache=kv_cache, device=Host(weights, CONTEXT, kv_cache=kv_cache))
    assert len(set(gpu.device.plan.blocks)) > (share > 0)
    ids = np.random.default_rng().integers(0, 2100, 200)
    for end in (30, 31, 32, 60, 61, 65, 200):
        ours, exact = gpu.logits(ids[:end])[0], cpu.logits(ids[:end])[0]
        assert error(ours, exact) < MOST[kv_cache]
    assert gpu.device.peak <= gpu.device.plan.peak


def test_blocks_that_jittor_moves(tmp_path):
    """In a process of its own, for whose Jittor it is compiled in."""
    folder = models.write(tmp_path / "model", n_embd=1024, n_head=4).folder
    code = f"from tests.test_gpu_model import jittor_moves; jittor_moves({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def jittor_moves(folder: str) -> None:
    weights = open_weights(folder)
    least = smallest(weights.config, weights.coding, CONTEXT, gpu=True, swap="jittor")
    on = open_device(weights, CONTEXT, device="cuda", vram=least + (30 << 20), swap="jittor")
    assert on.plan.slots == 2 and len(on.plan.streamed_blocks) == 5
    gpu, cpu = Model(weights, CONTEXT, device=on), Model(weights, CONTEXT, device=Host(weights, CONTEXT))
    ids = np.random.default_rng().integers(0, 2100, 200)
    for end in (30, 31, 32, 60, 61, 65, 200):
        ours, exact = gpu.logits(ids[:end])[0], cpu.logits(ids[:end])[0]
        assert error(ours, exact) < MOST["fp16"]
    assert on.peak <= on.plan.peak


def test_the_likeliest_are_those_of_all_logits(tmp_path):
    weights = models.write(tmp_path / "model", "int4", "int8")
    gpu, _ = both(weights)
    ids = np.random.default_rng().integers(0, 2100, 60)
    for sampling in (Sampling(greedy=True), Sampling(), Sampling(repetition_penalty=1.3, top_k=7), Sampling(top_k=0)):
        gpu.sequence.truncate(0)
        (found,) = gpu.evaluate([Request(gpu.sequence, ids, 3, sampling)])
        gpu.sequence.truncate(0)
        for i, (row, logits) in enumerate(zip(found, gpu.logits(ids, 3))):
            seen = ids[: len(ids) - 2 + i]
            expected = likeliest(penalised(logits, seen, sampling.penalty), sampling.enough)
            if sampling.top_k == 0:
                assert np.array_equal(row, logits)
            else:
                assert np.array_equal(row.ids, expected.ids) and np.array_equal(row.logits, expected.logits)


@pytest.mark.parametrize("coding", list(CODINGS))
@pytest.mark.parametrize("streamed", [True, False])
def test_an_adapter_s_gradients(tmp_path, coding, streamed):
    """As the CPU finds them, up to the rounding to TF32; and the same bits each time."""
    from moss_jt.train import Batch, Lora, Trainee
    from moss_jt.train.gpu_plan import Space, needs

    weights = models.write(tmp_path / "model", *CODINGS[coding], n_embd=256, n_head=4, n_layer=6)
    lora, rng = Lora(4, 8.0, dropout=0.1), np.random.default_rng()
    vram = needs(weights, Space(weights.config, lora, 300)).smallest if streamed else None
    gpu, cpu = Trainee(weights, lora, "cuda", vram=vram, tokens=300), Trainee(weights, lora, "cpu", tokens=300)
    for a, b in zip(gpu.parameters.values(), cpu.parameters.values()):
        a.value[...] = b.value[...] = rng.standard_normal(a.value.shape) * a.value.shape[1] ** -0.5
    ids = rng.integers(0, 2100, (3, 90)).astype(np.int32)
    found = []
    for trainee in (gpu, gpu, cpu):
        trainee.zero_gradients()
        trainee.dropout_state = 0
        loss = trainee.train(Batch(ids, ids), 1 / 267).loss
        found.append((loss, np.concatenate([p.gradient.reshape(-1) for p in trainee.parameters.values()])))
    assert gpu.streams == streamed and np.array_equal(found[0][1], found[1][1]) and found[0][0] == found[1][0]
    assert error(found[0][1], found[2][1]) < 1e-2 and abs(found[0][0] - found[2][0]) < 1e-3 * found[2][0]
    assert gpu.gpu.peak <= gpu.gpu.plan.budget


@pytest.mark.parametrize("coding", list(CODINGS))
def test_two_blocks_of_the_full_size(tmp_path, coding):
    from moss_jt.bench import Shape, moon, random_checkpoint
    from moss_jt.weights.layout import Coding

    with random_checkpoint(Shape(moon(2), Coding(*CODINGS[coding])), tmp_path) as folder:
        gpu, cpu = both(open_weights(folder), context=512)
        ids = np.random.default_rng().integers(0, 100_000, 300)
        for end in (1, 2, 9, 100, 300):
            assert error(gpu.logits(ids[:end]), cpu.logits(ids[:end])) < MOST["fp16"]


@pytest.mark.parametrize("name", ["", "-int8", "-int4", "-int4-actorder"])
@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
def test_golden_dialogues(official_checkpoint, golden, tmp_path, name, kv_cache):
    folder = moss_jt.convert.weights(official_checkpoint(f"moss-tiny-sft{name}"), tmp_path / "model")
    m = moss_jt.load(folder, device="cuda", kv_cache=kv_cache)
    for file in ("dialogues.json", "turns.json"):
        for record in json.loads((golden / file).read_text()):
            answer = m.generate(record["prompt_ids"], greedy=True, max_new_tokens=400)
            assert [piece.id for piece in answer] == record["greedy_ids"]
    if kv_cache == "fp16":
        with np.load(golden / f"logits_{name[1:] or 'fp16'}.npz") as stored:
            for k in range(len(stored.files) // 2):
                exact = stored[f"logits{k}"]
                known = exact > -5000
                assert error(m.logits(stored[f"ids{k}"].tolist(), 4)[known], exact[known]) < 3e-3


@pytest.mark.parametrize("swap", ["auto", "stream", "host"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_golden_dialogues_within_budgets(official_checkpoint, golden, tmp_path, swap, share):
    """In every mode and budget the same ids."""
    folder = moss_jt.convert.weights(official_checkpoint("moss-tiny-sft"), tmp_path / "model")
    weights = open_weights(folder)
    model, how = (weights.config, weights.coding, 600), ("fp16", True, swap, 1 << 40)
    least, most = smallest(*model, *how), make_plan(*model, 1 << 60, *how).peak
    m = moss_jt.load(folder, device="cuda", context=600, vram=least + int(share * (most - least)), swap=swap)
    records = [r for name in ("dialogues.json", "turns.json") for r in json.loads((golden / name).read_text())]
    for record in records:
        answer = m.generate(record["prompt_ids"], greedy=True, max_new_tokens=len(record["greedy_ids"]))
        assert [piece.id for piece in answer] == record["greedy_ids"]
