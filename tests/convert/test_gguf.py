"""Ours to GGUF: the file's tensors are the source's, and phi2 computes MOSS's logits from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from moss_jt.convert import gguf as container
from moss_jt.convert.rows import Matrix
from moss_jt.convert.view import of_region

from moss_jt import MossError, convert
from moss_jt.config import Config
from moss_jt.weights import open_weights
from moss_jt.weights.layout import Tensor
from moss_jt.weights.store import Region
from tests import dequantise, gguf_file, reference
from tests.checkpoints import random_state, small_config, write_official
from tests.tokenizer_folders import official_folder, sentencepiece_folder

SIZES = [
    {"n_embd": 64, "n_head": 4, "rotary_dim": 8},
    {"n_embd": 96, "n_head": 12, "rotary_dim": 2, "n_inner": 160, "n_layer": 3},
    {"n_embd": 160, "n_head": 4, "rotary_dim": 40, "n_inner": 32, "n_layer": 1, "vocab_size": 523},
]
FORMATS = ["gguf-f16", "gguf-q8_0", "gguf-q4_0"]
TYPES = {"gguf-f16": (1, 1), "gguf-q8_0": (8, 8), "gguf-q4_0": (2, 8)}  # ggml's numbers: blocks' matrices, the others


def make(folder: Path, dtype: str = "fp16", seed: int = 0, **sizes) -> tuple[Path, dict, dict]:
    """A converted checkpoint that can hold a dialogue, its config and its official state."""
    config = small_config(**{"vocab_size": 400, "eos_token_id": 316, **sizes})
    state = random_state(config, seed)
    src = official_folder(write_official(folder / "src", config, state, masks=False))
    return convert.weights(src, folder / "ours", dtype), config, state


def error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_phi2_computes_moss(tmp_path, sizes, format, dtype):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    ours, config, state = make(tmp_path, dtype, seed, **sizes)
    found = gguf_file.read_gguf(convert.export(ours, tmp_path / "m.gguf", format))
    ids = np.random.default_rng(seed).integers(0, config["vocab_size"], 20)
    stored = dequantise.official_state(open_weights(ours), state)
    exact = reference.logits(Config.from_dict(config), stored, ids)
    off = error(gguf_file.logits(found, ids), exact)
    assert off < {"gguf-f16": 1e-6 if dtype == "fp16" else 1e-3, "gguf-q8_0": 2e-2, "gguf-q4_0": 0.3}[format]
    assert format == "gguf-f16" or off > 1e-4


@pytest.mark.parametrize("format", FORMATS)
def test_every_tensor_is_the_source_s(tmp_path, format):
    """Against the official tensors, their rows found by the documented rule; q8_0 and q4_0 to half a step."""
    ours, config, state = make(tmp_path, n_embd=64, n_head=8, rotary_dim=4)
    found = gguf_file.read_gguf(convert.export(ours, tmp_path / "m.gguf", format))
    expected = expected_tensors(config, state)
    assert list(found.tensors) == list(expected)
    for name, exact in expected.items():
        matrices, others = TYPES[format]
        kind = 0 if exact.ndim == 1 else others if name in ("token_embd.weight", "output.weight") else matrices
        assert found.types[name] == kind, name
        if kind < 2:
            np.testing.assert_array_equal(found.tensors[name], exact, err_msg=name)
        else:
            blocks = np.abs(exact).reshape(-1, 32)
            step = np.repeat(blocks.max(1) / (127 if kind == 8 else 8), 32).reshape(exact.shape)
            off = np.abs(found.tensors[name] - exact)
            # Half a step, and 127 times what rounding the scale to fp16 may be off. In q4_0 the scale has the sign of the
            # largest number, and reaches only seven steps to the other side.
            assert (off <= step * (0.57 if kind == 8 else 1.01)).all(), name
            assert np.median(off / step) < 0.3, name


def expected_tensors(config: dict, state: dict) -> dict[str, np.ndarray]:
    """phi2's name -> the values, from the official state; float64, in the order of the file."""
    d, heads, turned = config["n_embd"], config["n_head"], config["rotary_dim"]
    inner, size = config["n_inner"] or 4 * d, d // heads
    entries = [*range(0, turned, 2), *range(1, turned, 2), *range(turned, size)]
    found = {"token_embd.weight": state["transformer.wte.weight"]}
    for i in range(config["n_layer"]):
        s = {name.split(f"h.{i}.")[1]: x for name, x in state.items() if f".h.{i}." in name}
        parts = np.split(s["attn.qkv_proj.weight"], 4)
        q, v, k = (np.concatenate([np.split(part, 3)[c] for part in parts]) for c in range(3))
        q, k = (x.reshape(heads, size, d)[:, entries].reshape(d, d) for x in (q, k))
        block = {
            "attn_norm.weight": s["ln_1.weight"], "attn_norm.bias": s["ln_1.bias"],
            "attn_qkv.weight": np.concatenate([q, k, v]), "attn_qkv.bias": np.zeros(3 * d),
            "attn_output.weight": s["attn.out_proj.weight"], "attn_output.bias": np.zeros(d),
            "ffn_up.weight": s["mlp.fc_in.weight"], "ffn_up.bias": s["mlp.fc_in.bias"],
            "ffn_down.weight": s["mlp.fc_out.weight"], "ffn_down.bias": s["mlp.fc_out.bias"],
        }  # fmt: skip
        assert block["ffn_up.weight"].shape == (inner, d)
        found.update({f"blk.{i}.{name}": x for name, x in block.items()})
    names = {"output_norm": "transformer.ln_f", "output": "lm_head"}
    found.update({f"{ours}.{x}": state[f"{official}.{x}"] for ours, official in names.items() for x in ("weight", "bias")})
    return found


