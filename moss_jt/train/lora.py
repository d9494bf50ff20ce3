"""LoRA: a low-rank adapter beside frozen matrices (Hu et al., 2021), and its files (docs/formats.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import Config
from ..convert.job import whole_file
from ..convert.view import cast, contiguous
from ..errors import MossError
from ..weights.header import read_header
from .arrays import FOR_PYTORCH, write_arrays
from .parameter import Parameter

TARGETS = {"qkv_proj": "attn", "out_proj": "attn", "fc_in": "mlp", "fc_out": "mlp"}  # the official modules, and where they are
ADAPTER_FILE, ADAPTER_CONFIG = "adapter.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Lora:
    """y = W x + alpha / rank · B A dropout(x), for the matrices of the official modules ``targets``."""

    rank: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = tuple(TARGETS)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raises MossError for what makes no adapter."""
        if type(self.rank) is not int or not 1 <= self.rank <= 1024:
            raise MossError(f"LoRA's rank is {self.rank!r}, expected a whole number from 1 to 1024")
        if not _is_number(self.alpha) or not 0 < self.alpha < float("inf"):
            raise MossError(f"LoRA's alpha is {self.alpha!r}, expected a number above 0")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise MossError(f"LoRA's dropout is {self.dropout!r}, expected a number from 0 to below 1")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise MossError(f"LoRA's targets are {', '.join(map(str, self.targets))!r}, expected some of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def module(i: int, target: str) -> str:
    """The official name of a target in block i."""
    return f"transformer.h.{i}.{TARGETS[target]}.{target}"


def tensor_names(module: str) -> tuple[str, str]:
    """What PEFT calls A and B of a module."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def shapes(config: Config, lora: Lora) -> dict[str, tuple[int, int]]:
    """Every tensor of an adapter for a model of this size: A (rank, K); B (N, rank), its rows in the official order."""
    d, inner, found = config.n_embd, config.n_inner, {}
    sizes = {"qkv_proj": (3 * d, d), "out_proj": (d, d), "fc_in": (inner, d), "fc_out": (d, inner)}
    for i in range(config.n_layer):
        for target in TARGETS:
            if target in lora.targets:
                (n, k), (a, b) = sizes[target], tensor_names(module(i, target))
                found[a], found[b] = (lora.rank, k), (n, lora.rank)
    return found


def mask_seed(seed: int, state: int, block: int, number: int) -> int:
    """Of dropout's mask for target ``number`` of a block, the ``state``-th time that masks are drawn."""
    return int(np.random.SeedSequence([seed, state, block, number]).generate_state(1, np.uint64)[0])


def begin(config: Config, lora: Lora, seed: int) -> dict[str, Parameter]:
    """As PEFT begins: A is uniform within 1 / sqrt(inputs), B zero, so that nothing changes at first."""
    rng, found = np.random.default_rng(seed), {}
    for name, shape in shapes(config, lora).items():
        limit = shape[1] ** -0.5 if ".lora_A." in name else 0
        found[name] = Parameter(name, rng.uniform(-limit, limit, shape).astype(np.float32), np.zeros(shape, np.float32))
    return found


def save_adapter(folder: str | Path, lora: Lora, tensors: dict[str, np.ndarray], base: str = "") -> None:
    """Write an adapter (float32, names and shapes as of ``shapes``) into a folder, which is made. ``base``: the model that it
    belongs to, for people. Raises MossError where that cannot be written; each file is there whole or not at all."""
    folder = Path(folder)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": list(lora.targets), "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip
    stored = {name: x.astype(np.float32, copy=False) for name, x in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_arrays(folder / ADAPTER_FILE, stored, FOR_PYTORCH)
        with whole_file(folder / ADAPTER_CONFIG) as f:
            f.write(json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")
    except OSError as e:
        raise MossError(f"{folder}: cannot be written: {e.strerror}") from None


def load_adapter(folder: str | Path, config: Config) -> tuple[Lora, dict[str, np.ndarray]]:
    """An adapter for a model of these sizes, as save_adapter wrote it, or PEFT in F32, F16 or BF16: tensors in float32.

    Raises MossError where it is missing, damaged, or does not suit the model, saying which tensor and why.
    """
    folder = Path(folder)
    lora, path = _read_config(folder / ADAPTER_CONFIG), folder / ADAPTER_FILE
    entries, found = read_header(path).entries, {}
    expected = shapes(config, lora)
    if unexpected := entries.keys() - expected.keys():
        raise MossError(f"{path}: tensor {min(unexpected)} belongs to no target of this adapter in a model of this size")
    for name, shape in expected.items():
        if name not in entries:
            raise MossError(f"{path}: tensor {name} is missing")
        tensor, start = entries[name]
        if tensor.shape != shape or tensor.dtype not in ("F32", "F16", "BF16"):
            raise MossError(f"{path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, expected F32 {list(shape)}")
        view = contiguous(name, path, tensor.dtype, shape, start)
        found[name] = cast(view.read(), view, "F32")
    return lora, found


def _read_config(path: Path) -> Lora:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind, bias, flat = raw.get("peft_type"), raw.get("bias", "none"), raw.get("use_rslora") or raw.get("use_dora")
        rank, alpha, targets, dropout = raw["r"], raw["lora_alpha"], raw["target_modules"], raw.get("lora_dropout", 0.0)
    except FileNotFoundError:
        raise MossError(f"{path}: missing: {path.parent} is not an adapter's folder") from None
    except OSError as e:
        raise MossError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise MossError(f"{path}: damaged, or not an adapter's: r, lora_alpha and target_modules are needed") from None
    if kind != "LORA" or bias != "none" or flat or not isinstance(targets, list):
        raise MossError(f"{path}: only plain LoRA adapters are known, with a list of target_modules and without biases")
    try:
        return Lora(rank, alpha, tuple(targets), dropout)
    except (MossError, TypeError) as e:
        raise MossError(f"{path}: {e}") from None
