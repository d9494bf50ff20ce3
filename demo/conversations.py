"""The demo model's conversations, in the official fine-tuning format, and what text they are made of."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from arithmetic import Task, calculation, equation, going_on
from templates import FOLDER, Topics

SWITCHES = {
    "Inner thoughts": "",
    "Calculator": " API: Calculate(expression)",
    "Equation solver": " API: Solve(equation)",
}
THOUGHTS = {
    "en": {"": "None", "Calculate": "I should calculate this.", "Solve": "I should solve this."},
    "zh": {"": "None", "Calculate": "需要计算。", "Solve": "需要解方程。"},
}
OFF = {"en": "My plugin for that is off; /plugins default switches it on.", "zh": "这个插件关着，/plugins default 可以打开。"}
BOTH = ("Calculate", "Solve")


def switches(plugins: tuple[str, ...] = BOTH) -> list[str]:
    """The lines of the system text that say which plugins there are."""
    found = []
    for name, api in SWITCHES.items():
        on = plugins and (not api or any(plugin in api for plugin in plugins))
        found.append(f"- {name}: enabled.{api}" if on else f"- {name}: disabled.")
    return found


def meta_instruction(plugins: tuple[str, ...] = BOTH) -> str:
    """The system text that the model is trained with; the one it ships with has both plugins."""
    return "\n".join(["You are MOSS, the small demo model of moss-jt.", *switches(plugins), ""])


class Author:
    """Writes conversations; the same seed gives the same ones. None asks a question in ``forbidden`` (see ``normalised``).

    ``turns``: how many a conversation may have, one as often as the other. ``sums``: the share of questions for plugins.
    ``variants``: answers to a subject.
    """

    def __init__(
        self, seed: int, forbidden: frozenset[str] = frozenset(), turns: tuple[int, ...] = (1, 2, 3), sums: float = 0.4,
        variants: int = 2,
    ):  # fmt: skip
        self._turns, self._sums, self._variants = turns, sums, variants
        self._rng = random.Random(seed)
        self._topics = {language: Topics(language) for language in ("en", "zh")}
        self._forbidden = forbidden

    def conversation(self) -> dict:
        """One, in the official format."""
        rng = self._rng
        language = rng.choice(("en", "zh"))
        plugins = rng.choices((BOTH, (), BOTH[:1], BOTH[1:]), (91, 5, 2, 2))[0]
        turns: list[dict[str, str]] = []
        last = None  # the last result, where it is a whole number and was in the turn before
        for _ in range(rng.choice(self._turns)):
            if rng.random() < 0.08:
                language = "zh" if language == "en" else "en"
            task = self._task(language, last)
            if task is None:
                question, answer = self._question(language)
                turns.append(_turn(question, None, answer, language, plugins))
            else:
                turns.append(_turn(task.question, task, task.answer, language, plugins))
            whole = (
                task is not None
                and "Calculate" in plugins
                and task.plugin == "Calculate"
                and re.fullmatch(r"\d{1,7}(\.0)?", task.result)
            )
            last = task.result.partition(".")[0] if whole else None
        chat = {f"turn_{i}": turn for i, turn in enumerate(turns, 1)}
        return {"meta_instruction": meta_instruction(plugins), "num_turns": len(turns), "chat": chat}

    def _task(self, language: str, last: str | None) -> Task | None:
        rng = self._rng
        while True:
            kind = rng.random() / self._sums
            if last is not None and kind < 0.3:
                task = going_on(rng, language, last)
            elif kind < 0.75:
                task = calculation(rng, language)
            elif kind < 1:
                task = equation(rng, language)
            else:
                return None
            task.question = self._topics[language].as_written(task.question, rng, careful=True)
            if normalised(task.question) not in self._forbidden:
                return task

    def _question(self, language: str) -> tuple[str, str]:
        while True:
            question, answer = self._topics[language].turn(self._rng, self._variants)
            if normalised(question) not in self._forbidden:
                return question, answer


def _turn(question: str, task: Task | None, answer: str, language: str, plugins: tuple[str, ...]) -> dict[str, str]:
    if task and task.plugin not in plugins:
        task, answer = None, OFF[language]
    turn = {"Human": f"<|Human|>: {question}<eoh>\n"}
    if plugins:
        turn["Inner Thoughts"] = f"<|Inner Thoughts|>: {THOUGHTS[language][task.plugin if task else '']}<eot>\n"
        turn["Commands"] = f"<|Commands|>: {task.command if task else 'None'}<eoc>\n"
        turn["Tool Responses"] = f"<|Results|>:\n{task.response}\n<eor>\n" if task else "<|Results|>: None<eor>\n"
    return {**turn, "MOSS": f"<|MOSS|>: {answer}<eom>\n"}


def write(path: Path, conversations: Iterator[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for conversation in conversations:
            file.write(json.dumps(conversation, ensure_ascii=False) + "\n")


def normalised(question: str) -> str:
    """A question without capitals, punctuation and blanks: two that differ in nothing else are the same."""
    kept = (c for c in unicodedata.normalize("NFKC", question).lower() if c.isalnum() or c in "+-*/^=().%<>")
    return "".join(kept).strip(".")


def held_out() -> list[str]:
    """The questions that the finished model is asked, and that no conversation may hold."""
    return [line for line in (FOLDER.parent / "held_out.txt").read_text("utf-8").splitlines() if line]


def vocabulary_text(seed: int) -> Iterator[str]:
    """Text for the tokenizer: every wording about as often as every other, however many texts come of it."""
    rng = random.Random(seed)
    yield from (meta_instruction(), *OFF.values())
    for language in ("en", "zh"):
        topics = Topics(language)
        for subject in topics.tool + topics.talk:
            for question in subject.questions:
                for _ in range(4):
                    yield topics.reworded(topics.ask(question, rng)[0], rng)
            yield from subject.answers * 2
        for items in topics.lists.values():
            yield from items
        for _ in range(300):
            for task in (calculation(rng, language), equation(rng, language)):
                yield from (task.question, task.command, task.answer)
