"""GPTQ checkpoints: four tensors in place of each matrix of a block. Their numbers, zeros and scales are kept as they are.

``w[n, k] = (q[k, n] - zero[g, n]) * scale[g, n]`` with g = g_idx[k]; docs/formats.md says how they are packed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from ..config import Config, read_json
from ..errors import MossError
from ..weights.layout import PANEL, Coding
from .copy import in_order
from .mapping import Piece, official_shapes, our_sides, pieces
from .panels import Quantised, unpacked, with_zeros
from .regroup import Arrangement, arrange, choose
from .view import View, cast, widened

PARTS = ("qweight", "qzeros", "scales", "g_idx")
_DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32"), "g_idx": ("I32", "I64")}
_USUAL_GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # at most one of them gives a number of groups, unless that is one
SETTINGS = "quantize_config.json"  # AutoGPTQ's, beside config.json
_CHUNK = 1 << 20  # weights unpacked at a time


@dataclass(frozen=True)
class Said:
    """What a folder's configs say of its quantisation: official ones ``wbits`` and ``groupsize``, those of AutoGPTQ and its
    like ``bits`` and ``group_size`` (-1: all inputs are one group)."""

    where: Path
    bits: object
    group: object
    method: object
    layout: object  # "gptq_v2": zeros are stored as they are, not less one

    @classmethod
    def read(cls, folder: Path) -> Said:
        raw, path = read_json(folder), folder / SETTINGS
        inside, found = raw.get("quantization_config"), {}
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise MossError(f"{path}: damaged: it should hold a JSON object")
        found = {**found, **(inside if isinstance(inside, dict) else {})}
        where = folder / ("config.json" if inside or not path.exists() else SETTINGS)
        bits, group = found.get("bits", raw.get("wbits")), found.get("group_size", raw.get("groupsize"))
        layout = found.get("checkpoint_format") or found.get("format") or "gptq"
        return cls(where, bits, group, found.get("quant_method") or "gptq", layout)

    def refusal(self) -> str | None:
        if self.method != "gptq":
            return f"{self.where}: quantised with {self.method!r}; of quantised checkpoints only GPTQ's can be converted"
        if self.layout not in ("gptq", "gptq_v2"):
            return f"{self.where}: its checkpoint_format is {self.layout!r}; only 'gptq' and 'gptq_v2' can be converted"
        return None


def is_gptq(tensors: dict[str, View]) -> bool:
    return any(name.endswith(".qweight") for name in tensors)


def matrices_of(config: Config) -> dict[str, tuple[int, int]]:
    """The matrices that GPTQ quantises, without ``.weight`` -> (N, K)."""
    shapes = official_shapes(config).items()
    return {n.removesuffix(".weight"): s for n, s in shapes if n.startswith("transformer.h.") and len(s) == 2}


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix of N outputs and K inputs: where its tensors are, and the group of each input, int64 (K)."""

    bits: int
    views: dict[str, View]
    groups: np.ndarray
    count: int  # of groups


