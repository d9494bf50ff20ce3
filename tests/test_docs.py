"""What the documentation shows is so: its Python runs, its commands parse, its tables and figures are the program's."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
from pathlib import Path

import click
import pytest

import moss_jt
from moss_jt.cli import COMMANDS, group
from moss_jt.config import KV_CACHES, Config
from moss_jt.sizes import parse_size
from moss_jt.swap import make_plan
from moss_jt.swap.plan import Speeds
from moss_jt.weights.layout import WTE_FILE, Coding, files_of

from .checkpoints import random_state, small_config, write_official
from .conftest import ROOT
from .tokenizer_folders import official_folder

GUIDES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "README_zh.md", "benchmarks/README.md", *GUIDES]
RUN = ["README.md", "README_zh.md", "docs/library.md", "docs/chat.md"]  # the pages whose Python is more than a sketch
# What README.md tells the needs of: the sizes in moss-moon-003's config.json.
MOON = Config(34, 6144, 24, 24576, 64, 2048, 107008)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "") -> list[str]:
    """The page's fenced blocks of one language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text(page), re.M | re.S)
    return [block for its, block in fenced if its == language]


# ---- Python -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """An official checkpoint of random weights with a tokenizer that can hold a dialogue."""
    config = small_config(n_ctx=2048, n_positions=2048, vocab_size=400)
    folder = write_official(tmp_path_factory.mktemp("docs") / "official", config, random_state(config), masks=False)
    return official_folder(folder)


def session(page: str, official: Path, compare: bool) -> None:
    """Run a page's Python from top to bottom, in a folder in which its names stand for ``official`` and what comes of it.

    ``compare``: whether a line's value has to be what stands after ``# ->`` in it.
    """
    Path("moss-moon-003-sft").symlink_to(official)
    moss_jt.convert.weights(official, "DIR")
    names: dict = {}
    for block in blocks(page, "python"):
        lines = block.splitlines()
        tree = ast.fix_missing_locations(_Checks(lines).visit(ast.parse(block)))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            names["_check"] = lambda expected, value, out=out: _check(expected, value, out, compare)
            exec(compile(tree, page, "exec"), names)


class _Checks(ast.NodeTransformer):
    """``value  # -> expected`` becomes ``_check("expected", lambda: value)``."""

    def __init__(self, lines: list[str]):
        self.lines = lines

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        _, mark, expected = self.lines[node.end_lineno - 1].partition("# -> ")
        if mark:
            value = ast.Lambda(ast.parse("lambda: 0", mode="eval").body.args, node.value)
            node.value = ast.Call(ast.Name("_check", ast.Load()), [ast.Constant(expected.strip()), value], [])
        return node


def _check(expected: str, value, out: io.StringIO, compare: bool) -> None:
    before = out.tell()
    found = repr(value())
    printed = out.getvalue()[before:].strip()
    if compare:
        assert (printed or found) == expected


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Stand in an empty folder, and do not wait for the disk: nothing has to survive a power cut."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.mark.parametrize("page", RUN)
def test_python_runs(page, small, elsewhere):
    session(page, small, compare=False)


def test_python_gives_what_the_page_says(official_checkpoint, elsewhere):
    assert "# -> " in text("docs/library.md")
    session("docs/library.md", official_checkpoint("moss-tiny-sft"), compare=True)


def test_a_wrong_value_on_a_page_is_noticed(monkeypatch, small, elsewhere):
    monkeypatch.setitem(globals(), "text", lambda page: "```python\nif True:\n    1 + 1  # -> 3\n```\n")
    with pytest.raises(AssertionError):
        session("page", small, compare=True)


def test_library_page_names_everything_public():
    from moss_jt.chat import Conversation
    from moss_jt.generate import Piece, Stats
    from moss_jt.tokenizer import Decoder, Tokenizer

    page = text("docs/library.md")
    for thing in (moss_jt.Moss, Conversation, Piece, Stats, Tokenizer, Decoder):
        names = {*vars(thing), *getattr(thing, "__dataclass_fields__", ())}
        missing = [name for name in names if not name.startswith("_") and not re.search(rf"\b{name}\b", page)]
        inner = {"count", "token_bytes", "model"}  # what the parts of moss_jt need of each other
        assert set(missing) <= inner, thing
    for name in moss_jt.convert.__all__ + moss_jt.__all__:
        assert name == "Moss" or name in page


