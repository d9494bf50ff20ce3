"""sweep.cuh: a whole model against float64, on the emulated device."""

from __future__ import annotations

import numpy as np
import pytest

from moss_jt.config import Config
from moss_jt.ops.rotary import rotary_angles
from moss_jt.ops.sweep import _BLOCK, MOST_ROWS, MOVED, _fill
from moss_jt.sampling import likeliest, penalised
from moss_jt.swap.plan import CHUNK, make_plan
from moss_jt.weights.layout import BITS, Coding

from .. import dequantise, reference
from ..emulation.build import build, unwritten
from ..swap import models
from ..test_kv_cache import rounded

WRAPPERS = """
#include "sweep.cuh"
// Addresses as numbers are of the host's memory.
ModelSizes the_model;
void card(int64_t multiprocessors) { device().multiprocessors = (int)multiprocessors; }
int64_t logits(int64_t T) { return (char*)Space(the_model, T, MOST_ROWS, nullptr).logits - (char*)nullptr; }
int64_t bytes(int64_t T, int64_t R, int64_t places) { return space_bytes(the_model, T, R, places); }
void model(int64_t D, int64_t I, int64_t V, int64_t heads, int64_t rotary, int64_t context, int64_t bits, int64_t head_bits,
           int64_t cache_bits) {
    the_model = {D, I, V, heads, rotary, context, bits, 128, 0, head_bits, 128, cache_bits, V, nullptr, 1e-5};
}
void located_blocks(int64_t table, int64_t n, int64_t moved, int64_t found) {
    const auto blocks = located((const BlockTensors*)table, n, (const void*)moved);
    for (int64_t i = 0; i < n; i++) ((BlockTensors*)found)[i] = blocks[i];
}
void block(const half* embedded, const float* angles, const float* norm_weight, const float* norm_bias, const float* in_bias,
           const float* out_bias, const void* in, const half* in_scale, const uint8_t* in_zero, const void* out,
           const half* out_scale, const uint8_t* out_zero, void* keys, void* values, float* key_scales, float* value_scales,
           int64_t sequences, int64_t n, int64_t T, void* at, int64_t most) {
    ModelSizes m = the_model;
    m.angles = angles;
    const BlockTensors b = {norm_weight, norm_bias, in_bias, out_bias, {in, in_scale, in_zero, nullptr},
                            {out, out_scale, out_zero, nullptr}, keys, values, key_scales, value_scales};
    run_blocks(m, &b, 1, embedded, (const Sequence*)sequences, n, T, Space(m, most, MOST_ROWS, (char*)at), 0);
}
void head(const float* norm_weight, const float* norm_bias, const float* bias, const void* q, const half* scale,
          const uint8_t* zero, int64_t first, int64_t count, int64_t rows, int64_t R, void* at, int64_t most) {
    const HeadTensors h = {norm_weight, norm_bias, bias, {q, scale, zero, nullptr}, first, count};
    run_head(the_model, h, (const int32_t*)rows, R, Space(the_model, most, MOST_ROWS, (char*)at), 0);
}
void likeliest(int64_t by, int64_t starts, const int32_t* ids, int64_t R, int64_t k, float* out, void* at, int64_t most) {
    Penalties p = {};
    for (int64_t r = 0; r < R; r++) p.by[r] = ((float*)by)[r], p.start[r + 1] = ((int32_t*)starts)[r + 1];
    run_top(the_model, p, ids, R, k, out, Space(the_model, most, MOST_ROWS, (char*)at), 0);
}
"""
CONTEXT, MOST = 24, 16


@pytest.fixture(scope="module")
def kernels():
    return build(WRAPPERS)


