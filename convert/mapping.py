"""Which part of which official tensor is which part of which of ours. Both directions are made from this one table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..config import MP_NUM, Config
from ..weights.layout import HEAD_FILE, WTE_FILE, block_file
from .view import View

# The official qkv_proj holds, in each of its MP_NUM parts, first queries, then values, then keys.
_OFFICIAL_ORDER = {"q": 0, "v": 1, "k": 2}
_OUR_ORDER = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Piece:
    """A rectangle that is copied: all columns of ``rows`` official rows."""

    official: str
    official_row: int
    ours: str
    our_row: int
    our_column: int
    rows: int
    columns: int  # 0 for a vector, whose rows are its elements


@dataclass(frozen=True)
class Band:
    """Some whole rows of a tensor that is to be written: the rows of these views, side by side."""

    views: tuple[View, ...]


def pieces(config: Config) -> dict[str, list[Piece]]:
    """For each of our files, the pieces it is made of."""
    d, v = config.n_embd, config.vocab_size
    files = {WTE_FILE: [Piece("transformer.wte.weight", 0, "wte.weight", 0, 0, v, d)]}
    block = list(_block(config))
    for i in range(config.n_layer):
        files[block_file(i)] = [replace(p, official=f"transformer.h.{i}.{p.official}") for p in block]
    files[HEAD_FILE] = [
        *(Piece(f"transformer.{name}", 0, name, 0, 0, d, 0) for name in ("ln_f.weight", "ln_f.bias")),
        Piece("lm_head.weight", 0, "lm_head.weight", 0, 0, v, d),
        Piece("lm_head.bias", 0, "lm_head.bias", 0, 0, v, 0),
    ]
    return files


def _block(config: Config) -> Iterator[Piece]:
    d, inner = config.n_embd, config.n_inner
    for name in ("ln_1.weight", "ln_1.bias"):
        yield Piece(name, 0, name, 0, 0, d, 0)
    part = d // MP_NUM
    for c in "qkv":
        for p in range(MP_NUM):
            official_row = (3 * p + _OFFICIAL_ORDER[c]) * part
            yield Piece("attn.qkv_proj.weight", official_row, "in.weight", _OUR_ORDER[c] * d + p * part, 0, part, d)
    yield Piece("mlp.fc_in.weight", 0, "in.weight", 3 * d, 0, inner, d)
    yield Piece("mlp.fc_in.bias", 0, "in.bias", 0, 0, inner, 0)
    yield Piece("attn.out_proj.weight", 0, "out.weight", 0, 0, d, d)
    yield Piece("mlp.fc_out.weight", 0, "out.weight", 0, d, d, inner)
    yield Piece("mlp.fc_out.bias", 0, "out.bias", 0, 0, d, 0)


def official_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that an official checkpoint must hold, in the official order of files, and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for p in (p for file in pieces(config).values() for p in file):
        rows = shapes.get(p.official, (0,))[0] + p.rows
        shapes[p.official] = (rows, p.columns) if p.columns else (rows,)
    return shapes


def our_sides(file: list[Piece], tensor: str) -> list[list[Piece]]:
    """What one of our tensors is made of, from its first row to its last: pieces side by side."""
    rows: dict[int, list[Piece]] = {}
    for p in sorted((p for p in file if p.ours == tensor), key=lambda p: (p.our_row, p.our_column)):
        rows.setdefault(p.our_row, []).append(p)
    return list(rows.values())


def our_bands(file: list[Piece], tensor: str, official: dict[str, View]) -> list[Band]:
    """The same as bands of the official tensors."""
    sides = our_sides(file, tensor)
    return [Band(tuple(official[p.official].rows(p.official_row, p.rows) for p in side)) for side in sides]


def official_bands(file: list[Piece], tensor: str, ours: dict[str, View]) -> list[Band]:
    """What one official tensor is made of, from its first row to its last."""
    bands = []
    for p in sorted((p for p in file if p.official == tensor), key=lambda p: p.official_row):
        view = ours[p.ours].rows(p.our_row, p.rows)
        bands.append(Band((view.columns(p.our_column, p.columns) if p.columns else view,)))
    return bands
