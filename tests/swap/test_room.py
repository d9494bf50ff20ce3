"""A GPU with less memory than planned: fewer weights stay there, answers go on, and nothing grows over turns."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moss_jt.cudart import OutOfDeviceMemory
from moss_jt.devices import gpu
from moss_jt.machine import MIB
from moss_jt.model import Model, Request
from moss_jt.moss import Moss
from moss_jt.sampling import Sampling
from moss_jt.swap import make_plan, room, smallest
from moss_jt.swap.plan import EITHER, HOST, RESIDENT, STREAMED, less

from ..emulation import device
from ..emulation.build import build
from ..kernels_cuda.test_sweep import WRAPPERS
from ..test_growth import Tokenizer, resident
from . import models
from .test_plan import models as sizes
from .test_plan import shares

CONTEXT = 64
SIZES = {"n_layer": 6, "n_embd": 64, "n_head": 4, "rotary_dim": 8, "vocab_size": 262, "n_inner": 72}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return models.write(tmp_path_factory.mktemp("room") / "model", "int4", "int8", **SIZES)


class Reading(device.Sweeps):
    """Kernels that read all weights that they are given, and find out whether those are right; any token may be next."""

    weights, space, wrong = None, 0, []

    def __init__(self, cuda, *given):
        no_kernels = SimpleNamespace(model=lambda *sizes: None, bytes=lambda *sizes: self.space)
        super().__init__(cuda, no_kernels, *given)
        self._next = np.random.default_rng(0)

    def _block(self, tensors, layer, *rest):
        exact = next(i for i in range(self._config.n_layer) if self._same(tensors, self.weights.block(i), "in.bias"))
        self._check(tensors, self.weights.block(exact))

    def _head(self, part, rows, space):
        tensors = part[0]
        self._check({name: tensors[name] for name in ("ln_f.weight", "ln_f.bias")}, self.weights.head())

    def _same(self, tensors, exact, name) -> bool:
        return np.array_equal(self._array(tensors[name], exact[name].shape, exact[name].dtype), exact[name])

    def _check(self, tensors, exact) -> None:
        self.wrong.extend(name for name in tensors if not self._same(tensors, exact, name))

    def logits(self, heads, rows, space, after):
        self.compute(heads, rows, space, after).sync()
        self._cuda.until_default_is_idle()
        return self._next.standard_normal((len(rows), self._config.vocab_size), np.float32)

    def likeliest(self, heads, rows, k, penalties, ids, space, after):
        best = np.argsort(self.logits(heads, rows, space, after))[:, ::-1][:, :k]
        return np.tile(np.arange(k, 0, -1, np.float32), (len(rows), 1)), best.astype(np.int32)


@pytest.fixture
def cuda(weights, monkeypatch):
    """A simulated GPU whose kernels only read, with exactly as much memory spared as is free."""
    cuda = device.install(monkeypatch, None, seed=1)
    monkeypatch.setattr(gpu, "Sweeps", lambda *given: Reading(cuda, *given))
    monkeypatch.setattr(gpu, "SPARED", 0)
    monkeypatch.setattr(room, "_SUMS", 0)  # as large as the whole device
    monkeypatch.setattr(room, "_POOLS", 0)
    monkeypatch.setattr(Reading, "weights", weights)
    monkeypatch.setattr(Reading, "space", everything(weights).memory["work space"] - 8 * gpu.MOST_ROWS * CONTEXT)
    monkeypatch.setattr(Reading, "wrong", [])
    yield cuda
    cuda.synchronize()
    assert not Reading.wrong


def everything(weights):
    return make_plan(weights.config, weights.coding, CONTEXT, 1 << 40, gpu=True)


def opened(weights, plan=None) -> Model:
    return Model(weights, CONTEXT, device=gpu.Cuda(weights, plan or everything(weights), 1 << 40))


def residents(model: Model) -> int:
    return model.device.plan.blocks.count(RESIDENT)


@settings(max_examples=80, deadline=None)
@given(sizes(), shares, shares, st.sampled_from(["stream", "host", "auto"]))
def test_a_smaller_plan(model, share, part, swap):
    """Within its room, with everything but weights as it was."""
    config, coding, context, kv_cache = model
    how = (kv_cache, True, swap, 1 << 60)
    least, most = smallest(config, coding, context, *how), make_plan(config, coding, context, 1 << 60, *how).peak
    plan = make_plan(config, coding, context, least + int(share * (most - least)), *how)
    size = int(part * plan.lent_bytes)
    smaller = less(plan, size)
    assume(smaller is not None)
    assert smaller.lent_bytes <= size and len(smaller.blocks) == config.n_layer
    assert smaller.host_blocks == plan.host_blocks and smaller.memory["KV cache"] == plan.memory["KV cache"]
    assert smaller.memory["work space"] == plan.memory["work space"]
    assert not smaller.streams or smaller.slots * smaller.slot > 0
    kinds = {now for before, now in zip(plan.blocks, smaller.blocks) if before in (HOST, EITHER)}
    assert len(kinds) <= 1 and kinds <= ({HOST, EITHER} if EITHER in plan.blocks else {HOST})
    if EITHER in smaller.blocks:
        assert smaller.slot >= plan.slot > 0


def test_taken_between_plan_and_loading(weights, cuda, capfd):
    whole = everything(weights)
    cuda.others = len(cuda.memory) - cuda.taken - whole.peak + whole.lent_bytes // 4
    model = opened(weights)
    assert model.device.plan.streams and 0 < residents(model) < 6
    model.logits(np.arange(30))
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.endswith("blocks stay there from now on, not 6\n")


def test_a_cache_for_many_sequences(weights, cuda, capfd):
    model = opened(weights)
    model.logits(np.arange(30))
    each = weights.config.cache_bytes_per_token() * CONTEXT
    cuda.others = len(cuda.memory) - cuda.taken - 4 * each - 100_000
    cache = model.cache(4)
    assert residents(model) < 6 and "not 6\n" in capfd.readouterr().err
    requests = [Request(s, np.arange(5 + s.place), 1, Sampling(greedy=True)) for s in cache.sequences]
    assert [len(found) for found in model.evaluate(requests)] == [1] * 4
    model.logits(np.arange(31))
    with pytest.raises(OutOfDeviceMemory, match=r"^out of memory: \d+MiB .* fewer sequences at once"):
        model.cache(400)
    cuda.others = 0
    model.logits(np.arange(32))  # what the last attempt gave up is brought again


def test_an_op_that_finds_no_memory(weights, cuda, capfd, monkeypatch):
    """In the middle of a conversation: its sweep is done again, with fewer weights, and the cache is kept."""
    model, blocks = opened(weights), Reading.blocks
    model.logits(np.arange(30))
    failing = [True, True]

    def launch(self, *given):
        if failing and failing.pop():
            raise RuntimeError("[f 1126] executor: Something wrong... cudaLaunchKernel: out of memory")
        return blocks(self, *given)

    monkeypatch.setattr(Reading, "blocks", launch)
    before = cuda.taken
    model.logits(np.arange(31))
    assert model.sequence.length == 31 and cuda.taken < before and model.streams
    assert capfd.readouterr().err.count("the GPU's memory is short") == 1
    monkeypatch.setattr(Reading, "blocks", lambda *given: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        model.logits(np.arange(32))


def test_nothing_left_to_give_up(weights, cuda):
    model = opened(weights)
    first = cuda.taken
    cuda.refuses, before = (lambda: True), model.device.plan
    with pytest.raises(OutOfDeviceMemory, match="end what else uses it") as e:
        model.cache(2)
    assert "\n" not in str(e.value)
    cuda.refuses = lambda: False
    model.logits(np.arange(20))
    assert before.blocks.count(RESIDENT) == 6 and cuda.taken <= first


@pytest.mark.parametrize(("share", "turns"), [(1, 500), (0.2, 200)])
def test_nothing_grows_over_turns(weights, cuda, share, turns, monkeypatch):
    monkeypatch.setattr(Reading, "_check", lambda *given: None)
    monkeypatch.setattr(Reading, "_block", lambda *given: None)
    least, most = smallest(weights.config, weights.coding, CONTEXT, gpu=True), everything(weights).peak
    plan = make_plan(weights.config, weights.coding, CONTEXT, least + int(share * (most - least)), gpu=True)
    model = opened(weights, plan)
    assert model.streams == (share < 1)
    conversation, seen, taken = Moss(model, Tokenizer()).chat("Hi.\n"), [], set()
    for turn in range(turns):
        for _ in conversation.send(str(turn), max_new_tokens=2, seed=turn):
            pass
        taken.add(cuda.taken)
        if turn % (turns // 10) == 0:
            gc.collect()
            seen.append(resident())
    assert len(conversation.turns) == turns and len(taken) == 1
    assert max(seen[5:]) - max(seen[:5]) < MIB, [size >> 10 for size in seen]


def test_the_same_logits_afterwards(weights, monkeypatch):
    """Of kernels that compute: what was cached before weights were given up goes on being used."""
    ids, found = np.random.default_rng().integers(0, 262, 24), {}
    for short in (False, True):
        cuda = device.install(monkeypatch, build(WRAPPERS), seed=3)
        monkeypatch.setattr(gpu, "SPARED", 0)
        model = opened(weights)
        logits = [model.logits(ids[:20])]
        if short:
            model.device._shrink(0)
        logits += [model.logits(ids[:n]) for n in (21, 24)]
        found[short] = np.concatenate(logits)
        assert model.streams == short
        cuda.synchronize()
    assert np.array_equal(found[True], found[False])


@pytest.mark.parametrize("resident", [0, 2])
def test_slots_that_kept_blocks_are_needed(monkeypatch, tmp_path, resident):
    """auto with less memory than planned: what was resident is streamed, or there are no slots any more, and the CPU computes
    what they kept."""
    weights = models.write(tmp_path / "model", "int4", "int8", **{**SIZES, "n_inner": 1400})
    ids, found, how = np.random.default_rng().integers(0, 262, 40), {}, {"gpu": True, "swap": "auto"}
    least = smallest(weights.config, weights.coding, CONTEXT, **how)
    plans = (make_plan(weights.config, weights.coding, CONTEXT, least + k * 20_000, **how) for k in range(999))
    plan = next(plan for plan in plans if plan.kept and plan.blocks.count(RESIDENT) == resident)
    for short in (False, True):
        cuda = device.install(monkeypatch, build(WRAPPERS), seed=3)
        monkeypatch.setattr(gpu, "SPARED", 0)
        model = opened(weights, replace(plan, streams_from=4))
        logits = [model.logits(ids[:n]) for n in (20, 21, 22)]
        while short and not {STREAMED, HOST} & set(model.device.plan.blocks):
            model.device._shrink(0)
        logits += [model.logits(ids[:n]) for n in (23, 24, 30, 31)]
        found[short] = np.concatenate(logits)
        cuda.synchronize()
    assert not model.device.plan.kept and (HOST in model.device.plan.blocks) == (resident == 0)
    assert np.linalg.norm(found[True] - found[False]) < models.MOST["fp16"] * np.linalg.norm(found[False])
