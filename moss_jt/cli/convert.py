"""``moss-jt convert``: official checkpoints to ours, and back."""

from __future__ import annotations

import click


@click.group()
def command() -> None:
    """Convert official checkpoints, and back."""


@command.command()
@click.argument("src")
@click.argument("dst", type=click.Path())
def weights(src: str, dst: str) -> None:
    """Convert the official checkpoint in the folder SRC to DST."""
    from .. import convert

    convert.weights(src, dst)
