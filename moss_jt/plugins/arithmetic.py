"""Expressions as models write them, evaluated without ever running them as a program, and within bounds.

The grammar is Python's, of which only what is named here is known: numbers, names, ``+ - * / // % ** ^``, calls of known
functions, and lists as their arguments. ``^`` is the power. The official calculator is Python's, too: numbers come out alike.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Mapping
from typing import Any, Callable

LONGEST = 500  # characters of an expression
MOST_BITS = 32768  # of a whole number: 9864 digits

_FULL_WIDTH = {0xFEE0 + c: chr(c) for c in range(0x21, 0x7F)}
_SIGNS = {"×": "*", "·": "*", "÷": "/", "−": "-", "、": ",", "π": "pi", "²": "^2", "³": "^3", "\u3000": " "}
_LIKE_ASCII = {**_FULL_WIDTH, **str.maketrans(_SIGNS)}


class NoResult(Exception):
    """There is no result; the text says why, where that is worth saying."""


def plain(text: str) -> str:
    """Full-width characters and signs of arithmetic in ASCII. Raises NoResult where the text is too long."""
    if len(text) > LONGEST:
        raise NoResult(f"longer than {LONGEST} characters")
    return text.translate(_LIKE_ASCII)


def parse(text: str) -> list[ast.stmt]:
    """The statements of a plain text. Raises NoResult where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about literals that a person would write otherwise
            return ast.parse(text.replace("^", "**").strip()).body
    except (SyntaxError, ValueError):
        raise NoResult from None
    except (RecursionError, MemoryError):
        raise NoResult("nested too deeply") from None


class Evaluator:
    """Values of parsed expressions, from names and functions that are known. A function gets its arguments in order."""

    def __init__(self, names: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]], is_value: Callable[[Any], bool]):
        """is_value: whether something may be calculated with."""
        self._names, self._functions, self._is_value = names, functions, is_value

    def value(self, node: ast.AST) -> Any:
        """Raises NoResult for what has no value, what is not known here, and what would be too large."""
        try:
            value = self._value(node)
        except ZeroDivisionError:
            raise NoResult("division by zero") from None
        except OverflowError:
            raise NoResult("the number is too large") from None
        except RecursionError:
            raise NoResult("nested too deeply") from None
        except (TypeError, ValueError):  # wrong arguments of a function
            raise NoResult from None
        return self._checked(value)

    def _value(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Constant):
            return self._checked(node.value)
        if isinstance(node, ast.Name) and node.id in self._names:
            return self._names[node.id]
        if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
            return _UNARY[type(node.op)](self._checked(self._value(node.operand)))
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            left, right = self._checked(self._value(node.left)), self._checked(self._value(node.right))
            return self._checked(_BINARY[type(node.op)](left, right))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self._call(node.func.id, node.args)
        raise NoResult

    def _call(self, name: str, args: list[ast.expr]) -> Any:
        if name not in self._functions:
            raise NoResult
        return self._checked(self._functions[name](*map(self._argument, args)))

    def _argument(self, node: ast.expr) -> Any:
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self._checked(self._value(item)) for item in node.elts]
        return self._checked(self._value(node))

    def _checked(self, value: Any) -> Any:
        if not self._is_value(value):
            raise NoResult
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise OverflowError
        return value


def is_number(value: Any) -> bool:
    """A whole or a floating-point number; neither a truth value, which Python counts as one, nor a complex one, nor NaN."""
    return type(value) in (int, float) and value == value


def power(base: Any, exponent: Any) -> Any:
    """``base ** exponent``; OverflowError instead of a whole number that is too large even to compute."""
    whole = type(base) is type(exponent) is int and exponent > 0 and abs(base) > 1
    if whole and (base.bit_length() - 1) * exponent > MOST_BITS:  # since 2 ** (bits - 1) <= |base|
        raise OverflowError
    return base**exponent


_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: power,
}
