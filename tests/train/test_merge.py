from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from moss_jt.convert.gptq import SETTINGS

import moss_jt
from moss_jt.cli import main
from moss_jt.config import Config, read_json
from moss_jt.tokenizer import load_tokenizer
from moss_jt.train.lora import Lora, module, save_adapter, shapes, tensor_names
from moss_jt.weights import open_weights

from ..checkpoints import random_state, small_config, write_official
from ..dequantise import official_state
from ..tokenizer_folders import official_folder

CONFIG = small_config(vocab_size=400, eos_token_id=7)
SIZES = Config.from_dict(CONFIG)
STATE = random_state(CONFIG, 1)
LORA = Lora(rank=3, alpha=4, targets=("qkv_proj", "fc_out"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Models src (official), fp16, int8, int4 and the adapter."""
    folder = tmp_path_factory.mktemp("merge")
    src = official_folder(write_official(folder / "src", CONFIG, STATE, masks=False))
    for dtype in ("fp16", "int8", "int4"):
        moss_jt.convert.weights(src, folder / dtype, dtype)
    save_adapter(folder / "adapter", LORA, tensors(LORA))
    return folder


def tensors(lora: Lora, seed: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal(s) / np.sqrt(s[-1])).astype(np.float32) for name, s in shapes(SIZES, lora).items()}


def merged_state(state: dict, lora: Lora) -> dict[str, np.ndarray]:
    """Official tensors in float64 with the adapter in them: W + alpha / rank B A."""
    found, parts = {name: x.astype(np.float64) for name, x in state.items()}, tensors(lora)
    for i in range(SIZES.n_layer):
        for target in lora.targets:
            a, b = (parts[name].astype(np.float64) for name in tensor_names(module(i, target)))
            found[module(i, target) + ".weight"] += lora.alpha / lora.rank * b @ a
    return found


@pytest.fixture
def run(base, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in base.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as e:
            main(["train", "merge", *args])
        return (e.value.code or 0, *capsys.readouterr())

    return call


def official(folder: str, out: str) -> dict[str, np.ndarray]:
    """A folder of ours, in fp16, as official tensors."""
    from safetensors.numpy import load_file

    return load_file(moss_jt.convert.export(folder, out, format="safetensors") / "model.safetensors")


def test_into_fp16(run):
    code, stdout, stderr = run("-m", "fp16", "--adapter", "adapter", "merged")
    assert code == 0 and stdout.startswith("merged: ") and "moss-jt chat -m merged" in stdout, stderr
    found, expected = official("merged", "out"), merged_state(STATE, LORA)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        # float32 holds the sum to 2^-24, fp16 its rounding to 2^-11: the nearest number of fp16, or one beside it.
        np.testing.assert_allclose(found[name], x, rtol=2**-11 * 1.01, atol=1e-6, err_msg=name)
    changed = {name for name, x in found.items() if (x != STATE[name].astype(np.float16)).any()}
    assert changed == {module(i, t) + ".weight" for i in range(SIZES.n_layer) for t in LORA.targets}


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantised_base_counts_as_the_numbers_it_stands_for(run, dtype):
    assert run("-m", dtype, "--adapter", "adapter", "merged")[0] == 0
    found, expected = official("merged", "out"), merged_state(official_state(open_weights(dtype), STATE), LORA)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=2**-11 * 1.01, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_again(run, dtype):
    """As converting the exact sums would: nothing in between is rounded to fp16, which would move some numbers by a step."""
    assert run("-m", "fp16", "--adapter", "adapter", "merged", "--dtype", dtype)[0] == 0
    exact = {name: x.astype(np.float32) for name, x in merged_state(STATE, LORA).items()}
    official_folder(write_official(Path("exact"), CONFIG, exact, dtype="fp32", masks=False))
    moss_jt.convert.weights("exact", "expected", dtype)
    a, b = open_weights("merged"), open_weights("expected")
    assert a.coding == b.coding
    for name, region in a.regions.items():
        for tensor, x in region.map().items():
            other = b.regions[name].map()[tensor]
            assert (x == other).mean() > 0.99, (name, tensor)


def test_what_is_written_besides(run, base):
    assert run("-m", "fp16", "--adapter", "adapter", "merged")[0] == 0
    config = read_json("merged")
    assert config["eos_token_id"] == load_tokenizer("merged").token_id("<eom>") != 7
    assert {k: v for k, v in config.items() if k not in ("moss_jt", "eos_token_id")} == {
        k: v for k, v in CONFIG.items() if k != "eos_token_id"
    }
    assert load_tokenizer("merged").encode("你好<eoh>") == load_tokenizer("fp16").encode("你好<eoh>")


def test_configs_of_a_quantised_model_no_longer_say_so(run, base):
    """The official code would take the merged weights for quantised ones."""
    moss_jt.convert.export("int8", "gptq", format="gptq")
    assert read_json("gptq")["wbits"] == 8
    moss_jt.convert.weights("gptq", "again")
    assert run("-m", "again", "--adapter", "adapter", "merged")[0] == 0
    config = read_json("merged")
    assert "wbits" not in config and "groupsize" not in config
    assert not Path("merged", SETTINGS).exists()


def test_again_does_nothing_and_another_source_is_refused(run, base):
    assert run("-m", "fp16", "--adapter", "adapter", "merged")[0] == 0
    assert run("-m", "fp16", "--adapter", "adapter", "merged")[0] == 0
    code, _, stderr = run("-m", "int8", "--adapter", "adapter", "merged")
    assert code == 1 and "merged: exists already" in stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-m", "none", "--adapter", "adapter", "x"], "none: no such folder"),
        (["-m", "src", "--adapter", "adapter", "x"], "src: not converted yet"),
        (["-m", "fp16", "--adapter", "none", "x"], "none/adapter_config.json: missing"),
        (["-m", "fp16", "--adapter", "other", "x"], "other/adapter.safetensors: tensor "),
        (["-m", "fp16", "--adapter", "adapter", "fp16"], "fp16: is the source itself"),
    ],
)
def test_one_line_says_what_is_wrong(run, args, says):
    other = Config.from_dict(small_config(n_embd=32))
    save_adapter("other", LORA, {name: np.zeros(s, np.float32) for name, s in shapes(other, LORA).items()})
    code, stdout, stderr = run(*args)
    assert (code, stdout, stderr.count("\n")) == (1, "", 1) and stderr.startswith(f"moss-jt: {says}"), stderr


def test_weights_that_overflow_are_refused(run):
    big = {name: np.full(s, 300, np.float32) for name, s in shapes(SIZES, LORA).items()}
    save_adapter("big", LORA, big)
    for dtype in ("fp16", "int8"):
        code, _, stderr = run("-m", "fp16", "--adapter", "big", dtype + "-merged", "--dtype", dtype)
        assert code == 1 and "beyond fp16's largest number" in stderr and "in.weight" in stderr
