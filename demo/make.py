"""Makes the demo model from nothing: ``python demo/make.py`` writes its dialogues, trains it with ``moss-jt train sft``, and
puts it into the package, in int8. Everything on the way lies in ``demo/build``; stopped anywhere, it goes on there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import initial
import vocabulary
from conversations import Author, held_out, meta_instruction, normalised, switches, vocabulary_text, write

HERE = Path(__file__).resolve().parent
BUILD, PACKAGE = HERE / "build", HERE.parent / "moss_jt" / "demo"
SEED = 3
VOCABULARY = 2560
# Copying numbers is learned soonest where there are no others, so questions stand alone before they come one after another.
STAGES = (
    {"conversations": 10000, "learning_rate": 1.5e-3, "turns": (1, 2, 3, 3, 4, 4), "sums": 0.43, "variants": 2},
    {"conversations": 12000, "learning_rate": 1.5e-3, "turns": (1,), "sums": 0.65, "variants": 2},
    {"conversations": 8000, "learning_rate": 1.2e-3, "turns": (1, 1, 2, 2, 3, 4), "sums": 0.43, "variants": 2},
    {"conversations": 20000, "learning_rate": 1.2e-3, "turns": (1, 1, 1, 2, 2, 3), "sums": 0.35, "variants": 1},
    {"conversations": 13000, "learning_rate": 1.2e-3, "turns": (1, 1, 1, 2), "sums": 0.25, "variants": 1},
)
VALIDATION = 200  # conversations


def main() -> None:
    write_initial(BUILD / "init")
    model = BUILD / "base"
    moss_jt("convert", "weights", BUILD / "init", model)
    for number, stage in enumerate(STAGES):
        data, run = BUILD / f"data-{number}", BUILD / f"run-{number}"
        write_data(data, SEED + 2 * number, stage)
        folders = ("-m", model, "--data_dir", data, "--output_dir", run)
        dtype = "fp16" if stage is not STAGES[-1] else "int8"
        moss_jt(
            "train", "sft", "--config", HERE / "sft.yaml", *folders, "--learning_rate", stage["learning_rate"], "--dtype", dtype
        )
        model = run / "model"
    install(model)


def write_data(folder: Path, seed: int, stage: dict) -> None:
    """``train.jsonl`` and ``val.jsonl``, the latter the same in each stage, and of no stage's conversations."""
    folder.mkdir(parents=True, exist_ok=True)
    forbidden = frozenset(map(normalised, held_out()))
    train = Author(seed, forbidden, stage["turns"], stage["sums"], stage["variants"])
    for name, author, count in (("train", train, stage["conversations"]), ("val", Author(SEED + 1, forbidden), VALIDATION)):
        write(folder / f"{name}.jsonl", islice(iter(author.conversation, None), count))


def write_initial(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids = vocabulary.train(vocabulary_text(SEED), VOCABULARY, [*switches(), *switches(())], folder / "tokenizer.model")
    initial.write(folder, VOCABULARY, ids("<|endoftext|>"), ids("<eom>"), SEED)


def moss_jt(*args: object) -> None:
    done = subprocess.run([sys.executable, HERE.parent / "cli.py", *map(str, args)], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def install(model: Path) -> None:
    """Into the package, without the record of what it was converted from."""
    for old in PACKAGE.glob("*.safetensors"):
        old.unlink()
    for file in model.iterdir():
        if file.name != "convert.json":
            shutil.copyfile(file, PACKAGE / file.name)
    (PACKAGE / "meta_instruction.txt").write_text(meta_instruction(), "utf-8")


if __name__ == "__main__":
    main()
