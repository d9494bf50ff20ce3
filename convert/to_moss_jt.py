"""From an official checkpoint, or from ours in fp16, to ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Callable

from ..errors import MossError
from ..meta_instruction import FILE as META_INSTRUCTION_FILE
from ..meta_instruction import read_meta_instruction
from ..tokenizer import write_tokenizer
from ..tokenizer.files import COPIED as TOKENIZER_FILES
from ..weights.header import header_bytes
from ..weights.layout import BITS, FORMAT, GROUP, HEAD_FILE, METADATA, Coding, block_file, files_of
from .calibrate import read_calibration
from .copy import Advance, append, write_panels, write_quantised, write_tensor
from .gptq import SETTINGS, Gptq
from .gptq_blocks import Blocks
from .job import Job, source_record, whole_file
from .panels import in_panels
from .source import Source, open_source

# Copied as they are, where they are there; write_tokenizer copies the tokenizer's own.
COPIED = ("generation_config.json", META_INSTRUCTION_FILE)
METHODS = ("rtn", "gptq")


def plan(
    src: Path,
    dst: Path,
    dtype: str | None,
    head_dtype: str | None = None,
    method: str = "rtn",
    calibration: Path | None = None,
    group_size: int = GROUP,
    act_order: bool = False,
) -> Job:
    """Open and check the source. Raises MossError for the first thing that is wrong with it, or for the destination."""
    check_method(method, calibration, act_order)
    coding = Coding(dtype or "fp16", head_dtype or ("fp16" if dtype in (None, "fp16") else "int8"), group_size, act_order)
    check_apart(src, dst)
    source = open_source(src)
    read_meta_instruction(src)  # what could not be used is not copied
    if source.gptq:
        if method != "rtn" or group_size != GROUP:
            raise MossError(f"{src}: quantised already, and kept as it is; for another method or group size take it in fp16")
        coding = _as_it_is(src, source.gptq, dtype, head_dtype)
    elif coding.dtype == "fp16" and (method != "rtn" or group_size != GROUP):
        raise MossError("fp16 is not quantised, so it has neither a method nor a group size; choose int8 or int4")
    if not source.official and coding.is_fp16:
        raise MossError(f"{src}: already converted; it can be used as it is")
    key = {"format": FORMAT, **coding.to_dict()}
    files = files_of(source.config, coding)
    sizes = {name: len(header_bytes(ts, METADATA)) + sum(t.nbytes for t in ts) for name, ts in files.items()}
    small = [src / name for name in ("config.json", SETTINGS, *COPIED, *TOKENIZER_FILES) if (src / name).is_file()]
    record = {**key, "source": source_record([*small, *source.files])}
    notes = source.gptq.notes if source.gptq else []
    job = Job(dst, record, sizes, lambda folder: _write_small_files(src, folder, key), _writer(source, coding), notes)
    return _calibrated(job, src, source, coding, calibration) if method == "gptq" else job


def _as_it_is(src: Path, gptq: Gptq, dtype: str | None, head_dtype: str | None) -> Coding:
    """A GPTQ checkpoint's own coding: its numbers are kept, so it cannot be had in others."""
    if dtype not in (None, gptq.coding.dtype):
        raise MossError(f"{src}: quantised to {gptq.coding.dtype} and kept so; for {dtype} take the checkpoint in fp16")
    return replace(gptq.coding, head_dtype=head_dtype or "fp16")


def check_method(method: str, calibration: str | Path | None, act_order: bool) -> None:
    """Raises MossError for what does not go together, whatever the checkpoint is."""
    if method not in METHODS:
        raise MossError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if method == "gptq" and calibration is None:
        raise MossError("gptq needs dialogues to calibrate with: give a file of them")
    if method != "gptq" and calibration is not None:
        raise MossError(f"{method} uses no calibration; leave {calibration} out, or choose gptq")
    if method != "gptq" and act_order:
        raise MossError(f"{method} has no order of inputs to go by; leave act-order out, or choose gptq")


def _calibrated(job: Job, src: Path, source: Source, coding: Coding, calibration: Path) -> Job:
    blocks = Blocks(source, coding, read_calibration(calibration, src, source.config), job.partial)
    numbers = {block_file(i): i for i in range(source.config.n_layer)}

    def write(file: BinaryIO, name: str, advance: Advance) -> None:
        if name in numbers:
            blocks.write(file, numbers[name], advance)
        else:
            if name == HEAD_FILE:  # after all blocks
                blocks.clear()
            job.write(file, name, advance)

    record = {**job.record, "method": "gptq", "calibration": source_record([calibration])}
    return replace(job, record=record, write=write, spilled=blocks.spilled)


def _writer(source: Source, coding: Coding) -> Callable[[BinaryIO, str, Advance], None]:
    """What writes one of our weights files, for a Job."""
    plain, stored = files_of(source.config), files_of(source.config, coding)

    def write(file: BinaryIO, name: str, advance: Advance) -> None:
        header = header_bytes(stored[name], METADATA)
        file.write(header)
        advance(len(header))
        dtype, group = (coding.head_dtype, GROUP) if name == HEAD_FILE else (coding.dtype, coding.group)
        for tensor in plain[name]:
            if tensor in stored[name]:
                write_tensor(file, tensor, source.bands(name, tensor.name), advance)
            elif source.gptq and name != HEAD_FILE:
                _write_gptq(file, source.gptq, name, tensor.name, advance)
            else:
                write_quantised(file, BITS[dtype], group, source.bands(name, tensor.name), advance)

    return write


def _write_gptq(file: BinaryIO, gptq: Gptq, name: str, tensor: str, advance: Advance) -> None:
    write_panels(file, in_panels(gptq.rows(name, tensor), gptq.bits), advance)
    if gptq.coding.ordered:
        append(file, gptq.order(name, tensor), advance)


def check_apart(src: Path, dst: Path) -> None:
    """Raises MossError where source and destination are one folder, or one lies in the other."""
    if not dst.name:
        raise MossError(f"{dst}: not a name for a new folder")
    a, b = src.resolve(), dst.resolve()
    if a == b:
        raise MossError(f"{dst}: is the source itself; choose another destination")
    if a in b.parents or b in a.parents:
        raise MossError(f"{dst}: one of source and destination lies in the other; choose another destination")


def _write_small_files(src: Path, folder: Path, key: dict) -> None:
    write_tokenizer(src, folder)
    for name in COPIED:
        if (src / name).is_file():
            _write(folder / name, (src / name).read_bytes())
    _write(folder / "config.json", our_config(official_config((src / "config.json").read_bytes()), key))


def our_config(text: bytes, key: dict) -> bytes:
    """An official config.json with our key first."""
    return text.replace(b"{", _our_key(key), 1)


def _our_key(key: dict) -> bytes:
    """What follows the first brace of our config.json; all else in it is as the source has it, so it can be taken out again."""
    return b'{\n  "moss_jt": ' + json.dumps(key).encode() + b","


def official_config(text: bytes) -> bytes:
    """A config.json without our key: byte for byte the one that ours was made from; an official one as it is."""
    raw = json.loads(text)
    key = raw.pop("moss_jt", None)
    if key is None:
        return text
    if _our_key(key) in text:
        return text.replace(_our_key(key), b"{", 1)
    return json.dumps(raw, indent=2, ensure_ascii=False).encode()  # somebody has laid it out anew


def _write(path: Path, data: bytes) -> None:
    with whole_file(path) as f:
        f.write(data)