class Emulated:
    """A model as moss_jt/devices/gpu.py runs it, but on the emulated device, and a block at a time."""

    def __init__(self, kernels, weights, kv_cache: str, places: int):
        self.kernels, self.weights, c = kernels, weights, weights.config
        self.bits = BITS[weights.coding.dtype], BITS[weights.coding.head_dtype], 8 if kv_cache == "int8" else 16
        sizes = (c.n_embd, c.n_inner, c.vocab_size, c.n_head, c.rotary_dim, CONTEXT)
        kernels.model(*sizes, *self.bits)
        self.space = unwritten(kernels.bytes(MOST, MOST_ROWS, places), np.uint8)
        rows = (places, c.n_head, CONTEXT)
        numbers = ((*rows, c.head_size), np.int8 if kv_cache == "int8" else np.float16)
        shapes = [numbers, numbers] + [(rows, np.float32)] * 2 * (kv_cache == "int8")
        self.caches = [[unwritten(*shape) for shape in shapes] for _ in range(c.n_layer)]

    def sweep(self, ids, table, rows) -> np.ndarray:
        """Logits (R, V)."""
        c, table = self.weights.config, np.array(table, np.int32)
        embedded, angles = self.weights.wte()["wte.weight"][ids], rotary_angles(CONTEXT, c.rotary_dim)
        for i, cache in enumerate(self.caches):
            w = self.weights.block(i)
            vectors = [w[name] for name in ("ln_1.weight", "ln_1.bias", "in.bias", "out.bias")]
            matrices = [part for name in ("in.weight", "out.weight") for part in _parts(w, name)]
            parts = [*cache, *[None] * (4 - len(cache))]
            given = embedded if i == 0 else None
            args = (given, angles, *vectors, *matrices, *parts, table.ctypes.data, len(table), len(ids), self.space, MOST)
            self.kernels.block(*args)
        self._head(np.array(rows, np.int32))
        at, count = self.kernels.logits(MOST), len(rows) * c.vocab_size
        return self.space.array[at:][: 4 * count].view(np.float32).reshape(len(rows), -1).copy()

    def _head(self, rows: np.ndarray) -> None:
        """In two parts, the first of 48 rows."""
        h, vocab = self.weights.head(), self.weights.config.vocab_size
        norm = [h[name] for name in ("ln_f.weight", "ln_f.bias")]
        for first, end in ((0, 48), (48, vocab)):
            parts = [
                part if part is None else part[_panels(part, h, first) : _panels(part, h, end)]
                for part in _parts(h, "lm_head.weight")
            ]
            given = (*norm, h["lm_head.bias"][first:end], *parts, first, end - first)
            self.kernels.head(*given, rows.ctypes.data, len(rows), self.space, MOST)

    def likeliest(self, rows, k: int, seen: list[np.ndarray], by: list[float]) -> tuple[np.ndarray, np.ndarray]:
        self._head(np.array(rows, np.int32))
        starts, ids = np.cumsum([0, *map(len, seen)]).astype(np.int32), np.concatenate([*seen, [0]]).astype(np.int32)
        out = unwritten((2, len(rows), k), np.float32)
        by = np.array(by, np.float32)
        self.kernels.likeliest(by.ctypes.data, starts.ctypes.data, ids, len(rows), k, out, self.space, MOST)
        return out.array[0], out.array[1].view(np.int32)


