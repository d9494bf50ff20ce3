"""The differentiable core of fine-tuning: a MOSS that learns, and the optimizer. Not the loop around them."""

from .batch import Batch, Measured
from .lora import Lora, load_adapter, save_adapter
from .optimizer import AdamW
from .parameter import Parameter
from .trainee import Trainee

__all__ = ["AdamW", "Batch", "Lora", "Measured", "Parameter", "Trainee", "load_adapter", "save_adapter"]
