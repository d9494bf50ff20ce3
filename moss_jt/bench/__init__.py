"""What ``moss-jt bench`` measures: a model at work, in turn with the limit of this machine that bounds it.

``Decode``, ``Prefill``, ``Swap`` and ``Load`` each ``check`` a Shape before anything is made or read, and ``run`` on opened
weights, for a dict of every sample, the limits beside them, and the shares. docs/bench.md names the fields.
"""

from .decode import Decode
from .load import Load
from .prefill import Prefill
from .random_model import moon, random_checkpoint
from .shape import Shape
from .swap import Swap

__all__ = ["Decode", "Load", "Prefill", "Shape", "Swap", "moon", "random_checkpoint"]
