"""Opening a converted checkpoint: what is whole opens, what is not is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moss_jt import MossError, convert
from moss_jt.config import Config
from moss_jt.weights import files_of, is_converted, open_weights, store
from moss_jt.weights.header import header_bytes
from moss_jt.weights.layout import METADATA, Tensor
from tests.checkpoints import random_state, small_config, write_official
from tests.gptq_checkpoints import random_gptq

CONFIG = small_config()


@pytest.fixture
def folder(tmp_path) -> Path:
    write_official(tmp_path / "src", CONFIG, random_state(CONFIG))
    return convert.weights(tmp_path / "src", tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(MossError) as e:
        open_weights(folder)
    return str(e.value).replace(f"{folder}", "model")


def rewrite(path: Path, tensors: list[Tensor], data: bytes | None = None, metadata: dict = METADATA) -> None:
    """A file with this header and that many bytes of data."""
    path.write_bytes(header_bytes(tensors, metadata) + (bytes(sum(t.nbytes for t in tensors)) if data is None else data))


def block() -> list[Tensor]:
    return files_of(Config.from_dict(CONFIG))["block-00.safetensors"]


def test_a_whole_one(folder):
    weights = open_weights(folder)
    assert weights.config == Config.from_dict(CONFIG)
    assert weights.coding.is_fp16
    assert list(weights.regions) == ["wte.safetensors", "block-00.safetensors", "block-01.safetensors", "head.safetensors"]
    assert weights.nbytes == sum(t.nbytes for tensors in files_of(weights.config).values() for t in tensors)
    assert is_converted(folder) and not is_converted(folder.parent / "src")
    assert open_weights(str(folder)).config == weights.config


def test_arrays_are_mapped_read_only_in_order_and_without_gaps(folder):
    for arrays in (open_weights(folder).block(1), open_weights(folder).wte(), open_weights(folder).head()):
        at = next(iter(arrays.values())).ctypes.data
        assert at % 4096 == 0
        for x in arrays.values():
            assert x.ctypes.data == at and not x.flags.writeable and x.flags.c_contiguous
            at += x.nbytes


def test_the_safetensors_library_reads_the_same(folder):
    weights = open_weights(folder)
    for name in weights.regions:
        theirs = load_file(folder / name)
        ours = weights.regions[name].map()
        assert theirs.keys() == ours.keys()
        for tensor, x in ours.items():
            assert theirs[tensor].dtype == x.dtype
            np.testing.assert_array_equal(theirs[tensor], x)


def test_no_folder(tmp_path):
    with pytest.raises(MossError, match="no such folder"):
        open_weights(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(MossError, match="not a folder"):
        open_weights(tmp_path / "file")
    with pytest.raises(MossError, match=r"no config\.json here"):
        open_weights(tmp_path)


def test_an_official_one_says_how_to_convert_it(folder):
    src = folder.parent / "src"
    with pytest.raises(MossError, match=rf"not converted yet; run: moss-jt convert weights {src} src-jt"):
        open_weights(src)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ({"format": 2, "dtype": "fp16"}, "format 2, this moss-jt reads 3"),
        ({"dtype": "fp16"}, "format None"),
        ({"format": 3, "dtype": "int3"}, "dtype 'int3'"),
        ({"format": 3, "dtype": "int4", "group_size": 100}, "group_size is 100"),
        ({"format": 3, "dtype": "int4", "group_size": 256}, "group_size is 256"),
        ("yes", "not converted yet"),
    ],
)
def test_another_format(folder, key, says):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "moss_jt": key}))
    assert says in refusal(folder)


@pytest.mark.parametrize("name", ["wte.safetensors", "block-01.safetensors", "head.safetensors"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    assert refusal(folder) == f"model/{name}: missing; convert the checkpoint again"


@pytest.mark.parametrize("keep", [0, 7, 100, 4096, -1])
def test_a_file_cut_short(folder, keep):
    path = folder / "block-01.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(folder).startswith("model/block-01.safetensors: ") and "cut short" in refusal(folder)


def test_a_file_that_is_too_long(folder):
    path = folder / "head.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    assert "bytes long, its header says" in refusal(folder)


def test_a_missing_tensor(folder):
    rewrite(folder / "block-00.safetensors", [t for t in block() if t.name != "in.bias"])
    assert refusal(folder) == "model/block-00.safetensors: tensor in.bias is missing"


def test_a_tensor_too_many(folder):
    rewrite(folder / "block-00.safetensors", [*block(), Tensor("extra", "F16", (2,))])
    assert refusal(folder) == "model/block-00.safetensors: unexpected tensor extra"


def test_a_wrong_dtype(folder):
    rewrite(folder / "block-00.safetensors", [Tensor(t.name, "F32", t.shape) for t in block()])
    assert refusal(folder) == "model/block-00.safetensors: tensor in.weight is F32, expected F16"


def test_a_wrong_shape(folder):
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"n_inner": null', '"n_inner": 20'), encoding="utf-8"
    )
    says = "tensor in.weight has shape [112, 16], config.json asks for [68, 16]"
    assert refusal(folder) == f"model/block-00.safetensors: {says}"


def test_a_wrong_order(folder):
    rewrite(folder / "block-00.safetensors", block()[::-1])
    assert "lie in the order out.bias, out.weight," in refusal(folder)


@pytest.mark.parametrize(("tensor", "row"), [("in.weight.order", 0), ("in.weight.order", 1), ("out.weight.order", 0)])
@pytest.mark.parametrize("wrong", [-1, 1, 1 << 30])
def test_an_order_that_is_none(tmp_path, tensor, row, wrong):
    """Kernels take its numbers as places in memory."""
    folder = convert.weights(random_gptq(small_config(n_embd=64), 4, 32, True).write(tmp_path / "src"), tmp_path / "model")
    region = open_weights(folder).regions["block-01.safetensors"]
    mapped = np.memmap(region.path, np.uint8, "r+", region.start)
    order = store.arrays(mapped, region.tensors)[tensor]
    order[row, order[row] == 0] = wrong
    mapped.flush()
    says = f"tensor {tensor} is damaged: it does not hold every input once"
    assert refusal(folder) == f"model/block-01.safetensors: {says}"


def test_data_that_cannot_be_mapped(folder):
    path = folder / "wte.safetensors"
    save_file(load_file(path), path)
    assert refusal(folder) == f"model/wte.safetensors: its data starts at byte {header_end(path)}, not at a multiple of 4096"


def header_end(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_header_from_somewhere_else(folder):
    (folder / "head.safetensors").write_bytes(b"<html>" * 1000)
    assert refusal(folder).startswith("model/head.safetensors: not a safetensors file")
