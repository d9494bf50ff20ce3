"""A Trainee against float64, by finite differences of the whole model's loss in random directions, and against transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moss_jt import MossError, convert
from moss_jt.config import Config
from moss_jt.machine import Memory
from moss_jt.train import AdamW, Batch, Lora, Trainee
from moss_jt.train.lora import TARGETS, shapes, tensor_names
from moss_jt.weights import open_weights

from .. import dequantise
from ..checkpoints import small_config
from ..gptq_checkpoints import random_gptq
from .models import SIZES, batch, loss, model


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"np.random.default_rng({seed})")
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", list(SIZES))
def test_losses_and_gradients_of_all_weights(tmp_path, rng, size):
    weights, state, config = model(tmp_path, int(rng.integers(1 << 30)), **SIZES[size])
    trainee = Trainee(weights)
    assert {name: p.value.shape for name, p in trainee.parameters.items()} == {name: x.shape for name, x in state.items()}
    assert all((p.value == state[name]).all() and not p.gradient.any() for name, p in trainee.parameters.items())
    given = batch(rng, config.vocab_size, [150, 7, 64])
    exact, count, right = loss(config, state, given)
    found = trainee.measure(given)
    assert (found.tokens, found.right) == (count, right) and abs(found.loss - exact) < 1e-5 * exact
    assert not any(p.gradient.any() for p in trainee.parameters.values())
    assert trainee.train(given, 0.25) == found
    state = {name: x.astype(np.float64) for name, x in state.items()}
    for name, x in state.items():  # each tensor in a direction of its own
        direction = trainee.parameters[name].gradient.astype(np.float64)
        direction += rng.standard_normal(x.shape) * np.linalg.norm(direction) / np.sqrt(x.size)
        direction *= 1e-4 * np.linalg.norm(x) / np.linalg.norm(direction)
        ends = [loss(config, {**state, name: x + way * direction}, given)[0] for way in (1, -1)]
        difference, ours = (ends[0] - ends[1]) / 2, float((trainee.parameters[name].gradient * direction).sum()) / 0.25
        assert abs(ours - difference) < 1e-3 * abs(difference), name


LORA = Lora(rank=5, alpha=7, dropout=0.0)


def shaken(trainee: Trainee, rng) -> Trainee:
    """With an adapter that does something."""
    for p in trainee.parameters.values():
        p.value[...] += rng.standard_normal(p.value.shape) * 0.1
    return trainee


def codegen(config, state):
    """transformers' CodeGen with these weights, and torch."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    names = ("vocab_size", "n_ctx", "n_embd", "n_layer", "n_head", "rotary_dim", "n_inner")
    sizes = {name: getattr(config, name) for name in names}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
    found = hf.CodeGenForCausalLM(hf.CodeGenConfig(**sizes, n_positions=config.n_ctx, **dropout))
    found.load_state_dict({name: torch.tensor(x) for name, x in state.items()}, strict=False)
    return found.train(), torch


def steps_beside_torch(trainee, theirs, named, torch, config, rng) -> None:
    """Some steps of both: losses, gradients and parameters, ``named`` of which are theirs."""
    start = {name: p.detach().numpy().copy() for name, p in named.items()}
    groups = [[p for p in named.values() if p.ndim > 1], [p for p in named.values() if p.ndim == 1]]
    decays = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0)) if group]
    optimizer, ours = torch.optim.AdamW(decays, lr=1e-3), AdamW(trainee.parameters, lr=0.5)
    for lr in (1e-3, 5e-4, 2e-3):
        parts = [batch(rng, config.vocab_size, [60, 33], 0.7), batch(rng, config.vocab_size, [9], 0.5)]
        count = sum(int((part.labels[:, 1:] != -100).sum()) for part in parts)
        trainee.zero_gradients()
        optimizer.zero_grad()
        for part in parts:  # gradients add up
            measured = trainee.train(part, 1 / count)
            output = theirs(torch.tensor(part.ids).long(), labels=torch.tensor(part.labels).long())
            assert abs(measured.loss / measured.tokens - output.loss.item()) < 1e-5 * output.loss.item()
            (output.loss * measured.tokens / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.3).item()
        assert abs(trainee.gradient_norm() - norm) < 1e-5 * norm and norm > 0.3
        trainee.scale_gradients(0.3 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        ours.step(lr)
        for name, p in named.items():
            q = trainee.parameters[name]
            for a, b in ((q.gradient, p.grad.numpy()), (q.value, p.detach().numpy())):
                assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b), name
            moved = [x - start[name] for x in (q.value, p.detach().numpy())]
            assert np.linalg.norm(moved[0] - moved[1]) < 1e-2 * np.linalg.norm(moved[1]), name


