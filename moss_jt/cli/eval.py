"""``moss-jt eval``: how good a model is, and how far one is from another, on dialogues with known answers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional

import click

from ..errors import MossError
from . import progress
from .chat_options import ADAPTER, load_model, machine_options

if TYPE_CHECKING:
    from ..dialogues import Dialogue
    from ..evaluate import Comparison, Place, Score

_Pair = tuple[str, Optional[str]]  # a model's folder and that of its adapter
_DATA = click.argument("data", metavar="DATA.jsonl", type=click.Path(path_type=Path))
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group("eval")
def command() -> None:
    """Measure a model on dialogues with known answers, or compare two.

    DATA.jsonl is in the official fine-tuning format, one conversation a line. Each token of MOSS's own words (inner thoughts,
    commands, answers) is predicted from the true tokens before it.
    """


@command.command("perplexity")
@click.option("-m", "--model", required=True, metavar="DIR", help="Folder of a converted checkpoint.")
@ADAPTER
@_DATA
@_JSON
@machine_options
def _perplexity(model: str, adapter: str | None, data: Path, as_json: bool, **machine: Any) -> None:
    """How well a model predicts the answers."""
    from ..evaluate import perplexity

    dialogues, left_out = _read(data, [(model, adapter)], machine["context"])
    moss = load_model(model, adapter=adapter, **machine)
    with progress.of_tokens() as advance:
        score = perplexity(moss, dialogues, advance)
    counts = {"data": str(data), "dialogues": len(dialogues), "turns_left_out": left_out}
    found = {"model": model, "adapter": adapter, **counts, **_score(score)}
    _print(as_json, found, [_dialogues(found), *_score_lines(score)])


@command.command("compare")
@click.argument("a")
@click.argument("b")
@_DATA
@click.option("--adapter", metavar="DIR", help="Folder of a LoRA adapter, for model B.")
@click.option("--reference-adapter", metavar="DIR", help="The same for model A.")
@_JSON
@machine_options
def _compare(
    a: str, b: str, data: Path, adapter: str | None, reference_adapter: str | None, as_json: bool, **machine: Any
) -> None:
    """How far the model in folder B is from that in folder A, the reference.

    One is in memory at a time; the logits of the first wait in a temporary file, 428 kB a token of the answers.
    """
    from ..evaluate import compare

    models: list[_Pair] = [(a, reference_adapter), (b, adapter)]
    dialogues, left_out = _read(data, models, machine["context"])
    loads = [partial(load_model, folder, adapter=its, **machine) for folder, its in models]
    with progress.of_tokens() as advance:
        found = compare(*loads, dialogues, advance)
    place = _describer(a, dialogues)
    result = {
        "reference": a,
        "reference_adapter": reference_adapter,
        "other": b,
        "other_adapter": adapter,
        "data": str(data),
        "dialogues": len(dialogues),
        "turns_left_out": left_out,
        "tokens": found.other.tokens,
        "agreement": found.agreement,
        "mean_kl": found.mean_kl,
        "max_kl": found.max_kl,
        "max_kl_at": place(found.max_kl_at),
        "first_divergence": place(found.first_divergence),
        "reference_score": _score(found.reference),
        "other_score": _score(found.other),
    }
    _print(as_json, result, _comparison_lines(found, result))


def _read(data: Path, models: list[_Pair], context: int) -> tuple[list[Dialogue], int]:
    """The dialogues, and how many turns the context leaves out. Before a model is loaded: it says what is wrong at once, also
    with the second of two, and with an adapter."""
    from ..config import Config
    from ..dialogues import LIMIT, read_dialogues
    from ..tokenizer import load_tokenizer
    from ..train.lora import load_adapter

    folders = [folder for folder, _ in models]
    configs = [Config.read(folder) for folder in folders]
    limit = min([context, LIMIT, *(config.n_ctx for config in configs)])
    left_out = 0

    def count(line: int, turns: int) -> None:
        nonlocal left_out
        left_out += turns

    per_model = [list(read_dialogues(data, load_tokenizer(folder), limit, count)) for folder in folders]
    for folder, found in zip(folders[1:], per_model[1:]):
        if [d.ids.tolist() for d in found] != [d.ids.tolist() for d in per_model[0]]:
            raise MossError(f"{folder}: its tokenizer gives other ids than that of {folders[0]}: nothing to compare")
    if len({config.vocab_size for config in configs}) > 1:
        raise MossError(f"{folder}: its vocabulary is {configs[1].vocab_size}, that of {folders[0]} {configs[0].vocab_size}")
    if not per_model[0]:
        raise MossError(f"{data}: holds no conversation that fits in {limit} tokens")
    for (_, adapter), config in zip(models, configs):
        if adapter is not None:
            load_adapter(adapter, config)
    return per_model[0], left_out // len(folders)


def _score(score: Score) -> dict:
    return {
        "tokens": score.tokens,
        "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,
        "loss": score.loss,
        "accuracy": score.accuracy,
    }


def _describer(folder: str, dialogues: list[Dialogue]) -> Callable[[Place | None], dict | None]:
    """What makes a Place a dict, its tokens with their text, and with the text before it."""
    from ..tokenizer import load_tokenizer

    decode, ids = load_tokenizer(folder).decode, {d.line: d.ids for d in dialogues}

    def describe(place: Place | None) -> dict | None:
        if place is None:
            return None
        found: dict = asdict(place)
        for name in ("token", "reference", "other"):
            found[name] = {"id": found[name], "text": decode([found[name]])}
        before = ids[place.line][max(0, place.position - 12) : place.position]
        return {**found, "before": decode(before.tolist())}

    return describe


def _print(as_json: bool, found: dict, lines: list[tuple[str, str]]) -> None:
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False).encode())  # JSON is UTF-8, whatever the terminal's encoding
        return
    for name, value in lines:
        click.echo(f"{name:<18}{value}")


def _dialogues(found: dict) -> tuple[str, str]:
    rest = f"; {found['turns_left_out']} turns do not fit and are left out" if found["turns_left_out"] else ""
    return "dialogues", f"{found['dialogues']:,}{rest}"


def _score_lines(score: Score) -> list[tuple[str, str]]:
    return [
        ("answer tokens", f"{score.tokens:,}"),
        ("perplexity", f"{score.perplexity:.6g}"),
        ("mean of -log p", f"{score.loss:.6g} nats"),
        ("token accuracy", f"{score.accuracy:.4%}"),
    ]


def _comparison_lines(found: Comparison, result: dict) -> list[tuple[str, str]]:
    scores = (found.reference, found.other)
    return [
        ("reference", _named(result["reference"], result["reference_adapter"])),
        ("other", _named(result["other"], result["other_adapter"])),
        _dialogues(result),
        ("answer tokens", f"{found.other.tokens:,}"),
        ("agreement", f"{found.agreement:.4%} of the likeliest tokens, {found.other.tokens - found.agreed} differ"),
        ("mean KL", f"{found.mean_kl:.4g} nats"),
        ("largest KL", f"{found.max_kl:.4g} nats, {_place(result['max_kl_at'])}"),
        ("first divergence", _place(result["first_divergence"])),
        ("perplexity", "{:.6g} and {:.6g}".format(*(s.perplexity for s in scores))),
        ("token accuracy", "{:.4%} and {:.4%}".format(*(s.accuracy for s in scores))),
    ]


def _named(folder: str, adapter: str | None) -> str:
    return folder if adapter is None else f"{folder} with {adapter}"


def _place(place: dict | None) -> str:
    if place is None:
        return "none"
    reference, other, token = (repr(place[name]["text"]) for name in ("reference", "other", "token"))
    where = f"line {place['line']}, token {place['position']}, after {place['before']!r}"
    return f"{where}: {reference} and {other}, where {token} is true"
