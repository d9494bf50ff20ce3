"""The sizes of a model, read from its config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import MossError

# The official qkv_proj is split over its rows in this many equal parts (see docs/formats.md), so heads come in fours.
MP_NUM = 4
# No size is larger than this in any model; a damaged number must not make us plan for a million blocks.
_LARGEST, _MOST_BLOCKS = 1 << 24, 1000
KV_CACHES = ("fp16", "int8")  # how keys and values may be kept
SWAPS = ("auto", "stream", "host", "unified", "jittor")  # what may become of blocks that do not fit a GPU


@dataclass(frozen=True)
class Config:
    """Sizes of one model. Shapes elsewhere name them D = n_embd, H = n_head, V = vocab_size."""

    n_layer: int
    n_embd: int
    n_head: int
    n_inner: int  # width of the MLP, already resolved: 4 * n_embd where config.json says null
    rotary_dim: int  # leading entries of each head that are rotated
    n_ctx: int  # longest sequence the model was trained for, in tokens
    vocab_size: int
    layer_norm_epsilon: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    def cache_bytes_per_token(self, kv_cache: str = "fp16") -> int:
        """What the cache needs for one position: keys and values of all blocks, in int8 with a float32 scale for each head.

        Raises MossError for a ``kv_cache`` that is none of KV_CACHES.
        """
        if kv_cache not in KV_CACHES:
            raise MossError(f"kv_cache is {kv_cache!r}, it must be {' or '.join(KV_CACHES)}")
        head = self.head_size + 4 if kv_cache == "int8" else self.head_size * 2
        return self.n_layer * 2 * self.n_head * head

    @classmethod
    def read(cls, folder: str | Path) -> Config:
        """Read ``folder/config.json``. Raises MossError where it is missing, broken or of another architecture."""
        return cls.from_dict(read_json(folder), where=str(Path(folder) / "config.json"))

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config.json") -> Config:
        """Check the official keys and build a Config. Raises MossError naming the key that is wrong."""
        _refuse_other_architectures(raw, where)
        sizes = {name: _positive(raw, name, where) for name in ("n_layer", "n_embd", "n_head", "rotary_dim", "vocab_size")}
        sizes["n_ctx"] = _positive(raw, "n_ctx" if "n_ctx" in raw else "n_positions", where)
        sizes["n_inner"] = 4 * sizes["n_embd"] if raw.get("n_inner") is None else _positive(raw, "n_inner", where)
        ids = {name: raw.get(name) if isinstance(raw.get(name), int) else None for name in ("bos_token_id", "eos_token_id")}
        epsilon = raw.get("layer_norm_epsilon", 1e-5)
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
            raise MossError(f"{where}: layer_norm_epsilon is {epsilon!r}, expected a number between 0 and 1")
        config = cls(**sizes, **ids, layer_norm_epsilon=float(epsilon))
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        if self.n_head % MP_NUM:
            raise MossError(f"{where}: n_head {self.n_head} is not a multiple of {MP_NUM}, as the layout of qkv_proj needs")
        if self.n_embd % self.n_head:
            raise MossError(f"{where}: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_size:
            raise MossError(f"{where}: rotary_dim {self.rotary_dim} must be even and at most {self.head_size}, a head's size")


def read_json(folder: str | Path) -> dict:
    """The raw content of ``folder/config.json``. Raises MossError where there is none or it is not a JSON object."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MossError(f"{folder}: no config.json here, so this is not a model's folder") from None
    except OSError as e:
        raise MossError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise MossError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(raw, dict):
        raise MossError(f"{path}: holds a {type(raw).__name__}, expected an object")
    return raw


def _refuse_other_architectures(raw: dict, where: str) -> None:
    if "n_embd" in raw and "rotary_dim" in raw:
        if raw.get("model_type", "moss") not in ("moss", "codegen"):
            raise MossError(f"{where}: model_type is {raw['model_type']!r}; only MOSS (moss-moon-003) models are supported")
        if raw.get("activation_function", "gelu_new") != "gelu_new":
            raise MossError(f"{where}: activation_function is {raw['activation_function']!r}, MOSS uses 'gelu_new'")
        if raw.get("tie_word_embeddings", False):
            raise MossError(f"{where}: tie_word_embeddings is true, which no MOSS model uses")
        return
    if "hidden_size" in raw and raw.get("model_type") == "moss":
        raise MossError(
            f"{where}: this is moss-base-7b's architecture (it has hidden_size, no n_embd and rotary_dim), "
            "not moss-moon-003's; it is not supported"
        )
    missing = [k for k in ("n_embd", "rotary_dim") if k not in raw]
    raise MossError(f"{where}: {' and '.join(missing)} missing: not a moss-moon-003 model")


def _positive(raw: dict, name: str, where: str) -> int:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MossError(f"{where}: {name} is {value!r}, expected a positive whole number")
    if value > (largest := _MOST_BLOCKS if name == "n_layer" else _LARGEST):
        raise MossError(f"{where}: {name} is {value}, and cannot be more than {largest}")
    return value
