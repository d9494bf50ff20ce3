"""The command line. Each command is a file here, imported only when it is run, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from .. import __version__
from ..errors import MossError

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
        click.echo(f"moss-jt: {e}", err=True)
        sys.exit(1)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe left; Python would complain again while closing stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
