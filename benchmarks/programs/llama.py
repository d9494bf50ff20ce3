"""llama.cpp, on random weights in the shape that is asked for. Needs llama-cpp-python and gguf.

The GGUF architecture is phi2, which computes what a MOSS block computes: one norm before attention and MLP side by side, rotary
on part of each head, the GELU with tanh. Only the order of the rotary pairs differs, which costs the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as Type
from serving import asked, rate, serve

STORED = {"fp16": Type.F16, "int8": Type.Q8_0, "int4": Type.Q4_0}
POOL = 1 << 22  # random numbers, repeated


def tensors(config: dict, dtype: Type, head: Type) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """Name, shape and type of each tensor, in the file's order; the first is the embedding."""
    d, inner, v = config["n_embd"], config["n_inner"], config["vocab_size"]
    yield "token_embd.weight", (v, d), dtype
    for i in range(config["n_layer"]):
        sizes = {"attn_qkv": (3 * d, d), "attn_output": (d, d), "ffn_up": (inner, d), "ffn_down": (d, inner)}
        yield from ((f"blk.{i}.attn_norm.{part}", (d,), Type.F32) for part in ("weight", "bias"))
        for name, (n, k) in sizes.items():
            yield f"blk.{i}.{name}.weight", (n, k), dtype
            yield f"blk.{i}.{name}.bias", (n,), Type.F32
    yield from ((f"output_norm.{part}", (d,), Type.F32) for part in ("weight", "bias"))
    yield "output.weight", (v, d), head
    yield "output.bias", (v,), Type.F32


def write(path: Path, config: dict, dtype: Type, head: Type) -> int:
    """Write the model; returns the bytes of weights that a decoded token reads."""
    writer = gguf.GGUFWriter(path, "phi2")
    describe(writer, config)
    numbers = np.random.default_rng(0).standard_normal(POOL, np.float32) * 0.02
    pools = {t: gguf.quants.quantize(numbers.reshape(-1, 4096), t).view(np.uint8).reshape(-1) for t in {dtype, head, Type.F32}}
    all_of_them = [(name, shape, t, nbytes(shape, t)) for name, shape, t in tensors(config, dtype, head)]
    for name, shape, t, count in all_of_them:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=t)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, t, count in all_of_them:
        writer.write_tensor_data(np.resize(pools[t], count))
    writer.close()
    return sum(count for *_, count in all_of_them[1:])


def nbytes(shape: tuple[int, ...], t: Type) -> int:
    values, size = gguf.GGML_QUANT_SIZES[t]
    return int(np.prod(shape)) // values * size


def describe(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_context_length(config["n_ctx"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(config["rotary_dim"])
    writer.add_tokenizer_model("gpt2")  # of no use here, but it has to be there
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


class Program:
    def __init__(self, path: Path, config: dict, threads: int, used: int):
        self.vocab, self.used = config["vocab_size"], used
        size = {"n_ctx": config["n_ctx"], "n_batch": 512}
        self.llama = llama_cpp.Llama(str(path), **size, n_threads=threads, n_threads_batch=threads, verbose=False)
        self.last = self.evaluate(self.random(used), 0)

    def random(self, count: int) -> list[int]:
        return np.random.default_rng(0).integers(10, self.vocab, count).tolist()

    def evaluate(self, ids: list[int], behind: int) -> int:
        """Evaluate the ids behind so many cached tokens; returns the likeliest to follow."""
        self.llama.n_tokens = behind
        self.llama.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def token(self) -> None:
        self.last = self.evaluate([self.last], self.used)

    def decode(self) -> float:
        return rate(self.token, 1)

    def prefill(self, tokens: int) -> float:
        ids = self.random(tokens)
        return rate(lambda: self.evaluate(ids, 0), tokens)


def main() -> None:
    ask = asked()
    dtype, head = STORED[ask["dtype"]], STORED[ask["head_dtype"]]
    path = Path(ask["folder"]) / "moss.gguf"
    read = write(path, ask["config"], dtype, head)
    program = Program(path, ask["config"], ask["threads"], ask["used"])
    serve(
        {"decode": program.decode, "prefill": program.prefill},
        version=f"llama-cpp-python {llama_cpp.__version__}",
        weights=f"{dtype.name}, lm_head {head.name}",
        bytes_per_token=read,
        compiled_for=llama_cpp.llama_print_system_info().decode(),
    )


if __name__ == "__main__":
    main()
