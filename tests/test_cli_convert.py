"""``moss-jt convert``: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moss_jt.cli import main
from moss_jt.weights import open_weights
from moss_jt.weights.layout import BITS, Coding
from tests.checkpoints import random_state, small_config, write_official
from tests.dialogue_files import small_talk, write
from tests.gptq_checkpoints import random_gptq

CONFIG = small_config()
MAIN = [sys.executable, "-c", "import sys; from moss_jt.cli import main; main(sys.argv[1:])"]


@pytest.fixture
def src(tmp_path) -> Path:
    return write_official(tmp_path / "src", CONFIG, random_state(CONFIG), shards=2)


@pytest.fixture
def run(capsys):
    """Run the command line here; returns (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as e:
            main([str(a) for a in args])
        return (e.value.code or 0, *capsys.readouterr())

    return call


def test_convert_and_export(tmp_path, src, run):
    dst, out = tmp_path / "dst", tmp_path / "out"
    code, stdout, stderr = run("convert", "weights", src, dst)
    assert code == 0 and stderr == ""
    assert stdout.startswith(f"{dst}: ") and "in 4 files. Chat with it: moss-jt chat -m" in stdout
    open_weights(dst)
    assert run("convert", "weights", src, dst) == (0, f"{dst}: already converted from {src}\n", "")
    code, stdout, stderr = run("convert", "export", dst, out, "--shard-size", "4kB")
    assert code == 0 and stderr == "" and stdout.startswith(f"{out}: ")
    assert len(list(out.glob("pytorch_model-*.bin"))) > 2


def test_export_to_safetensors(tmp_path, src, run):
    run("convert", "weights", src, tmp_path / "dst")
    assert run("convert", "export", tmp_path / "dst", tmp_path / "out", "--format", "safetensors")[0] == 0
    assert (tmp_path / "out/model.safetensors").exists()


def test_export_to_gguf(tmp_path, src, run):
    dst, out = tmp_path / "dst", tmp_path / "m.gguf"
    run("convert", "weights", src, dst, "--dtype", "int8")
    export = ("convert", "export", dst, out, "--format", "gguf-f16")
    note = f"{dst} is in int8: weights are dequantised and stored as gguf-f16\n"
    code, stdout, stderr = run(*export, "--dry-run")
    assert (code, stderr, out.exists(), (tmp_path / "m.gguf.partial").exists()) == (0, note, False, False)
    assert "blk.1 " in stdout and "m.gguf: 5 parts, " in stdout and "tokenizer" not in stdout
    code, stdout, stderr = run(*export)
    assert (code, stderr) == (0, note) and stdout == f"{out}: {out.stat().st_size / 1e6:.2f} MB in 5 parts.\n"
    code, stdout, stderr = run("convert", "export", dst, tmp_path / "m.bin", "--format", "gguf-q8_0")
    assert (code, stdout) == (1, "") and "has to end in .gguf" in stderr and stderr.count("\n") == 1
    assert run("convert", "export", dst, out, "--format", "gguf-q2_k")[0] == 2


def test_every_dtype_for_blocks_and_head(tmp_path, src, run):
    for dtype in BITS:
        dst = tmp_path / dtype
        code, stdout, stderr = run("convert", "weights", src, dst, "--dtype", dtype, "--head-dtype", "int8")
        assert code == 0 and stderr == "" and stdout.startswith(f"{dst}: ")
        opened = open_weights(dst)
        assert opened.coding == Coding(dtype, "int8")
    assert run("convert", "weights", src, tmp_path / "int4", "--dtype", "int4")[1].endswith(f"already converted from {src}\n")
    code, stdout, stderr = run("convert", "weights", src, tmp_path / "int4")
    assert code == 1 and stdout == "" and "exists already" in stderr
    for wrong in (tmp_path / "int4", tmp_path / "fp16"):  # the latter's lm_head
        code, stdout, stderr = run("convert", "export", wrong, tmp_path / "out")
        assert code == 1 and stdout == "" and "only fp16 is exported" in stderr and stderr.count("\n") == 1
    code, stdout, _ = run("convert", "weights", src, tmp_path / "dry", "--dtype", "int4", "--dry-run")
    for path in (tmp_path / "int4").glob("*.safetensors"):
        assert f"{path.stat().st_size:,} bytes" in next(line for line in stdout.splitlines() if line.startswith(path.name))


def test_gptq_and_back(tmp_path, run):
    made = random_gptq(small_config(n_embd=64), 4, 32, True)
    made.config["groupsize"] = 128
    src, dst, out = made.write(tmp_path / "src"), tmp_path / "dst", tmp_path / "out"
    says = f"{src / 'config.json'}: says groups of 128, but the tensors have groups of 32; the tensors are right\n"
    code, stdout, stderr = run("convert", "weights", src, dst, "--dry-run")
    assert code == 0 and stderr == says and "nothing was written" in stdout and not dst.exists()
    code, stdout, stderr = run("convert", "weights", src, dst, "--head-dtype", "int8")
    assert code == 0 and stderr == says and stdout.startswith(f"{dst}: ")
    assert run("convert", "weights", src, dst, "--head-dtype", "int8") == (0, f"{dst}: already converted from {src}\n", "")
    code, stdout, stderr = run("convert", "weights", src, tmp_path / "int8", "--dtype", "int8")
    assert code == 1 and stdout == "" and "quantised to int4 and kept so" in stderr and stderr.count("\n") == 1
    code, stdout, stderr = run("convert", "export", dst, out, "--format", "gptq")
    assert (
        code == 0 and "in 1 file." in stdout and stderr.endswith("lm_head is in int8, GPTQ's layout has it in fp16: rounded\n")
    )
    assert json.loads((out / "config.json").read_text())["groupsize"] == 32


def test_gptq(tmp_path, src, run):
    talk, dst = write(tmp_path / "talk.jsonl", small_talk()), tmp_path / "dst"
    args = ["convert", "weights", src, dst, "--dtype", "int4", "--method", "gptq", "--calibration", talk, "--group-size", "8"]
    code, stdout, stderr = run(*args, "--act-order", "--dry-run")
    assert code == 0 and stderr == "" and "to keep until then" in stdout and not dst.exists()
    code, stdout, stderr = run(*args, "--act-order")
    assert code == 0 and stderr == "" and stdout.startswith(f"{dst}: ")
    assert all(name in stdout for name in ("qkv_proj", "fc_in", "out_proj", "fc_out", "seconds"))
    assert open_weights(dst).coding == Coding("int4", "int8", 8, True)
    assert run(*args, "--act-order")[1] == f"{dst}: already converted from {src}\n"
    assert run("convert", "export", dst, tmp_path / "out", "--format", "gptq")[0] == 0
    assert not (tmp_path / "out/quantisation.json").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "gptq"], "gptq needs dialogues to calibrate with"),
        (["--calibration", "x.jsonl"], "rtn uses no calibration"),
        (["--act-order"], "rtn has no order of inputs"),
        (["--group-size", "12"], "group_size is 12, it must be a multiple of 8, at most 128"),
    ],
)
def test_what_does_not_go_together(tmp_path, src, run, options, says):
    code, stdout, stderr = run("convert", "weights", src, tmp_path / "dst", "--dtype", "int4", *options)
    assert code == 2 and stdout == "" and f"Error: {says}" in stderr


