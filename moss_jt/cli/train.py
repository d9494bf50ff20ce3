"""``moss-jt train``: fine-tuning, and putting an adapter into weights."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import click

from ..errors import MossError
from ..mpirun import started
from . import progress, ui
from .device import DEVICE
from .size import SIZE, gigabytes

if TYPE_CHECKING:
    from ..train.data import Conversations
    from ..train.settings import Settings
    from ..train.sft import Begun, Prepared

_FOLDER = click.Path(path_type=Path)


@click.group("train")
def command() -> None:
    """Fine-tune a model on dialogues, all of it or a LoRA adapter."""


class _Names(click.ParamType):
    """Names with commas between them, or a list in a file of settings."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
            self.fail("names with commas between them are expected", param, ctx)
        return tuple(part.strip() for part in parts)


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Make what a YAML file says the options' defaults, so that the command line overrides it."""
    if path is None:
        return
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as e:
        raise MossError(f"{path}: cannot be read: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise MossError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(found, dict):
        raise MossError(f"{path}: holds no settings; a line is like learning_rate: 1.0e-5")
    known = {p.name for p in ctx.command.params} - {param.name}
    for name in found:
        if name not in known:
            raise MossError(f"{path}: {name!r} is not a setting; settings are {', '.join(sorted(known))}")
    ctx.default_map = found


def _number(name: str, default: float, least: float, help: str, above: bool = False) -> Callable:
    whole = isinstance(default, int)
    kind = click.IntRange(least) if whole else click.FloatRange(least, min_open=above)
    return click.option(f"--{name}", type=kind, metavar="N" if whole else "X", default=default, show_default=True, help=help)


# finetune_moss.py's names have underscores; a hyphen is taken for one.
@command.command("sft", context_settings={"token_normalize_func": lambda name: name.replace("-", "_")})
@click.option(
    "--config", type=_FOLDER, metavar="FILE", is_eager=True, expose_value=False, callback=_read_config,
    help="YAML file with any of these settings; those given here have precedence.",
)  # fmt: skip
@click.option("-m", "--model_name_or_path", type=_FOLDER, required=True, metavar="DIR", help="Converted model to begin with.")
@click.option("--data_dir", type=_FOLDER, required=True, metavar="DIR", help="Folder with train.jsonl and val.jsonl.")
@click.option("--output_dir", type=_FOLDER, required=True, metavar="DIR", help="Folder for checkpoints and the result.")
@click.option("--log_dir", type=_FOLDER, metavar="DIR", help="Folder for logs.  [default: log in output_dir]")
@_number("n_epochs", 2, 1, "How often to go through the data.")
@_number("train_bsz_per_gpu", 4, 1, "Conversations in a batch.")
@_number("eval_bsz_per_gpu", 4, 1, "The same when evaluating.")
@_number("gradient_accumulation_steps", 1, 1, "Batches in a step.")
@_number("gradient_clipping", 1.0, 0, "Longest gradient, longer ones are shortened; 0: any.")
@_number("learning_rate", 1.5e-5, 0, "The highest one: it rises and falls again.", above=True)
@_number("warmup_rates", 0.05, 0, "Share of the steps in which it rises.")
@_number("weight_decay", 0.1, 0, "AdamW's, for matrices.")
@_number("max_seq_len", 2048, 2, "Tokens of a conversation; turns beyond are left out.")
@_number("eval_step", 200, 1, "Evaluate after so many steps, and at the end.")
@_number("save_step", 2000, 1, "Write a checkpoint after so many steps, and at the end.")
@_number("seed", 42, 0, "Decides the order of the data, and dropout.")
@click.option("--lora_rank", type=click.IntRange(1), metavar="N", help="Train a LoRA adapter of this rank, not all weights.")
@click.option(
    "--lora_alpha", type=click.FloatRange(0, min_open=True), metavar="X", help="It counts alpha / rank.  [default: 2 · rank]"
)
@click.option("--lora_targets", type=_Names(), metavar="NAMES", help="Of which matrices, as qkv_proj,out_proj.  [default: all]")
@click.option(
    "--lora_dropout",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="X",
    help="Share of its inputs left out.  [default: 0]",
)
@_number("keep", 1, 1, "Checkpoints to keep.")
@click.option("--skip_bad", is_flag=True, help="Leave out lines that are no conversation, and say how many.")
@click.option(
    "--resume/--no_resume",
    default=None,
    help="Insist on a checkpoint, or delete what is there.  [default: go on if there is one]",
)
@click.option(
    "--dtype", type=click.Choice(["fp16", "int8", "int4"]), default="fp16", show_default=True, help="Of the resulting model."
)
@DEVICE
@click.option("--ram", type=SIZE, metavar="SIZE", help="Most memory for training an adapter.  [default: what can be spared]")
@click.option("--vram", type=SIZE, metavar="SIZE", help="Most of a GPU's memory, the same.  [default: what can be spared]")
def _sft(**options: Any) -> None:
    """Fine-tune a model on dialogues in the official format.

    Stopped anywhere, the same command goes on after the last checkpoint and gives the same numbers. The result is a folder in
    output_dir: model, which chat -m opens, or with --lora_rank adapter, which chat --adapter adds to the same model.
    """
    from ..train.sft import prepare

    prepared, first = prepare(_settings(options)), started().rank == 0
    if first:
        _say_data(prepared)
    done = _train(prepared, first)
    if done:
        click.echo(done)


def _train(prepared: Prepared, first: bool) -> Path | None:
    """``first``: whether this is the process that shows how far it is."""
    from ..train.loop import Stopped
    from ..train.sft import run
    from .train_screen import Screen

    with _Stop(first) as stop, Screen() as screen:

        def began(begun: Begun) -> None:
            if first:
                screen.began(begun)
            stop.arm()

        def publishing(done: int, total: int) -> None:
            stop.disarm()
            screen.publishing(done, total)

        try:
            return run(prepared, [screen], screen.saved, lambda: stop.asked, publishing, began)
        except Stopped:
            screen.close()
            if first:
                ui.note("Stopped. The same command goes on from here.")
            sys.exit(128 + (stop.signal or signal.SIGTERM))


def _settings(options: dict[str, Any]) -> Settings:
    """Raises click.UsageError for what makes no sense."""
    from ..train import Lora
    from ..train.settings import Settings

    lora = {name: options.pop(f"lora_{name}") for name in ("rank", "alpha", "targets", "dropout")}
    given = {name: value for name, value in lora.items() if value is not None}
    try:
        if given and "rank" not in given:
            raise MossError(f"--lora_{next(iter(given))} is of an adapter: give it a --lora_rank")
        return Settings(**options, lora=Lora(**{"alpha": 2 * given["rank"], **given}) if given else None)
    except MossError as e:
        raise click.UsageError(str(e)) from None


def _say_data(prepared: Prepared) -> None:
    for data in (prepared.train, prepared.val):
        if data is None:
            ui.note(f"{prepared.settings.data_dir / 'val.jsonl'}: not there, so nothing is evaluated")
        else:
            ui.note("; ".join([f"{data.path}: {len(data):,} conversations, {len(data.ids):,} tokens", *_left_out(data)]))


def _left_out(data: Conversations) -> Iterator[str]:
    if data.left_out:
        turns, first = sum(data.left_out.values()), min(data.left_out)
        yield f"{turns} turns do not fit and are left out, the first in line {first}"
    if data.bad:
        first = min(data.bad)
        yield f"{len(data.bad)} bad lines are left out, the first is line {first}: {data.bad[first]}"


class _Stop:
    """While it is armed, the first Ctrl-C, or SIGTERM, asks to stop where nothing is lost. A second one stops at once. Under
    mpirun SIGUSR1 does so, too: that is passed on without more, while Ctrl-C soon ends in SIGKILL.
    ``says``: whether that is said."""

    def __init__(self, says: bool) -> None:
        self.asked, self.signal, self._says = False, 0, says
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        return self

    def __exit__(self, *_: Any) -> None:
        self.disarm()

    def arm(self) -> None:
        several = [signal.SIGUSR1] if started().processes > 1 else []
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM, *several)}

    def disarm(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self.signal = True, number
        if self._says:
            ui.note("Stopping after this batch, and saving a checkpoint. Once more stops at once, without.")


@command.command("merge")
@click.option("-m", "--model", type=_FOLDER, required=True, metavar="DIR", help="Folder of the converted checkpoint.")
@click.option("--adapter", type=_FOLDER, required=True, metavar="DIR", help="Folder of an adapter that was trained for it.")
@click.argument("dst", type=_FOLDER)
@click.option(
    "--dtype", type=click.Choice(["fp16", "int8", "int4"]), default="fp16", show_default=True, help="Of the new model."
)
def _merge(model: Path, adapter: Path, dst: Path, dtype: str) -> None:
    """Put an adapter into the weights of its model, and write that to DST, a converted checkpoint."""
    from ..train.merge import plan_merge

    job = plan_merge(model, adapter, dst, dtype)
    if not job.finished:
        with progress.of_bytes("written") as advance:
            job.run(advance)
    total = gigabytes(sum(job.files.values()))
    click.echo(f"{dst}: {total} in {len(job.files)} files. Chat with it: moss-jt chat -m {dst}")
