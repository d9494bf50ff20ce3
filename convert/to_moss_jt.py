"""From an official checkpoint to ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

from ..errors import MossError
from ..tokenizer import write_tokenizer
from ..tokenizer.files import COPIED as TOKENIZER_FILES
from ..weights.header import header_bytes
from ..weights.layout import FORMAT, METADATA, files_of
from .copy import Advance, write_tensor
from .job import Job, source_record, whole_file
from .mapping import our_bands, pieces
from .official import open_official, problems

DTYPES = ("fp16",)
# Copied as they are, where they are there; write_tokenizer copies the tokenizer's own.
_COPIED = ("generation_config.json",)


def plan(src: Path, dst: Path, dtype: str) -> Job:
    """Open and check the source. Raises MossError for the first thing that is wrong with it, or for the destination."""
    if dtype not in DTYPES:
        raise MossError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    check_apart(src, dst)
    official = open_official(src)
    for problem in problems(official):
        raise MossError(problem)
    files = files_of(official.config)
    file_pieces = pieces(official.config)

    def write(file: BinaryIO, name: str, advance: Advance) -> None:
        header = header_bytes(files[name], METADATA)
        file.write(header)
        advance(len(header))
        for tensor in files[name]:
            write_tensor(file, tensor, our_bands(file_pieces[name], tensor.name, official.tensors), advance)

    sizes = {name: len(header_bytes(ts, METADATA)) + sum(t.nbytes for t in ts) for name, ts in files.items()}
    small = [src / name for name in ("config.json", *_COPIED, *TOKENIZER_FILES) if (src / name).is_file()]
    record = {"format": FORMAT, "dtype": dtype, "source": source_record([*small, *official.shards])}
    return Job(dst, record, sizes, lambda folder: _write_small_files(src, folder, dtype), write)


def check_apart(src: Path, dst: Path) -> None:
    """Raises MossError where source and destination are one folder, or one lies in the other."""
    if not dst.name:
        raise MossError(f"{dst}: not a name for a new folder")
    a, b = src.resolve(), dst.resolve()
    if a == b:
        raise MossError(f"{dst}: is the source itself; choose another destination")
    if a in b.parents or b in a.parents:
        raise MossError(f"{dst}: one of source and destination lies in the other; choose another destination")


def _write_small_files(src: Path, folder: Path, dtype: str) -> None:
    write_tokenizer(src, folder)
    for name in _COPIED:
        if (src / name).is_file():
            _write(folder / name, (src / name).read_bytes())
    text = (src / "config.json").read_bytes()
    _write(folder / "config.json", text.replace(b"{", _our_key(dtype), 1))


def _our_key(dtype: str) -> bytes:
    """What follows the first brace of our config.json; all else in it is as the source has it, so it can be taken out again."""
    return b'{\n  "moss_jt": ' + json.dumps({"format": FORMAT, "dtype": dtype}).encode() + b","


def official_config(text: bytes, dtype: str) -> bytes:
    """The source's config.json, byte for byte, from ours."""
    if _our_key(dtype) in text:
        return text.replace(_our_key(dtype), b"{", 1)
    raw = json.loads(text)  # somebody has laid it out anew
    raw.pop("moss_jt", None)
    return json.dumps(raw, indent=2, ensure_ascii=False).encode()


def _write(path: Path, data: bytes) -> None:
    with whole_file(path) as f:
        f.write(data)
