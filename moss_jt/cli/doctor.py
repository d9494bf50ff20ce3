"""``moss-jt doctor``: whether chat would run here, and how fast it could be."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..requirements import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command("doctor")
@click.option(
    "-m",
    "--model",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkpoint's folder: does it fit in memory, and how fast is its disk?",
)
@click.option("--quick", is_flag=True, help="Measure no speeds.")
@click.option("--import", "run", is_flag=True, help="Also import Jittor, which may compile it, and compute something.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.pass_context
def command(ctx: click.Context, model: Path | None, quick: bool, run: bool, as_json: bool) -> None:
    """Check this machine, each thing with a verdict and what mends it. Exits with 1 if chat would not run."""
    from .. import doctor

    findings = doctor.findings(model, measure=not quick, run=run)
    if as_json:
        findings = list(findings)
        click.echo(json.dumps(_as_json(findings), ensure_ascii=False, indent=1))
    else:
        findings = [_drawn(finding) for finding in findings]  # each as soon as it is known
        click.echo("\n" + _conclusion(findings))
    ctx.exit(1 if _worst(findings) == "problem" else 0)


def _worst(findings: list[Finding]) -> str:
    return max((finding.verdict for finding in findings), key=list(_COLOURS).index)


def _as_json(findings: list[Finding]) -> dict:
    rows = [{"name": f.name, "verdict": f.verdict, "text": f.text, "fix": f.fix, **f.values} for f in findings]
    return {"verdict": _worst(findings), "findings": rows}


def _drawn(finding: Finding) -> Finding:
    mark, indent = click.style(f"{finding.verdict:8}", fg=_COLOURS[finding.verdict]), " " * 21
    width = max(50, min(shutil.get_terminal_size().columns, 110)) - len(indent)
    lines = textwrap.wrap(finding.text, width, break_long_words=False, break_on_hyphens=False)
    click.echo(f"{mark} {finding.name:12}" + f"\n{indent}".join(lines))
    if finding.fix:
        click.echo(indent + click.style(finding.fix, bold=True))  # unbroken, to be copied
    return finding


def _conclusion(findings: list[Finding]) -> str:
    problems = sum(finding.verdict == "problem" for finding in findings)
    if problems:
        text = f"MOSS cannot run here before {'this is' if problems == 1 else f'these {problems} things are'} mended."
        return click.style(text, fg="red")
    return click.style("MOSS can run here.", fg="green")
