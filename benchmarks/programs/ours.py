"""moss-jt, on random weights in the shape that is asked for."""

from __future__ import annotations

from pathlib import Path

from serving import asked, serve

import moss_jt
from moss_jt.bench import Shape, limits, random_checkpoint
from moss_jt.bench.decode import Sweeps
from moss_jt.bench.prefill import Prompts
from moss_jt.config import Config
from moss_jt.model import Model
from moss_jt.runtime import jittor
from moss_jt.weights import open_weights
from moss_jt.weights.layout import Coding


def main() -> None:
    ask = asked()
    shape = Shape(Config(**ask["config"]), Coding(ask["dtype"], ask["head_dtype"]))
    jittor("cpu", ask["threads"])
    with random_checkpoint(shape, Path(ask["folder"])) as folder:
        model = Model(open_weights(folder), shape.config.n_ctx)
        serve(
            {
                "decode": Sweeps(model, ask["used"], 1).tokens_s,
                "prefill": lambda tokens: Prompts(model, tokens).tokens_s(),
                "memory": limits.memory_read(ask["threads"]).measure,
            },
            version=moss_jt.__version__,
            weights=f"{shape.coding.dtype}, lm_head {shape.coding.head_dtype}",
            bytes_per_token=shape.token_bytes,
        )


if __name__ == "__main__":
    main()
