"""Small checkpoints in the official formats, made on the spot and without torch.

    config = small_config(n_head=8)                      # what config.json holds
    state = random_state(config, seed=1)                 # official name -> float32 array, exact in fp16 and bf16
    write_official(folder, config, state, container="zip", shards=2, dtype="fp16")

The containers are written from their description, independently of the converter's code: ``zip`` as torch.save does now,
``legacy`` as it did before 1.6, ``safetensors`` as transformers does.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MP_NUM = 4
_TORCH = {
    "fp32": "FloatStorage",
    "fp16": "HalfStorage",
    "bf16": "BFloat16Storage",
    "bool": "BoolStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
}
_SAFETENSORS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "bool": "BOOL", "int32": "I32", "int64": "I64"}
_TOKENIZER_WORDS = ["Ġ", "h", "i", "hi", "!"]


def small_config(**changes) -> dict:
    """The keys of an official config.json, of a model of 2 blocks with 5,000 parameters; ``changes`` replace some."""
    config = {
        "model_type": "moss", "activation_function": "gelu_new", "n_layer": 2, "n_embd": 16, "n_head": 4, "n_inner": None,
        "rotary_dim": 4, "n_ctx": 32, "n_positions": 32, "vocab_size": 24, "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float16",
    }  # fmt: skip
    return {**config, **changes}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Official name -> shape, in the official order, without the causal masks."""
    d, v = config["n_embd"], config["vocab_size"]
    inner = config["n_inner"] or 4 * d
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (v, d)}
    for i in range(config["n_layer"]):
        block = {
            "ln_1.weight": (d,), "ln_1.bias": (d,), "attn.qkv_proj.weight": (3 * d, d), "attn.out_proj.weight": (d, d),
            "mlp.fc_in.weight": (inner, d), "mlp.fc_in.bias": (inner,),
            "mlp.fc_out.weight": (d, inner), "mlp.fc_out.bias": (d,),
        }  # fmt: skip
        found.update({f"transformer.h.{i}.{name}": shape for name, shape in block.items()})
    ln_f = {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
    return {**found, **ln_f, "lm_head.weight": (v, d), "lm_head.bias": (v,)}


def random_state(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors of which fp16 and bf16 keep every bit (8 significant bits, no extreme exponents).

    Scaled as a freshly made model's, so that it computes something: weights around 1/sqrt(inputs), norms around 1.
    """
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes(config).items():
        x = rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) == 2 else 10)
        state[name] = _keep_8_bits(x + 1 if ".ln_" in name and name.endswith("weight") else x)
    return state


def _keep_8_bits(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    x[np.abs(x) < 2**-12] = 0
    return (x.view(np.uint32) & 0xFFFF0000).view(np.float32)


def write_official(
    folder: Path,
    config: dict,
    state: dict[str, np.ndarray],
    container: str = "zip",
    shards: int = 1,
    dtype: str = "fp16",
    index: bool | None = None,
    masks: bool = True,
) -> Path:
    """Write ``folder`` as an official checkpoint and return it.

    container: zip, legacy or safetensors. index: whether to write an index file; by default where there are several shards.
    masks: whether each block has its causal_mask buffer. The tokenizer's files are a few tokens' worth of GPT-2's kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_tokenizer_files(folder)
    stored = {name: store(x, dtype) for name, x in state.items()}
    if masks:
        mask = np.tril(np.ones((config["n_ctx"], config["n_ctx"]), bool))[None, None]
        stored.update({f"transformer.h.{i}.attn.causal_mask": ("bool", mask) for i in range(config["n_layer"])})
    stem, suffix = ("model", "safetensors") if container == "safetensors" else ("pytorch_model", "bin")
    names = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" for i in range(shards)] if shards > 1 else [f"{stem}.{suffix}"]
    weight_map = {name: names[i * shards // len(stored)] for i, name in enumerate(stored)}
    for file in names:
        tensors = {name: stored[name] for name in stored if weight_map[name] == file}
        (folder / file).write_bytes(WRITERS[container](tensors))
    if shards > 1 if index is None else index:
        total = sum(x.nbytes for _, x in stored.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / f"{stem}.{suffix}.index.json").write_text(text + "\n", encoding="utf-8")
    return folder


def write_tokenizer_files(folder: Path) -> None:
    """vocab.json, merges.txt and the rest, as small as they can be."""
    files: dict[str, object] = {
        "vocab.json": {word: i for i, word in enumerate(_TOKENIZER_WORDS)},
        "added_tokens.json": {"<eoh>": 5, "<eom>": 6, "  ": 7},
        "special_tokens_map.json": {"additional_special_tokens": ["<eoh>", "<eom>"]},
        "tokenizer_config.json": {"tokenizer_class": "MossTokenizer"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nh i\n", encoding="utf-8")


def store(x: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
    """An array as it is stored: (dtype, array), bfloat16 as the upper 16 bits of a float32."""
    if dtype == "bf16":
        return dtype, (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return dtype, x.astype({"fp32": np.float32, "fp16": np.float16, "bool": bool}[dtype])


# ---- pickles ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Global:
    """A module and a name in it, as the GLOBAL instruction gives them."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """A call (REDUCE) of a Global."""

    function: Global
    args: tuple


@dataclass(frozen=True)
class Persistent:
    """A persistent id (BINPERSID)."""

    value: tuple


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = Global("collections", "OrderedDict")


def tensor(key: str, storage: str, numel: int, offset: int, shape: tuple, strides: tuple, legacy: bool = False) -> Call:
    """A tensor as torch pickles it; ``storage`` is for example HalfStorage."""
    place = Persistent(("storage", Global("torch", storage), key, "cpu", numel, *((None,) if legacy else ())))
    return Call(REBUILD, (place, offset, shape, strides, False, Call(ORDERED_DICT, ())))


def encode(value: object) -> bytes:
    """The instructions (protocol 2) that build ``value``: plain data, Global, Call and Persistent."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encode, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(encode, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(encode(x) for item in value.items() for x in item) + b"u"
    if isinstance(value, Global):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return encode(value.function) + encode(value.args) + b"R"
    if isinstance(value, Persistent):
        return encode(value.value) + b"Q"
    raise TypeError(value)


def pickled(value: object) -> bytes:
    return b"\x80\x02" + encode(value) + b"."


# ---- containers -------------------------------------------------------------------------------------------------------------


def zip_container(pickle: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as z:
        z.writestr("archive/data.pkl", pickle)
        z.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            z.writestr(f"archive/data/{key}", data)
        z.writestr("archive/version", "3\n")
    return out.getvalue()


def legacy_container(pickle: bytes, storages: dict[str, tuple[int, bytes]]) -> bytes:
    """``storages``: key -> (number of elements, bytes), in the order in which they are written."""
    sizes = {"short": 2, "int": 4, "long": 4}
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": sizes}
    head = pickled(0x1950A86A20F9469CFC6C) + pickled(1001) + pickled(system) + pickle + pickled(list(storages))
    return head + b"".join(struct.pack("<q", numel) + data for numel, data in storages.values())


def safetensors_container(tensors: dict[str, tuple[str, np.ndarray]]) -> bytes:
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, x) in tensors.items():
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text + b"".join(x.tobytes() for _, x in tensors.values())


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def _pickle_of(tensors: dict[str, tuple[str, np.ndarray]], legacy: bool) -> bytes:
    return pickled(
        {
            name: tensor(str(i), _TORCH[dtype], x.size, 0, x.shape, _contiguous(x.shape), legacy)
            for i, (name, (dtype, x)) in enumerate(tensors.items())
        }
    )


def torch_zip(tensors: dict[str, tuple[str, np.ndarray]]) -> bytes:
    return zip_container(_pickle_of(tensors, False), {str(i): x.tobytes() for i, (_, x) in enumerate(tensors.values())})


def torch_legacy(tensors: dict[str, tuple[str, np.ndarray]]) -> bytes:
    storages = {str(i): (x.size, x.tobytes()) for i, (_, x) in enumerate(tensors.values())}
    return legacy_container(_pickle_of(tensors, True), storages)


WRITERS = {"zip": torch_zip, "legacy": torch_legacy, "safetensors": safetensors_container}