def test_no_calibration_file(tmp_path, src, run):
    options = ["--dtype", "int4", "--method", "gptq", "--calibration", "no.jsonl"]
    says = "no.jsonl: cannot be read: No such file or directory"
    assert run("convert", "weights", src, tmp_path / "dst", *options) == (1, "", f"moss-jt: {says}\n")


def test_dry_run_writes_nothing(tmp_path, src, run):
    code, stdout, stderr = run("convert", "weights", src, tmp_path / "dst", "--dry-run")
    assert code == 0 and stderr == ""
    assert "block-01.safetensors" in stdout and "free there; nothing was written" in stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]
    run("convert", "weights", src, tmp_path / "dst")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "dst").glob("*.safetensors")}
    for name, size in sizes.items():
        assert f"{size:,} bytes" in next(line for line in stdout.splitlines() if line.startswith(name))
    code, stdout, _ = run("convert", "export", tmp_path / "dst", tmp_path / "out", "--dry-run")
    assert code == 0 and "pytorch_model.bin" in stdout and not (tmp_path / "out").exists()


def test_errors_are_one_line_and_1(tmp_path, src, run):
    (src / "pytorch_model-00002-of-00002.bin").unlink()
    for args in (
        ["weights", src, tmp_path / "dst"],
        ["weights", src, tmp_path / "dst", "--dry-run"],
        ["export", src, tmp_path / "x"],
    ):
        code, stdout, stderr = run("convert", *args)
        assert code == 1 and stdout == "" and stderr.startswith("moss-jt: ") and stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ["weights"],
        ["weights", "src"],
        ["weights", "src", "dst", "more"],
        ["weights", "src", "dst", "--dtype", "int3"],
        ["weights", "src", "dst", "--head-dtype", "int3"],
        ["weights", "src", "dst", "--method", "awq"],
        ["weights", "src", "dst", "--group-size", "many"],
        ["export", "src", "dst", "--shard-size", "0"],
        ["export", "src", "dst", "--shard-size", "10 parsecs"],
        ["export", "src", "dst", "--format", "gguf"],
        ["nothing"],
    ],
)
def test_wrong_usage_is_2(run, args):
    code, stdout, stderr = run("convert", *args)
    assert code == 2 and stdout == "" and "Error: " in stderr