def test_steps_of_all_weights_are_those_of_transformers_and_torch(tmp_path, rng):
    weights, state, config = model(tmp_path, int(rng.integers(1 << 30)), n_embd=96, n_head=12, n_inner=150, rotary_dim=6)
    theirs, torch = codegen(config, state)
    steps_beside_torch(Trainee(weights), theirs, dict(theirs.named_parameters()), torch, config, rng)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_steps_of_an_adapter_are_those_of_transformers_and_torch(tmp_path, rng, dtype):
    sizes = {"n_embd": 96, "n_head": 12, "n_inner": 150, "rotary_dim": 6}
    weights, state, config = model(tmp_path, int(rng.integers(1 << 30)), dtype, **sizes)
    theirs, torch = codegen(config, dequantise.official_state(weights, state))
    trainee, named = shaken(Trainee(weights, LORA), rng), {}
    theirs.requires_grad_(False)

    def adapted_by(a, b):
        return lambda linear, inputs, output: output + LORA.scale * (inputs[0] @ a.T) @ b.T

    for name, linear in theirs.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            both = [torch.nn.Parameter(torch.tensor(trainee.parameters[part].value)) for part in tensor_names(name)]
            named.update(zip(tensor_names(name), both))
            linear.register_forward_hook(adapted_by(*both))
    assert named.keys() == trainee.parameters.keys()
    steps_beside_torch(trainee, theirs, named, torch, config, rng)


def test_the_same_batches_give_the_same_bits_and_an_optimizer_goes_on_from_its_state(tmp_path, rng):
    weights, _, config = model(tmp_path, 3)
    batches = [batch(rng, config.vocab_size, [20, 11]) for _ in range(4)]

    def run(trainee, optimizer, some):
        losses = []
        for part in some:
            trainee.zero_gradients()
            losses.append(trainee.train(part, 0.1).loss)
            optimizer.step()
        return losses

    first, second = Trainee(weights), Trainee(weights)
    a, b = (AdamW(t.parameters, lr=1e-2) for t in (first, second))
    losses = run(first, a, batches)
    assert losses[:2] == run(second, b, batches[:2])
    third = Trainee(weights)
    for name, p in second.parameters.items():
        third.parameters[name].value[...] = p.value
    c = AdamW(third.parameters, lr=1e-2)
    with pytest.raises(MossError, match=r"lacks lm_head\.bias\.m"):
        c.load_state({name: x for name, x in b.state().items() if name != "lm_head.bias.m"})
    with pytest.raises(MossError, match=r"lm_head.bias.v has shape \[3\], expected \[90\]"):
        c.load_state({**b.state(), "lm_head.bias.v": np.zeros(3, np.float32)})
    c.load_state({name: x.copy() for name, x in b.state().items()})
    assert run(third, c, batches[2:]) == losses[2:]


def test_what_cannot_be_trained_is_said(tmp_path):
    weights, _, _ = model(tmp_path / "a", 1, n_ctx=8, n_positions=8)
    trainee = Trainee(weights)
    ids = np.zeros((2, 8), np.int32)
    for bad, text in (
        (Batch(np.zeros((2, 9), np.int32), np.zeros((2, 9), np.int32)), "9 tokens do not fit the model's context of 8"),
        (Batch(ids, np.zeros((2, 7), np.int32)), "expected two of"),
        (Batch(ids + 90, ids), "token id 90 is not in the model's vocabulary of 90"),
        (Batch(ids, ids - 1), "label -1 is not in the model's vocabulary"),
    ):
        with pytest.raises(MossError, match=text):
            trainee.train(bad)
    assert trainee.train(Batch(ids, ids - 100)) == (0, 0, 0) and trainee.gradient_norm() == 0
    quantised, _, _ = model(tmp_path / "b", 1, dtype="int8")
    with pytest.raises(MossError, match="int8 cannot be trained; train an adapter"):
        Trainee(quantised)
    with pytest.raises(MossError, match="on the CPU only"):
        Trainee(weights, device="cuda")
    with pytest.raises(MossError, match="a budget of RAM is for frozen weights"):
        Trainee(weights, ram="1GiB")


