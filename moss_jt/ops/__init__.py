"""The model's custom operators. One file each: shapes, errors, and the ``jt.code`` that calls the kernel."""

from .attention import attention
from .layer_norm import layer_norm
from .linear import Weight, linear_head, linear_in, linear_out
from .prepare import prepare

__all__ = ["Weight", "attention", "layer_norm", "linear_head", "linear_in", "linear_out", "prepare"]
