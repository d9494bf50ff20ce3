"""Round to nearest: how far off weights are, how they lie in the files, and that every source gives the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from moss_jt.convert import copy
from moss_jt.convert.panels import Quantised, in_panels
from moss_jt.convert.quantise import quantise

from moss_jt import MossError, convert
from moss_jt.machine import cores
from moss_jt.weights import open_weights
from moss_jt.weights.layout import Coding
from tests.checkpoints import pickled, random_state, shapes, small_config, tensor, write_official, zip_container

from .test_convert_weights import MEASURED, expected_block

TOP = {8: 255, 4: 15}


def drawn(kind: str, n: int, k: int) -> np.ndarray:
    """Weights of one kind, float32 (n, k)."""
    rng = np.random.default_rng()
    x = rng.standard_normal((n, k))
    made = {
        "normal": lambda: x * 0.02,
        "positive": lambda: np.abs(x) + 1,
        "negative": lambda: -np.abs(x) - 1,
        "one far out": lambda: np.where(rng.integers(0, 128, x.shape), x, 1000),
        "huge": lambda: np.clip(x * 60000, -65504, 65504),
        "small": lambda: x * 1e-6,  # in fp16, scales are subnormal from 6e-5 down
        "tiny": lambda: x * 1e-8,  # below fp16's smallest number
        "mixed": lambda: x * 10.0 ** rng.integers(-9, 4, (n, 1)),
        "sparse": lambda: x * (rng.random(x.shape) < 0.02),
    }
    return made[kind]().astype(np.float32)


KINDS = ["normal", "positive", "negative", "one far out", "huge", "small", "tiny", "mixed", "sparse"]


def grouped(x: np.ndarray) -> np.ndarray:
    """(N, K) -> (N, G, 128), with zeros where the last group has no inputs."""
    whole = np.zeros((len(x), -(-x.shape[1] // 128) * 128))
    whole[:, : x.shape[1]] = x
    return whole.reshape(len(x), -1, 128)


def full_range(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The rule without cutting: (scale, squared error) of each group."""
    x = grouped(w).astype(np.float32)
    low, high = np.minimum(x.min(2), 0), np.maximum(x.max(2), 0)
    halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # every scale there is, in order
    scale = halves[np.searchsorted(halves, (high - low) / np.float32(TOP[bits]))]
    zero = np.rint(-low / scale)[..., None]
    scale = scale.astype(np.float64)
    q = np.clip(np.rint(x / scale[..., None]) + zero, 0, TOP[bits])
    return scale, (((q - zero) * scale[..., None] - x) ** 2).sum(2)


def dequantised(rows: Quantised, k: int) -> np.ndarray:
    """(N, k), float64."""
    w = (rows.q.astype(np.float64) - rows.zero[..., None] - 1) * rows.scale.astype(np.float64)[..., None]
    return w.reshape(len(w), -1)[:, :k]


@pytest.mark.parametrize("k", [1, 127, 128, 200, 640])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_is_off_by_more_than_half_a_scale(bits, kind, k):
    w = drawn(kind, 50, k)
    q, scale, zero = quantise(w, bits)
    groups = -(-k // 128)
    assert (q.dtype, scale.dtype, zero.dtype) == (np.uint8, np.float16, np.uint8)
    assert (q.shape, scale.shape, zero.shape) == ((50, groups, 128), (50, groups), (50, groups))
    assert np.isfinite(scale).all() and (scale != 0).all() and (zero < TOP[bits]).all()

    found = dequantised(Quantised(q, scale, zero), k)
    scale = np.abs(scale.astype(np.float64))
    error, half = np.abs(grouped(found - w)), scale[..., None] / 2 * (1 + 1e-4)
    numbers = q.astype(int)
    cut = (numbers == 0) | (numbers == TOP[bits]) if bits == 4 else np.zeros(error.shape, bool)
    assert ((error <= half) | cut).all()
    plain_scale, plain_error = full_range(w, bits)
    assert (scale <= plain_scale).all() and ((error**2).sum(2) <= plain_error * (1 + 1e-4) + 1e-30).all()
    assert not found[w == 0].any()
    padding = numbers.reshape(50, -1)[:, k:]
    assert (padding == zero[:, -1:].astype(int) + 1).all()


def test_cutting_the_largest_weights_pays_in_4_bits():
    w = drawn("normal", 200, 1024)
    found = dequantised(quantise(w, 4), 1024)
    assert ((found - w) ** 2).sum() < 0.92 * full_range(w, 4)[1].sum()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.3, 65504.0, -65504.0, 6e-8, -6e-8, 1e-12])