def _matrix(name: str, shape: tuple[int, int], tensors: dict[str, View], said: Said) -> Matrix:
    """Raises MossError, naming the tensor, where they do not fit together."""
    n, k = shape
    views = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
    if f"{name}.weight" in tensors:
        raise MossError(f"{tensors[f'{name}.weight'].path}: tensor {name}.weight is not quantised, but other matrices are")
    for part in ("qweight", "qzeros", "scales"):
        if part not in views:
            raise MossError(f"{said.where.parent}: tensor {name}.{part} is missing")
    for part, view in views.items():
        if view.dtype not in _DTYPES[part]:
            raise MossError(f"{view.path}: tensor {view.name} is {view.dtype}, expected {' or '.join(_DTYPES[part])}")
    bits, count = _bits(views["qweight"], n, k), max((1, *views["scales"].shape[:1]))
    for part, expected in {"scales": (count, n), "qzeros": (count, n * bits // 32), "g_idx": (k,)}.items():
        if part in views and views[part].shape != expected:
            view = views[part]
            raise MossError(
                f"{view.path}: tensor {view.name} has shape {list(view.shape)}, but {list(expected)} belongs to "
                f"{n} outputs, {k} inputs and {count} groups in {bits} bits"
            )
    return Matrix(bits, views, _groups(name, views, k, count, said), count)


def _bits(view: View, n: int, k: int) -> int:
    for bits in (4, 8):
        if view.shape == (k * bits // 32, n) and k * bits % 32 == 0:
            return bits
    asked = f"config.json asks for {n} outputs of {k} inputs: [{k // 8}, {n}] in 4 bits, [{k // 4}, {n}] in 8"
    raise MossError(f"{view.path}: tensor {view.name} has shape {list(view.shape)}, {asked}")


def _groups(name: str, views: dict[str, View], k: int, count: int, said: Said) -> np.ndarray:
    if "g_idx" in views:
        view = views["g_idx"]
        groups = view.read().astype(np.int64)
        for wrong in groups[(groups < 0) | (groups >= count)][:1]:
            raise MossError(f"{view.path}: tensor {view.name} holds {wrong}, but there are {count} groups")
        return groups
    for size in (k if said.group == -1 else said.group, *_USUAL_GROUPS, k):
        if type(size) is int and size > 0 and -(-k // size) == count:
            return np.arange(k) // size
    raise MossError(f"{said.where.parent}: tensor {name}.g_idx is missing, and {count} groups of {k} inputs may be any")


def _matrices(folder: Path, config: Config, tensors: dict[str, View]) -> tuple[dict[str, Matrix], list[str]]:
    """Those that are right, and what is wrong with the others."""
    said = Said.read(folder)
    if refusal := said.refusal():
        return {}, [refusal]
    found: dict[str, Matrix] = {}
    wrong = []
    for name, shape in matrices_of(config).items():
        try:
            found[name] = matrix = _matrix(name, shape, tensors, said)
            first, other = next(iter(found.items()))
            if matrix.bits != other.bits:
                del found[name]
                raise MossError(f"{folder}: {name} is in {matrix.bits} bits and {first} in {other.bits}; all must be alike")
            _check_bias(name, tensors)
        except MossError as e:
            wrong.append(str(e))
    return found, wrong


def _check_bias(name: str, tensors: dict[str, View]) -> None:
    """Some programs write biases of zeros where a model has none."""
    view = tensors.get(f"{name}.bias")
    if view and "_proj" in name and view.read().any():
        raise MossError(f"{view.path}: tensor {view.name} is not zero, but MOSS has no bias there")


def tensor_names(config: Config) -> set[str]:
    """Every tensor that is for ``problems`` to judge."""
    of_each = (*PARTS, "weight")
    biases = {f"{name}.bias" for name in matrices_of(config) if "_proj" in name}
    return {f"{name}.{part}" for name in matrices_of(config) for part in of_each} | biases


def _coding(folder: Path, config: Config, matrices: dict[str, Matrix]) -> Coding:
    """How they can be stored. Raises MossError where they cannot be, exactly."""
    found = choose(_product(matrices, names)[0] for names in _products(config))
    if found is None:
        raise MossError(f"{folder}: groups of inputs cannot be cut into pieces of one size, a multiple of 8 up to 128")
    size, ordered = found
    if ordered and 3 * config.n_embd % PANEL:
        raise MossError(f"{folder}: n_embd {config.n_embd} is not a multiple of {PANEL}, as act-order needs")
    return Coding(f"int{next(iter(matrices.values())).bits}", "fp16", size, ordered)


def _products(config: Config) -> Iterator[tuple[str, ...]]:
    """The matrices whose inputs lie side by side in ours."""
    for i in range(config.n_layer):
        at = f"transformer.h.{i}."
        yield from ((f"{at}attn.qkv_proj",), (f"{at}mlp.fc_in",), (f"{at}attn.out_proj", f"{at}mlp.fc_out"))


def _product(matrices: dict[str, Matrix], names: tuple[str, ...]) -> tuple[np.ndarray, list[Matrix]]:
    """The group of each input of matrices side by side, numbered on from one to the next; and the matrices."""
    found = [matrices[name] for name in names]
    starts = np.cumsum([0, *(m.count for m in found)])
    return np.concatenate([m.groups + start for m, start in zip(found, starts)]), found


def problems(folder: Path, config: Config, tensors: dict[str, View]) -> list[str]:
    """What keeps the quantised matrices from being converted, one line each."""
    try:
        matrices, wrong = _matrices(folder, config, tensors)
        if not wrong:
            _coding(folder, config, matrices)
    except MossError as e:
        return [str(e)]
    return wrong


class Gptq:
    """The quantised matrices of a checkpoint that has no ``problems``."""

    def __init__(self, folder: Path, config: Config, tensors: dict[str, View]):
        self.said = Said.read(folder)
        self._matrices, _ = _matrices(folder, config, tensors)
        self.coding = _coding(folder, config, self._matrices)
        self.bits = next(iter(self._matrices.values())).bits
        self._pieces = pieces(config)

    @property
    def group(self) -> int:
        """Inputs of the largest group."""
        return max(int(np.bincount(m.groups).max()) for m in self._matrices.values())

    @property
    def act_order(self) -> bool:
        """Whether inputs of a group do not lie together."""
        return any((np.diff(m.groups) < 0).any() for m in self._matrices.values())

    @property
    def notes(self) -> list[str]:
        """What the configs say and the tensors do not bear out."""
        wrong = []
        if self.said.bits not in (None, self.bits):
            wrong.append(f"{self.said.bits!r} bits, but the tensors are in {self.bits}")
        if self.said.group is not None and not all(map(self._has_groups_as_said, self._matrices.values())):
            wrong.append(f"groups of {self.said.group!r}, but the tensors have groups of {self.group}")
        return [f"{self.said.where}: says {' and '.join(wrong)}; the tensors are right"] if wrong else []

    def _has_groups_as_said(self, m: Matrix) -> bool:
        k = len(m.groups)
        size = k if self.said.group == -1 else self.said.group
        return type(size) is int and size > 0 and -(-k // size) == m.count

    def rows(self, file: str, tensor: str) -> Iterator[Quantised]:
        """One of our tensors, some rows after the other."""
        return in_order(lambda part: part(), self._parts(file, tensor))

    def _parts(self, file: str, tensor: str) -> Iterator:
        for names, sides in groupby(our_sides(self._pieces[file], tensor), key=_names):
            groups, matrices = _product(self._matrices, names)
            arrangement = self._arrange(groups)
            loaded = [_Loaded(m, self.said.layout == "gptq_v2") for m in matrices]
            step = max(PANEL, _CHUNK // len(groups))
            for side in sides:
                first, end = side[0].official_row, side[0].official_row + side[0].rows
                for row in range(first, end, step):
                    yield partial(_rows, loaded, arrangement, self.coding.group, row, min(step, end - row))

    def order(self, file: str, tensor: str) -> np.ndarray:
        """Where the inputs of one of our tensors come from, int32: a row for each group of official matrices."""
        names = dict.fromkeys(_names(side) for side in our_sides(self._pieces[file], tensor))
        return np.array([self._arrange(_product(self._matrices, n)[0]).order for n in names], "<i4")

    def _arrange(self, groups: np.ndarray) -> Arrangement:
        return arrange(groups, self.coding.group, self.coding.ordered)


def _names(side: list[Piece]) -> tuple[str, ...]:
    return tuple(piece.official.removesuffix(".weight") for piece in side)


class _Loaded:
    """A matrix in memory, still packed."""

    def __init__(self, matrix: Matrix, v2: bool):
        views = matrix.views
        self.bits, self.words, self.scale = matrix.bits, views["qweight"].read(), _scales(views["scales"])
        stored = np.ascontiguousarray(views["qzeros"].read()).view(np.uint8)
        self.zero = unpacked(stored, self.bits).astype(np.uint16) + (0 if v2 else 1)

    def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q (count, K), scale (count, G), zero (count, G)."""
        some = slice(first, first + count)
        words = np.ascontiguousarray(self.words[:, some].T)
        return unpacked(words.view(np.uint8), self.bits), self.scale[:, some].T, self.zero[:, some].T


def _scales(view: View) -> np.ndarray:
    x = view.read()
    found = cast(x, view, "F16")
    if (found != widened(x, view)).any():
        raise MossError(f"{view.path}: tensor {view.name} is {view.dtype}, and fp16 cannot hold it exactly")
    return found


def _rows(loaded: list[_Loaded], arrangement: Arrangement, size: int, first: int, count: int) -> Quantised:
    q, scale, zero = (np.concatenate(x, axis=1) for x in zip(*(one.rows(first, count) for one in loaded)))
    q = q.take(arrangement.order, axis=1)
    if missing := -q.shape[1] % size:
        q = np.pad(q, ((0, 0), (0, missing)))
    groups = arrangement.groups
    return with_zeros(q.reshape(count, -1, size), scale[:, groups], zero[:, groups], loaded[0].bits)
