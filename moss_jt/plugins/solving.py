"""Equations and systems of them, by sympy, in a process of its own (see ``solver``): nothing bounds sympy's time from inside.

sympy's own parser is never used, since it evaluates what it is given.
"""

from __future__ import annotations

import ast
import json
import math
import re
import resource
import signal
import sys
from typing import Any

import sympy
from sympy.polys.polyerrors import UnsolvableFactorError
from sympy.solvers.polysys import solve_poly_system

from .arithmetic import Evaluator, NoResult, is_number, parse, plain, power
from .base import NO_RESULT

CPU_SECONDS = 2.0  # for one call
_MEMORY = 1 << 30
_LONGEST_VALUE = 60  # characters, before its decimals are shown instead
_MOST_SOLUTIONS = 20

# What a product may be written without a sign between: 2x, 3(x+1), (x+1)(x-1), x(x+1).
_TOKEN = re.compile(r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d]\w*)|(?P<sign>\*\*|\S))")


def serve() -> None:
    """Answer one line of JSON after the other. What takes too long or too much ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    solve("x^2=3x+4;y=x")  # sympy imports more when it first solves
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = solve(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def solve(text: str) -> str:
    """The solutions, a line for each unknown: ``x = 17/3``, with several ones ``x_0 = -2``, ``x_1 = 2``.

    Equations are separated by ``;`` or ``,``. A name by itself among them is what to solve for, otherwise it is all
    names. Without any ``=``, an expression is taken to be 0.
    """
    try:
        return "\n".join(_lines(*_system(plain(text))))
    except NoResult as e:
        return f"No result: {e}." if str(e) else NO_RESULT
    except MemoryError:
        return "No result: too large to solve."
    except Exception:  # sympy raises anything for what it cannot solve
        return NO_RESULT


def _system(text: str) -> tuple[list[sympy.Expr], list[sympy.Symbol]]:
    """What has to be 0, and the unknowns asked for."""
    equations, others, wanted = [], [], []
    for part in filter(None, map(str.strip, re.split(r"[;\n]|,(?![^(]*\))", text.replace("==", "=")))):
        sides = part.rstrip(" ?.").split("=")
        if len(sides) == 2:
            left, right = map(_expression, sides)
            equations.append(left - right)
        elif len(sides) > 2 or set(part) & set("<>"):
            raise NoResult
        elif re.fullmatch(r"[^\W\d]\w*", part):
            wanted.append(sympy.Symbol(part))
        else:
            others.append(part)
    if not equations and len(others) == 1:
        equations = [_expression(others[0])]
    if not equations:
        raise NoResult("there is no equation")
    return list(map(sympy.sympify, equations)), wanted


def _expression(text: str) -> Any:
    text = _with_all_signs(text)
    statements = parse(text)
    if len(statements) != 1 or not isinstance(statements[0], ast.Expr):
        raise NoResult
    names = {node.id for node in ast.walk(statements[0]) if isinstance(node, ast.Name)} - set(_FUNCTIONS)
    symbols: dict[str, Any] = {name: sympy.Symbol(name) for name in names}
    return Evaluator({**symbols, "pi": math.pi}, _FUNCTIONS, _is_value).value(statements[0].value)


def _with_all_signs(text: str) -> str:
    """With ``*`` where it was left out."""
    parts, before = [], ""
    for found in _TOKEN.finditer(text):
        token = found[0].strip()
        ends = before == ")" or re.fullmatch(r"[\w.]+", before)
        begins = token == "(" or found["name"] or found["number"]
        if ends and begins and not (token == "(" and before in _FUNCTIONS):
            parts.append("*")
        parts.append(token)
        before = token
    return "".join(parts)


def _lines(equations: list[sympy.Expr], wanted: list[sympy.Symbol]) -> list[str]:
    free = sorted(set().union(*(equation.free_symbols for equation in equations)), key=str)
    asked = [symbol for symbol in wanted if symbol in free] or free
    if not asked:
        raise NoResult
    # One equation may have parameters beside its unknowns; a system is solved for all that it has.
    unknowns = asked if len(equations) == 1 else free
    found = _solutions(equations, unknowns)
    if not found or not all(_is_solution(s, unknowns, set(free) - set(unknowns)) for s in found):
        raise NoResult
    if len(found) == 1:
        return [f"{symbol} = {_shown(found[0][symbol])}" for symbol in asked]
    lines = [f"{symbol}_{i} = {_shown(s[symbol])}" for i, s in enumerate(found[:_MOST_SOLUTIONS]) for symbol in asked]
    return lines + ([f"and {len(found) - _MOST_SOLUTIONS} more solutions"] if len(found) > _MOST_SOLUTIONS else [])


def _is_solution(found: dict, unknowns: list[sympy.Symbol], parameters: set[sympy.Symbol]) -> bool:
    """Whether it says of each unknown what it is."""
    values = found.values()
    return found.keys() == set(unknowns) and all(v.free_symbols <= parameters and v.is_finite is not False for v in values)


def _solutions(equations: list[sympy.Expr], unknowns: list[sympy.Symbol]) -> list[dict]:
    if any(equation.has(sympy.zoo, sympy.nan, sympy.oo) for equation in equations):
        raise NoResult
    if len(equations) > 1:
        _refuse_without_formula(equations, unknowns)
        return sympy.solve(equations, unknowns, dict=True)
    found = sympy.solve(equations[0], unknowns, dict=True)
    rootless = {value.poly for s in found for value in s.values() if isinstance(value, sympy.CRootOf)}
    exact = [s for s in found if not any(isinstance(value, sympy.CRootOf) for value in s.values())]
    # Their decimals are found faster all together.
    return exact + [{unknowns[0]: root} for poly in sorted(rootless, key=str) for root in poly.nroots()]


def _refuse_without_formula(equations: list[sympy.Expr], unknowns: list[sympy.Symbol]) -> None:
    """Raises NoResult for a system of polynomials some of whose solutions have no formula: ``sympy.solve`` leaves those out."""
    if not all(equation.is_polynomial(*unknowns) for equation in equations):
        return
    exact = [sympy.nsimplify(equation, rational=True) for equation in equations]
    if math.prod(sympy.total_degree(equation, *unknowns) for equation in exact) < 5:  # there are no more solutions than that
        return
    try:
        solve_poly_system(exact, *unknowns, strict=True)
    except UnsolvableFactorError:
        raise NoResult("not all solutions have a formula") from None
    except NotImplementedError:  # solve knows other ways
        return


def _shown(value: sympy.Expr) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE and not value.has(sympy.CRootOf) else str(value.evalf())


def _is_value(value: Any) -> bool:
    return is_number(value) or isinstance(value, sympy.Expr)


def _either(number: Any, symbolic: Any) -> Any:
    """A function that gives numbers for numbers, as the official solver does, and sympy's for all else."""
    return lambda *args: (number if all(map(is_number, args)) else symbolic)(*args)


_IN_BOTH = ("sqrt", "exp", "log", "sin", "cos", "tan", "asin", "acos", "atan")
_FUNCTIONS = {
    **{name: _either(getattr(math, name), getattr(sympy, name)) for name in _IN_BOTH},
    "ln": _either(math.log, sympy.log),
    "abs": _either(abs, sympy.Abs),
    "pow": power,
}
