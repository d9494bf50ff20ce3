"""What the tests of CUDA kernels share."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"np.random.default_rng({seed})")  # fresh every time; pytest shows it when the test fails
    return np.random.default_rng(seed)
