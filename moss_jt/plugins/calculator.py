"""The calculator: ``Calculate("60/6") => '10.0'``.

It takes what the official one takes: Python's arithmetic with ``^`` as the power, the functions of ``math``, angles in
radians, values that are named first (``p=15;sqrt(p*(p-3))``), and Chinese units after numbers.
"""

from __future__ import annotations

import ast
import math
import re
from decimal import Context
from typing import Any

from .arithmetic import Evaluator, NoResult, is_number, parse, plain, power
from .base import NO_RESULT, Plugin

_DIGITS = 1000  # of a whole number, before it is rounded
_HAN = r"[\u3400-\u9fff]"
_UNIT = re.compile(rf"(?<=[0-9])\s*({_HAN}+)")
_NUMBER = re.compile(r"(?<![\w.])\d[\w.]*")
_MOST_ITEMS = 10_000  # to choose from, in combinations


class Calculator(Plugin):
    """Evaluates an expression, in milliseconds whatever it is."""

    name, api = "Calculator", "Calculate(expression)"

    def run(self, argument: str) -> str:
        try:
            return f"'{_shown(calculate(argument))}'"
        except NoResult as e:
            return f"'No result: {e}.'" if str(e) else f"'{NO_RESULT}'"


def calculate(text: str) -> int | float:
    """The value of an expression, the last of several with ``;`` between them. Raises NoResult."""
    text = _without_units(plain(text).replace("math.", "").rstrip(" =?;"))
    names: dict[str, Any] = dict(_CONSTANTS)
    evaluator = Evaluator(names, _FUNCTIONS, is_number)
    *before, last = parse(text) or [None]
    for statement in before:
        if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)):
            raise NoResult
        names[statement.targets[0].id] = evaluator.value(statement.value)
    if not isinstance(last, ast.Expr):
        raise NoResult
    value = evaluator.value(last.value)
    if value in (math.inf, -math.inf):
        raise NoResult("the number is too large")
    return value


def _without_units(text: str) -> str:
    """Without a unit in Chinese after numbers: ``6亿美元*2`` is ``6*2``. Raises NoResult where that could be something else.

    That is: with several units, or where a sum has numbers without it.
    """
    units = _UNIT.findall(text)
    summed = re.search(r"[+-]", text)
    if len(set(units)) > 1 or (units and summed and len(units) < len(_NUMBER.findall(text))):
        raise NoResult
    return _UNIT.sub("", text)


def _shown(value: int | float) -> str:
    if isinstance(value, int) and value.bit_length() > _DIGITS * math.log2(10):
        rounded = Context(prec=15).create_decimal(value)
        return f"about {rounded:e} ({rounded.adjusted() + 1} digits)"
    return str(value)


def _factorial(n: int) -> int:
    if n > 3000:  # has 9131 digits
        raise OverflowError
    return math.factorial(n)


def _few(function: Any) -> Any:
    """Of combinatorics, where the arguments bound the time."""

    def bounded(n: int, *k: int) -> int:
        if n > _MOST_ITEMS:
            raise OverflowError
        return function(n, *k)

    return bounded


def _round(value: float, digits: int = 0) -> int | float:
    if abs(digits) > 100:
        raise NoResult
    return round(value, digits) if digits else round(value)


def _numbers(*args: Any) -> list:
    return args[0] if len(args) == 1 and isinstance(args[0], list) else list(args)


_CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}
_OF_MATH = (
    "sqrt exp log log2 log10 log1p expm1 sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh degrees radians "
    "floor ceil trunc fabs fmod hypot gcd lcm gamma erf isqrt"
)
_FUNCTIONS = {
    **{name: getattr(math, name) for name in _OF_MATH.split()},
    "abs": abs,
    "int": int,
    "float": float,
    "pow": power,
    "ln": math.log,
    "round": _round,
    "factorial": _factorial,
    "comb": _few(math.comb),
    "perm": _few(math.perm),
    "min": lambda *args: min(_numbers(*args)),
    "max": lambda *args: max(_numbers(*args)),
    "sum": lambda *args: sum(_numbers(*args)),
    "mean": lambda *args: sum(_numbers(*args)) / len(_numbers(*args)),
}
