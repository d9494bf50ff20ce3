"""What carries out sweeps: new tokens through all blocks, and logits where they are wanted."""

from .host import Host
from .sweep import Sweep

__all__ = ["Host", "Sweep"]
