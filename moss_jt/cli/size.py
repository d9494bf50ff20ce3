"""Sizes: as options, and as they are written for people."""

from __future__ import annotations

import click

from ..config import KV_CACHES, SWAPS
from ..errors import MossError
from ..sizes import parse_size


class _Size(click.ParamType):
    """A size such as 6GiB, in bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except MossError as e:
            self.fail(str(e), param, ctx)


SIZE = _Size()
CONTEXT = click.option("--context", type=click.IntRange(2), default=2048, show_default=True, help="Tokens to keep room for.")
RAM = click.option("--ram", type=SIZE, metavar="SIZE", help="Most memory to use, like 6GiB.  [default: what can be spared]")
VRAM = click.option("--vram", type=SIZE, metavar="SIZE", help="Most of a GPU's memory to use.  [default: what can be spared]")
SWAP = click.option(
    "--swap", type=click.Choice(SWAPS), default="auto", show_default=True, help="What becomes of blocks that do not fit a GPU."
)
KV_CACHE = click.option(
    "--kv-cache", type=click.Choice(KV_CACHES), default="fp16", show_default=True, help="In what keys and values are kept."
)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**7 else f"{count / 1e6:.2f} MB"
