"""Whole models on an emulated GPU whose streams run at random speeds, with too little memory: in every mode logits as in
float64, and the same likeliest tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moss_jt.devices import gpu
from moss_jt.model import Model, Request
from moss_jt.swap import make_plan, smallest
from moss_jt.swap.plan import EITHER, HOST, RESIDENT, STREAMED

from .. import reference
from ..emulation import device
from ..emulation.build import build
from ..kernels_cuda.test_sweep import WRAPPERS, official
from ..test_kv_cache import rounded
from . import models

CONTEXT = 48
SIZES = {"n_layer": 5, "n_embd": 64, "n_head": 4, "rotary_dim": 8, "vocab_size": 900, "n_inner": 1400}
CODINGS = [("fp16", "fp16", "fp16"), ("int4", "int8", "int8")]


@pytest.fixture(scope="module")
def kernels():
    return build(WRAPPERS)


@pytest.fixture(scope="module", params=CODINGS, ids="-".join)
def weights(request, tmp_path_factory):
    dtype, head_dtype, kv_cache = request.param
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    folder = tmp_path_factory.mktemp("modes") / "model"
    return models.write(folder, dtype, head_dtype, seed=seed, **SIZES), kv_cache


def planned(weights, kv_cache: str, swap: str, fits, on_host: int = 5):
    """With the smallest budget in which it is as is wanted, and RAM for so many blocks."""
    whole = make_plan(weights.config, weights.coding, CONTEXT, 1 << 40, kv_cache, True)
    ram = replace(whole, blocks=(HOST,) * on_host + (RESIDENT,) * (5 - on_host)).host_memory if swap == "auto" else None
    model, how = (weights.config, weights.coding, CONTEXT), (kv_cache, True, swap, ram)
    least, most = smallest(*model, *how), make_plan(*model, 1 << 40, *how).peak
    plans = (make_plan(*model, int(budget), *how) for budget in np.linspace(least, most, 200))
    return next(plan for plan in plans if fits(plan))


def close(ours, exact, kv_cache: str) -> None:
    assert np.linalg.norm(ours - exact) < models.MOST[kv_cache] * np.linalg.norm(exact)
    best = exact.argmax()
    assert ours.argmax() == best or exact[best] - exact[ours.argmax()] < 0.02 * np.abs(exact).max()


def residents(count: int):
    return lambda plan: plan.blocks.count(RESIDENT) == count


MODES = {
    "stream": ("stream", residents(1)),
    "host": ("host", residents(0)),
    "host, one resident": ("host", residents(1)),
    "auto, without room for slots": ("auto", lambda plan: HOST in plan.blocks),
    "auto, lm_head in the slots": ("auto", lambda plan: EITHER in plan.blocks and plan.head_ranges() and not plan.kept),
    "auto, lm_head in slots of its own": ("auto", lambda plan: plan.head_slot and plan.head_ranges() and plan.kept),
    "auto, one resident": ("auto", lambda plan: len(plan.kept) == 2 and plan.blocks.count(RESIDENT) == 1),
    "auto, with little RAM": ("auto", lambda plan: {EITHER, STREAMED, RESIDENT} == set(plan.blocks), 3),
    "auto, with hardly any RAM": ("auto", lambda plan: plan.blocks.count(EITHER) == 2 and STREAMED in plan.blocks, 2),
    "unified": ("unified", residents(1)),
    "jittor": ("jittor", residents(0)),
}


@pytest.mark.parametrize("mode", MODES)
def test_as_in_float64(kernels, weights, monkeypatch, mode):
    weights, kv_cache = weights
    rng = np.random.default_rng()
    if kv_cache == "int8":
        attention = reference.attention
        monkeypatch.setattr(reference, "attention", lambda q, k, v: attention(q, rounded(k), rounded(v)))
    state, (a, b) = official(weights), (rng.integers(0, 900, 44), rng.integers(0, 900, 30))
    exact = {id(ids): reference.logits(weights.config, state, ids) for ids in (a, b)}

    cuda = device.install(monkeypatch, kernels, int(rng.integers(1 << 30)))
    monkeypatch.setattr("moss_jt.swap.placement._JITTOR_UNIT", 4096)  # or all would fit where one part does
    plan = replace(planned(weights, kv_cache, *MODES[mode]), streams_from=4)
    # Where the CPU may compute, and some blocks are streamed all the same, RAM is for the former: the others come from disk.
    on = gpu.Cuda(weights, plan, plan.host_memory if {EITHER, STREAMED} <= set(plan.blocks) else 1 << 40)
    assert bool(on.weights.from_disk) == ({EITHER, STREAMED} <= set(plan.blocks))
    model = Model(weights, CONTEXT, kv_cache=kv_cache, device=on)
    # Prompts of more than a chunk, single tokens and a few at once, so that auto changes between its ways again and again.
    for end in (21, 22, 23, 31, 32, 35, 40, 41):
        close(model.logits(a[:end])[0], exact[id(a)][end - 1], kv_cache)
    places = model.cache(2).sequences
    for lengths in ((5, 30), (6, 30), (9, 30), (10, 30)):
        found = model.evaluate([Request(s, ids[:n], 1) for s, ids, n in zip(places, (a, b), lengths)])
        for (logits,), ids, n in zip(found, (a, b), lengths):
            close(logits, exact[id(ids)][n - 1], kv_cache)
    cuda.synchronize()
