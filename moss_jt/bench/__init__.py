"""What ``moss-jt bench`` measures: a model at work, in turn with the limit of this machine that bounds it.

with random_model(Shape(moon(blocks=4), "int4", "int8"), folder) as model:
    Decode().run(open_weights(model), threads=2, repeat=10)   # a dict: every sample, the limit, the share
"""

from .decode import Decode
from .load import Load
from .prefill import Prefill
from .random_model import moon, random_model
from .shape import Shape
from .swap import Swap

__all__ = ["Decode", "Load", "Prefill", "Shape", "Swap", "moon", "random_model"]
