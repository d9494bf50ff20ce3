"""The angles by which rotary embedding turns pairs of a head's entries."""

from __future__ import annotations

import numpy as np


def rotary_angles(capacity: int, rotary_dim: int) -> np.ndarray:
    """cos, then sin, of position · 10000^(-2i / rotary_dim), in float32 (2, capacity, rotary_dim / 2).

    Pair i of a head is its entries 2i and 2i + 1 (Su et al., RoFormer, 2021, as in GPT-J).
    """
    angle = np.arange(capacity)[:, None] * 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)
