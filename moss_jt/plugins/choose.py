"""The plugins that come with moss-jt, by name."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import MossError
from .base import Plugin
from .calculator import Calculator
from .solver import Solver

BUILT_IN: dict[str, Plugin] = {"calculator": Calculator(), "solver": Solver()}


def built_in(names: str | Iterable[str]) -> list[Plugin]:
    """The plugins so named, for example ``"calculator,solver"``. Raises MossError for a name that there is not."""
    names = names.split(",") if isinstance(names, str) else list(names)
    wanted = [name.strip().lower() for name in names if name.strip()]
    for name in wanted:
        if name not in BUILT_IN:
            raise MossError(f"no plugin {name}; there are {', '.join(BUILT_IN)}")
    return [BUILT_IN[name] for name in dict.fromkeys(wanted)]
