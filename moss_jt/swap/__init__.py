"""Where each block's weights live, and lending them to the model in time."""

from .resident import Resident

__all__ = ["Resident"]
