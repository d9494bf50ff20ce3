"""PyTorch: transformers' CodeGen, which computes the same as MOSS, in fp16 on random weights in the shape that is asked for, on
the CPU or, with ``"device": "cuda"``, on a GPU; there also PyTorch's own copy and product. With a ``budget`` of its memory
accelerate keeps the rest in RAM."""

from __future__ import annotations

import torch
import transformers
from serving import asked, rate, serve
from transformers import CodeGenConfig, CodeGenForCausalLM
from transformers.models.codegen.modeling_codegen import create_sinusoidal_positions


def build(config: dict, device: str) -> CodeGenForCausalLM:
    """The model with small random weights, filled in seconds: a pool of them again and again."""
    names = ("n_layer", "n_embd", "n_head", "n_inner", "n_ctx", "rotary_dim", "vocab_size")
    shape = CodeGenConfig(n_positions=config["n_ctx"], **{name: config[name] for name in names})
    with torch.device("meta"):
        model = CodeGenForCausalLM(shape)
    model = model.half().to_empty(device=device).eval()
    pool = (torch.randn(1 << 22) * 0.02).half().to(device)
    for parameter in model.parameters():
        for part in parameter.data.view(-1).split(len(pool)):
            part.copy_(pool[: len(part)])
    for block in model.transformer.h:
        block.attn.embed_positions = create_sinusoidal_positions(config["n_ctx"], config["rotary_dim"]).half().to(device)
    return model


def within(model: CodeGenForCausalLM, budget: int) -> CodeGenForCausalLM:
    """As accelerate places it: so many bytes on the GPU, the rest in RAM, brought there when it is used."""
    from accelerate import dispatch_model, infer_auto_device_map

    memory = {0: budget, "cpu": 1 << 40}
    places = infer_auto_device_map(model, memory, no_split_module_classes=["CodeGenBlock"])
    return dispatch_model(model, places)


class Program:
    def __init__(self, model: CodeGenForCausalLM, used: int):
        self.model, self.used = model, used
        out = model(self.random(used), use_cache=True, logits_to_keep=1)
        self.cache, self.last = out.past_key_values, out.logits.argmax(-1)

    def random(self, count: int) -> torch.Tensor:
        return torch.randint(10, self.model.config.vocab_size, (1, count), device=self.model.device)

    def token(self) -> None:
        out = self.model(self.last, past_key_values=self.cache, use_cache=True)
        self.last = out.logits.argmax(-1)
        self.last.item()  # waits, as whoever wants to know the token does
        self.cache.crop(-1)  # so that it always holds as many

    def decode(self) -> float:
        return rate(self.token, 1)

    def prefill(self, tokens: int) -> float:
        ids = self.random(tokens)
        return rate(lambda: self.model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).item(), tokens)


def copy() -> float:
    """Bytes a second that a copy on the GPU reads and writes."""
    a = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)

    def work() -> None:
        for _ in range(8):
            b.copy_(a)
        torch.cuda.synchronize()

    work()
    return rate(work, 16 * len(a))


def multiply() -> float:
    """Floating-point operations a second of a product in fp16 on the GPU."""
    a = torch.ones(8192, 8192, dtype=torch.half, device="cuda")

    def work() -> None:
        torch.matmul(a, a)
        torch.cuda.synchronize()

    work()
    return rate(work, 2 * len(a) ** 3)


@torch.inference_mode()
def main() -> None:
    ask = asked()
    torch.set_num_threads(ask["threads"])
    torch.manual_seed(0)
    device = ask.get("device", "cpu")
    model = within(build(ask["config"], "cpu"), ask["budget"]) if "budget" in ask else build(ask["config"], device)
    program = Program(model, ask["used"])
    serve(
        {
            "decode": program.decode,
            "prefill": program.prefill,
            **({"copy": copy, "multiply": multiply} if device == "cuda" else {}),
        },
        version=f"torch {torch.__version__}, transformers {transformers.__version__}",
        weights="fp16",
        bytes_per_token=sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "wte" not in name),
    )


if __name__ == "__main__":
    main()