def test_metadata(tmp_path):
    ours, config, _ = make(tmp_path, n_embd=64, n_head=8, rotary_dim=4)
    m = gguf_file.read_gguf(convert.export(ours, tmp_path / "m.gguf", "gguf-q4_0")).metadata
    assert {key: value for key, value in m.items() if not key.startswith("tokenizer.")} == {
        "general.architecture": "phi2", "general.name": "ours", "general.file_type": 2, "general.quantization_version": 2,
        "phi2.context_length": 32, "phi2.embedding_length": 64, "phi2.feed_forward_length": 256, "phi2.block_count": 2,
        "phi2.attention.head_count": 8, "phi2.attention.head_count_kv": 8, "phi2.rope.dimension_count": 4,
        "phi2.rope.freq_base": 10000.0, "phi2.attention.layer_norm_epsilon": pytest.approx(1e-5),
    }  # fmt: skip
    t = {key.removeprefix("tokenizer.ggml."): value for key, value in m.items() if key.startswith("tokenizer.ggml.")}
    assert (t["model"], t["pre"], t["add_bos_token"], t["add_eos_token"]) == ("gpt2", "gpt-2", False, False)
    assert (t["bos_token_id"], t["eos_token_id"]) == (config["bos_token_id"], config["eos_token_id"])
    vocab = json.loads((ours / "vocab.json").read_text())
    added = json.loads((ours / "added_tokens.json").read_text())
    assert len(t["tokens"]) == len(t["token_type"]) == 400 == len(set(t["tokens"]))
    for token, i in {**vocab, **added}.items():
        assert t["tokens"][i] == token
        assert t["token_type"][i] == (3 if token[0] == "<" and token[-1] == ">" else 4 if token in added else 1), token
    assert set(t["token_type"][len(vocab) + len(added) :]) == {5}
    assert t["merges"] == (ours / "merges.txt").read_text().splitlines()[1:]


@pytest.mark.parametrize(("ours", "theirs"), [(container.Q8_0, "Q8_0"), (container.Q4_0, "Q4_0")])
def test_bits_are_those_of_the_gguf_package(ours, theirs):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng()
    x = rng.standard_normal((50, 256), np.float32) * (10.0 ** rng.integers(-7, 4, (50, 1))).astype(np.float32)
    x[3], x[4, ::2], x[5] = 0, 0, np.round(x[5] * 4)  # blocks of zeros; whole numbers
    halves = np.arange(-15.5, 15, dtype=np.float32)  # with a scale of 1, and the numbers before them
    x[6:8, ::32], x[6, 1:32], x[7, 1:32] = 127, halves, np.nextafter(halves, np.float32(0))
    their = gguf.quants.quantize(x, gguf.GGMLQuantizationType[theirs])
    np.testing.assert_array_equal(ours.encode(x), their)
    assert ours.nbytes * x.size // ours.block == their.nbytes


