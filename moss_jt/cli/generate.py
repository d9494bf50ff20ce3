"""`moss-jt generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import Any

import click

from ..errors import MossError
from ..plugins import Plugin
from . import ui
from .chat_options import TEXT, as_utf8, check_options, load_model, shared_options, system_text


@click.command("generate")
@click.argument("prompt", type=TEXT, required=False)
@shared_options
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the dialogue format.")
@click.option(
    "--stop", type=TEXT, multiple=True, metavar="TEXT", help="Also stop at this text, which is not shown. Repeatable."
)
@click.option("--stats", is_flag=True, help="Show the plan, and speeds and memory after the answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end: text, ids, counts, speeds.")
def command(
    prompt: str | None,
    model: str,
    adapter: str | None,
    system: str | None,
    plugins: list[Plugin] | None,
    no_plugins: bool,
    context: int,
    kv_cache: str,
    vram: int | None,
    swap: str,
    ram: int | None,
    device: str,
    raw: bool,
    stop: tuple[str, ...],
    stats: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Answer one question, or with --raw continue a text. PROMPT may come from a pipe, or be - for that."""
    for option, value in (("--system", system), ("--plugins", plugins)):
        if raw and value is not None:
            raise click.UsageError(f"{option} belongs to the dialogue format, which --raw leaves out")
    check_options(settings)
    plugins = [] if no_plugins else plugins
    system = None if system is None else system_text(system)
    text = _read_prompt(prompt)
    text = text if raw else text.strip()
    if not text:
        raise MossError("the prompt is empty")
    moss = load_model(model, device, context, ram, kv_cache, vram, swap, stats, adapter)
    settings["stop"] = _stops(moss, stop)
    pieces = moss.generate(text, **settings) if raw else moss.chat(system, plugins).send(text, told=ui.ran, **settings)
    with closing(pieces):
        if as_json:
            _print_json(moss, pieces)
        else:
            ui.answer(pieces)
    if stats:
        ui.stats(moss)


def _read_prompt(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return prompt
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise click.UsageError("no PROMPT given and nothing piped in")
    return as_utf8(sys.stdin.buffer.read())


def _stops(moss: Any, texts: tuple[str, ...]) -> list[int | str]:
    from ..generate import Stop

    return [*Stop.of(None, moss.tokenizer, moss.config.eos_token_id).ids, *texts]


def _print_json(moss: Any, pieces: Any) -> None:
    said, interrupted = [], False
    try:
        for piece in pieces:
            said.append(piece)
    except KeyboardInterrupt:
        interrupted = True
    s = moss.last_stats
    result = {
        "text": "".join(piece.text for piece in said),
        "ids": [piece.id for piece in said],
        "prompt_tokens": s.prompt_tokens,
        "new_tokens": len(said),
        "stop": "interrupted" if interrupted else "stop" if s.stopped else "length",
        "prefill": {"seconds": s.prefill_seconds, "tokens_s": s.prefill_tokens_s},
        "decode": {"seconds": s.decode_seconds, "tokens_s": s.decode_tokens_s},
    }
    click.echo(json.dumps(result, ensure_ascii=False).encode())  # JSON is UTF-8, whatever the terminal's encoding
    if interrupted:
        sys.exit(130)