# ---- commands ---------------------------------------------------------------------------------------------------------------


def shown_commands(page: str) -> list[list[str]]:
    """The arguments of every moss-jt that stands in a block of commands; several spaces or a # end a command."""
    found = []
    for line in "".join(blocks(page)).replace("\\\n", "").splitlines():
        for part in re.split(r"\||&&|;", line.partition("   ")[0]):
            words = shlex.split(part, comments=True)
            if "moss-jt" in words:
                found.append(words[words.index("moss-jt") + 1 :])
    return found


def parse(args: list[str]) -> None:
    """Raises click.UsageError unless these arguments are a command with options that it has and all that it needs."""
    command, name = group, "moss-jt"
    while isinstance(command, click.Group):
        name, command, args = command.resolve_command(click.Context(command, info_name=name), args)
    command.make_context(name, list(args))


@pytest.fixture
def folders(elsewhere):
    """Stand where the folders and settings that pages name exist."""
    for name in ("DIR", "moss-moon-003-sft-jt"):
        Path(name).mkdir()
    Path("sft.yaml").write_text("model_name_or_path: DIR\ndata_dir: data\noutput_dir: out\n")


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, folders):
    for args in shown_commands(page):
        parse(args)


def test_pages_show_commands_and_parsing_finds_mistakes(folders):
    assert len(shown_commands("README.md")) > 10 and len(shown_commands("docs/doctor.md")) == 5
    for wrong in (
        "chatt",
        "chat -m DIR --gredy",
        "chat -m DIR too-much",
        "generate -m D --seed x",
        "convert weights a",
    ):
        with pytest.raises(click.UsageError):
            parse(wrong.split())


