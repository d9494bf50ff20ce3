"""LoRA's settings and files; streaming; dropout."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from moss_jt import MossError
from moss_jt.swap import sources
from moss_jt.train import Lora, Trainee, lender, load_adapter, save_adapter
from moss_jt.train.lora import shapes

from .models import batch, model


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": True}, "alpha is True"),
        ({"dropout": 1}, "dropout is 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"targets": ()}, "targets are ''"),
        ({"targets": ("fc_in", "lm_head")}, "expected some of qkv_proj, out_proj, fc_in, fc_out"),
        ({"targets": ("fc_in", "fc_in")}, "targets are 'fc_in, fc_in'"),
    ],
)
def test_what_makes_no_adapter(wrong, text):
    with pytest.raises(MossError, match=text):
        Lora(**wrong)


@pytest.fixture
def adapter(tmp_path):
    weights, _, config = model(tmp_path / "model", 1)
    lora, rng = Lora(3, 6, ("out_proj", "qkv_proj"), 0.25), np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes(config, lora).items()}
    save_adapter(tmp_path / "new" / "adapter", lora, tensors, "some/model")
    return tmp_path / "new" / "adapter", weights, config, lora, tensors


def test_an_adapter_s_files_come_back_and_are_as_peft_has_them(adapter):
    folder, _, config, lora, tensors = adapter
    found, again = load_adapter(folder, config)
    assert found == lora and again.keys() == tensors.keys() and all((again[name] == x).all() for name, x in tensors.items())
    theirs = load_file(folder / "adapter.safetensors")
    assert all((theirs[name] == x).all() for name, x in tensors.items())
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["lora_dropout"]) == (3, 6, 0.25)
    assert raw["target_modules"] == ["out_proj", "qkv_proj"] and raw["base_model_name_or_path"] == "some/model"


def test_damaged_and_unsuitable_adapters_are_refused(adapter):
    folder, _, config, _, tensors = adapter
    path, text = folder / "adapter_config.json", (folder / "adapter_config.json").read_text()

    def refused(message: str) -> None:
        with pytest.raises(MossError, match=message):
            load_adapter(folder, config)

    raw = json.loads(text)
    for changes, message in (
        ({"r": 4}, r"lora_A.weight is F32 \[3, 16\], expected F32 \[4, 16\]"),
        ({"r": "3"}, "rank is '3'"),
        ({"lora_alpha": "big"}, "alpha is 'big'"),
        ({"target_modules": ["qkv_proj"]}, "out_proj.lora_A.weight belongs to no target"),
        ({"target_modules": ["qkv_proj", "out_proj", "fc_in"]}, "fc_in.lora_A.weight is missing"),
        ({"target_modules": "all-linear"}, "a list of target_modules"),
        ({"bias": "all"}, "without biases"),
        ({"use_dora": True}, "only plain LoRA"),
        ({"peft_type": "IA3"}, "only plain LoRA"),
    ):
        path.write_text(json.dumps({**raw, **changes}))
        refused(message)
    for broken in ("", "[]", "{}", text[:40]):
        path.write_text(broken)
        refused("damaged, or not an adapter's")
    path.write_text(text)
    name = next(iter(tensors))
    save_adapter(folder, Lora(**_settings(raw)), {**tensors, name: np.full_like(tensors[name], np.nan)})
    refused("holds NaN")
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused("cut short")
    file.unlink()
    refused("no such file")
    path.unlink()
    refused("is not an adapter's folder")


def _settings(raw: dict) -> dict:
    return {"rank": raw["r"], "alpha": raw["lora_alpha"], "targets": tuple(raw["target_modules"])}


def test_an_adapter_that_cannot_be_written(adapter, tmp_path):
    _, _, _, lora, tensors = adapter
    (tmp_path / "file").write_text("")
    with pytest.raises(MossError, match="cannot be written"):
        save_adapter(tmp_path / "file" / "adapter", lora, tensors)


def steps(trainee: Trainee, batches: list) -> list[float]:
    """Losses of some steps of plain gradient descent."""
    found = []
    for given in batches:
        trainee.zero_gradients()
        found.append(trainee.train(given, 0.01).loss)
        for p in trainee.parameters.values():
            np.subtract(p.value, 0.5 * p.gradient, out=p.value)
    return [*found, trainee.measure(batches[0]).loss]


def test_streamed_weights_give_the_same_bits(tmp_path, monkeypatch):
    weights, _, config = model(tmp_path, 5, "int8", n_layer=6, n_embd=64)
    lora, rng = Lora(dropout=0.1), np.random.default_rng(0)
    batches = [batch(rng, config.vocab_size, [20, 13]) for _ in range(3)]
    resident = Trainee(weights, lora)
    assert not resident.streams
    losses = steps(resident, batches)
    block = lender.whole(weights.regions["block-00.safetensors"].tensors).room
    monkeypatch.setattr(lender, "_PROGRAM", 0)
    learned = sum(p.value.size for p in resident.parameters.values())
    fixed = 16 * learned + weights.regions["head.safetensors"].nbytes + lender.work_bytes(config, 300)
    for room, resident_blocks in ((2, 0), (4, 2), (5, 3)):
        streamed = Trainee(weights, lora, ram=fixed + room * block)
        assert streamed.streams and len(streamed.weights.lender._mapped) == resident_blocks
        assert steps(streamed, batches) == losses
    assert not Trainee(weights, lora, ram=fixed + 6 * block).streams
    with pytest.raises(MossError, match=r"on 300 tokens at a time: \d+MiB is the smallest"):
        Trainee(weights, lora, ram=fixed + 2 * block - 1)
    divided = Trainee(weights, lora, ram="1GiB", tokens=30)
    together, apart = (trainee.measure(batches[0]) for trainee in (Trainee(weights, lora), divided))
    assert apart[1:] == together[1:] and abs(apart.loss - together.loss) < 1e-5 * together.loss
    with pytest.raises(MossError, match="a sequence of 40 tokens is longer than the 30"):
        divided.train(batch(rng, config.vocab_size, [40]))


def test_a_disk_s_error_is_said_and_the_next_batch_tries_again(tmp_path, monkeypatch):
    weights, _, config = model(tmp_path, 5, n_layer=4)
    monkeypatch.setattr("moss_jt.train.lender.spare_memory", lambda: 0)
    trainee, given = Trainee(weights, Lora()), batch(np.random.default_rng(0), config.vocab_size, [9])
    loss, fetch = trainee.measure(given).loss, sources.Source.fetch

    def fails(source, memory):
        raise MossError("the disk is gone")

    monkeypatch.setattr(sources.Source, "fetch", fails)
    for _ in range(2):
        with pytest.raises(MossError, match="the disk is gone"):
            trainee.train(given)
            trainee.train(given)
    monkeypatch.setattr(sources.Source, "fetch", fetch)
    assert trainee.train(given).loss == loss


def test_dropout_is_drawn_anew_and_can_be_gone_on_from(tmp_path):
    weights, _, config = model(tmp_path, 2, n_embd=64, n_head=4)
    rng = np.random.default_rng(0)
    trainee, given = Trainee(weights, Lora(dropout=0.5), seed=7), batch(rng, config.vocab_size, [40, 30], 1.0)
    for p in trainee.parameters.values():
        p.value[...] = rng.standard_normal(p.value.shape) * 0.05
    without = trainee.measure(given).loss
    first, second = trainee.train(given).loss, trainee.train(given).loss
    assert len({without, first, second}) == 3 and trainee.measure(given).loss == without and trainee.dropout_state == 2
    trainee.dropout_state = 1
    assert trainee.train(given).loss == second
    other = Trainee(weights, Lora(dropout=0.5), seed=8)
    for name, p in other.parameters.items():
        p.value[...] = trainee.parameters[name].value
    assert other.measure(given).loss == without and other.train(given).loss not in (first, second)
    # The derivative is that of the masks that were drawn.
    trainee.zero_gradients()
    trainee.dropout_state = 0
    trainee.train(given)
    size = trainee.gradient_norm()
    before = {name: p.value.copy() for name, p in trainee.parameters.items()}
    losses = []
    for way in (1, -1):
        for name, p in trainee.parameters.items():
            p.value[...] = before[name] + way * 0.01 / size * p.gradient
        trainee.dropout_state = 0
        gradients = {name: p.gradient.copy() for name, p in trainee.parameters.items()}
        losses.append(trainee.train(given).loss)
        for name, p in trainee.parameters.items():
            p.gradient[...] = gradients[name]
    assert abs(losses[0] - losses[1] - 0.02 * size) < 0.02 * 0.02 * size
