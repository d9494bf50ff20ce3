"""Training an adapter on a simulated GPU, whatever its timing, against the CPU's trainee."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from moss_jt import MossError, convert
from moss_jt.config import Config
from moss_jt.swap.parts import pages
from moss_jt.train import Batch, Lora, Trainee
from moss_jt.train.batch import Counted
from moss_jt.train.gpu import OnGpu, _official_rows
from moss_jt.train.gpu_plan import Space, make_plan, needs
from moss_jt.train.parameter import Parameter
from moss_jt.weights import open_weights
from moss_jt.weights.layout import Coding, files_of

from ..checkpoints import small_config
from ..gptq_checkpoints import random_gptq
from . import simulated_gpu
from .models import batch, model

TOKENS = 36
SMALL = {"n_layer": 2, "n_embd": 40, "n_head": 4, "n_inner": 77, "rotary_dim": 4, "vocab_size": 70}
STREAMED = {**SMALL, "n_layer": 5, "n_inner": 160}
LORA = Lora(3, 7.0)


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def both(weights, lora: Lora, rng, monkeypatch, vram=None, ram=None, tokens: int = TOKENS, seed: int = 3):
    """A trainee on the CPU, its adapter far from where it began, and the same on a simulated GPU; and that."""
    device = simulated_gpu.install(monkeypatch, int(rng.integers(1 << 30)))
    cpu = Trainee(weights, lora, device="cpu", seed=seed)
    for p in cpu.parameters.values():
        p.value[...] = rng.standard_normal(p.value.shape) * 0.5 * p.value.shape[1] ** -0.5  # with 1, roundings grow
    ours = {name: Parameter(name, p.value, np.zeros_like(p.value)) for name, p in cpu.parameters.items()}
    return cpu, OnGpu(weights, lora, ours, tokens, seed, vram, ram), ours, device


def compare(cpu: Trainee, gpu: OnGpu, ours: dict, given: Batch, scale: float = 0.25) -> None:
    """Losses, and the gradients of every tensor."""
    counted, state = Counted.of(given), cpu.dropout_state
    exact = cpu.measure(given)
    loss, right = gpu.run(*counted, None, None)
    assert right == exact.right and abs(loss - exact.loss) < 1e-5 * exact.loss
    exact = cpu.train(given, scale)
    loss, right = gpu.run(*counted, scale, state)
    assert right == exact.right and abs(loss - exact.loss) < 1e-5 * exact.loss
    for name, p in cpu.parameters.items():
        error = np.linalg.norm(ours[name].gradient - p.gradient) / np.linalg.norm(p.gradient)
        assert error < 1e-4, (name, error)  # sums of floats in another order


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("targets", [LORA.targets, ("fc_in", "out_proj")])
def test_losses_and_gradients(tmp_path, rng, monkeypatch, dtype, targets):
    """Three sequences of different lengths, and again with gradients that are there already; dropout's masks are the same."""
    sizes = SMALL if dtype == "fp16" else {**SMALL, "n_inner": 80}
    weights, _, config = model(tmp_path, int(rng.integers(1 << 30)), dtype, **sizes)
    cpu, gpu, ours, _ = both(weights, replace(LORA, targets=targets, dropout=0.2), rng, monkeypatch)
    compare(cpu, gpu, ours, batch(rng, config.vocab_size, [12, 7, 9]))
    compare(cpu, gpu, ours, batch(rng, config.vocab_size, [33]), 1.0)
    assert not gpu.weights.streams


def test_inputs_in_another_order(tmp_path, rng, monkeypatch):
    raw = small_config(n_layer=2, n_ctx=40, n_positions=40, vocab_size=120, n_embd=64, n_head=4, n_inner=80, rotary_dim=4)
    made = random_gptq(raw, 4, 32, act_order=True)
    weights = open_weights(convert.weights(made.write(tmp_path / "official"), tmp_path / "ours"))
    assert weights.coding.ordered
    cpu, gpu, ours, _ = both(weights, LORA, rng, monkeypatch)
    compare(cpu, gpu, ours, batch(rng, 120, [15, 9]))