def options(command: click.Command) -> list[list[str]]:
    """Each option's names."""
    if isinstance(command, click.Group):
        return [names for one in command.commands.values() for names in options(one)]
    return [parameter.opts for parameter in command.params if isinstance(parameter, click.Option)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_command_s_guide(name):
    guide = re.search(rf"^\| `moss-jt {name}` \|.*\[.*\]\((.*?)\) \|$", text("README.md"), re.M)[1]
    page = "README.md" if guide.startswith("#") else guide
    shown = set(re.findall(r"(?<![\w-])-[-\w]+", text(page)))
    missing = [names for names in options(group.get_command(None, name)) if not shown & set(names)]
    assert not missing


# ---- tables, figures, links -------------------------------------------------------------------------------------------------


def test_table_of_commands_is_the_program_s():
    rows = dict(re.findall(r"^\| `moss-jt (\w+)` \| (.*?) \|", text("README.md"), re.M))
    assert rows == COMMANDS and list(rows) == list(COMMANDS)
    assert re.findall(r"^\| `moss-jt (\w+)` \|", text("README_zh.md"), re.M) == list(COMMANDS)


def test_both_readmes_show_the_same_commands():
    def stripped(page: str) -> list[str]:
        return [re.sub(r" *#.*", "", block) for block in blocks(page) + blocks(page, "python")]

    assert stripped("README.md") == stripped("README_zh.md") and len(stripped("README.md")) >= 5


def test_figures_of_the_large_model():
    caches = [MOON.cache_bytes_per_token(kv_cache) for kv_cache in KV_CACHES]
    figures = [figure for cache in caches for figure in (f"{cache:,} ", f"{cache * MOON.n_ctx / 1e9:.1f} GB")]
    for coding in (Coding(), Coding("int8", "int8"), Coding("int4", "int8")):
        sizes = {name: sum(t.nbytes for t in tensors) for name, tensors in files_of(MOON, coding).items()}
        a_token = sum(n for name, n in sizes.items() if name != WTE_FILE)
        figures += [f"{sum(sizes.values()) / 1e9:.1f} GB", f"{a_token / 1e9:.1f} GB"]
    for page in ("README.md", "README_zh.md"):
        assert not [figure for figure in figures if figure not in text(page)]


def test_plans_within_budgets():
    rows = re.findall(r"^\| (\d+ GiB) \| (.*) \| (.*) \| (.*) \|$", text("docs/memory.md"), re.M)
    assert len(rows) == 9
    for budget, *cells in rows:
        for cell, coding in zip(cells, (Coding(), Coding("int8", "int8"), Coding("int4", "int8"))):
            try:
                plan = make_plan(MOON, coding, 2048, parse_size(budget), gpu=True)
            except moss_jt.MossError:
                assert cell == "–"
                continue
            counts = f"{plan.blocks.count('resident')} + {len(plan.streamed_blocks)}, {plan.disk_bytes / 1e9:.1f} GB"
            assert cell == (counts if plan.streams else "all")


def test_speeds_that_plans_expect():
    page = text("docs/performance.md").partition("## Swapping on a GPU")[2].partition("\n## ")[0]
    given = re.search(r"(\d+) GB/s and (\d+) TF.* (\d+) GB/s, .* (\d+) GB/s and (\d+) TF", page)
    memory, arithmetic, link, ram, cpu = map(float, given.groups())
    speeds = Speeds(memory * 1e9, link * 1e9, arithmetic * 1e12, Speeds(ram * 1e9, 0, cpu * 1e12))
    rows = re.findall(r"^\| (\d+ GiB) \| (.*) \| (.*) \| (.*) \|$", page, re.M)
    assert len(rows) == 4
    for budget, *cells in rows:
        for cell, coding in zip(cells, (Coding(), Coding("int8", "int8"), Coding("int4", "int8"))):
            plans = [
                make_plan(MOON, coding, 2048, parse_size(budget), gpu=True, swap=swap) for swap in ("stream", "host", "auto")
            ]
            decode = " / ".join(f"{plan.decode(speeds).tokens_s:.3g}" for plan in plans)
            prefill = " / ".join(f"{plan.prefill(speeds).tokens_s:.0f}" for plan in plans)
            assert cell == (f"{decode}; {prefill}" if plans[0].streams else "all fits")


def test_defaults_of_generate_in_its_table():
    import inspect

    rows = dict(re.findall(r"^\| `(\w+)` \| `?(.*?)`? ?\|", text("docs/library.md").partition("## Generating")[2], re.M))
    given = inspect.signature(moss_jt.Moss.generate).parameters
    for name, parameter in given.items():
        if parameter.default is not inspect.Parameter.empty:
            assert rows.pop(name) == str(parameter.default)
    assert rows.pop("prompt") == ""


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", text(page)):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        goal = (ROOT / page).parent / file if file else ROOT / page
        assert goal.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", goal.read_text(encoding="utf-8"), re.M)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], target


def test_changelog_has_this_version():
    assert f"## [{moss_jt.__version__}]" in text("CHANGELOG.md")


def test_design_page_lists_the_places():
    page = text("docs/design.md")
    places = [f"moss_jt/{path.name}" for path in (ROOT / "moss_jt").glob("*.py") if path.name != "__init__.py"]
    places += [f"moss_jt/{path.parent.name}/" for path in (ROOT / "moss_jt").glob("*/__init__.py")]
    missing = [place for place in [*places, "convert/", "kernels_cpu/"] if f"`{place}`" not in page]
    assert not missing


def test_json_example_of_tokens(shared, capsys):
    """README.md shows ids: they are the official vocabulary's."""
    from moss_jt.cli import main

    line = next(words for words in shown_commands("README.md") if words[0] == "tokenize" and "你好" in words)
    with pytest.raises(SystemExit):
        main([str(shared / "moss_tokenizer") if word == "moss-moon-003-sft" else word for word in line])
    ids = json.loads(capsys.readouterr().out)
    assert f"你好                              # {ids}" in text("README.md")
