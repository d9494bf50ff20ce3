"""Questions that want a plugin: arithmetic for the calculator, equations for the solver, in many wordings and two languages."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt

from templates import FOLDER, choose, read_sections

NO_RESULT = "No result: division by zero."
ANSWERS = {
    "en": ("{e} = {r}", "{e} = {r}", "The result is {r}.", "That is {r}."),
    "zh": ("{e} = {r}", "{e} = {r}", "结果是 {r}。", "等于 {r}。"),
}
FAILED = {"en": "There is no result for that.", "zh": "这个没有结果。"}
SOLUTION = {"en": "The solution: ", "zh": "解是 "}
AND, OR = {"en": " and ", "zh": "，"}, {"en": " or ", "zh": " 或 "}
UNSOLVED = (
    "No result.",
    "No result: it takes too long to solve.",
    "No result: the equation solver needs sympy, which is not installed.",
)

_WORDINGS = {language: read_sections(FOLDER / f"{language}_plugins.txt") for language in ("en", "zh")}


@dataclass
class Task:
    """A question, the command that it needs, what comes of that, and the answer."""

    question: str
    plugin: str  # Calculate or Solve
    argument: str
    result: str  # as the plugin gives it
    answer: str

    @property
    def command(self) -> str:
        return f'{self.plugin}("{self.argument}")'

    @property
    def response(self) -> str:
        """What stands in Results."""
        return f"{self.command} => '{self.result}'" if self.plugin == "Calculate" else f"{self.command} =>\n{self.result}"


# ---- the calculator ---------------------------------------------------------------------------------------------------------


def calculation(rng: random.Random, language: str) -> Task:
    """Something for the calculator."""
    while True:
        question, e = _direct(rng, language) if rng.random() < 0.5 else _worded(rng, language)
        result = calculate(e)
        if result is not None and len(e) < 40:
            return Task(question, "Calculate", e, result, _answer(e, result, rng, language))


def going_on(rng: random.Random, language: str, last: str) -> Task:
    """A question about the last result, a whole number as the answer showed it."""
    template, _, operator = rng.choice(_WORDINGS[language]["going on"]).rpartition(" => ")
    b = str(rng.randint(2, 999))
    e = f"{last}{operator}{b}"
    result = calculate(e)
    return Task(choose(template, rng).replace("{b}", b), "Calculate", e, result, _answer(e, result, rng, language))


def calculate(expression: str) -> str | None:
    """What the calculator gives; None for what is too long to be asked here."""
    try:
        value = eval(expression.replace("^", "**"), {"__builtins__": {}, "sqrt": sqrt})
    except ZeroDivisionError:
        return NO_RESULT
    text = str(value)
    return text if "e" not in text and abs(value) < 10**12 else None


def shown(result: str) -> str:
    """A result as it stands in an answer: no .0, and of more than four decimals the first four and an ellipsis."""
    whole, _, decimals = result.partition(".")
    if not decimals or decimals == "0":
        return whole
    return f"{whole}.{decimals}" if len(decimals) <= 4 else f"{whole}.{decimals[:4]}…"


def _answer(e: str, result: str, rng: random.Random, language: str) -> str:
    if result == NO_RESULT:
        return FAILED[language]
    return rng.choice(ANSWERS[language]).replace("{e}", e).replace("{r}", shown(result))


def _direct(rng: random.Random, language: str) -> tuple[str, str]:
    """A question with an expression as it is, and the expression."""
    e = f"{_number(rng)}/0" if rng.random() < 0.02 else _expression(rng)
    return rng.choice(_WORDINGS[language]["direct"]).replace("{e}", _written(e, rng, language == "zh")), e


def _worded(rng: random.Random, language: str) -> tuple[str, str]:
    """A question in words, and its expression."""
    digits, _, rest = rng.choice(_WORDINGS[language]["worded"]).partition(": ")
    template, _, e = rest.rpartition(" => ")
    question = choose(template, rng)
    values = {name: _number(rng, int(digits), decimals=digits >= "5") for name in "abc"}  # no half apples
    values |= {"p": str(rng.randint(2, 99)), "q": str(rng.randint(2, 5))}
    return _filled(question, values), _filled(e, values)


def _number(rng: random.Random, digits: int = 6, decimals: bool = True) -> str:
    """Of up to so many digits, short ones more often; now and then with decimals."""
    length = min(digits, rng.choice((1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6) if rng.random() < 0.3 else (1, 2, 2, 3, 3, 4)))
    text = str(rng.randint(1 if length == 1 else 10 ** (length - 1), 10**length - 1))
    if decimals and rng.random() < 0.1:
        text += f".{rng.randint(1, 9)}" if rng.random() < 0.6 else f".{rng.randint(0, 9)}{rng.randint(1, 9)}"
    return text


def _expression(rng: random.Random) -> str:
    a, b, c, d = (_number(rng) for _ in range(4))
    o, p, q = (rng.choice("++--***/") for _ in range(3))
    forms = {
        f"{a}{o}{b}": 70,
        f"{a}{o}{b}{p}{c}": 9,
        f"({a}{o}{b}){p}{c}": 10,
        f"{a}{o}({b}{p}{c})": 5,
        f"({a}{o}{b}){p}({c}{q}{d})": 3,
        f"{a}{o}{b}{p}{c}{q}{d}": 3,
    }
    return rng.choices(list(forms), list(forms.values()))[0]


def _written(expression: str, rng: random.Random, chinese: bool) -> str:
    """An expression as someone may type it: other signs, blanks."""
    text = expression
    if rng.random() < (0.4 if chinese else 0.2):
        text = text.replace("*", "×").replace("/", "÷")
    elif rng.random() < 0.1:
        text = text.replace("*", "x")
    return re.sub(r"(?<=[\d)])([-+*/×÷x])", r" \1 ", text) if rng.random() < 0.5 else text


# ---- the solver -------------------------------------------------------------------------------------------------------------


def equation(rng: random.Random, language: str) -> Task:
    """Something for the solver: linear, quadratic, or two equations; now and then without a result."""
    task = rng.choices((_linear, _quadratic, _system, _two_numbers), (5, 2, 3, 1))[0](rng, language)
    if rng.random() < 0.03:
        task.result, task.answer = rng.choice(UNSOLVED), FAILED[language]
    return task


def _linear(rng: random.Random, language: str) -> Task:
    x = rng.choice("xxxxyntaz")
    a, b = rng.randint(2, 99 if rng.random() < 0.3 else 12), rng.randint(1, 999 if rng.random() < 0.2 else 60)
    whole, part = rng.randint(-20, 60), Fraction(rng.randint(1, 90), a)
    form = rng.choice(("ax+b", "ax-b", "ax", "x+b", "x-b", "ax+b=cx+d"))
    root = part if form[0] == "a" and form != "ax+b=cx+d" and rng.random() < 0.25 else whole
    if form == "ax+b=cx+d":
        c = rng.randint(1, a - 1)
        return _one(rng, language, f"{a}{x}+{b}={_term(c, x)}{(a - c) * root + b:+d}", x, [root])
    coefficient, sign = a if form[0] == "a" else 1, {"+": 1, "-": -1}.get(form[-2], 0)
    left = _term(coefficient, x) + (f"{sign * b:+d}" if sign else "")
    return _one(rng, language, f"{left}={coefficient * root + sign * b}", x, [root])


def _quadratic(rng: random.Random, language: str) -> Task:
    x = rng.choice("xxxxxyt")
    if rng.random() < 0.3:
        q = rng.randint(1, 30)
        return _one(rng, language, f"{x}^2={q * q}", x, [-q, q])
    p, q = sorted((rng.randint(-12, 12), rng.randint(-12, 12)))
    middle = f"{'-' if p + q > 0 else '+'}{_term(abs(p + q), x)}" if p + q else ""
    return _one(rng, language, f"{x}^2{middle}{f'{p * q:+d}' if p * q else ''}=0", x, sorted({p, q}))


def _one(rng: random.Random, language: str, e: str, x: str, roots: list) -> Task:
    """An equation in one unknown with these solutions."""
    names = [x] if len(roots) == 1 else [f"{x}_{i}" for i in range(len(roots))]
    result = "\n".join(f"{name} = {root}" for name, root in zip(names, roots))
    written = re.sub(r"(?<=\w)([-+=])", r" \1 ", e) if rng.random() < 0.35 else e
    question = _filled(rng.choice(_WORDINGS[language]["equation"]), {"e": written, "x": x})
    return Task(question, "Solve", e, result, SOLUTION[language] + OR[language].join(f"{x} = {root}" for root in roots))


def _system(rng: random.Random, language: str) -> Task:
    x, y = rng.choice(("xy", "xy", "xy", "ab", "mn"))
    p, q = rng.randint(-9, 40), rng.randint(-9, 40)
    a, b, c, d, determinant = 0, 0, 0, 0, 0
    while determinant == 0:
        a, c = (rng.choice((1, 1, 1, 2, 3, rng.randint(2, 9))) for _ in range(2))
        b, d = (rng.choice((1, 1, 1, 2, 3, rng.randint(2, 9))) * rng.choice((1, -1)) for _ in range(2))
        determinant = a * d - b * c
    e, f = (f"{_term(i, x)}{'+' if j > 0 else '-'}{_term(abs(j), y)}={i * p + j * q}" for i, j in ((a, b), (c, d)))
    question = _filled(rng.choice(_WORDINGS[language]["system"]), {"e": e, "f": f, "x": x, "y": y})
    return _both(question, f"{e};{f}", x, p, y, q, language)


def _two_numbers(rng: random.Random, language: str) -> Task:
    y, difference = rng.randint(1, 90), rng.randint(1, 60)
    x = y + difference
    question = choose(rng.choice(_WORDINGS[language]["two numbers"]), rng)
    question = _filled(question, {"s": str(x + y), "d": str(difference)})
    return _both(question, f"x+y={x + y};x-y={difference}", "x", x, "y", y, language)


def _both(question: str, equations: str, x: str, p: int, y: str, q: int, language: str) -> Task:
    answer = f"{SOLUTION[language]}{x} = {p}{AND[language]}{y} = {q}"
    return Task(question, "Solve", equations, f"{x} = {p}\n{y} = {q}", answer)


def _term(coefficient: int, unknown: str) -> str:
    return unknown if coefficient == 1 else f"{coefficient}{unknown}"


def _filled(template: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w)\}", lambda found: values[found[1]], template)
