"""From ours in int8 or int4 to the official quantised layout: the same numbers, zeros and scales, packed as GPTQ does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO, Callable

import numpy as np

from ..errors import MossError
from ..weights import Weights
from ..weights.layout import BITS, HEAD_FILE, PANEL, Tensor
from .copy import Advance, append, write_tensor
from .gptq import matrices_of
from .mapping import Band, Piece, official_shapes, pieces
from .panels import packed, rows_of
from .view import View, cast, of_region

_CHUNK = 1 << 20  # weights repacked at a time
_LARGEST_F16 = 65504


class ToGptq:
    """The tensors of the official layout, and what writes each. Raises MossError where a checkpoint cannot be had so."""

    def __init__(self, weights: Weights, bands: Callable[[str], list[Band]]):
        self.weights, self.bands, self.coding = weights, bands, weights.coding
        if self.coding.dtype == "fp16":
            raise MossError(f"{weights.folder}: its blocks are in fp16; GPTQ's layout is for int8 and int4")
        self.bits = BITS[self.coding.dtype]
        self.matrices = matrices_of(weights.config)
        per_word = 32 // self.bits
        for name, shape in self.matrices.items():
            if any(size % per_word for size in shape):
                raise MossError(
                    f"{weights.folder}: {name} is {shape[0]} x {shape[1]}; GPTQ's layout needs multiples of {per_word}"
                )
        self._made_of = {
            name: (file, [p for p in all_of_it if p.official == f"{name}.weight"])
            for file, all_of_it in pieces(weights.config).items()
            for name in {p.official.removesuffix(".weight") for p in all_of_it} & self.matrices.keys()
        }
        self._order = {name: self._stored_inputs(name) for name in self.matrices}

    @property
    def notes(self) -> list[str]:
        head = self.coding.head_dtype
        return [] if head == "fp16" else [f"{self.weights.folder}: lm_head is in {head}, GPTQ's layout has it in fp16: rounded"]

    @property
    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for official, shape in official_shapes(self.weights.config).items():
            name = official.removesuffix(".weight")
            if name not in self.matrices:
                found.append(Tensor(official, "F16", shape))
                continue
            (n, k), groups = shape, len(self._groups(name))
            found += [
                Tensor(f"{name}.qweight", "I32", (k * self.bits // 32, n)),
                Tensor(f"{name}.qzeros", "I32", (groups, n * self.bits // 32)),
                Tensor(f"{name}.scales", "F16", (groups, n)),
                Tensor(f"{name}.g_idx", "I32", (k,)),
            ]
        return found

    def write(self, file: BinaryIO, tensor: Tensor, advance: Advance) -> None:
        name, _, part = tensor.name.rpartition(".")
        if name in self.matrices and part != "bias":
            made = {"qweight": self._qweight, "qzeros": self._qzeros, "scales": self._scales, "g_idx": self._g_idx}[part](name)
            append(file, made, advance)
        elif tensor.name == "lm_head.weight" and self.coding.head_dtype != "fp16":
            for rows in self._dequantised_head():
                append(file, rows, advance)
        else:
            write_tensor(file, tensor, self.bands(tensor.name), advance)

    def config(self, text: bytes) -> bytes:
        """The official config.json with the keys that say how it is quantised."""
        raw = json.loads(text)
        said = {"wbits": self.bits, "groupsize": self.coding.group}
        if isinstance(inside := raw.get("quantization_config"), dict):
            theirs = {"bits": self.bits, "group_size": self.coding.group, "desc_act": self.coding.ordered}
            layout = {key: "gptq" for key in ("checkpoint_format", "format") if key in inside}
            said["quantization_config"] = {**inside, **theirs, **layout}
        if said.items() <= raw.items():
            return text
        return json.dumps({**raw, **said}, indent=2, ensure_ascii=False).encode()

    # ---- a matrix's four tensors ------------------------------------------------------------------------------------------

    def _stored_inputs(self, name: str) -> np.ndarray:
        """Where each official input of a matrix is in ours, int64 (K)."""
        file, its = self._made_of[name]
        first, k = its[0].our_column, self.matrices[name][1]
        if not self.coding.ordered:
            return np.arange(first, first + k)
        order = self._arrays(file)[f"{its[0].ours}.order"]
        order = order[1 if name.endswith("fc_in") else 0]
        return np.argsort(order)[first : first + k]

    def _groups(self, name: str) -> np.ndarray:
        """Our groups that a matrix's inputs are in: those are its groups."""
        return np.unique(self._order[name] // self.coding.group)

    def _arrays(self, file: str) -> dict[str, np.ndarray]:
        return self.weights.regions[file].map()

    def _view(self, file: str, tensor: str) -> View:
        return of_region(self.weights.regions[file])[tensor]

    def _chunks(self, name: str) -> Iterator[tuple[dict, Piece, int, int]]:
        """(our tensors, a piece, rows [first, end) of it) that together are a matrix."""
        file, its = self._made_of[name]
        arrays, step = self._arrays(file), max(PANEL, _CHUNK // self.matrices[name][1])
        for piece in its:
            for first in range(0, piece.rows, step):
                yield arrays, piece, first, min(piece.rows, first + step)

    def _qweight(self, name: str) -> np.ndarray:
        n, k = self.matrices[name]
        found = np.empty((k * self.bits // 32, n), "<i4")
        for arrays, piece, first, end in self._chunks(name):
            q = rows_of(arrays[f"{piece.ours}.q"], self.bits, piece.our_row + first, piece.our_row + end)
            words = packed(q.take(self._order[name], axis=1), self.bits).view("<i4")
            found[:, piece.official_row + first : piece.official_row + end] = words.T
        return found

    def _of_groups(self, name: str, part: str) -> np.ndarray:
        """Scales or zeros as official ones lie: (G, N)."""
        file, its = self._made_of[name]
        ours = self._arrays(file)[f"{its[0].ours}.{part}"][:, self._groups(name)]  # (P, G, 16)
        ours = ours.transpose(1, 0, 2).reshape(ours.shape[1], -1)
        found = np.empty((len(ours), self.matrices[name][0]), ours.dtype)
        for p in its:
            found[:, p.official_row : p.official_row + p.rows] = ours[:, p.our_row : p.our_row + p.rows]
        return found

    def _scales(self, name: str) -> np.ndarray:
        file, its = self._made_of[name]
        return cast(self._of_groups(name, "scale"), self._view(file, f"{its[0].ours}.scale"), "F16")

    def _qzeros(self, name: str) -> np.ndarray:
        zeros = self._of_groups(name, "zero")  # less one in both
        if (most := int(zeros.max())) >> self.bits:
            raise MossError(f"{self.weights.folder}: {name} has a zero of {most + 1}, more than GPTQ's layout holds")
        return packed(zeros, self.bits).view("<i4")

    def _g_idx(self, name: str) -> np.ndarray:
        return np.searchsorted(self._groups(name), self._order[name] // self.coding.group).astype("<i4")

    # ---- lm_head ----------------------------------------------------------------------------------------------------------

    def _dequantised_head(self) -> Iterator[np.ndarray]:
        """Rows of lm_head, float16."""
        arrays, config, bits = self._arrays(HEAD_FILE), self.weights.config, BITS[self.coding.head_dtype]
        q, scale, zero = (arrays[f"lm_head.weight.{part}"] for part in ("q", "scale", "zero"))
        scale = cast(scale, self._view(HEAD_FILE, "lm_head.weight.scale"), "F16")
        scale, zero = (x.transpose(0, 2, 1).reshape(-1, x.shape[1], 1) for x in (scale, zero))
        step = max(1, _CHUNK // config.n_embd)
        for first in range(0, config.vocab_size, step):
            end = min(config.vocab_size, first + step)
            numbers = rows_of(q, bits, first, end).reshape(end - first, q.shape[1], -1).astype(np.float32)
            w = (numbers - zero[first:end] - 1) * scale[first:end].astype(np.float32)
            w = w.reshape(end - first, -1)[:, : config.n_embd]
            yield w.clip(-_LARGEST_F16, _LARGEST_F16).astype("<f2")
