"""Checkpoints of random weights: what they hold, what a token reads of them, and that they go away."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from moss_jt import MossError
from moss_jt.bench import Shape, moon, page_cache, random_checkpoint, random_model
from moss_jt.config import Config
from moss_jt.machine import Memory
from moss_jt.weights import open_weights
from moss_jt.weights.layout import BITS, Coding
from tests.dequantise import matrix

SMALL = Config(n_layer=2, n_embd=256, n_head=4, n_inner=384, rotary_dim=8, n_ctx=64, vocab_size=300)
DTYPES = [("fp16", "fp16"), ("int8", "fp16"), ("int8", "int8"), ("int4", "int8"), ("int4", "int4")]


@pytest.mark.parametrize(("dtype", "head_dtype"), DTYPES)
def test_sensible_weights(tmp_path, monkeypatch, dtype, head_dtype):
    monkeypatch.setattr(random_model, "_POOL", 5000)  # every tensor needs it several times, and a part of it
    random_model._pool.cache_clear()
    with random_checkpoint(Shape(SMALL, Coding(dtype, head_dtype)), tmp_path) as folder:
        weights = open_weights(folder)
        assert (weights.config, weights.coding) == (SMALL, Coding(dtype, head_dtype))
        block, head = weights.block(1), weights.head()
        bits, head_bits = BITS[dtype], BITS[head_dtype]
        matrices = [
            matrix(block, "in.weight", 3 * 256 + 384, 256, bits),
            matrix(block, "out.weight", 256, 640, bits),
            matrix(head, "lm_head.weight", 300, 256, head_bits),
        ]
        for x in [*matrices, np.asarray(weights.wte()["wte.weight"], np.float64)]:
            assert x.std() == pytest.approx(0.02, rel=0.05) and abs(x.mean()) < 0.0025  # int4: 0 … 15 less 8
            assert np.abs(x).max() < 0.11
        assert (block["ln_1.weight"] == 1).all() and (head["ln_f.weight"] == 1).all()
        assert 0.01 < head["lm_head.bias"].std() < 0.03 and 0.01 < block["in.bias"].std() < 0.03
        del weights, block, head
    random_model._pool.cache_clear()


def test_gone_at_the_end(tmp_path):
    with random_checkpoint(Shape(SMALL, Coding("int4", "int8")), tmp_path) as folder:
        assert folder.parent == tmp_path and (folder / "block-01.safetensors").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MossError("no"), OSError(errno.EIO, "of somebody else")])
def test_gone_after_an_error_which_is_passed_on(tmp_path, error):
    with (
        pytest.raises(error if isinstance(error, type) else type(error)) as e,
        random_checkpoint(Shape(SMALL, Coding()), tmp_path),
    ):
        raise error
    assert list(tmp_path.iterdir()) == [] and (isinstance(error, type) or e.value is error)


def test_a_disk_that_fills_up_meanwhile(tmp_path, monkeypatch):
    def full(fd: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(random_model.os, "posix_fallocate", full)
    with pytest.raises(MossError, match=r"cannot be written to: No space left on device$"):
        random_checkpoint(Shape(SMALL, Coding()), tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(random_model, "disk_free", lambda folder: 33_000_000_000)
    with pytest.raises(MossError, match=r": 34 blocks in fp16 take 33\.44 GB, and 33\.00 GB are free there: take fewer"):
        random_checkpoint(Shape(moon(34), Coding()), tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_memory_has_no_more_room_than_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(random_model, "disk_free", lambda folder: 1 << 50)
    monkeypatch.setattr(random_model, "memory", lambda: Memory(1 << 40, 5_000_000_000))
    monkeypatch.setattr(random_model, "in_memory", lambda folder: True)
    with pytest.raises(MossError, match=r"6\.25 GB, and 5\.00 GB"):
        random_checkpoint(Shape(moon(4), Coding()), tmp_path).__enter__()


def test_room_in_memory(monkeypatch):
    """What a token reads, the cache for the whole context, and a GiB."""
    shape = Shape(moon(4), Coding("int4", "int8"))
    needed = shape.token_bytes + 4 * 4 * 6144 * 2048 + (1 << 30)
    monkeypatch.setattr(page_cache.machine, "memory", lambda: Memory(1 << 40, needed))
    page_cache.check_room(shape, Path("/"))
    monkeypatch.setattr(page_cache.machine, "memory", lambda: Memory(1 << 40, needed - 1))
    with pytest.raises(MossError, match=rf"needs {needed / 1e9:.2f} GB of it, and {(needed - 1) / 1e9:.2f} GB are available"):
        page_cache.check_room(shape, Path("/"))
    monkeypatch.setattr(page_cache, "in_memory", lambda folder: True)  # then the weights have their memory already
    page_cache.check_room(shape, Path("/"))


@pytest.mark.parametrize(
    ("dtype", "weight", "head_dtype", "head_weight"), [("fp16", 2, "fp16", 2), ("int4", 67 / 128, "int8", 131 / 128)]
)
def test_bytes_a_token_reads(dtype, weight, head_dtype, head_weight):
    """Counted from MOSS's own tensors: 12 d² of weights a block, norms and biases in fp32."""
    d, v = 6144, 107008
    a_block = 12 * d * d * weight + 4 * (2 * d + 4 * d + d)
    head = v * d * head_weight + 4 * (2 * d + v)
    shape = Shape(moon(34), Coding(dtype, head_dtype))
    assert shape.token_bytes == 34 * a_block + head
    assert shape.nbytes == shape.token_bytes + 2 * v * d


def test_operations_of_a_prompt():
    """Counted one product at a time."""
    c, count = SMALL, 0
    for token in range(5):
        for rows, columns in [(3 * 256, 256), (256, 256), (384, 256), (256, 384)]:  # qkv, out_proj, fc_in, fc_out
            count += c.n_layer * rows * columns
        count += c.n_layer * 4 * 2 * (token + 1) * 64  # heads, scores and sums, tokens seen, size of a head
    count += c.vocab_size * 256
    assert Shape(c, Coding()).prompt_operations(5) == 2 * count
