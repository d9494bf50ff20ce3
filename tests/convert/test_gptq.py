"""GPTQ checkpoints in: every weight bit for bit what the official formula gives, and what is wrong with one in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from moss_jt.convert.regroup import arrange, choose

from moss_jt import MossError, convert
from moss_jt.weights import open_weights
from moss_jt.weights.layout import Coding
from tests import dequantise
from tests.checkpoints import small_config, store
from tests.gptq_checkpoints import Made, packed, random_gptq

SIZES = {
    "whole groups": {"n_embd": 256, "n_head": 4, "n_layer": 1},
    "short last groups": {"n_embd": 160, "n_head": 8, "n_inner": 304},
    "out_proj ends inside a group": {"n_embd": 48, "n_head": 4, "n_inner": 152},
}
QKV, OUT, FC_IN, FC_OUT = (
    f"transformer.h.{i}.{x}" for i, x in ((0, "attn.qkv_proj"), (1, "attn.out_proj"), (1, "mlp.fc_in"), (0, "mlp.fc_out"))
)


def small(**changes) -> dict:
    return small_config(**{"n_embd": 64, "n_head": 4, **changes})


def assert_exact(made: Made, folder) -> None:
    """The stored matrices are the official ones; the rest is there, too."""
    weights = open_weights(folder)
    state = {name: x.astype(np.float64) for name, (dtype, x) in made.stored.items() if dtype == "fp16"}
    found = dequantise.official_state(weights, state)
    assert made.weights.keys() <= found.keys()
    for name, x in made.weights.items():
        assert np.array_equal(found[name], x), name
    assert np.array_equal(found["lm_head.weight"], state["lm_head.weight"])
    for i in range(weights.config.n_layer):
        for ours, official in (("in.bias", "mlp.fc_in.bias"), ("out.bias", "mlp.fc_out.bias"), ("ln_1.weight", "ln_1.weight")):
            assert np.array_equal(weights.block(i)[ours], state[f"transformer.h.{i}.{official}"])


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, 1024, -1])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight_is_exact(tmp_path, bits, group, act_order, size):
    made = random_gptq(small_config(**SIZES[size]), bits, group, act_order)
    dst = convert.weights(made.write(tmp_path / "src"), tmp_path / "dst")
    coding = open_weights(dst).coding
    assert (coding.dtype, coding.head_dtype) == (f"int{bits}", "fp16")
    if size == "whole groups":
        all_alike = group in (256, 1024, -1)  # of n_embd inputs, but not of n_inner
        assert coding.group == (group if group in (32, 64, 96, 128) else 128) or group == 96
        assert coding.ordered or not act_order or all_alike
    assert json.loads((dst / "config.json").read_text()) == {**made.config, "moss_jt": {"format": 3, **coding.to_dict()}}
    assert_exact(made, dst)


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_container(tmp_path, container, bits):
    made = random_gptq(small(), bits, 32, act_order=True)
    assert_exact(made, convert.weights(made.write(tmp_path / "src", container), tmp_path / "dst"))


@pytest.mark.parametrize(
    ("container", "name"), [("safetensors", "gptq_model-4bit-32g.safetensors"), ("zip", "gptq_model-4bit-32g.bin")]
)
def test_names_of_other_programs(tmp_path, container, name):
    made = random_gptq(small(), 4, 32)
    assert_exact(made, convert.weights(made.write(tmp_path / "src", container, name), tmp_path / "dst"))


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_v2_stores_zeros_as_they_are(tmp_path, bits):
    made = random_gptq(small(), bits, 32, True, less_one=0)  # 0 is among them, and is exact, too
    assert_exact(made, convert.weights(made.write(tmp_path / "src"), tmp_path / "dst"))
    made.config["quantization_config"].pop("checkpoint_format")
    src = made.write(tmp_path / "src2")
    (src / "quantize_config.json").write_text(json.dumps({"bits": bits, "group_size": 32, "checkpoint_format": "gptq_v2"}))
    assert_exact(made, convert.weights(src, tmp_path / "dst2"))


@pytest.mark.parametrize("group", [32, 128, -1])
def test_without_g_idx(tmp_path, group):
    made = random_gptq(small(n_inner=144), 8, group)
    for name in made.matrices:
        del made.stored[f"{name}.g_idx"]
    assert_exact(made, convert.weights(made.write(tmp_path / "src"), tmp_path / "dst"))
    del made.config["groupsize"]
    assert_exact(made, convert.weights(made.write(tmp_path / "src2"), tmp_path / "dst2"))


def test_groups_that_no_input_is_in(tmp_path):
    made = random_gptq(small(), 4, 32)
    for part in ("qzeros", "scales"):
        made.set(f"{QKV}.{part}", np.concatenate([made.stored[f"{QKV}.{part}"][1]] * 2))
    assert_exact(made, convert.weights(made.write(tmp_path / "src"), tmp_path / "dst"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_scales_of_other_dtypes_are_kept_if_fp16_holds_them(tmp_path, dtype):
    made = random_gptq(small(), 4, 32)
    scales = np.full_like(made.stored[f"{FC_IN}.scales"][1], 0.25, np.float32)
    q = (made.weights[f"{FC_IN}.weight"] / np.repeat(made.stored[f"{FC_IN}.scales"][1], 32, 0).T.astype(np.float64)).round()
    made.weights[f"{FC_IN}.weight"] = q * 0.25
    made.set(f"{FC_IN}.scales", *store(scales, dtype)[::-1])
    assert_exact(made, convert.weights(made.write(tmp_path / "src"), tmp_path / "dst"))
    scales[1, 3] = 1 + 2**-12 if dtype == "fp32" else 1e-9
    made.set(f"{FC_IN}.scales", *store(scales, dtype)[::-1])
    with pytest.raises(MossError, match=rf"tensor {FC_IN}\.scales is (F32|BF16), and fp16 cannot hold it exactly"):
        convert.weights(made.write(tmp_path / "src"), tmp_path / "dst2")


def test_biases_of_zeros_are_dropped(tmp_path):
    made = random_gptq(small(), 4, 32)
    for i in range(2):
        made.set(f"transformer.h.{i}.attn.qkv_proj.bias", np.zeros(192, np.float16), "fp16")
        made.set(f"transformer.h.{i}.attn.out_proj.bias", np.zeros(64, np.float16), "fp16")
    assert_exact(made, convert.weights(made.write(tmp_path / "src"), tmp_path / "dst"))
    made.stored[f"{OUT}.bias"][1][5] = 0.5
    with pytest.raises(MossError, match=rf"tensor {OUT}\.bias is not zero, but MOSS has no bias there$"):
        convert.weights(made.write(tmp_path / "src2"), tmp_path / "dst2")


def test_dtypes_that_can_be_asked_for(tmp_path):
    src = random_gptq(small(), 4, 32).write(tmp_path / "src")
    dst = convert.weights(src, tmp_path / "dst", "int4", "int8")
    assert open_weights(dst).coding == Coding("int4", "int8", 32)
    assert convert.plan_weights(src, dst, head_dtype="int8").finished
    for dtype in ("int8", "fp16"):
        with pytest.raises(MossError, match=rf"quantised to int4 and kept so; for {dtype} take the checkpoint in fp16"):
            convert.weights(src, tmp_path / "other", dtype)


def test_what_the_config_gets_wrong_is_said_and_not_believed(tmp_path):
    made = random_gptq(small(), 8, 32)
    made.config.update(wbits=4)
    job = convert.plan_weights(made.write(tmp_path / "src"), tmp_path / "dst")
    assert job.notes == [f"{tmp_path}/src/config.json: says 4 bits, but the tensors are in 8; the tensors are right"]
    job.run()
    assert_exact(made, tmp_path / "dst")
    made.config.update(wbits=8, groupsize=128)
    notes = convert.plan_weights(made.write(tmp_path / "src"), tmp_path / "dst").notes
    assert len(notes) == 1 and "says groups of 128, but the tensors have groups of 32; the tensors are right" in notes[0]
    made.config.update(groupsize=32)
    assert not convert.plan_weights(made.write(tmp_path / "src"), tmp_path / "dst").notes


def test_a_stopped_conversion_goes_on(tmp_path):
    made = random_gptq(small(n_layer=3), 4, 32, True)
    src = made.write(tmp_path / "src")

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.weights(src, tmp_path / "dst", progress=stop)
    assert (tmp_path / "dst.partial/block-00.safetensors").exists()
    assert_exact(made, convert.weights(src, tmp_path / "dst"))


# ---- the size of groups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "ordered", "expected"),
    [
        ([128, 128, 128], False, (128, False)),
        ([1024, 1024, 512], False, (128, False)),
        ([96, 96, 7], False, (96, False)),
        ([200, 200], False, (40, False)),
        ([128, 128], True, (128, True)),
        ([1024, 256], True, (128, True)),
        ([64, 13, 64], True, (64, True)),  # the one of 13 is last
        ([13, 64, 13], True, None),
        ([130, 130], True, None),
    ],
)
def test_the_largest_size_is_chosen(sizes, ordered, expected):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    if ordered:
        groups = np.random.default_rng(1).permutation(groups)
    assert choose([groups]) == expected
    if expected:
        order, of_source = arrange(groups, *expected)
        assert sorted(order) == list(range(len(groups))) and len(of_source) == -(-len(groups) // expected[0])
        assert (groups[order] == np.repeat(of_source, expected[0])[: len(groups)]).all()


# ---- what is wrong ----------------------------------------------------------------------------------------------------------


def _cut(made: Made, name: str, *where: slice) -> None:
    made.set(name, np.ascontiguousarray(made.stored[name][1][where]))


def _poke(made: Made, name: str, value: float, dtype: str | None = None) -> None:
    x = made.stored[name][1].copy()
    x[-1] = value
    made.set(name, x, dtype)


WRONG = {
    "a tensor is missing": (lambda m: m.stored.pop(f"{OUT}.qzeros"), rf"tensor {OUT}\.qzeros is missing"),
    "and one that is not quantised": (lambda m: m.stored.pop("lm_head.bias"), r"tensor lm_head\.bias is missing"),
    "qweight is transposed": (
        lambda m: m.set(f"{QKV}.qweight", m.stored[f"{QKV}.qweight"][1].T.copy()),
        rf"tensor {QKV}\.qweight has shape \[192, 8\], config\.json asks for 192 outputs of 64 inputs: \[8, 192\] in 4 bits, ",
    ),
    "two bits": (lambda m: _cut(m, f"{QKV}.qweight", slice(4)), r"has shape \[4, 192\], config\.json asks for"),
    "scales are short": (lambda m: _cut(m, f"{OUT}.scales", slice(None), slice(63)), r"out_proj\.scales has shape \[2, 63\]"),
    "scales are one number": (lambda m: m.set(f"{OUT}.scales", np.array(1, np.float16)), r"out_proj\.scales has shape \[\]"),
    "zeros are short": (
        lambda m: _cut(m, f"{OUT}.qzeros", slice(1)),
        r"out_proj\.qzeros has shape \[1, 8\], but \[2, 8\] belongs",
    ),
    "g_idx is short": (
        lambda m: _cut(m, f"{FC_OUT}.g_idx", slice(255)),
        r"fc_out\.g_idx has shape \[255\], but \[256\] belongs",
    ),
    "g_idx is too large": (lambda m: _poke(m, f"{FC_OUT}.g_idx", 8), r"fc_out\.g_idx holds 8, but there are 8 groups"),
    "g_idx is negative": (lambda m: _poke(m, f"{FC_OUT}.g_idx", -1), r"fc_out\.g_idx holds -1, but there are 8 groups"),
    "g_idx is fractional": (lambda m: _poke(m, f"{QKV}.g_idx", 0, "fp32"), r"qkv_proj\.g_idx is F32, expected I32 or I64"),
    "a scale is NaN": (lambda m: _poke(m, f"{FC_IN}.scales", np.nan), r"tensor \S*fc_in\.scales holds NaN"),
    "a scale is infinite": (lambda m: _poke(m, f"{OUT}.scales", -np.inf), r"tensor \S*out_proj\.scales holds infinity"),
    "one is not quantised": (
        lambda m: m.set(f"{OUT}.weight", np.zeros((64, 64), np.float16), "fp16"),
        rf"tensor {OUT}\.weight is not quantised, but other matrices are",
    ),
    "lm_head is quantised": (
        lambda m: (m.stored.pop("lm_head.weight"), m.set("lm_head.qweight", np.zeros((8, 24), np.int32), "int32")),
        r"tensor lm_head\.weight is missing",
    ),
    "groups of odd sizes": (
        lambda m: m.set(f"{QKV}.g_idx", np.repeat(np.arange(2, dtype=np.int32), [31, 33])),
        r"groups of inputs cannot be cut into pieces of one size, a multiple of 8 up to 128",
    ),
    "another program": (
        lambda m: m.config.update(quantization_config={"quant_method": "awq"}),
        r"quantised with 'awq'; of quantised",
    ),
    "another layout": (
        lambda m: m.config.update(quantization_config={"checkpoint_format": "marlin"}),
        r"its checkpoint_format is 'marlin'; only 'gptq' and 'gptq_v2'",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_is_wrong_is_one_line(tmp_path, case):
    change, says = WRONG[case]
    made = random_gptq(small(), 4, 32)
    change(made)
    made.write(tmp_path / "src")
    with pytest.raises(MossError, match=says) as e:
        convert.weights(tmp_path / "src", tmp_path / "dst")
    assert str(e.value).isprintable() and not (tmp_path / "dst").exists()


def test_matrices_of_different_bits(tmp_path):
    made, other = random_gptq(small(), 4, 32), random_gptq(small(), 8, 32)
    made.stored.update({n: x for n, x in other.stored.items() if n.startswith("transformer.h.1.mlp.fc_out")})
    with pytest.raises(MossError, match=r"h\.1\.mlp\.fc_out is in 8 bits and \S+ in 4; all must be alike"):
        convert.weights(made.write(tmp_path / "src"), tmp_path / "dst")


def test_act_order_needs_whole_panels(tmp_path):
    made = random_gptq(small(n_embd=40, n_inner=160), 4, 8, True)
    with pytest.raises(MossError, match="n_embd 40 is not a multiple of 16, as act-order needs"):
        convert.weights(made.write(tmp_path / "src"), tmp_path / "dst")


def test_groups_unknown_without_g_idx(tmp_path):
    made = random_gptq(small(), 4, 32)
    del made.stored[f"{QKV}.g_idx"], made.config["groupsize"]
    for part, x in (("scales", np.ones((5, 192), np.float16)), ("qzeros", np.zeros((5, 24), np.int32))):
        made.set(f"{QKV}.{part}", x)
    with pytest.raises(MossError, match=r"tensor \S*qkv_proj\.g_idx is missing, and 5 groups of 64 inputs may be any"):
        convert.weights(made.write(tmp_path / "src"), tmp_path / "dst")


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_a_file_that_was_cut_short(tmp_path, container):
    src = random_gptq(small(), 4, 32).write(tmp_path / "src", container)
    (path,) = src.glob("*model.*")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(MossError, match=rf"^{path}: .*(cut short|damaged)"):
        convert.weights(src, tmp_path / "dst")


def test_other_architectures(tmp_path):
    llama = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "wbits": 4, "groupsize": 32}
    base_7b = {**llama, "model_type": "moss"}
    layer = {"qweight": np.zeros((8, 64), np.int32), "qzeros": np.zeros((2, 8), np.int32), "g_idx": np.zeros(64, np.int32)}
    stored = {f"model.layers.0.self_attn.q_proj.{name}": ("int32", x) for name, x in layer.items()}
    for config, says in (
        (llama, "n_embd and rotary_dim missing: not a moss-moon-003 model"),
        (base_7b, "this is moss-base-7b's architecture"),
        (small(), r"none of MOSS's tensors are here, but model\.layers\.0\.self_attn\.q_proj\.qweight"),
    ):
        with pytest.raises(MossError, match=says):
            convert.weights(Made(config, stored, {}).write(tmp_path / "src"), tmp_path / "dst")


def test_the_packing_of_the_tests_is_the_official_one():
    """Of OpenMOSS/MOSS's models/quantization.py: low bits first, along the inputs."""
    assert packed(np.arange(8)[:, None], 4).tolist() == [[0x76543210]]
    assert packed(np.array([[1], [2], [3], [255]]), 8).view(np.uint32).tolist() == [[0xFF030201]]
