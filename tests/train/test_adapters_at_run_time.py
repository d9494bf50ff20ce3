"""Adapters at run time: beside the weights, block by block, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

import moss_jt
from moss_jt.config import Config
from moss_jt.errors import MossError
from moss_jt.train.lora import TARGETS, Lora, module, save_adapter, shapes, tensor_names
from moss_jt.train.merge import plan_merge
from moss_jt.weights import open_weights

from .. import reference
from ..checkpoints import random_state, small_config, write_official
from ..dequantise import official_state
from ..test_model import error
from ..tokenizer_folders import official_folder

CONFIG = small_config(n_ctx=64, n_positions=64, vocab_size=400, n_embd=160, n_head=8, n_inner=300)
SIZES = Config.from_dict(CONFIG)
LORAS = {
    "all": Lora(rank=4, alpha=8),
    "one of each matrix": Lora(rank=3, alpha=2, targets=("qkv_proj", "fc_out")),
    "first only": Lora(rank=1, alpha=1, targets=("fc_in",)),
    "second only": Lora(rank=20, alpha=5, targets=("out_proj",)),
}
IDS = np.random.default_rng(3).integers(0, 400, 40)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    src = official_folder(write_official(folder / "src", CONFIG, random_state(CONFIG, 1), masks=False))
    for dtype in ("fp16", "int8", "int4"):
        moss_jt.convert.weights(src, folder / dtype, dtype)
    for name, lora in LORAS.items():
        save_adapter(folder / name, lora, tensors(lora))
    return folder


def tensors(lora: Lora) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {name: (rng.standard_normal(s) / np.sqrt(s[-1])).astype(np.float32) for name, s in shapes(SIZES, lora).items()}


def exact(folder, lora: Lora) -> np.ndarray:
    """Logits in float64: of the stored weights, with the adapter beside them."""
    state, parts = official_state(open_weights(folder), random_state(CONFIG, 1)), tensors(lora)
    for i in range(SIZES.n_layer):
        for target in lora.targets:
            a, b = (parts[name].astype(np.float64) for name in tensor_names(module(i, target)))
            state[module(i, target) + ".weight"] = state[module(i, target) + ".weight"] + lora.scale * b @ a
    return reference.logits(SIZES, state, IDS)


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("name", LORAS)
def test_logits_are_those_of_the_sum(base, dtype, name):
    expected = exact(base / dtype, LORAS[name])
    m = moss_jt.load(base / dtype, device="cpu", adapter=base / name)
    assert error(m.logits(IDS, last=len(IDS)), expected) < 1e-3
    m.model.sequence.truncate(0)
    assert error(np.array([m.logits(IDS[: n + 1])[0] for n in range(9)]), expected[:9]) < 1e-3
    without = moss_jt.load(base / dtype, device="cpu").logits(IDS, last=len(IDS))
    assert error(without, expected) > 2e-2  # it would show


def test_logits_are_those_of_the_merged_folder(base, tmp_path):
    plan_merge(base / "fp16", base / "all", tmp_path / "merged").run()
    merged = moss_jt.load(tmp_path / "merged", device="cpu").logits(IDS, last=len(IDS))
    beside = moss_jt.load(base / "fp16", device="cpu", adapter=base / "all").logits(IDS, last=len(IDS))
    assert error(beside, merged) < 2e-3  # rounding the sum to fp16


def test_streamed_weights_have_it_too(base):
    from moss_jt.swap import smallest

    weights = open_weights(base / "fp16")
    least = smallest(weights.config, weights.coding, 64) + 4096 * 200
    m = moss_jt.load(base / "fp16", device="cpu", context=64, ram=least, adapter=base / "all")
    assert m.model.streams
    assert error(m.logits(IDS, last=len(IDS)), exact(base / "fp16", LORAS["all"])) < 1e-3


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    other = Config.from_dict(small_config(n_embd=32))
    save_adapter(tmp_path / "other", LORAS["all"], {n: np.zeros(s, np.float32) for n, s in shapes(other, LORAS["all"]).items()})
    with pytest.raises(MossError, match=r"adapter\.safetensors: tensor .* expected F32"):
        moss_jt.load(base / "fp16", device="cpu", adapter=tmp_path / "other")
    with pytest.raises(MossError, match=r"adapter_config\.json: missing"):
        moss_jt.load(base / "fp16", device="cpu", adapter=tmp_path)


def test_a_gpu_that_is_asked_for_is_refused_with_one(base):
    with pytest.raises(MossError, match="only the CPU computes with an adapter"):
        moss_jt.load(base / "fp16", device="cuda", adapter=base / "all")


def test_generate_with_an_adapter(base, capsys):
    from moss_jt.cli import main

    answers = []
    for more in ([], ["--adapter", str(base / "all")]):
        with pytest.raises(SystemExit) as e:
            main(["generate", "-m", str(base / "fp16"), "--raw", "hello", "--greedy", "--max-new-tokens", "8", "--json", *more])
        assert not e.value.code
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]


def test_all_targets_are_known():
    assert LORAS["all"].targets == tuple(TARGETS)
