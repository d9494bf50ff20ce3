"""MOSS (moss-moon-003) in Jittor, with its layers wherever there is room for them.

>>> import moss_jt
>>> m = moss_jt.load("moss-moon-003-sft-jt")
>>> for piece in m.generate("Hello"): print(piece.text, end="")

Importing this package imports neither Jittor nor numpy; ``load`` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import MossError

if TYPE_CHECKING:
    from .moss import Moss, load

__all__ = ["Moss", "MossError", "load"]
__version__ = "0.1.0"

_HOME = {"load": ".moss", "Moss": ".moss"}  # imported when first asked for


def __getattr__(name: str):
    if name == "convert":
        return import_module(".convert", __name__)
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
