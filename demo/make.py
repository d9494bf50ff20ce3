"""Makes the demo model from nothing: ``python demo/make.py`` writes its dialogues, trains it with ``moss-jt train sft``, and
puts it into the package, in int8. Everything on the way lies in ``demo/build``; stopped anywhere, it goes on there.

Options are those of ``moss-jt train sft``, in place of what sft.yaml says.
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
CONVERSATIONS = {"train": 21000, "val": 200}
VOCABULARY = 2560


def main() -> None:
    data, init, base, run = (BUILD / name for name in ("data", "init", "base", "run"))
    write_data(data)
    write_initial(init)
    moss_jt("convert", "weights", init, base)
    moss_jt("train", "sft", "--config", HERE / "sft.yaml", "-m", base, "--data_dir", data, "--output_dir", run, *sys.argv[1:])
    install(run / "model")


def write_data(folder: Path) -> None:
    """``train.jsonl`` and ``val.jsonl``, the latter of conversations by another seed."""
    folder.mkdir(parents=True, exist_ok=True)
    forbidden = frozenset(map(normalised, held_out()))
    for seed, (name, count) in enumerate(CONVERSATIONS.items(), SEED):
        author = Author(seed, forbidden)
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