@pytest.mark.parametrize("ram", [None, 1], ids=["pinned", "from disk"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_within_a_budget(tmp_path, rng, monkeypatch, share, ram):
    """Matrices, heads and logits some at a time; blocks streamed; device memory as planned, and no more of it later."""
    monkeypatch.setattr("moss_jt.train.gpu_plan._SCORES", 1)
    monkeypatch.setattr("moss_jt.train.gpu_plan._WEIGHTS", 16 * 250)
    monkeypatch.setattr("moss_jt.train.gpu_plan._LOGITS", 2)
    weights, _, config = model(tmp_path, 1, "int8", **{**STREAMED, "vocab_size": 1000})
    monkeypatch.setattr("moss_jt.train.gpu_plan._JITTOR", 0)
    monkeypatch.setattr("moss_jt.train.gpu_plan._CUBLAS", 0)
    needed = needs(weights, Space(config, LORA, TOKENS))
    most = needed.fixed + needed.block * needed.blocks
    budget = needed.smallest + int(share * (most - needed.smallest))
    cpu, gpu, ours, device = both(weights, LORA, rng, monkeypatch, budget, ram)
    assert gpu.weights.streams and bool(gpu.weights.from_disk) == (ram == 1)
    assert len(gpu.plan.streamed_blocks) < config.n_layer if share else len(gpu.plan.streamed_blocks) == config.n_layer
    taken = []
    for lengths in ([17], [9, 12, 3], [5]):
        compare(cpu, gpu, ours, batch(rng, config.vocab_size, lengths))
        taken.append(device.taken)
    assert taken == taken[:1] * 3 and gpu.peak <= gpu.plan.budget
    gpu.weights.close()


def test_each_block_comes_twice_a_batch(tmp_path, rng, monkeypatch):
    weights, _, config = model(tmp_path, 1, "int8", **STREAMED)
    monkeypatch.setattr("moss_jt.train.gpu_plan._JITTOR", 0)
    monkeypatch.setattr("moss_jt.train.gpu_plan._CUBLAS", 0)
    needed = needs(weights, Space(config, LORA, TOKENS))
    _, gpu, _, device = both(weights, LORA, rng, monkeypatch, needed.smallest)
    counted, copied = Counted.of(batch(rng, config.vocab_size, [9])), []
    to_device = device.to_device
    device.to_device = lambda pointer, source, stream=None: (
        copied.append((source.nbytes, stream)),
        to_device(pointer, source, stream),
    )
    for _ in range(3):
        gpu.run(*counted, 1.0, 0)
    over = [size for size, stream in copied if stream]
    assert len(over) == 3 * 2 * config.n_layer and set(map(pages, over)) == {needed.block}
    gpu.weights.close()


def test_a_batch_that_was_interrupted(tmp_path, rng, monkeypatch):
    weights, _, config = model(tmp_path, 1, "int8", **STREAMED)
    for name in ("_JITTOR", "_CUBLAS"):
        monkeypatch.setattr(f"moss_jt.train.gpu_plan.{name}", 0)
    cpu, gpu, ours, _ = both(weights, LORA, rng, monkeypatch, needs(weights, Space(config, LORA, TOKENS)).smallest)
    given, backward, left = batch(rng, config.vocab_size, [9, 17]), gpu._passes.backward, [2]

    def fails(*args) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        backward(*args)

    monkeypatch.setattr(gpu._passes, "backward", fails)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(*Counted.of(given), 1.0, 0)
    assert not any(p.gradient.any() for p in ours.values())
    compare(cpu, gpu, ours, given)
    gpu.weights.close()


def test_official_rows():
    """Parts of [q v k], as docs/formats.md has them."""
    assert _official_rows(8).tolist() == [
        *(0, 1, 6, 7, 12, 13, 18, 19), *(4, 5, 10, 11, 16, 17, 22, 23), *(2, 3, 8, 9, 14, 15, 20, 21),
    ]  # fmt: skip


def test_budgets(tmp_path):
    weights, _, config = model(tmp_path, 1, "int8", n_layer=5)
    space = Space(config, LORA, 100)
    needed = needs(weights, space)
    with pytest.raises(MossError, match=rf"on 100 tokens at a time: {-(-needed.smallest >> 20)}MiB is the smallest that works"):
        make_plan(weights, space, needed.smallest - 1)
    streamed = [len(make_plan(weights, space, needed.smallest + i * needed.block).streamed_blocks) for i in range(5)]
    assert streamed == [5, 4, 3, 0, 0]
    places = list(space.places(256).values())
    assert all(a < b or size == 0 for a, b, size in zip(places, places[1:], space.sizes.values())) and places[0] == 256
    assert all(place % 256 == 0 for place in places)
    assert Space(config, replace(LORA, dropout=0.1), 100).nbytes > space.nbytes > Space(config, LORA, 50).nbytes


def test_the_least_for_the_whole_model():
    """34 blocks in int8, 2048 tokens at a time: 12 GiB hold more than that."""
    from moss_jt.bench import moon

    config, coding = moon(34), Coding("int8", "int8")
    files = {name: SimpleNamespace(tensors=tensors) for name, tensors in files_of(config, coding).items()}
    weights = SimpleNamespace(config=config, coding=coding, regions=files)
    plan = make_plan(weights, Space(config, Lora(8, 16), 2048), 12 << 30)
    assert 8 < plan.blocks.count("resident") < 20


def test_what_a_gpu_is_asked_for(tmp_path, monkeypatch, capsys):
    """Refused in a line where it cannot be, and with auto the CPU does it."""
    weights, _, _ = model(tmp_path, 1, "int8", **SMALL)
    devices: list = []
    monkeypatch.setattr("moss_jt.train.trainee.cuda.driver", lambda: SimpleNamespace(devices=devices))
    for how in ({"device": "cpu"}, {"device": "auto"}):
        with pytest.raises(MossError, match="a budget of VRAM is given, but the CPU computes"):
            Trainee(weights, LORA, vram="4GiB", **how)
    for how in ({"device": "cuda"}, {"vram": 1}):
        with pytest.raises(MossError, match="all weights are trained on the CPU only: take --device cpu, or train an adapter"):
            Trainee(weights, None, **how)
    assert Trainee(weights, LORA).gpu is None and capsys.readouterr().err == ""

    def refuses(*given) -> OnGpu:
        raise MossError("it is wrong")

    devices.append(SimpleNamespace(capability=(9, 0)))
    of = Trainee.__init__.__globals__["jittor"]
    monkeypatch.setattr(
        "moss_jt.train.trainee.jittor", lambda device: of("cpu") if device == "cpu" else SimpleNamespace(has_cuda=1)
    )
    monkeypatch.setattr("moss_jt.train.gpu_check.opened", refuses)
    assert Trainee(weights, LORA).gpu is None
    assert capsys.readouterr().err == "moss-jt: using the CPU: it is wrong\n"
    for how in ({"device": "cuda"}, {"vram": "4GiB"}):
        with pytest.raises(MossError, match=r"^device cuda: it is wrong$"):
            Trainee(weights, LORA, **how)
    monkeypatch.setattr("moss_jt.train.gpu_check.opened", lambda *given: given)
    trainee = Trainee(weights, LORA, vram="4GiB", tokens=7, seed=5)
    assert trainee.gpu[3:] == (7, 5, "4GiB", None) and trainee.gpu[2] is trainee.parameters


def test_a_wrong_gpu_is_found_out(monkeypatch):
    """The check's model through the simulated GPU: right as it is, and wrong where one kernel is."""
    from moss_jt.train import gpu_check

    monkeypatch.setattr(gpu_check, "_SMALL", Config(1, 32, 4, 48, 4, 24, 60))
    monkeypatch.setattr(gpu_check, "_TOKENS", 24)
    monkeypatch.setattr(gpu_check, "_stamp", lambda coding: SimpleNamespace(exists=lambda: False, touch=lambda: None))
    simulated_gpu.install(monkeypatch, 1)
    gpu_check.check(Coding("int4", "int8"))
    monkeypatch.setattr(simulated_gpu.Kernels, "weigh_backward", lambda *given: None)
    with pytest.raises(MossError, match=r"wrong by [\d.e-]+ of their size"):
        gpu_check.check(Coding("int4", "int8"))
