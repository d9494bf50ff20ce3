"""``moss-jt tokenize``: text to ids and back, for scripts and for curiosity."""

from __future__ import annotations

import json
import sys

import click

from . import ui


class _BadInput(click.ClickException):
    exit_code = 2


@click.command("tokenize")
@click.argument("text", required=False)
@click.option("-m", "--model", required=True, metavar="DIR", help="Folder of a checkpoint, converted or official.")
@click.option("--decode", "task", flag_value="decode", help="Take a JSON list of ids and print the text they stand for.")
@click.option("--count", "task", flag_value="count", help="Print only the number of tokens.")
def command(text: str | None, model: str, task: str | None) -> None:
    """Print the token ids of TEXT as a JSON list on one line.

    TEXT may come from a pipe, or be - for that. It is taken as it is, a newline at its end included. So is the text that
    --decode prints: nothing is added to it, except on a terminal a newline.
    """
    from ..tokenizer import load_tokenizer

    given = _given(text)
    ids = _listed(given) if task == "decode" else None
    tokenizer = load_tokenizer(model)
    if ids is not None:
        click.echo(tokenizer.decode(ids).encode(), nl=ui.is_terminal(sys.stdout))
        return
    ids = tokenizer.encode(given)
    click.echo(len(ids) if task == "count" else json.dumps(ids))


def _given(text: str | None) -> str:
    if text not in (None, "-"):
        raw = text.encode("utf-8", "surrogateescape")  # how Python marks bytes of an argument that are no UTF-8
    elif sys.stdin is None or (text is None and sys.stdin.isatty()):
        raise click.UsageError("no TEXT given and nothing piped in")
    else:
        raw = sys.stdin.buffer.read()
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise _BadInput(f"the text is not UTF-8: byte {e.start} is 0x{raw[e.start]:02X}; convert it first") from None


def _listed(text: str) -> list[int]:
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise _BadInput("--decode takes a JSON list of ids, such as [27, 91]")
    return ids