def test_groups_of_one_value(bits, value):
    w = np.full((2, 200), value, np.float32)
    found = dequantised(quantise(w, bits), 200)
    assert np.ptp(found) == 0
    nearest = abs(value) * 2**-10 if abs(value) > 1e-4 else 2**-25  # fp16 has 11 bits, and steps of 2^-24 near 0
    assert abs(found[0, 0] - np.float64(np.float32(value))) <= nearest


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_lie_on_a_grid_come_out_exactly(bits):
    numbers = np.arange(256) * 7 % 256 if bits == 8 else (np.arange(256) * 7 + np.arange(256) // 64 * 5) % 16
    numbers[[0, 1, 128, 129]] = [0, TOP[bits]] * 2  # the whole range in both groups
    q, scale, zero = quantise(((numbers - 3) * 0.5).astype(np.float32)[None], bits)
    assert scale.tolist() == [[0.5, 0.5]] and zero.tolist() == [[2, 2]] and q.reshape(-1).tolist() == numbers.tolist()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_whose_zero_is_0_keeps_every_weight(bits):
    numbers = np.resize(np.arange(TOP[bits], -1, -1), 128)
    q, scale, zero = quantise((numbers * 0.25).astype(np.float32)[None], bits)
    assert scale.tolist() == [[-0.25]] and zero.tolist() == [[TOP[bits] - 1]]
    assert dequantised(Quantised(q, scale, zero), 128).tolist() == [(numbers * 0.25).tolist()]


# ---- panels -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [[37], [16, 21], [1, 2, 3, 31], [5, 27, 5]])
@pytest.mark.parametrize(("bits", "group", "groups"), [(8, 128, 2), (4, 128, 2), (4, 8, 3), (8, 40, 1)])
def test_panels_are_as_specified_however_the_rows_come(bits, group, groups, cut):
    """Each byte is looked up where docs/formats.md says that it lies."""
    rng, n, per = np.random.default_rng(), 37, 32 // bits
    q = rng.integers(0, 2**bits, (n, groups, group), dtype=np.uint8)
    scale, zero = rng.random((n, groups)).astype(np.float16), rng.integers(0, 256, (n, groups), dtype=np.uint8)
    ends = np.cumsum(cut)[:-1]
    parts = [Quantised(*part) for part in zip(*(np.split(x, ends) for x in (q, scale, zero)))]
    stored = Quantised(*map(np.concatenate, zip(*in_panels(parts, bits))))
    assert [x.shape for x in stored] == [(3, groups, group * bits // 32, 64), (3, groups, 16), (3, groups, 16)]
    for row in range(48):
        panel, lane = divmod(row, 16)
        for g in range(groups):
            inside = row < n
            assert stored.scale[panel, g, lane] == (scale[row, g] if inside else 0)
            assert stored.zero[panel, g, lane] == (zero[row, g] if inside else 0)
            for k in range(group):
                byte = stored.q[panel, g, k // per, 4 * lane + k % per * bits // 8]
                number = byte >> k * bits % 8 & TOP[bits]
                assert number == (q[row, g, k] if inside else 0)


# ---- files ------------------------------------------------------------------------------------------------------------------


CONFIG = small_config(n_embd=48, n_head=8, n_inner=150)  # groups are cut short, and reach from out_proj into fc_out
STATE = random_state(CONFIG, 5)


def parts(w: np.ndarray, name: str, dtype: str) -> list[tuple[str, np.ndarray]]:
    if dtype == "fp16":
        return [(name, w.astype("<f2"))]
    bits = int(dtype[3:])
    panels = in_panels([quantise(np.ascontiguousarray(w, np.float32), bits)], bits)
    return [(f"{name}.{part}", np.concatenate(x)) for part, x in zip(("q", "scale", "zero"), zip(*panels))]


def expected(config: dict, state: dict, dtype: str, head_dtype: str) -> dict[str, list[tuple[str, np.ndarray]]]:
    """File -> its tensors in order."""

    def stored(tensors: dict, dtype: str) -> list:
        found = []
        for name, x in tensors.items():
            found += parts(x, name, dtype) if x.ndim == 2 else [(name, x.astype("<f4"))]
        return found

    files = {"wte": [("wte.weight", state["transformer.wte.weight"].astype("<f2"))]}
    for i in range(config["n_layer"]):
        files[f"block-{i:02d}"] = stored(expected_block(config, state, i), dtype)
    head = {f"ln_f.{x}": state[f"transformer.ln_f.{x}"] for x in ("weight", "bias")}
    files["head"] = stored({**head, **{f"lm_head.{x}": state[f"lm_head.{x}"] for x in ("weight", "bias")}}, head_dtype)
    return files


def assert_files(folder: Path, config: dict, state: dict, dtype: str, head_dtype: str) -> None:
    """Every byte of every weights file."""
    for name, tensors in expected(config, state, dtype, head_dtype).items():
        data = (folder / f"{name}.safetensors").read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        assert start == 4096
        header, at = json.loads(data[8:start]), 0
        assert list(header) == ["__metadata__", *(its for its, _ in tensors)]
        for its, x in tensors:
            assert header[its]["shape"] == list(x.shape) and header[its]["data_offsets"] == [at, at + x.nbytes]
            assert data[start + at : start + at + x.nbytes] == x.tobytes(), (name, its)
            at += x.nbytes
        assert len(data) == start + at


DTYPES = [("int8", "int8"), ("int4", "int8"), ("int4", "int4"), ("int4", "fp16"), ("fp16", "int4")]


@pytest.mark.parametrize(("dtype", "head_dtype"), DTYPES)
def test_every_file_is_as_specified_byte_by_byte(tmp_path, dtype, head_dtype):
    src = write_official(tmp_path / "src", CONFIG, STATE, shards=3)
    dst = convert.weights(src, tmp_path / "dst", dtype, head_dtype)
    assert_files(dst, CONFIG, STATE, dtype, head_dtype)
    opened = open_weights(dst)
    assert opened.coding == Coding(dtype, head_dtype)
    said = {"format": 3, "dtype": dtype, **({} if dtype == head_dtype else {"head_dtype": head_dtype})}
    assert json.loads((dst / "config.json").read_text()) == {**CONFIG, "moss_jt": said}
    record = json.loads((dst / "convert.json").read_text())
    assert {name: x for name, x in record.items() if name != "source"} == said
    job = convert.plan_weights(src, dst, dtype, head_dtype)
    assert job.finished and job.files == {name: (dst / name).stat().st_size for name in job.files}


@pytest.mark.parametrize(("dtype", "head_dtype"), [("fp16", "fp16"), ("int8", "int8"), ("int4", "int8")])
def test_lm_head_is_int8_unless_all_is_fp16(tmp_path, dtype, head_dtype):
    src = write_official(tmp_path / "src", CONFIG, STATE)
    assert open_weights(convert.weights(src, tmp_path / "dst", dtype)).coding.head_dtype == head_dtype


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_container_and_dtype(tmp_path, container, dtype):
    src = write_official(tmp_path / "src", CONFIG, STATE, container, dtype=dtype)
    assert_files(convert.weights(src, tmp_path / "dst", "int4"), CONFIG, STATE, "int4", "int8")


def test_what_fp16_would_round_is_quantised_as_it_is(tmp_path):
    rng = np.random.default_rng()
    state = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in STATE.items()}
    src = write_official(tmp_path / "src", CONFIG, state, dtype="fp32")
    assert_files(convert.weights(src, tmp_path / "dst", "int8"), CONFIG, state, "int8", "int8")


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
@pytest.mark.parametrize("block", [1, 500])
def test_chunks_of_any_size_give_the_same(tmp_path, monkeypatch, chunk, block):
    monkeypatch.setattr(copy, "CHUNK", chunk)
    monkeypatch.setattr(copy, "_BLOCK", block)
    src = write_official(tmp_path / "src", CONFIG, STATE)
    assert_files(convert.weights(src, tmp_path / "dst", "int4"), CONFIG, STATE, "int4", "int8")


def test_transposed_storages_give_the_same(tmp_path):
    src = write_official(tmp_path / "src", CONFIG, STATE, masks=False)
    tensors = {n: tensor(n, "HalfStorage", x.size, 0, x.shape, (1, len(x))[: x.ndim]) for n, x in STATE.items()}
    storages = {name: x.T.astype(np.float16).tobytes() for name, x in STATE.items()}
    (src / "pytorch_model.bin").write_bytes(zip_container(pickled(tensors), storages))
    assert_files(convert.weights(src, tmp_path / "dst", "int4"), CONFIG, STATE, "int4", "int8")


def test_from_one_of_ours_in_fp16(tmp_path):
    src = write_official(tmp_path / "src", CONFIG, STATE)
    ours = convert.weights(src, tmp_path / "ours")
    dst = convert.weights(ours, tmp_path / "dst", "int4")
    assert_files(dst, CONFIG, STATE, "int4", "int8")
    other = convert.weights(src, tmp_path / "other", "int4")
    names = {p.name for p in other.iterdir()}
    assert names == {p.name for p in dst.iterdir()}
    for name in names - {"convert.json"}:
        assert (dst / name).read_bytes() == (other / name).read_bytes(), name
    assert convert.plan_weights(ours, dst, "int4").finished and not convert.plan_weights(src, dst, "int4").finished


def test_refusals(tmp_path):
    src = write_official(tmp_path / "src", CONFIG, STATE)
    ours, int4 = convert.weights(src, tmp_path / "ours"), convert.weights(src, tmp_path / "int4", "int4")
    cases = [
        (
            lambda: convert.weights(src, tmp_path / "x", "int4", "int3"),
            "dtype 'int3' is unknown; choose one of fp16, int8, int4",
        ),
        (lambda: convert.weights(ours, tmp_path / "x"), "already converted; it can be used as it is"),
        (
            lambda: convert.weights(int4, tmp_path / "x", "int8"),
            "int4: already in int4, lm_head in int8; convert the official checkpoint",
        ),
        (lambda: convert.weights(int4, tmp_path / "x"), "already in int4"),
        (lambda: convert.weights(src, int4, "int8"), "int4: exists already"),
        (
            lambda: convert.export(int4, tmp_path / "x"),
            "is in int4, lm_head in int8, and only fp16 is exported so; convert with --dtype fp16, or choose the format gptq",
        ),
    ]
    for call, says in cases:
        with pytest.raises(MossError, match=says) as e:
            call()
        assert str(e.value).isprintable()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int4", "ours", "src"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65537.0, -1e30])
def test_a_bad_number_names_its_tensor(tmp_path, bad):
    state = {**STATE, "transformer.h.1.mlp.fc_out.weight": STATE["transformer.h.1.mlp.fc_out.weight"].copy()}
    state["transformer.h.1.mlp.fc_out.weight"][3, 5] = bad
    write_official(tmp_path / "src", CONFIG, state, dtype="fp32")
    with pytest.raises(MossError, match=r"tensor transformer\.h\.1\.mlp\.fc_out\.weight holds (NaN|infinity|.*beyond fp16's)"):
        convert.weights(tmp_path / "src", tmp_path / "dst", "int4")
    assert not (tmp_path / "dst").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how much memory a process had")
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_memory_does_not_grow_with_the_model(tmp_path, dtype):
    """Matrices of 64 MB and more: what is held at once is a few chunks, and an eighth of lm_head as scales and zeros."""
    config = small_config(n_embd=512, vocab_size=64_000, n_layer=1, n_inner=16)
    state = {name: np.zeros(shape, np.float32) for name, shape in shapes(config).items()}
    src = write_official(tmp_path / "src", config, state, dtype=dtype)
    command = [sys.executable, "-c", MEASURED, src, tmp_path / "dst", "int4"]
    threads = min(cores().usable, copy._MOST_THREADS)
    assert int(subprocess.check_output(command)) < (24 + 12 * threads) << 20
