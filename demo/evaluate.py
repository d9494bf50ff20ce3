"""Asks the demo model what no training dialogue asked: ``python demo/evaluate.py [FOLDER]``, by default the one in the package.

The free questions of held_out.txt, each in a new conversation, with its answer; 100 calculations and 40 equations with new
numbers, and the sums of held_out_sums.txt, in new words: how many commands are well-formed, how many answers have the result.
Always greedy, and the sums also sampled, as ``moss-jt chat`` does by itself.
"""

from __future__ import annotations

import random
import sys
from itertools import cycle
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from arithmetic import Task, calculation, equation, shown  # noqa: E402
from conversations import held_out  # noqa: E402

import moss_jt  # noqa: E402
from moss_jt import demo  # noqa: E402
from moss_jt.plugins import commands  # noqa: E402

SEED = 1_000_003


def main(folder: Path) -> None:
    moss = moss_jt.load(folder)
    for question in held_out():
        print(f"> {question}\n{ask(moss, question, greedy=True)[0]}\n", flush=True)
    languages, rng = cycle(("en", "zh")), random.Random(SEED)
    calculations = [(t.question, said(t)) for t in (calculation(rng, next(languages)) for _ in range(100))]
    equations = [(t.question, said(t)) for t in (equation(rng, next(languages)) for _ in range(40))]
    words = [tuple(line.split(" => ")) for line in (HERE / "held_out_sums.txt").read_text("utf-8").splitlines()]
    for sampling in ({"greedy": True}, {"seed": SEED}):
        for name, tasks in (("calculations", calculations), ("equations", equations), ("in new words", words)):
            report(moss, f"{name}, {'greedy' if 'greedy' in sampling else 'sampled'}", tasks, sampling)


def said(task: Task) -> str:
    """What the answer has to hold."""
    if task.result.startswith("No result"):
        return task.answer
    return shown(task.result) if task.plugin == "Calculate" else task.result.splitlines()[-1].partition(" = ")[2]


def ask(moss: moss_jt.Moss, question: str, **sampling: object) -> tuple[str, str]:
    """The answer, and the commands before it."""
    conversation = moss.chat()
    for _ in conversation.send(question, max_new_tokens=120, **sampling):
        pass
    turn = conversation.turns[-1]
    return turn.answer, moss.tokenizer.decode(dict(turn.segments).get("Commands", []), skip_special=True)


def report(moss: moss_jt.Moss, name: str, tasks: list[tuple[str, str]], sampling: dict) -> None:
    formed = right = 0
    for question, expected in tasks:
        answer, written = ask(moss, question, **sampling)
        found = commands.parse(written.partition(":")[2].strip())
        well = len(found) == 1 and found[0].function in ("Calculate", "Solve") and found[0].argument != ""
        formed, right = formed + well, right + (expected in answer)
        if not well or expected not in answer:
            print(f"  {question} | {written.strip()} | {answer} | expected {expected}")
    print(f"{name}: {formed} of {len(tasks)} commands well-formed, {right} answers right\n", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else demo.FOLDER)