def test_the_gguf_package_opens_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    ours, _, _ = make(tmp_path, n_embd=64)
    out = convert.export(ours, tmp_path / "m.gguf", "gguf-q8_0")
    mine = gguf_file.read_gguf(out)
    theirs = {t.name: t for t in gguf.GGUFReader(out).tensors}
    assert theirs.keys() == mine.raw.keys()
    for name, t in theirs.items():
        values = gguf.quants.dequantize(t.data, t.tensor_type)
        np.testing.assert_allclose(values.reshape(mine.tensors[name].shape), mine.tensors[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("second", [0, 37])
def test_rows_of_a_matrix_whose_inputs_are_in_other_orders(tmp_path, bits, second):
    rng, (n, k, group) = np.random.default_rng(), (50, 100, 24)
    panels, groups, orders = 4, 5, 2 if second else 1
    shapes = {"q": (panels, groups, group * bits // 32, 64), "scale": (panels, groups, 16), "zero": (panels, groups, 16)}
    stored = {name: rng.integers(0, 256, shape, np.uint8) for name, shape in shapes.items()}
    stored["scale"] = rng.standard_normal(shapes["scale"]).astype(np.float16)
    stored["order"] = np.array([rng.permutation(k) for _ in range(orders)], np.int32)
    named = {f"m.{name}": x for name, x in stored.items()}
    (tmp_path / "raw").write_bytes(b"".join(x.tobytes() for x in named.values()))
    kinds = {np.uint8: "U8", np.float16: "F16", np.int32: "I32"}
    tensors = tuple(Tensor(name, kinds[x.dtype.type], x.shape) for name, x in named.items())
    views = of_region(Region(tmp_path / "raw", 0, sum(t.nbytes for t in tensors), tensors))
    parts = [stored[name] for name in ("q", "scale", "zero")]
    exact = dequantise.dequantise(*parts, bits, n, groups * group)[:, :k]
    cut = second or n
    exact = np.concatenate([dequantise.in_order(exact[a:b], o) for a, b, o in zip((0, cut), (cut, n), stored["order"])])
    matrix = Matrix(views, "m", (n, k), bits, second)
    for first, count in ((0, n), (5, 3), (15, 2), (30, 20), (49, 1)):
        np.testing.assert_array_equal(matrix.rows(first, count), exact[first : first + count])


# ---- the file that appears whole or not at all ------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_at(share: float):
    def progress(done: int, total: int) -> None:
        if done > total * share:
            raise Stopped

    return progress


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("torn", [False, True])
def test_stopped_and_again(tmp_path, share, torn):
    ours, _, _ = make(tmp_path, n_embd=64, n_layer=5)
    whole = convert.export(ours, tmp_path / "whole.gguf", "gguf-q8_0").read_bytes()
    out, partial = tmp_path / "m.gguf", tmp_path / "m.gguf.partial"
    with pytest.raises(Stopped):
        convert.export(ours, out, "gguf-q8_0", progress=stop_at(share))
    assert not out.exists()
    body = partial / "m.gguf"
    seen = []
    job = convert.plan_export(ours, out, "gguf-q8_0")
    if torn:  # what was being written has not reached the disk
        kept = sum(job.files.values()) - sum(job.remaining.values())
        data = body.read_bytes()
        body.write_bytes(data[:kept] + b"\xff" * (len(data) - kept))
    assert len(job.remaining) < len(job.files) or share == 0
    job.run(lambda done, total: seen.append((done, total)))
    # The header holds the tensors' places and the name of the source's folder: the same for both.
    assert out.read_bytes() == whole and not partial.exists()
    assert seen[-1] == (len(whole), len(whole)) and (seen[0][0] > 0) == (share > 0)


def test_the_last_part_that_was_written_is_not_trusted(tmp_path):
    """It may not have reached the disk; the one before it has, since it was synced before this one was begun."""
    ours, _, _ = make(tmp_path, n_embd=64)
    job = convert.plan_export(ours, tmp_path / "m.gguf", "gguf-f16")
    sizes = list(job.files.values())
    job.partial.mkdir()
    for size, left in ((sizes[0], 5), (sizes[0] + 1, 4), (sizes[0] + sizes[1], 4), (sum(sizes), 1), (sum(sizes) + 9, 1)):
        (job.partial / "m.gguf").write_bytes(b"x" * size)
        assert len(job.remaining) == left == len(job.files) - (5 - left)


def test_a_partial_file_of_another_format_is_refused(tmp_path):
    ours, _, _ = make(tmp_path, n_embd=64)
    with pytest.raises(Stopped):
        convert.export(ours, tmp_path / "m.gguf", "gguf-q8_0", progress=stop_at(0.5))
    with pytest.raises(MossError, match="begun from another source or with other settings"):
        convert.export(ours, tmp_path / "m.gguf", "gguf-f16")


def test_refusals(tmp_path):
    ours, _, _ = make(tmp_path, n_embd=48)
    (tmp_path / "there.gguf").write_text("mine")
    (tmp_path / "spm").mkdir()
    spm = convert.weights(sentencepiece_folder(without_vocabulary(tmp_path)), tmp_path / "spm/ours")
    cases = [
        (tmp_path / "src", "out.gguf", "gguf-f16", "not converted yet"),
        (ours, "out", "gguf-f16", r"name has to end in \.gguf"),
        (ours, "there.gguf", "gguf-f16", "exists already"),
        (ours, "ours/m.gguf", "gguf-f16", "lies in the other"),
        (ours, "no/m.gguf", "gguf-f16", "no such folder to write"),
        (ours, "out.gguf", "gguf-q8_0", "n_embd is 48, which gguf-q8_0 cannot store in blocks of 32; use gguf-f16"),
        (ours, "out.gguf", "gguf-q5_0", "format 'gguf-q5_0' is unknown; choose one of .*gguf-f16, gguf-q8_0, gguf-q4_0"),
        (spm, "out.gguf", "gguf-f16", r"tokenizer\.json: missing; only a byte-level tokenizer"),
    ]
    for src, out, format, says in cases:
        with pytest.raises(MossError, match=says):
            convert.export(src, tmp_path / out, format)
    assert (tmp_path / "there.gguf").read_text() == "mine"
    path = ours / "tokenizer.json"
    text = path.read_text()
    assert '"use_regex":true' in text
    path.write_text(text.replace('"use_regex":true', '"use_regex":false'))
    with pytest.raises(MossError, match=r"tokenizer\.json: cuts text otherwise than GPT-2's"):
        convert.export(ours, tmp_path / "out.gguf", "gguf-f16")


def without_vocabulary(tmp_path: Path) -> Path:
    folder = write_official(tmp_path / "spm/src", small_config(vocab_size=500), random_state(small_config(vocab_size=500)))
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (folder / name).unlink()
    return folder


# ---- llama.cpp --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def trained(llama_cpp, official_checkpoint, tmp_path_factory) -> Path:
    return convert.weights(official_checkpoint("moss-tiny-sft"), tmp_path_factory.mktemp("trained") / "ours")


def llama_logits(llama_cpp, path: Path, ids, last: int) -> np.ndarray:
    model = llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2)
    model.eval([int(i) for i in ids])
    return np.array(model.scores[len(ids) - last : len(ids)])


@pytest.mark.parametrize("format", FORMATS)
def test_llama_cpp_computes_the_trained_checkpoint(llama_cpp, trained, golden, tmp_path, format):
    out = convert.export(trained, tmp_path / "m.gguf", format)
    cases = np.load(golden / "logits_fp16.npz")
    for name in (name for name in cases.files if name.startswith("ids")):
        exact = cases[name.replace("ids", "logits")]
        counts = exact > -5000  # the rest belongs to tokens that were never trained
        found = llama_logits(llama_cpp, out, cases[name], len(exact))
        off = error(found[counts], exact[counts])
        assert off < {"gguf-f16": 1e-3, "gguf-q8_0": 2e-2, "gguf-q4_0": 0.15}[format]


@pytest.mark.parametrize("name", ["int8", "int4-actorder"])
def test_llama_cpp_computes_the_official_quantised_ones(llama_cpp, official_checkpoint, golden, tmp_path, name):
    ours = convert.weights(official_checkpoint(f"moss-tiny-sft-{name}"), tmp_path / "ours")
    out = convert.export(ours, tmp_path / "m.gguf", "gguf-f16")
    cases = np.load(golden / f"logits_{name}.npz")
    exact = cases["logits0"]
    counts = exact > -5000
    assert error(llama_logits(llama_cpp, out, cases["ids0"], len(exact))[counts], exact[counts]) < 2e-3


def test_llama_cpp_computes_a_random_model(llama_cpp, tmp_path):
    ours, config, state = make(tmp_path, "int8", n_embd=128, n_head=4, rotary_dim=8, n_ctx=64)
    out = convert.export(ours, tmp_path / "m.gguf", "gguf-f16")
    ids = np.random.default_rng().integers(0, 300, 40)
    exact = reference.logits(Config.from_dict(config), dequantise.official_state(open_weights(ours), state), ids)
    assert error(llama_logits(llama_cpp, out, ids, 40), exact) < 3e-3


def test_llama_cpp_s_tokenizer(llama_cpp, trained, golden, tmp_path):
    """The official ids, but where whitespace is beside a run of spaces or tabs: docs/formats.md says so."""
    out = convert.export(trained, tmp_path / "m.gguf", "gguf-q4_0")
    model = llama_cpp.Llama(str(out), vocab_only=True, verbose=False)
    records = json.loads((golden / "tokenizer.json").read_text())
    other = [r["text"] for r in records if model.tokenize(r["text"].encode(), add_bos=False, special=True) != r["ids"]]
    assert len(other) == 5 and all("  " in text or "\t\t" in text for text in other)
    assert model.token_eos() == 106068
