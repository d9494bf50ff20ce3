"""What `chat`, `generate` and `eval` share: options, and loading the model. The settings are also what `/set` changes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable

import click

from .. import demo
from ..chat import MAX_NEW_TOKENS
from ..errors import MossError
from ..plugins import Plugin, built_in
from . import ui
from .device import DEVICE
from .size import CONTEXT, KV_CACHE, RAM, SWAP, VRAM


@dataclass(frozen=True)
class Setting:
    """One argument of ``Moss.generate``: an option of the command line and a name for `/set`."""

    type: click.ParamType
    default: Any
    help: str


SETTINGS = {
    "temperature": Setting(click.FLOAT, 0.7, "Higher is more varied."),
    "top_p": Setting(click.FLOAT, 0.8, "Choose among the likeliest tokens with this probability together; 1: all."),
    "top_k": Setting(click.INT, 40, "Choose among this many of the likeliest tokens; 0: all."),
    "repetition_penalty": Setting(click.FLOAT, None, "Above 1: less repetition.  [default: 1.02, none if greedy]"),
    "max_new_tokens": Setting(click.IntRange(1), MAX_NEW_TOKENS, "Longest answer, in tokens."),
    "seed": Setting(click.INT, None, "Makes answers repeatable."),
    "greedy": Setting(click.BOOL, False, "Always choose the likeliest token."),
}


class _Text(click.ParamType):
    """Text from the command line; bytes that are no UTF-8 become the replacement character."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return as_utf8(value)


TEXT = _Text()


class _Plugins(click.ParamType):
    """Names of plugins, a comma between them."""

    name = "names"

    def convert(self, value: str | list[Plugin], param: click.Parameter | None, ctx: click.Context | None) -> list[Plugin]:
        if not isinstance(value, str):
            return value
        try:
            return built_in(value)
        except MossError as e:
            self.fail(str(e), param, ctx)


PLUGINS = _Plugins()
ADAPTER = click.option("--adapter", metavar="DIR", help="Folder of a LoRA adapter that was trained for the model.")


def shared_options(command: Callable) -> Callable:
    """Add the options that say which model, where, and how to choose tokens."""
    options = [
        click.option(
            "-m",
            "--model",
            metavar="DIR",
            callback=_or_demo,
            help="Folder of a converted checkpoint.  [default: the small demo model]",
        ),
        ADAPTER,
        click.option("--system", type=TEXT, metavar="TEXT|@FILE", help="In place of MOSS's meta instruction."),
        click.option("--plugins", metavar="NAMES", type=PLUGINS, help="What MOSS may call, such as calculator,solver."),
        click.option("--no-plugins", is_flag=True, help="MOSS may call nothing, whatever the system text enables."),
        *(_option(name, setting) for name, setting in SETTINGS.items()),
        machine_options,
    ]
    return _with(options, command)


def _or_demo(ctx: click.Context, param: click.Parameter, folder: str | None) -> str:
    if folder is None:
        ui.note(demo.NOTE)
    return folder or str(demo.FOLDER)


def machine_options(command: Callable) -> Callable:
    """Add the options that say what a model may use of the machine: what ``load_model`` takes besides the folder."""
    return _with([CONTEXT, KV_CACHE, RAM, VRAM, SWAP, DEVICE], command)


def _with(options: list[Callable], command: Callable) -> Callable:
    for option in reversed(options):
        command = option(command)
    return command


def _option(name: str, setting: Setting) -> Callable:
    flag = "--" + name.replace("_", "-")
    if setting.type is click.BOOL:
        return click.option(flag, is_flag=True, help=setting.help)
    shown = setting.default is not None
    return click.option(flag, type=setting.type, default=setting.default, show_default=shown, help=setting.help)


def check_settings(settings: dict[str, Any]) -> None:
    """Raises MossError for a value that makes no sense, before a model is loaded for it."""
    from ..sampling import Sampling

    Sampling(**{name: value for name, value in settings.items() if name != "max_new_tokens"})


def check_options(settings: dict[str, Any]) -> None:
    """The same for the command line, where it is wrong usage: raises click.UsageError."""
    try:
        check_settings(settings)
    except MossError as e:
        raise click.UsageError(str(e)) from None


def load_model(
    folder: str,
    device: str,
    context: int,
    ram: int | None,
    kv_cache: str,
    vram: int | None,
    swap: str,
    stats: bool = False,
    adapter: str | None = None,
) -> Any:
    """The model in ``folder``; at a terminal, a line says what is being waited for; with ``stats``, lines say what will live
    where, before it is brought there. Raises MossError."""
    from .. import load

    if sys.stdout is None:
        raise MossError("stdout is closed, so there is nowhere to print an answer")
    if ui.is_terminal(sys.stderr):
        ui.note(f"Loading {folder} …")
    budgets = {"context": context, "ram": ram, "kv_cache": kv_cache, "vram": vram, "swap": swap}
    tell = partial(_tell, Path(folder)) if stats else None
    return load(folder, device=device, planned=tell, adapter=adapter, **budgets)


def _tell(folder: Path, plan: Any) -> None:
    from .plan import in_short

    for line in in_short(folder, plan):
        ui.note(line)


def system_text(text: str) -> str:
    """The text itself, or with ``@FILE`` what the file holds. Raises MossError where it cannot be read."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).expanduser().read_text(encoding="utf-8")
    except OSError as e:
        raise MossError(f"{text[1:]}: cannot be read: {e.strerror}") from None
    except ValueError:
        raise MossError(f"{text[1:]}: not UTF-8 text") from None


def as_utf8(text: str | bytes) -> str:
    """Text that can be encoded, whatever bytes it came from."""
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "replace")
