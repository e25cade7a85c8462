"""One native operation of many tasks, for tests of the threads that run it."""

from typing import Any

import numpy as np


def norm_is_right(native: Any, pool: Any, seed: int) -> bool:
    """Whether rms_norm of 300 random rows is that of numpy."""
    x = np.random.default_rng(seed).standard_normal((300, 64)).astype(np.float32)
    out = np.full_like(x, np.nan)
    native.rms_norm(pool, x, np.ones(64, np.float32), 1e-6, out)
    truth = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-6)
    return bool(np.allclose(out, truth, atol=1e-5))
