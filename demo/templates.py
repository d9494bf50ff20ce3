"""Questions and answers from the files in dialogues/: subjects with ways to ask and answers, expanded at random.

A file has subjects (``== name``), each with questions (``? …``) and answers (``> …``). ``(a|b|)`` is one of these, and may lie
inside another; ``[topic]`` is an item of that list; ``{n=4..64}`` is a number and ``{d=int8|int4}`` a word, which the answer
repeats where it has ``{n}`` and ``{d}``.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent / "dialogues"
_INNERMOST = re.compile(r"\(([^()]*\|[^()]*)\)")
_SLOT = re.compile(r"\{(\w)=([^}]*)\}")
_LIST = re.compile(r"\[(\w+)\]")


@dataclass
class Subject:
    name: str
    questions: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def read_subjects(path: Path) -> list[Subject]:
    """The subjects of a file. Raises ValueError, naming the line, for one that is none of the above."""
    subjects: list[Subject] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        mark, _, rest = line.partition(" ")
        if mark == "==":
            subjects.append(Subject(rest))
        elif mark == "?" and subjects:
            subjects[-1].questions.append(rest)
        elif mark == ">" and subjects:
            subjects[-1].answers.append(rest)
        elif line and mark != "#":
            raise ValueError(f"{path}, line {number}: {line!r}")
    return subjects


def read_sections(path: Path) -> dict[str, list[str]]:
    """Lines below each ``== name``."""
    sections: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("== "):
            sections[line[3:]] = []
        elif line and line[0] != "#":
            sections[list(sections)[-1]].append(line)
    return sections


def choose(template: str, rng: random.Random) -> str:
    """The template with one of each (a|b), the innermost first."""
    while (found := _INNERMOST.search(template)) is not None:
        template = template[: found.start()] + rng.choice(found[1].split("|")) + template[found.end() :]
    return template


def expand(template: str, lists: dict[str, list[str]], rng: random.Random) -> tuple[str, dict[str, str]]:
    """One text of a template, and what its slots were filled with."""
    text = choose(_LIST.sub(lambda found: rng.choice(lists[found[1]]), template), rng)
    slots: dict[str, str] = {}

    def fill(found: re.Match[str]) -> str:
        low, dots, high = found[2].partition("..")
        slots[found[1]] = str(rng.randint(int(low), int(high))) if dots else rng.choice(found[2].split("|"))
        return slots[found[1]]

    text = _SLOT.sub(fill, text)
    return re.sub(r" +", " ", text).strip(), slots


class Topics:
    """What a language's files hold: ``turn`` gives a question and an answer."""

    def __init__(self, language: str):
        self.chinese = language == "zh"
        self.lists = {name: lines[0].split("|") for name, lines in read_sections(FOLDER / f"{language}_lists.txt").items()}
        words = read_sections(FOLDER / f"{language}_words.txt")
        self._synonyms = [line.split("|") for line in words["synonyms"]]
        frames = (line.partition(" => ") for line in words["frames"])
        self._frames = [(re.compile(pattern), forms.split("|")) for pattern, _, forms in frames]
        self._leads, self._tails = (words[name][0].split("|") for name in ("leads", "tails"))
        self.tool = read_subjects(FOLDER / f"{language}_tool.txt")
        self.talk = read_subjects(FOLDER / f"{language}_talk.txt")

    def turn(self, rng: random.Random, variants: int) -> tuple[str, str]:
        """A question, and one of its subject's first so many answers."""
        subject = rng.choice(self.tool if rng.random() < 0.62 else self.talk)
        # What it cannot answer has no end, so it is asked more often.
        if subject.name not in ("knowledge", "advice", "dangerous") and rng.random() < 0.04:
            name = rng.choice(("knowledge", "knowledge", "advice", "dangerous"))
            subject = next(s for s in self.talk if s.name == name)
        question, slots = self.ask(rng.choice(subject.questions), rng)
        question = self.reworded(question, rng)
        answer = rng.choice(subject.answers[:variants])
        for name, value in slots.items():
            answer = answer.replace("{" + name + "}", value)
        return self.as_written(question, rng), answer

    def reworded(self, question: str, rng: random.Random) -> str:
        """Perhaps in another frame, with other words, and with something around it that does not matter."""
        if rng.random() < 0.4:
            for pattern, forms in self._frames:
                if found := pattern.match(question):
                    question = rng.choice(forms).replace("{}", found[1])
                    break
        for word, *others in self._synonyms:
            if word in question and "/" not in question and "--" not in question and rng.random() < 0.25:
                found = word if self.chinese else rf"\b{word}\b"
                question = re.sub(found, rng.choice(others), question, count=1)
        if len(question) > (4 if self.chinese else 12):
            if rng.random() < 0.07:
                question = rng.choice(self._leads) + question
            if rng.random() < 0.07:
                question += rng.choice(self._tails)
        return question

    def as_written(self, question: str, rng: random.Random, careful: bool = False) -> str:
        """A question as people write them; careful: without slips, which would change a number."""
        return (as_written_zh if self.chinese else as_written)(question, self, rng, careful)

    def ask(self, template: str, rng: random.Random) -> tuple[str, dict[str, str]]:
        """One of a question's wordings, and what its slots were filled with."""
        return expand(template, self.lists, rng)


