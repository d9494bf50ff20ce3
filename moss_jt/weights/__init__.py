"""The converted checkpoint on disk: what is in it (layout), and opening and checking it (store)."""

from .layout import FORMAT, Tensor, files_of
from .store import Weights, is_converted, open_weights

__all__ = ["FORMAT", "Tensor", "Weights", "files_of", "is_converted", "open_weights"]
