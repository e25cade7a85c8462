"""Angles of the rotary position embedding."""

import torch
from torch import Tensor


# As transformers v5.23 Qwen2RotaryEmbedding: angles in float32, cast after cos and sin.
def rope_table(
    start: int, stop: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of consecutive positions.

    Args:
        start: first position.
        stop: one past the last position.
        head_dim: even.
        theta: base of the frequencies.
        dtype: of the result.
        device: of the result.

    Returns:
        cos and sin, each (stop − start, head_dim / 2); pairs (i, i + head_dim / 2) share an angle.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(start, stop, dtype=torch.float32, device=device)
    angles = positions[:, None] * (1.0 / theta**exponents)
    return angles.cos().to(dtype), angles.sin().to(dtype)
