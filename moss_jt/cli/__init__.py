"""The command line. Each command is a file here, imported only when it is run, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import sys
import time
import traceback
from importlib import import_module
from typing import Callable, NoReturn

import click

from .. import __version__
from ..errors import MossError
from ..mpirun import started

# Command -> the line that ``moss-jt --help`` shows for it. Its module is moss_jt.cli.NAME, its object there ``command``.
COMMANDS = {
    "chat": "Talk with a converted MOSS in the terminal.",
    "generate": "Continue a text, or answer one question, and print it.",
    "convert": "Convert official checkpoints, and back.",
    "plan": "Say what a model would need: memory, bytes a token, speed.",
    "info": "Say what a model's folder holds.",
    "tokenize": "Turn text into token ids, or back.",
    "eval": "Measure a model on dialogues with known answers, or compare two.",
    "train": "Fine-tune a model on dialogues, all of it or a LoRA adapter.",
    "bench": "Measure speed, beside what this machine could do.",
    "doctor": "Check this machine: compiler, Python, CUDA, memory, speeds.",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return import_module(f"{__name__}.{name}").command if name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="moss-jt")
def group() -> None:
    """MOSS (moss-moon-003, 16 B) on the machine you already have."""


def main(args: list[str] | None = None) -> None:
    """Run the command line. Exits with 2 for wrong usage, 1 for what failed, 130 for Ctrl-C."""
    try:
        sys.exit(group.main(args, prog_name="moss-jt", standalone_mode=False) or 0)
    except MossError as e:
        line = f"moss-jt: {e}"
        _fail(1, lambda: click.echo(line, err=True))
    except click.ClickException as e:
        _fail(e.exit_code, e.show)
    except (click.Abort, KeyboardInterrupt):
        _fail(130, lambda: click.echo("", err=True))
    except BrokenPipeError:  # the reader of a pipe left; Python would complain again while closing stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(1)
    except Exception:
        if started().processes == 1:
            raise
        _fail(1, traceback.print_exc)


_HEAD_START = 5  # seconds


def _fail(code: int, say: Callable[[], object] = lambda: None) -> NoReturn:
    """Of several processes that mpirun started, one that fails ends at once, and mpirun the others with it: in the ordinary
    way it would wait for them in MPI, and they for it. What all of them met, the first one says, which has a head start."""
    rank, processes, _ = started()
    if rank:
        time.sleep(_HEAD_START)
    say()
    if processes == 1:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)
