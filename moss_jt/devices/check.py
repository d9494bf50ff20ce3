"""Whether the GPU here computes what it should: logits of a small model of random weights, beside numpy's.

Done once for each coding, kind of device and version of the kernels, in about a second. Kernels that a driver or a card gets
wrong would give fluent nonsense otherwise.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np

from .. import cuda
from ..config import Config
from ..convert.forward import attention, gelu, layer_norm
from ..convert.rows import Matrix
from ..convert.view import of_region
from ..errors import MossError
from ..ops.sweep import source
from ..runtime import jittor
from ..sampling import Sampling
from ..swap import make_plan
from ..weights import Weights, open_weights
from ..weights.layout import BITS, HEAD_FILE, Coding, block_file
from .gpu import Cuda
from .sweep import Row, Sweep

_SMALL = Config(2, 256, 4, 1024, 32, 80, 600)
_MOST = {"fp16": 1e-2, "int8": 3e-2}  # relative error of the logits, by the cache; a wrong kernel's is about 1


def check(coding: Coding, kv_cache: str) -> None:
    """Raises MossError where logits are wrong. Says nothing where that has been found out before."""
    stamp = _stamp(coding, kv_cache)
    if stamp.exists():
        return
    from ..bench import Shape, random_checkpoint  # here, because what it measures with is made of devices

    plain = Coding(coding.dtype, coding.head_dtype, coding.group)  # without act-order, in which random inputs have none
    with random_checkpoint(Shape(_SMALL, plain), Path(tempfile.gettempdir())) as folder:
        weights = open_weights(folder)
        error = _error(weights, kv_cache)
    if not error < _MOST[kv_cache]:
        raise MossError(
            f"the GPU computes logits that are wrong by {error:.2g} of their size, on a model for testing: this is a defect of "
            "moss-jt, or of the driver; --device cpu does without"
        )
    stamp.touch()


def _stamp(coding: Coding, kv_cache: str) -> Path:
    devices = [(device.name, device.capability) for device in cuda.driver().devices]
    key = hashlib.md5(repr((source(), coding.to_dict(), kv_cache, devices, cuda.driver().version)).encode())
    return Path(jittor().flags.cache_path) / f"moss-jt-{key.hexdigest()[:16]}.checked"


def _error(weights: Weights, kv_cache: str) -> float:
    """A prompt of many tokens, then of few, then one; and whether the likeliest are those of all logits."""
    ids = np.random.default_rng(0).integers(0, _SMALL.vocab_size, 60)
    exact = _logits(weights, ids)
    device = Cuda(weights, make_plan(_SMALL, weights.coding, 80, 1 << 40, kv_cache, gpu=True), 0)
    cache, at, worst = device.cache(1), 0, 0.0
    for count in (50, 4, 5, 1):
        table = np.array([(0, at, 0, count)], np.int32)
        rows = [Row(i, ids[: at + i + 1], None) for i in sorted({0, count - 1})]
        found = device.sweep(cache, Sweep(ids[at : at + count], table, rows))
        expected = exact[[at + row.row for row in rows]]
        worst = max(worst, float(np.linalg.norm(np.stack(found) - expected) / np.linalg.norm(expected)))
        at += count
    likeliest = device.sweep(cache, Sweep(ids[-1:], np.array([(0, at - 1, 0, 1)], np.int32), [_greedy(rows[-1])]))[0]
    return worst if likeliest.ids[0] == found[-1].argmax() else float("inf")


def _greedy(row: Row) -> Row:
    return Row(0, row.seen, Sampling(greedy=True))


def _logits(weights: Weights, ids: np.ndarray) -> np.ndarray:
    """Of every position, (T, V): numpy, float32."""
    c, bits = weights.config, BITS[weights.coding.dtype]
    d, inner = c.n_embd, c.n_inner
    x = weights.wte()["wte.weight"][ids].astype(np.float32)
    for i in range(c.n_layer):
        views, w = of_region(weights.regions[block_file(i)]), weights.block(i)
        y = layer_norm(x, w["ln_1.weight"], w["ln_1.bias"], c.layer_norm_epsilon)
        y = y @ Matrix(views, "in.weight", (3 * d + inner, d), bits).rows(0, 3 * d + inner).T
        mlp = np.ascontiguousarray(y[:, 3 * d :] + w["in.bias"])
        gelu(mlp)
        both = np.concatenate([attention(*np.split(y[:, : 3 * d], 3, axis=1), c), mlp], axis=1)
        x = x + both @ Matrix(views, "out.weight", (d, d + inner), bits).rows(0, d).T + w["out.bias"]
    views, w = of_region(weights.regions[HEAD_FILE]), weights.head()
    x = layer_norm(x, w["ln_f.weight"], w["ln_f.bias"], c.layer_norm_epsilon)
    lm_head = Matrix(views, "lm_head.weight", (c.vocab_size, d), BITS[weights.coding.head_dtype])
    return x @ lm_head.rows(0, c.vocab_size).T + w["lm_head.bias"]