# ---- as people write --------------------------------------------------------------------------------------------------------

_SMALL = re.compile(
    r"\b(?:the|a|an|is|are|do|does|i|my|me|to|of|for|you|your|it|its|this|that|there|be|so|just|please|have|has|am|will|would|"
    r"in|on)\b ?"
)
_SMALL_ZH = re.compile(r"[的了我你吗呢吧啊呀是有就都把个一]")
_ASKS = re.compile(r"^(what|how|who|which|where|why|can|do|does|is|are|will|when|should|may|did|was|were|am|could|has|have)\b")


def as_written(question: str, topics: Topics, rng: random.Random, careful: bool = False) -> str:
    """With or without a polite word, a capital, a question mark, and, unless careful, now and then a slip of the fingers."""
    asks = bool(_ASKS.match(question))
    if not careful and rng.random() < 0.12:
        question = terse(question, rng)
    if rng.random() < 0.12 and len(question) > 8:
        question = rng.choice(topics.lists["before"]) + question
    if asks and not careful and rng.random() < 0.06:
        question += rng.choice(topics.lists["after"])
    if not careful and rng.random() < 0.1:
        question = slip(question, rng)
    if rng.random() < 0.5:
        question = question[0].upper() + question[1:]
        question = re.sub(r"\bi\b", "I", question)
    if question[-1].isalnum():
        question += rng.choice(("?", "?", "?", "", " ?") if asks else ("", "", "", ".", "?" if careful else "!"))
    return question


def as_written_zh(question: str, topics: Topics, rng: random.Random, careful: bool = False) -> str:
    """The same in Chinese, where a character may be missing."""
    if rng.random() < 0.15 and len(question) > 3:
        question = rng.choice(topics.lists["before"]) + question
    if rng.random() < 0.08 and len(question) > 3 and question[-1] not in "吗呢吧？":
        question += rng.choice(topics.lists["after"])
    if not careful and rng.random() < 0.12 and len(question) > 5:
        question = terse(question, rng, _SMALL_ZH)
    if not careful and rng.random() < 0.1 and len(question) > 5:
        cut = rng.randrange(len(question))
        if "\u4e00" <= question[cut] <= "\u9fff":
            question = question[:cut] + question[cut + 1 :]
    if question[-1] not in "？。！，?!.":
        question += rng.choice(("？", "？", "？", "", "?", "。"))
    return question


def terse(text: str, rng: random.Random, small: re.Pattern = _SMALL) -> str:
    """The text without some of its small words, or all of them; as it is where little would be left."""
    share = rng.choice((0.3, 0.6, 1))
    found = small.sub(lambda word: "" if rng.random() < share else word[0], text).strip()
    return found if 2 * len(found) > len(text) else text


def slip(text: str, rng: random.Random) -> str:
    """The text with a letter left out, doubled, or exchanged with the next."""
    letters = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if not letters or text[0] == "/" or "--" in text:
        return text
    i = rng.choice(letters)
    return text[:i] + rng.choice(("", text[i] * 2, text[i + 1] + text[i])) + text[i + (rng.random() < 0.5) + 1 :]
