"""Ours to official and back: every tensor bit for bit, every file that was official byte for byte."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import numpy as np
import pytest
from moss_jt.convert.official import open_official
from safetensors import safe_open

from moss_jt import MossError, convert
from tests.checkpoints import random_state, small_config, write_official

SIZES = [
    {},
    {"n_head": 8, "n_embd": 48, "n_inner": 40, "n_layer": 3},
    {"n_head": 12, "n_embd": 24, "rotary_dim": 2, "n_layer": 1, "vocab_size": 31},
    {"n_inner": 1, "n_layer": 11},
]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of an official folder, as it is stored."""
    return {name: view.read() for name, view in open_official(folder).tensors.items()}


def assert_same_tensors(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype and x.shape == b[name].shape and x.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("format", ["pytorch", "safetensors"])
def test_round_trip(tmp_path, sizes, format):
    config = small_config(**sizes)
    state = {name: x.astype(np.float16) for name, x in random_state(config, 3).items()}
    for x in state.values():  # signs of zero and the smallest numbers are kept too
        x.flat[:3] = [-0.0, 6e-8, 65504]
    src = write_official(tmp_path / "src", config, state, shards=3)
    convert.weights(src, tmp_path / "ours")
    out = convert.export(tmp_path / "ours", tmp_path / "out", format, shard_size=3000)
    assert_same_tensors(tensors(src), tensors(out))
    for name in ("config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        assert filecmp.cmp(src / name, out / name, shallow=False), name
    for shard in out.glob("*-of-*"):
        assert shard.stat().st_size < 3000 + 20_000
    extra = {p.name for p in out.iterdir() if "-of-" not in p.name} - {p.name for p in src.iterdir()}
    assert extra <= {"model.safetensors.index.json"}
    convert.weights(out, tmp_path / "again")
    names = [p.name for p in (tmp_path / "ours").glob("*.safetensors")]
    assert filecmp.cmpfiles(tmp_path / "ours", tmp_path / "again", names, shallow=False) == (names, [], [])


def test_the_trained_checkpoint(official_checkpoint, tmp_path):
    src = official_checkpoint("moss-tiny-sft")
    convert.weights(src, tmp_path / "ours")
    out = convert.export(tmp_path / "ours", tmp_path / "out", shard_size=60_000_000)
    assert_same_tensors(tensors(src), tensors(out))
    same = [p.name for p in src.iterdir() if not p.name.startswith("pytorch_model")]
    assert filecmp.cmpfiles(src, out, same, shallow=False) == (same, [], [])


@pytest.fixture
def ours(tmp_path) -> Path:
    config = small_config()
    write_official(tmp_path / "src", config, random_state(config), dtype="fp32")
    return convert.weights(tmp_path / "src", tmp_path / "ours")


def test_one_shard_has_no_index(tmp_path, ours):
    out = convert.export(ours, tmp_path / "out")
    assert sorted(p.name for p in out.glob("*model*")) == ["pytorch_model.bin"]
    out = convert.export(ours, tmp_path / "out2", "safetensors")
    assert sorted(p.name for p in out.glob("*model*")) == ["model.safetensors"]


def test_the_index_names_every_tensor(tmp_path, ours):
    out = convert.export(ours, tmp_path / "out", shard_size=4000)
    index = json.loads((out / "pytorch_model.bin.index.json").read_text())
    held = {name: view.path.name for name, view in open_official(out).tensors.items()}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(out).values())


def test_storages_can_be_mapped(tmp_path, ours):
    out = convert.export(ours, tmp_path / "out")
    assert all(view.start % 64 == 0 for view in open_official(out).tensors.values())


def test_torch_opens_it(tmp_path, ours):
    torch = pytest.importorskip("torch")
    out = convert.export(ours, tmp_path / "out", shard_size=4000)
    for mmap in (False, True):
        found = {}
        for shard in out.glob("*.bin"):
            found.update(torch.load(shard, weights_only=True, mmap=mmap))
        assert_same_tensors({name: x.numpy() for name, x in found.items()}, tensors(out))


def test_torch_saves_what_we_open(tmp_path):
    """Containers and pickles as torch itself writes them: a module's state dict, views, parameters, both containers."""
    torch = pytest.importorskip("torch")
    config = small_config()
    state = {name: torch.from_numpy(x).half() for name, x in random_state(config).items()}
    base = torch.zeros(3, 16).half()
    base[1] = state["transformer.ln_f.bias"]
    state["transformer.ln_f.bias"] = base[1]
    name = "transformer.h.0.mlp.fc_in.weight"
    state[name] = torch.nn.Parameter(state[name].t().contiguous().t())
    for legacy in (False, True):
        src = write_official(tmp_path / f"src{legacy}", config, random_state(config))
        torch.save(state, src / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        found = tensors(src)
        for name, x in state.items():
            np.testing.assert_array_equal(found[name], x.detach().numpy(), err_msg=name)


def test_the_safetensors_library_opens_it(tmp_path, ours):
    out = convert.export(ours, tmp_path / "out", "safetensors")
    with safe_open(str(out / "model.safetensors"), "numpy") as f:
        assert f.metadata() == {"format": "pt"}
        assert_same_tensors({name: f.get_tensor(name) for name in f.keys()}, tensors(out))  # noqa: SIM118


def test_a_config_that_somebody_laid_out_anew(tmp_path, ours):
    path = ours / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    out = convert.export(ours, tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "src/config.json").read_text())


def test_numbers_that_only_fp32_holds_are_refused(tmp_path):
    config = small_config()
    state = random_state(config)
    state["transformer.ln_f.weight"][2] = 1e5
    write_official(tmp_path / "src", config, state, dtype="fp32")
    ours = convert.weights(tmp_path / "src", tmp_path / "ours")
    with pytest.raises(MossError, match=r"tensor ln_f\.weight holds 100000, beyond fp16's"):
        convert.export(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path, ours):
    cases = [
        (tmp_path / "src", tmp_path / "out", {}, "not converted yet"),
        (ours, ours, {}, "is the source itself"),
        (ours, tmp_path / "src", {}, "exists already"),
        (ours, tmp_path / "out", {"format": "gguf"}, "format 'gguf' is unknown"),
        (ours, tmp_path / "out", {"shard_size": 0}, "cannot hold anything"),
    ]
    for src, out, options, says in cases:
        with pytest.raises(MossError, match=says):
            convert.export(src, out, **options)


def test_an_export_that_was_stopped_goes_on(tmp_path, ours):
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        convert.export(ours, tmp_path / "out", shard_size=4000, progress=stop)
    partial = tmp_path / "out.partial"
    whole = {p.name: p.stat().st_ino for p in partial.glob("*.bin")}
    assert whole and not (tmp_path / "out").exists()
    with pytest.raises(MossError, match="begun from another source or with other settings"):
        convert.export(ours, tmp_path / "out", shard_size=5000)
    out = convert.export(ours, tmp_path / "out", shard_size=4000)
    assert whole.items() <= {p.name: p.stat().st_ino for p in out.glob("*.bin")}.items()
    other = convert.export(ours, tmp_path / "other", shard_size=4000)
    names = sorted(p.name for p in other.iterdir())
    assert filecmp.cmpfiles(out, other, names, shallow=False) == (names, [], []) and names == sorted(
        p.name for p in out.iterdir()
    )


def test_a_tokenizer_json_that_was_official_comes_back(tmp_path, ours):
    src = write_official(tmp_path / "src2", small_config(), random_state(small_config()))
    (src / "tokenizer.json").write_bytes((ours / "tokenizer.json").read_bytes() + b"\n")
    out = convert.export(convert.weights(src, tmp_path / "ours2"), tmp_path / "out")
    assert filecmp.cmp(src / "tokenizer.json", out / "tokenizer.json", shallow=False)
    (tmp_path / "ours2/convert.json").write_text("[]")  # nothing says that it was official
    assert not (convert.export(tmp_path / "ours2", tmp_path / "out2") / "tokenizer.json").exists()