@pytest.mark.parametrize("args", [["convert"], ["convert", "weights"], ["convert", "export"], ["info"]])
def test_help_imports_nothing_heavy(args):
    code = (
        "import sys, atexit; from moss_jt.cli import main;"
        "atexit.register(lambda: print('HEAVY', [m for m in ('numpy', 'rich', 'safetensors', 'jittor') if m in sys.modules]));"
        "main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *args, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage: moss-jt " + " ".join(args) in done.stdout and "HEAVY []" in done.stdout, done


# As the command, but each step takes a while, so that there is time to stop it.
SLOW = """
import sys, time
from moss_jt.convert import copy
from moss_jt.cli import main
real = copy.write_tensor
def slow(*args):
    time.sleep(0.05)
    real(*args)
from moss_jt.convert import to_moss_jt
to_moss_jt.write_tensor = slow
main(sys.argv[1:])
"""


def test_ctrl_c_says_how_to_go_on(tmp_path, src):
    args = ["convert", "weights", src, tmp_path / "dst"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(tmp_path / "dst.partial" / "block-00.safetensors")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and stdout == ""
    assert stderr.strip() == "moss-jt: stopped; the same command goes on where it was"
    again = subprocess.run([*MAIN, *args], capture_output=True, text=True)
    assert again.returncode == 0 and "dst.partial: going on, " in again.stderr and "of 4 files are left" in again.stderr
    open_weights(tmp_path / "dst")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_on_a_terminal_a_bar_is_drawn(tmp_path, src):
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", SLOW, "convert", "weights", src, tmp_path / "dst"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=env) as process:
        os.close(theirs)
        drawn = b""
        while data := read(ours):
            drawn += data
    os.close(ours)
    assert process.returncode == 0
    assert b"kB" in drawn and b"/s" in drawn and "━".encode() in drawn


def read(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except OSError:  # Linux: the other side was closed
        return b""


def test_going_on_with_other_settings_does_not_say_that_it_goes_on(tmp_path, src, run):
    args = ["convert", "weights", src, tmp_path / "dst", "--dtype", "int4"]
    partial = tmp_path / "dst.partial"
    partial.mkdir()
    (partial / "convert.json").write_text('{"format": 3}')
    code, stdout, stderr = run(*args)
    assert (
        code == 1 and stdout == "" and stderr.startswith(f"moss-jt: {partial}: begun from another source") and partial.exists()
    )
