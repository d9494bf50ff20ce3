"""An official checkpoint's folder: which files, which tensors, and whether they are what its config asks for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..errors import MossError
from ..weights.header import read_header
from . import gptq
from .mapping import official_shapes
from .torchfile import is_zip, open_torch
from .view import View, contiguous

_SAFETENSORS, _PICKLES = "*.safetensors", "pytorch_model*.bin"
_INDEXES = {
    _SAFETENSORS: "model.safetensors.index.json",
    _PICKLES: "pytorch_model.bin.index.json",
    "gptq_model*.bin": "gptq_model.bin.index.json",  # AutoGPTQ's name
}
_NUMBERED = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.\w+)")
# Buffers that carry nothing: masks that follow from the architecture.
_DROPPED = re.compile(r"transformer\.h\.\d+\.attn\.(causal_mask|masked_bias|bias)")
_CASTABLE = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Official:
    """An official checkpoint, opened: every shard's header is read and checked, no tensor is."""

    folder: Path
    config: Config
    shards: tuple[Path, ...]
    tensors: dict[str, View]  # buffers that carry nothing left out


def open_official(folder: str | Path) -> Official:
    """Open a folder of shards. Raises MossError where a file is missing, damaged or hostile, or the config is of another
    architecture; whether the tensors suit the config is for ``problems`` to say."""
    folder = Path(folder)
    if not folder.is_dir():
        raise MossError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    config = Config.read(folder)
    shards, index = find_shards(folder)
    tensors = _gather(folder, {p: _open_shard(p) for p in shards}, index)
    return Official(folder, config, shards, {n: v for n, v in tensors.items() if not _DROPPED.fullmatch(n)})


def find_shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The files that hold the weights, safetensors before pickles, and the index's tensor -> file ({} without an index)."""
    for pattern, index_name in _INDEXES.items():
        index = _read_index(folder / index_name)
        names = sorted(set(index.values())) or _complete(sorted(p.name for p in folder.glob(pattern)), folder)
        for name in names:
            if not (folder / name).is_file():
                raise MossError(f"{folder / name}: missing, or not a file" + (f"; {index_name} names it" if index else ""))
        if names:
            return tuple(folder / name for name in names), index
    raise MossError(f"{folder}: no weights here: neither {_PICKLES} nor {_SAFETENSORS}")


def _read_index(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(f, str) and Path(f).name == f and (f + name).isprintable() for name, f in index.items())
    except OSError as e:
        raise MossError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        plain = False
    if not plain or not index:
        raise MossError(f"{path}: damaged: it should hold a weight_map from tensors to files of this folder")
    return index


def _complete(names: list[str], folder: Path) -> list[str]:
    """``names``, having made sure that no shard of a numbered set is missing."""
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            start, _, of, end = match.groups()
            for i in range(1, int(of) + 1):
                if (other := f"{start}{i:05d}-of-{of}{end}") not in names:
                    raise MossError(f"{folder / other}: missing; {name} is there, so it should be too")
    return names


def container_of(path: Path) -> str:
    """How a shard is stored: safetensors, or one of torch's two containers."""
    if path.suffix == ".safetensors":
        return "safetensors"
    return "torch zip" if is_zip(path) else "torch legacy"


def _open_shard(path: Path) -> dict[str, View]:
    if path.suffix != ".safetensors":
        return open_torch(path)
    entries = read_header(path).entries
    return {name: contiguous(name, path, t.dtype, t.shape, start) for name, (t, start) in entries.items()}


def _gather(folder: Path, shards: dict[Path, dict[str, View]], index: dict[str, str]) -> dict[str, View]:
    tensors: dict[str, View] = {}
    for path, views in shards.items():
        for name, view in views.items():
            if name in tensors and index.get(name) is None:
                raise MossError(f"{folder}: tensor {name} is in both {tensors[name].path.name} and {path.name}")
            if index.get(name, path.name) == path.name:
                tensors[name] = view
    for name, file in index.items():
        if name not in tensors:
            raise MossError(f"{folder / file}: tensor {name} is missing, though the index says that it is in this file")
    return tensors


def problems(official: Official) -> list[str]:
    """Everything that keeps these tensors from being the model that config.json describes, one line each."""
    folder, config, tensors = official.folder, official.config, official.tensors
    expected, packed = official_shapes(config), set()
    if gptq.is_gptq(tensors):
        packed = gptq.tensor_names(config)
        expected = {n: shape for n, shape in expected.items() if n not in packed}
    if not expected.keys() & tensors.keys():
        return [f"{folder}: none of MOSS's tensors are here, but {_some(tensors)}: another architecture than moss-moon-003's"]
    found = [f"{folder}: tensor {n} is missing" for n in expected if n not in tensors]
    found += [f"{tensors[n].path}: tensor {n} is not one of MOSS's" for n in tensors if n not in expected and n not in packed]
    for name in (n for n in expected if n in tensors):
        found += _tensor_problems(tensors[name], expected[name])
    return found + gptq.problems(folder, config, tensors) if packed else found


def _tensor_problems(view: View, shape: tuple[int, ...]) -> list[str]:
    if view.shape != shape:
        return [f"{view.path}: tensor {view.name} has shape {list(view.shape)}, config.json asks for {list(shape)}"]
    if view.dtype not in _CASTABLE:
        return [f"{view.path}: tensor {view.name} is {view.dtype}, expected one of {', '.join(_CASTABLE)}"]
    return []


def _some(names: dict) -> str:
    first = list(names)[:2]
    return ", ".join(first) + (", …" if len(names) > 2 else "")