def _panels(part: np.ndarray, head: dict, row: int) -> int:
    """Where a row of lm_head is in what it is stored as: whole panels, in fp16 rows."""
    return row if "lm_head.weight" in head else min(len(part), -(-row // 16))


def _parts(tensors: dict, name: str) -> list:
    if name in tensors:
        return [np.asarray(tensors[name]), None, None]
    return [np.asarray(tensors[f"{name}.{part}"]) for part in ("q", "scale", "zero")]


def official(weights) -> dict:
    """Official name -> array."""
    names = {
        "ln_1.weight": "ln_1.weight", "ln_1.bias": "ln_1.bias", "in.bias": "mlp.fc_in.bias", "out.bias": "mlp.fc_out.bias",
    }  # fmt: skip
    head = weights.head()
    found = {"transformer.wte.weight": weights.wte()["wte.weight"], "lm_head.bias": head["lm_head.bias"]}
    found.update({f"transformer.{name}": head[name] for name in ("ln_f.weight", "ln_f.bias")})
    for i in range(weights.config.n_layer):
        found.update({f"transformer.h.{i}.{theirs}": weights.block(i)[ours] for ours, theirs in names.items()})
    return dequantise.official_state(weights, found)


def test_addresses_relative_to_what_is_moved(kernels):
    """From MOVED on; others, and what there is none of, stay."""
    names = [name for name in _BLOCK.names if not _BLOCK[name].names]
    tensors = {name: MOVED + 4096 * i for i, name in enumerate([*names[:4], "in.weight.q", "in.weight.scale", "out.weight"])}
    table, found = np.zeros(2, _BLOCK), np.zeros(2, _BLOCK)
    _fill(table[1], tensors)
    table["keys"] = 7000, (1 << 48) - 8
    kernels.located_blocks(table.ctypes.data, 2, 5 << 40, found.ctypes.data)
    expected = np.array(table.tolist(), _BLOCK)
    fields = expected.view(np.uint64)
    fields[fields >= MOVED] += np.uint64((5 << 40) - MOVED & (1 << 64) - 1)
    assert (found == expected).all() and found[1]["out.weight"]["q"] == (5 << 40) + 4096 * 6 and not found[0]["in.bias"]


@pytest.mark.parametrize("multiprocessors", [1, 14, 46, 82, 132, 200])
def test_the_plan_leaves_room_for_the_work_space(kernels, multiprocessors):
    """Whatever the card, and of which shape the model is."""
    for d, heads, inner, vocab, context in ((6144, 24, 24576, 107008, 2048), (1024, 8, 4096, 50000, 512), (64, 4, 72, 300, 24)):
        config = Config(2, d, heads, inner, d // heads, context, vocab)
        kernels.card(multiprocessors)
        kernels.model(d, inner, vocab, heads, d // heads, context, 4, 8, 16)
        plan = make_plan(config, Coding("int4", "int8"), context, 1 << 50, gpu=True)
        assert kernels.bytes(min(CHUNK, context), MOST_ROWS, 1) + 4 * MOST_ROWS * context <= plan.memory["work space"]


@pytest.mark.parametrize(
    "dtype, head_dtype, kv_cache", [("fp16", "fp16", "fp16"), ("int8", "int8", "int8"), ("int4", "int8", "fp16")]
)
def test_a_prompt_and_what_follows_it(kernels, tmp_path, rng, monkeypatch, dtype, head_dtype, kv_cache):
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "rotary_dim": 8, "vocab_size": 300, "n_inner": 72}
    weights = models.write(tmp_path / "model", dtype, head_dtype, seed=int(rng.integers(1 << 30)), **sizes)
    model, state = Emulated(kernels, weights, kv_cache, places=2), official(weights)
    a, b = rng.integers(0, 300, 15), rng.integers(0, 300, 6)
    if kv_cache == "int8":
        attention = reference.attention
        monkeypatch.setattr(reference, "attention", lambda q, k, v: attention(q, rounded(k), rounded(v)))
    exact = {len(ids): reference.logits(weights.config, state, ids) for ids in (a, b)}

    def close(ours, theirs):
        assert np.linalg.norm(ours - theirs) < models.MOST[kv_cache] * np.linalg.norm(theirs)

    close(model.sweep(a[:12], [(1, 0, 0, 12)], [3, 11]), exact[15][[3, 11]])
    both = np.concatenate([a[12:14], b])
    logits = model.sweep(both, [(1, 12, 0, 2), (0, 0, 2, 6)], [1, 7])
    close(logits, np.stack([exact[15][13], exact[6][5]]))
    last = model.sweep(a[14:], [(1, 14, 0, 1)], [0])
    close(last, exact[15][[14]])

    seen = np.unique(a)
    values, ids = model.likeliest([0], 5, [seen], [1.5])
    expected = likeliest(penalised(last[0], seen, np.float32(1.5)), 5)
    assert np.array_equal(ids[0], expected.ids) and np.array_equal(values[0], expected.logits)
