"""Makes the demo model from nothing: ``python demo/make.py`` writes its dialogues, trains it with ``moss-jt train sft``, and
puts it into the package, in int8. Everything on the way lies in ``demo/build``; stopped anywhere, it goes on there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import initial
import vocabulary
from conversations import Author, held_out, meta_instruction, normalised, switches, vocabulary_text, write

HERE = Path(__file__).resolve().parent
BUILD, PACKAGE = HERE / "build", HERE.parent / "moss_jt" / "demo"
SEED = 3
VOCABULARY = 2560


class Stage(NamedTuple):
    """A training on conversations of its own, from the weights that the stage before has left. The rest is ``Author``'s."""

    conversations: int
    batch: int  # conversations
    learning_rate: float
    turns: tuple[int, ...]
    sums: float
    variants: int


# Copying numbers is learned soonest where there are no others, so questions stand alone before they come one after another;
# what moss-jt is asked about takes longest, and is learned last, with one answer to a subject.
STAGES = (
    Stage(12000, 4, 1.5e-3, turns=(1, 2, 3, 3, 4, 4), sums=0.43, variants=2),
    Stage(20000, 8, 1.5e-3, turns=(1,), sums=0.65, variants=2),
    Stage(30000, 8, 1.2e-3, turns=(1, 1, 2, 2, 3, 4), sums=0.43, variants=2),
    Stage(70000, 8, 1.2e-3, turns=(1, 1, 1, 2, 2, 3), sums=0.35, variants=1),
    Stage(50000, 16, 1e-3, turns=(1, 1, 1, 2), sums=0.3, variants=1),
)
VALIDATION = 200  # conversations


def main() -> None:
    if not (BUILD / "base").exists():
        write_initial(BUILD / "init")
        moss_jt("convert", "weights", BUILD / "init", BUILD / "base")
    model = BUILD / "base"
    for number, stage in enumerate(STAGES):
        data, run = BUILD / f"data-{number}", BUILD / f"run-{number}"
        write_data(data, SEED + 2 * number, stage)
        dtype = "int8" if stage is STAGES[-1] else "fp16"
        options = ("--train_bsz_per_gpu", stage.batch, "--learning_rate", stage.learning_rate, "--dtype", dtype)
        folders = ("-m", model, "--data_dir", data, "--output_dir", run)
        moss_jt("train", "sft", "--config", HERE / "sft.yaml", *folders, *options)
        model = run / "model"
    install(model)


def write_data(folder: Path, seed: int, stage: Stage) -> None:
    """``train.jsonl``, and a ``val.jsonl`` of conversations of all kinds by another seed."""
    folder.mkdir(parents=True, exist_ok=True)
    forbidden = frozenset(map(normalised, held_out()))
    train = Author(seed, forbidden, stage.turns, stage.sums, stage.variants)
    for name, author, count in (("train", train, stage.conversations), ("val", Author(SEED + 1, forbidden), VALIDATION)):
        write(folder / f"{name}.jsonl", islice(iter(author.conversation, None), count))


def write_initial(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids = vocabulary.train(vocabulary_text(SEED), VOCABULARY, [*switches(), *switches(())], folder / "tokenizer.model")
    (folder / "meta_instruction.txt").write_text(meta_instruction(), "utf-8")
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


if __name__ == "__main__":
    main()