def test_all_weights_need_memory(tmp_path, monkeypatch):
    weights, state, _ = model(tmp_path, 1)
    needed = 16 * sum(x.size for x in state.values())
    monkeypatch.setattr("moss_jt.train.full.memory", lambda: Memory(1 << 40, needed - 1))
    with pytest.raises(MossError, match=r"takes 0 MiB.*, and 0 MiB are available: train an adapter"):
        Trainee(weights)


def adapted(state: dict, trainee: Trainee, lora: Lora) -> dict:
    """The weights with the adapter's products added to them."""
    found = {name: np.asarray(x, np.float64) for name, x in state.items()}
    for name, p in trainee.parameters.items():
        if ".lora_A." in name:
            b = trainee.parameters[name.replace(".lora_A.", ".lora_B.")].value.astype(np.float64)
            official = name.replace("base_model.model.", "").replace(".lora_A", "")
            found[official] = found[official] + lora.alpha / lora.rank * b @ p.value
    return found


@pytest.mark.parametrize("dtype, size", [("fp16", "12 heads, n_inner"), ("int8", "12 heads, n_inner"), ("int4", "8 heads")])
@pytest.mark.parametrize("targets", [tuple(TARGETS), ("qkv_proj", "fc_out")])
def test_losses_and_gradients_of_an_adapter(tmp_path, rng, dtype, size, targets):
    weights, state, config = model(tmp_path, int(rng.integers(1 << 30)), dtype, **SIZES[size])
    state, lora = dequantise.official_state(weights, state), replace(LORA, targets=targets)
    trainee, given = Trainee(weights, lora), batch(rng, config.vocab_size, [40, 7, 20])
    assert {name: p.value.shape for name, p in trainee.parameters.items()} == shapes(config, lora)
    assert abs(trainee.measure(given).loss - loss(config, state, given)[0]) < 1e-4 * loss(config, state, given)[0]
    shaken(trainee, rng)
    exact, count, right = loss(config, adapted(state, trainee, lora), given)
    found = trainee.train(given, 0.25)
    assert (found.tokens, found.right) == (count, right) and abs(found.loss - exact) < 1e-5 * exact
    for name, p in trainee.parameters.items():
        gradient, value = p.gradient.astype(np.float64), p.value.copy()
        direction = gradient + rng.standard_normal(value.shape) * np.linalg.norm(gradient) / np.sqrt(value.size)
        direction *= 1e-3 * np.linalg.norm(value) / np.linalg.norm(direction)
        moved = []
        for way in (1, -1):
            p.value[...] = value + way * direction
            moved.append(p.value.astype(np.float64))
            moved.append(loss(config, adapted(state, trainee, lora), given)[0])
        p.value[...] = value
        ours = float((gradient * (moved[0] - moved[2])).sum()) / 0.25
        assert abs(ours - (moved[1] - moved[3])) < 1e-3 * abs(ours), name


def test_an_adapter_beside_inputs_in_another_order(tmp_path, rng):
    raw = small_config(n_ctx=40, n_positions=40, vocab_size=120, n_embd=160, n_head=8, n_inner=304, rotary_dim=4)
    made = random_gptq(raw, 4, 64, act_order=True)
    weights = open_weights(convert.weights(made.write(tmp_path / "official"), tmp_path / "ours"))
    assert weights.coding.ordered
    config, lora = Config.from_dict(raw), LORA
    state = {**{name: x for name, (dtype, x) in made.stored.items() if dtype == "fp16"}, **made.weights}
    trainee, given = shaken(Trainee(weights, lora), rng), batch(rng, config.vocab_size, [30, 9])
    exact = loss(config, adapted(state, trainee, lora), given)[0]
    assert abs(trainee.train(given).loss - exact) < 1e-5 * exact
    name, p = next(iter(trainee.parameters.items()))  # of the first block: its gradient has passed through all others
    direction = p.gradient * (1e-3 * np.linalg.norm(p.value) / np.linalg.norm(p.gradient))
    np.add(p.value, direction, out=p.value)
    more = loss(config, adapted(state, trainee, lora), given)[0]
    np.subtract(p.value, 2 * direction, out=p.value)
    less = loss(config, adapted(state, trainee, lora), given)[0]
    ours = 2 * float((p.gradient.astype(np.float64) * direction).sum())
    assert abs(ours - (more - less)) < 1e-3 * abs(ours), name
