"""``moss-jt bench vram``: the matrix, what is kept of it, what cannot be measured, and that the figures agree."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from moss_jt import MossError, bench, cuda
from moss_jt.bench import Shape, random_checkpoint, vram
from moss_jt.bench.page_cache import in_memory
from moss_jt.cli import main
from moss_jt.config import Config
from moss_jt.machine import GIB, MIB
from moss_jt.swap import make_plan, smallest
from moss_jt.weights import open_weights
from moss_jt.weights.layout import Coding

SMALL = Config(n_layer=3, n_embd=256, n_head=4, n_inner=512, rotary_dim=8, n_ctx=64, vocab_size=3000)
CODING = Coding("int4", "int8")
FIGURES = {
    "used": 64, "blocks": {"streamed": 3}, "planned_peak_bytes": 4 * GIB, "peak_vram_bytes": 3 * GIB, "peak_ram_bytes": GIB,
    "prompt_tokens_s": 50.0, "tokens_s": 2.5, "predicted_tokens_s": 2.0, "bytes_per_token": 10**10, "GB_s": 25.0,
    "link": "a link", "link_GB_s": 50.0, "share": 0.5, "memory_GB_s": 1e3, "host_GB_s": 50.0,
}  # fmt: skip


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run ``moss-jt bench vram`` with a GPU that is said to be there. Returns code, stdout, stderr."""
    monkeypatch.setattr(cuda, "driver", lambda: cuda.Driver((13, 0), (cuda.Device("Card", 1 << 34, (9, 0)),)))
    monkeypatch.setattr(bench, "moon", lambda blocks: Config(**{**vars(SMALL), "n_layer": blocks}))
    monkeypatch.setenv("COLUMNS", "150")
    (tmp_path / "weights").mkdir()

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as e:
            main(["bench", "vram", *map(str, args)])
        assert list((tmp_path / "weights").iterdir()) == []
        return (e.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def measured(monkeypatch):
    """In place of measuring: the cases that were asked for, each with what its folder holds."""
    asked = []

    def measure(folder, case, seconds):
        asked.append((case, open_weights(folder).coding.dtype))
        return FIGURES

    monkeypatch.setattr(vram, "measure", measure)
    return asked


def test_the_matrix(run, measured, tmp_path):
    code, out, err = run("--layers", 2, "--dir", tmp_path / "weights")
    assert code == 0 and len(measured) == 3 * (1 + 6 * len(vram.SWAPS["cuda"])) * 2
    assert [dtype for _, dtype in measured] == [case.dtype for case, _ in measured]
    assert {case.budget for case, _ in measured} == {None, *(size * GIB for size in (4, 6, 8, 12, 16, 24))}
    assert all((case.swap is None) == (case.budget is None) for case, _ in measured)
    assert err.count("2.5 tokens/s, peak 3.00 GiB\n") == len(measured)
    assert out.count(" 50.0 %") == len(measured) and "of VRAM" in out


def test_options_narrow_it(run, measured, tmp_path):
    asked = ("--dtype", "int8", "--budget", "6GiB", "--budget", "resident", "--length", "full", "--context", 100)
    code, out, _ = run(*asked, "--swap", "stream", "--layers", 1, "--dir", tmp_path / "weights", "--json")
    expected = [
        vram.Case("cuda", "int8", 6 * GIB, "stream", "full", 100),
        vram.Case("cuda", "int8", None, None, "full", 100),
    ]
    assert code == 0 and [case for case, _ in measured] == expected and out.count("\n") == 1
    found = json.loads(out)
    assert (found["bench"], found["device"], len(found["cases"])) == ("vram", "cuda", 2)
    row = {"model": "random", "layers": 1, **asdict(expected[0]), **FIGURES}
    assert found["cases"][0].items() >= row.items() and set(found["cases"][0]) - set(row) == {"bench", "date", "machine"}


def test_an_interruption_loses_nothing(run, measured, tmp_path, monkeypatch):
    out_file, measure = tmp_path / "results.jsonl", vram.measure
    asked = ("--layers", 1, "--dtype", "int4", "--dir", tmp_path / "weights", "--out", out_file, "--length", "short")
    asked += ("--swap", "stream")

    def stopped(*given):
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(vram, "measure", stopped)
    code, out, _ = run(*asked)
    assert code == 130 and out.count("2.5") == 2 and out_file.read_text().count("\n") == 2
    out_file.write_text(out_file.read_text()[:-20])  # killed while it wrote
    monkeypatch.setattr(vram, "measure", measure)
    code, out, _ = run(*asked)
    assert code == 0 and out.count(" 2.5 ") == 7
    budgets = [case.budget for case, _ in measured]
    assert budgets == [None, 4 * GIB, *(size * GIB for size in (4, 6, 8, 12, 16, 24))]
    assert run(*asked)[0] == 0 and len(measured) == 8  # all is known, and shown
    run(*asked, "--context", 100)
    assert len(measured) == 15  # other cases
    assert sum(1 for line in out_file.read_text().splitlines() if line.endswith("}")) == 14  # one was cut off


def test_no_room_for_the_weights(run, measured, tmp_path, monkeypatch):
    monkeypatch.setattr("moss_jt.bench.random_model.disk_free", lambda parent: 1000)
    code, out, _ = run("--layers", 1, "--dtype", "int4", "--swap", "stream", "--length", "short", "--dir", tmp_path / "weights")
    assert code == 0 and not measured and out.count("not measured: ") == 7 and "free there: take fewer" in out


# ---- real cases -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with random_checkpoint(Shape(SMALL, CODING), tmp_path_factory.mktemp("bench")) as folder:
        yield folder


def test_budgets_of_ram(run, model):
    least, everything = smallest(SMALL, CODING, 64), make_plan(SMALL, CODING, 64, 1 << 60).peak
    budgets = ("resident", least + 100_000, MIB, everything + 1)
    options = [word for budget in budgets for word in ("--budget", budget)]
    code, out, err = run("-m", model, "--device", "cpu", *options, "--length", "full", "--seconds", 0, "--json")
    resident, streamed, small, large = json.loads(out)["cases"]
    assert code == 0 and "is the smallest that works" in small["why_not"] and "as resident" in large["why_not"]
    assert resident["blocks"] == {"resident": 3} and resident["share"] is None and resident["bytes_per_token"] == 0
    if in_memory(model):
        assert "on no disk" in streamed["why_not"]
        return
    plan = make_plan(SMALL, CODING, 64, least + 100_000)
    assert sum(streamed["blocks"].values()) == 3 and streamed["bytes_per_token"] == plan.disk_bytes > 0
    for row in (resident, streamed):
        assert (row["used"], row["layers"], row["dtype"], row["peak_vram_bytes"]) == (64, None, "int4", None)
        assert row["peak_ram_bytes"] > 10 * MIB and row["tokens_s"] > 0 and row["prompt_tokens_s"] > 0
        assert row["predicted_tokens_s"] > 0 and row["link_GB_s"] > 0 and row["memory_GB_s"] > 0
    assert streamed["GB_s"] == pytest.approx(streamed["bytes_per_token"] * streamed["tokens_s"] / 1e9)
    assert streamed["share"] == pytest.approx(streamed["GB_s"] / streamed["link_GB_s"])
    assert err.count(" tokens/s, peak ") == 2 and streamed["planned_peak_bytes"] == plan.peak


def test_more_than_there_is(model, monkeypatch):
    monkeypatch.setattr(vram.machine, "memory", lambda: vram.machine.Memory(GIB, MIB))
    with pytest.raises(MossError, match="are needed, and 1MiB are"):
        vram.figures(open_weights(model), vram.Case("cpu", "int4", None, None, "short", 64), 0)


def test_a_process_that_ends_is_a_row(model, monkeypatch):
    case = vram.Case("cpu", "int4", None, None, "short", 64)
    for code, how in ((-9, "by signal 9"), (3, "with 3")):
        monkeypatch.setattr(vram, "run_apart", lambda *given, code=code: subprocess.CompletedProcess([], code, ""))
        assert vram.measure(model, case, 0) == {"why_not": f"its process ended {how}"}


def test_from_a_checkout(model):
    """The processes find all of the program where it is not installed."""
    code = "from moss_jt.bench.apart import run_apart as r; print(r('from moss_jt import kernels_cpu; print(1)').stdout)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n\n"


# ---- the plot ---------------------------------------------------------------------------------------------------------------


def test_plot(run, measured, tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "speeds.png"
    code, *_ = run("--layers", 1, "--dir", tmp_path / "weights", "--plot", png)
    assert code == 0 and png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000


def test_lines_of_the_plot():
    from moss_jt.cli.bench_plot import _lines

    rows = [
        {**asdict(vram.Case("cuda", dtype, budget and budget * GIB, swap, "full")), **FIGURES, "tokens_s": speed}
        for dtype, budget, swap, speed in (
            ("int4", 6, "stream", 2),
            ("int4", 4, "stream", 1),
            ("int4", 4, "other", 3),
            ("int4", None, None, 9),
            ("fp16", None, None, 5),
        )
    ]
    rows[3]["planned_peak_bytes"] = 11 * GIB
    rows.append({**rows[0], "dtype": "int8", "why_not": "no"})
    found = {key: [(point["planned"], point["tokens_s"]) for point in points] for key, points in _lines(rows).items()}
    assert found == {
        ("fp16", "resident", "full"): [(4, 5)],
        ("int4", "other", "full"): [(4, 3), (11, 9)],
        ("int4", "stream", "full"): [(4, 1), (6, 2), (11, 9)],
    }


# ---- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["-m", ".", "--layers", 3], 2, "belong to random weights"),
        (["-m", "."], 1, "no config.json here"),
        (["--budget", "lots"], 2, "'lots' is not a size"),
        (["--swap", "magic"], 2, "magic"),
        (["--plot", "a.jpg"], 1, "ends in .png"),
        (["--plot", "missing/a.png"], 1, "no such folder"),
        (["--out", "other.txt"], 1, "holds no results of bench vram"),
    ],
)
def test_one_line_says_what_is_wrong(run, measured, monkeypatch, tmp_path, args, code, text):
    if "--plot" in args:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("dear diary\n")
    found, out, err = run(*args)
    assert (found, out, measured) == (code, "", []) and text in err.splitlines()[-1] and "Traceback" not in err


def test_without_matplotlib(run, measured, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("--plot", "a.png")
    assert (
        (code, out, measured) == (1, "", []) and err.startswith("moss-jt: --plot needs matplotlib: ") and err.count("\n") == 1
    )


def test_without_a_gpu(run, measured, monkeypatch):
    monkeypatch.setattr(cuda, "driver", lambda: cuda.Driver(problem="no driver"))
    code, out, err = run("--layers", 1)
    assert (code, out, measured) == (1, "", []) and err.count("\n") == 1
    assert err == "moss-jt: no driver: no GPU's memory to measure here; --device cpu measures budgets of RAM\n"
