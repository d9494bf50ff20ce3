"""The option that says what computes."""

from __future__ import annotations

import click

_DEVICES = click.Choice(["auto", "cpu", "cuda"])
DEVICE = click.option("--device", type=_DEVICES, default="auto", show_default=True, help="What computes; auto: CUDA if it can.")
