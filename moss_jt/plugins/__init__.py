"""What MOSS can call while it answers: plugins, each a name, a function of one text, and what it gives.

A plugin of one's own is an object like these::

    class Clock(Plugin):
        name, api = "Clock", "Now(timezone)"

        def run(self, argument: str) -> str:
            return ...

    moss.chat(plugins=[*built_in("calculator"), Clock()])
"""

from __future__ import annotations

from .base import NO_RESULT, Plugin
from .calculator import Calculator
from .choose import BUILT_IN, built_in
from .solver import Solver

__all__ = ["BUILT_IN", "NO_RESULT", "Calculator", "Plugin", "Solver", "built_in"]
