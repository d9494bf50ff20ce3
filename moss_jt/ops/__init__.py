"""The model's custom operators. One file each: shapes, errors, and the ``jt.code`` that calls the kernel."""

from .block import Block, LowRank, sequences
from .head import Head
from .prepare import prepare
from .rotary import rotary_angles

__all__ = ["Block", "Head", "LowRank", "prepare", "rotary_angles", "sequences"]
