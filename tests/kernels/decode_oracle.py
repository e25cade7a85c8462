"""Inputs and torch oracles that the tests of the decode projections share."""

import torch
from torch import Tensor

from ovfast import reference

ROWS = 16
EPS = 1e-6


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator) * scale


def residual_and_partials(
    device: str, hidden_size: int, num_partials: int
) -> tuple[Tensor, Tensor | None]:
    """Float32, with a different size of value in every row."""
    sizes = torch.logspace(-1, 1, ROWS)[:, None]
    residual = (randn(ROWS, hidden_size, seed=1) * sizes).to(device)
    if num_partials == 0:
        return residual, None
    partials = randn(num_partials, ROWS, hidden_size, seed=2) * sizes
    return residual, partials.to(device)


def summed(residual: Tensor, partials: Tensor | None) -> Tensor:
    """In the kernels' order; in float64 where the arguments are."""
    for partial in () if partials is None else partials:
        residual = residual + partial
    return residual


def rms_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """Of float32 rows, with upstream's two roundings to the dtype of weight."""
    scale = (x.square().mean(1, keepdim=True) + eps).rsqrt()
    return (x * scale).to(weight.dtype) * weight


def rms_norm_truth(residual: Tensor, partials: Tensor | None, weight: Tensor) -> Tensor:
    x = summed(residual.double(), None if partials is None else partials.double())
    return reference.rms_norm(x, weight, EPS, upcast=True)
