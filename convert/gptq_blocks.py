"""Quantises a checkpoint's blocks with GPTQ, one after the other, each on what the quantised ones before it make of the
calibration dialogues.

A block is taken in two halves. Its in-product's inputs give a Hessian, with which in.weight is quantised; the quantised weights
give the out-product's inputs, and those the Hessians with which out.weight is; and the quantised out.weight gives the next
block's inputs. So each product is computed once, one block is in memory at a time, and one file on the disk is enough to go on.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Callable

import numpy as np

from ..config import Config
from ..errors import MossError
from ..weights.header import header_bytes
from ..weights.layout import BITS, METADATA, WTE_FILE, Coding, block_file, block_tensors
from . import spill
from .calibrate import Calibration, Chunk
from .copy import Advance, write_panels
from .forward import attention, gelu, layer_norm
from .gptq_matrix import DAMPING, Inputs, Matrix, matrices, quantise_matrix
from .gptq_solver import by_rows, weights_of
from .job import REPORT, whole_file
from .panels import in_panels
from .source import Source
from .view import cast
from .work import Work


@dataclass(frozen=True)
class Blocks:
    """Writes ``source``'s blocks in the way of ``coding`` into ``folder``, where activations are kept meanwhile."""

    source: Source
    coding: Coding
    calibration: Calibration
    folder: Path

    @property
    def spilled(self) -> int:
        """Bytes that activations take at most: a block's inputs, its out-product's, and the next block's inputs."""
        config = self.source.config
        return 4 * len(self.calibration.ids) * (3 * config.n_embd + config.n_inner)

    def write(self, file: BinaryIO, i: int, advance: Advance) -> None:
        """Write block i, and beside it the next one's inputs and a report. Blocks are to be written in their order."""
        started = time.monotonic()
        inputs = self._inputs(i)
        self.clear(but=inputs)
        if not inputs.exists():
            if i > 0:
                raise MossError(f"{inputs}: missing; delete {self.folder} and start anew")
            self._embed()
        outputs = self._inputs(i + 1) if i + 1 < self.source.config.n_layer else None
        errors = _Block(self, file, i, advance).write(inputs, outputs)
        self._report(i, time.monotonic() - started, errors)

    def clear(self, but: Path | None = None) -> None:
        """Remove all activations, or all but some."""
        for path in self.folder.glob(f"*{spill.SUFFIX}*"):
            if path != but:
                path.unlink()

    def _inputs(self, i: int) -> Path:
        return self.folder / f"inputs-{i:02d}{spill.SUFFIX}"

    def _embed(self) -> None:
        """The first block's inputs: a row of wte for each token."""
        (band,) = self.source.bands(WTE_FILE, "wte.weight")
        (view,) = band.views
        ids, which = np.unique(self.calibration.ids, return_inverse=True)
        rows = (view.rows(int(token), 1) for token in ids)
        wte = np.concatenate([cast(row.read(), row, "F32") for row in rows])
        with whole_file(self._inputs(0)) as file:
            for chunk in self.calibration.chunks:
                spill.append(file, wte[which[chunk.start : chunk.stop]])

    def _report(self, i: int, seconds: float, errors: dict) -> None:
        path = self.folder / REPORT
        try:
            done = json.loads(path.read_text(encoding="utf-8"))["blocks"][:i]
        except (OSError, ValueError, KeyError, TypeError):
            done = []
        found = {
            "method": "gptq",
            **self.coding.to_dict(),
            "damping": DAMPING,
            "dialogues": len(self.calibration.dialogues),
            "tokens": len(self.calibration.ids),
            "blocks": [*done, {"block": i, "seconds": round(seconds, 1), "errors": errors}],
        }
        with whole_file(path) as file:
            file.write(json.dumps(found, indent=1).encode() + b"\n")


class _Block:
    """One block, while it is written."""

    def __init__(self, blocks: Blocks, file: BinaryIO, i: int, advance: Advance):
        self._source, self._coding, self._chunks = blocks.source, blocks.coding, blocks.calibration.chunks
        self._file, self._name = file, block_file(i)
        tensors = block_tensors(self._source.config, self._coding)
        self._header = header_bytes(tensors, METADATA)
        nbytes = len(self._header) + sum(t.nbytes for t in tensors)
        self._work = Work(matrices(self._source.config), len(blocks.calibration.ids), nbytes, advance)

    def write(self, inputs: Path, outputs: Path | None) -> dict:
        """``inputs`` and ``outputs``: the activations before and after the block. Returns the errors of its matrices."""
        config, first, second = self._source.config, *matrices(self._source.config)
        products = inputs.with_name(f"products{spill.SUFFIX}")
        self._file.write(self._header)
        norm = self._vector("ln_1.weight"), self._vector("ln_1.bias")

        def normed(chunk: Chunk) -> np.ndarray:
            return layer_norm(spill.read(inputs, chunk.start, chunk.stop, first.k), *norm, config.layer_norm_epsilon)

        errors, in_product = self._quantise(first, normed)
        bias = self._vector("in.bias")
        with open(products, "wb") as file:

            def between(chunk: Chunk) -> np.ndarray:
                x = _between(in_product(normed(chunk)), bias, chunk, config)
                spill.append(file, x)
                return x

            more, out_product = self._quantise(second, between)
        bias = self._vector("out.bias")
        with whole_file(outputs) if outputs else nullcontext() as file:
            for chunk in self._chunks if outputs else ():
                x = out_product(spill.read(products, chunk.start, chunk.stop, second.k))
                x += bias
                x += spill.read(inputs, chunk.start, chunk.stop, first.k)
                spill.append(file, x)
        self._work.finish()
        return {**errors, **more}

    def _vector(self, name: str) -> np.ndarray:
        """Read a norm's or a bias's values, and write them where they belong."""
        views = [view for band in self._source.bands(self._name, name) for view in band.views]
        x = np.concatenate([cast(view.read(), view, "F32") for view in views])
        self._file.write(x.data)
        return x

    def _quantise(self, matrix: Matrix, inputs: Callable[[Chunk], np.ndarray]) -> tuple[dict, Callable]:
        """Quantise and write a matrix whose inputs in calibration ``inputs`` gives. Returns its errors, and its product with
        inputs (T, K)."""
        known = Inputs(matrix)
        for chunk in self._chunks:
            known.add(inputs(chunk), chunk.sampled)
            self._work.did(chunk.tokens * matrix.to_add)
        bands = self._source.bands(self._name, matrix.name)
        solved, order, errors = quantise_matrix(matrix, bands, known, self._coding, self._work)
        bits, group = BITS[self._coding.dtype], self._coding.group
        write_panels(self._file, in_panels(by_rows(solved, bits, group), bits), lambda count: None)
        if self._coding.ordered:
            self._file.write(np.stack([order] * matrix.orders).astype("<i4").data)
        w = weights_of(solved, group)

        def product(x: np.ndarray) -> np.ndarray:
            self._work.did(len(x) * matrix.to_multiply)
            return x[:, order] @ w if self._coding.ordered else x @ w

        return errors, product


def _between(products: np.ndarray, bias: np.ndarray, chunk: Chunk, config: Config) -> np.ndarray:
    """The in-product's outputs (T, 3D + I) to the out-product's inputs (T, D + I)."""
    d = config.n_embd
    x = np.empty((len(products), d + config.n_inner), np.float32)
    for place in chunk.dialogues:
        x[place, :d] = attention(*(products[place, j * d : (j + 1) * d] for j in range(3)), config)
    f = products[:, 3 * d :] + bias
    gelu(f)
    x[:, d:] = f
    return x
