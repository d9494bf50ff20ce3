"""What a model's folder holds, official or converted, as plain data: ``moss-jt info`` draws it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from ..config import KV_CACHES, Config
from ..errors import MossError
from ..meta_instruction import enabled, read_meta_instruction
from ..plugins import BUILT_IN
from ..weights import is_converted, open_weights
from ..weights.layout import FORMAT, files_of
from .gptq import Gptq, is_gptq
from .mapping import official_shapes
from .official import Official, container_of, find_shards, open_official, problems


def describe(folder: Path) -> dict:
    """A dict that JSON can hold. ``problems`` lists what is wrong, one line each; [] means that the model can be used (or, an
    official one, converted). Raises MossError where the folder is no model's at all: no config.json, another architecture."""
    if not folder.is_dir():
        raise MossError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    converted = is_converted(folder)
    config = Config.read(folder)
    found = _converted(folder, config) if converted else _official(folder)
    text, wrong = _meta_instruction(folder)
    per_token = {kv_cache: config.cache_bytes_per_token(kv_cache) for kv_cache in KV_CACHES}
    return {
        "folder": str(folder),
        "kind": "converted" if converted else "official",
        "config": asdict(config),
        "parameters": sum(math.prod(shape) for shape in official_shapes(config).values()),
        "cache_bytes_per_token": per_token,
        "cache_bytes_at_n_ctx": {kv_cache: size * config.n_ctx for kv_cache, size in per_token.items()},
        "meta_instruction": text,
        **found,
        "problems": found["problems"] + wrong,
    }


def _meta_instruction(folder: Path) -> tuple[dict | None, list[str]]:
    """What there is to say of the checkpoint's own, None where it has none; and what is wrong with it."""
    try:
        text = read_meta_instruction(folder)
    except MossError as e:
        return None, [str(e)]
    if text is None:
        return None, []
    on = enabled(text, BUILT_IN.values())
    return {"characters": len(text), "plugins": [name for name, plugin in BUILT_IN.items() if plugin in on]}, []


def _converted(folder: Path, config: Config) -> dict:
    """Of a folder that cannot be opened, only its files: what they should hold is not certain."""
    coding, held, wrong = {"dtype": None}, {}, []
    try:
        weights = open_weights(folder)
        coding = weights.coding.to_dict()
        if coding["dtype"] != "fp16":
            coding.update(group_size=weights.coding.group, act_order=weights.coding.ordered)
        held = {name: [asdict(t) for t in region.tensors] for name, region in weights.regions.items()}
    except MossError as e:
        wrong = [str(e)]
    files = [_file(folder / name, held.get(name)) for name in files_of(config)]
    return {
        "format": FORMAT,
        "head_dtype": coding["dtype"],
        **coding,
        "bytes": sum(f["bytes"] for f in files),
        "files": files,
        "problems": wrong,
    }


def _official(folder: Path) -> dict:
    try:
        official = open_official(folder)
    except MossError as e:
        return {"container": None, "dtypes": {}, "tensors": None, **_files(folder), "problems": [str(e)]}
    held = Counter(view.path for view in official.tensors.values())
    return {
        "container": ", ".join(sorted({container_of(p) for p in official.shards})),
        "dtypes": dict(Counter(view.dtype for view in official.tensors.values())),
        **_files(folder, held),
        "tensors": {n: {"dtype": v.dtype, "shape": list(v.shape), "file": v.path.name} for n, v in official.tensors.items()},
        **_quantised(official),
    }


def _quantised(official: Official) -> dict:
    wrong = problems(official)
    if wrong or not is_gptq(official.tensors):
        return {"problems": wrong}
    gptq = Gptq(official.folder, official.config, official.tensors)
    said = {"dtype": gptq.coding.dtype, "group_size": gptq.group, "act_order": gptq.act_order, "notes": gptq.notes}
    return {"gptq": said, "problems": []}


def _files(folder: Path, held: Counter | None = None) -> dict:
    try:
        shards, _ = find_shards(folder)
    except MossError:
        shards = ()
    files = [{**_file(p), **({"tensors": held[p]} if held else {})} for p in shards]
    return {"bytes": sum(f["bytes"] for f in files), "files": files}


def _file(path: Path, tensors: list | None = None) -> dict:
    found = {"name": path.name, "bytes": path.stat().st_size if path.is_file() else 0}
    return found if tensors is None else {**found, "tensors": tensors}
