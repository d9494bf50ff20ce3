"""What a training gives: in each checkpoint with every bit, and at its end as something to use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Callable

from ..convert import plan_weights
from ..convert.job import sync, whole_file
from ..convert.to_moss_jt import COPIED, official_config
from ..tokenizer import load_tokenizer, write_tokenizer
from ..weights import Weights
from .arrays import FOR_PYTORCH, fill, write_arrays
from .lora import Lora, load_adapter, save_adapter
from .parameter import Parameter

MODEL, ADAPTER = "model", "adapter"  # the folder's name, in a checkpoint and of the result
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


class Whole:
    """All weights. In a checkpoint they are an official checkpoint's folder, in F32, which other programs can read, too."""

    def __init__(self, base: Path, parameters: dict[str, Parameter], dtype: str):
        """``base``: the converted checkpoint that was trained. ``dtype``: of the result's blocks."""
        self._base, self._dtype = base, dtype
        self._values = {name: p.value for name, p in parameters.items()}
        self.nbytes = sum(x.nbytes for x in self._values.values())

    def save(self, folder: Path) -> None:
        model = folder / MODEL
        model.mkdir()
        write_small_files(self._base, model)
        write_arrays(model / _WEIGHTS, self._values, FOR_PYTORCH)

    def load(self, folder: Path) -> None:
        fill(folder / MODEL / _WEIGHTS, self._values)

    def publish(self, checkpoint: Path, output: Path, progress: Progress | None = None) -> Path:
        """Make a checkpoint's weights a converted folder in ``output``, complete or not at all; returns it. One that is there
        is replaced unless it is just that."""
        job = plan_weights(checkpoint / MODEL, output / MODEL, self._dtype)
        if not job.finished:
            for old in (job.dst, *([] if job.begun else [job.partial])):
                if old.exists():
                    shutil.rmtree(old)
            job.run(progress)
        return job.dst


class Adapter:
    """An adapter, as PEFT has it, in F32."""

    def __init__(self, base: Weights, lora: Lora, parameters: dict[str, Parameter]):
        self._base, self._lora = base, lora
        self._values = {name: p.value for name, p in parameters.items()}
        self.nbytes = sum(x.nbytes for x in self._values.values())

    def save(self, folder: Path) -> None:
        save_adapter(folder / ADAPTER, self._lora, self._values, str(self._base.folder))

    def load(self, folder: Path) -> None:
        _, found = load_adapter(folder / ADAPTER, self._base.config)
        for name, x in self._values.items():
            x[...] = found[name]

    def publish(self, checkpoint: Path, output: Path, progress: Progress | None = None) -> Path:
        """Make a checkpoint's adapter a folder in ``output``, complete or not at all; returns it. One that is there is
        replaced."""
        done = output / ADAPTER
        partial = done.with_name(ADAPTER + ".partial")
        for old in (partial, done):
            if old.exists():
                shutil.rmtree(old)
        shutil.copytree(checkpoint / ADAPTER, partial)
        for path in (*partial.iterdir(), partial):
            sync(path)
        partial.rename(done)
        return done


def write_small_files(base: Path, folder: Path) -> None:
    """All but the weights, as an official checkpoint has it: what ``base`` has, but a dialogue ends with ``<eom>``, as the
    training data does, where a base model says ``<|endoftext|>``."""
    write_tokenizer(base, folder)
    end = load_tokenizer(base).token_id("<eom>")
    for name in (_CONFIG, *COPIED):
        if (base / name).is_file():
            text = (base / name).read_bytes()
            with whole_file(folder / name) as file:
                file.write(_ending_with(end, official_config(text)) if name.endswith(".json") else text)


def _ending_with(end: int | None, text: bytes) -> bytes:
    raw = json.loads(text)
    if end is None or raw.get("eos_token_id") == end:
        return text
    return json.dumps({**raw, "eos_token_id": end}, indent=2, ensure_ascii=False).encode() + b"\n"
