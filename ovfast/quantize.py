"""Weights in int8 and int4, by plain torch: what the native kernels compute, and their oracle.

A group of neighbouring inputs of one output shares a scale, stored as bfloat16; the last group of a
row may be shorter. A weight is scale · q.

- int8: groups of 128, q in [-127, 127]; scale = largest magnitude / 127, rounded upwards.
- int4: groups of 32, q in [-8, 7], as llama.cpp's Q4_0: the weight of the largest magnitude (the
  first, where several are as large) becomes -8; scale = that weight / -8, rounded to the nearest.

The scale is rounded first and q = weight / scale after it, to the nearest, halves to even. A group
whose scale is 0 has q = 0. Inputs of a layer are quantised in the same groups to int8, with
float32 scales: largest magnitude / 127.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ovfast.storage import GROUPS

QuantizedKind = Literal["int8", "int4"]

LARGEST_INT8 = 127
LOWEST_INT4, HIGHEST_INT4 = -8, 7


def quantize(weight: Tensor, kind: QuantizedKind) -> tuple[Tensor, Tensor]:
    """Quantises the weight of a linear layer.

    Args:
        weight: (rows, cols), finite.
        kind: "int8" or "int4".

    Returns:
        q (rows, cols) int8, and scales (rows, groups) float32 whose values are bfloat16.
    """
    grouped = _grouped(weight.float(), GROUPS[kind])
    magnitude = grouped.abs()
    if kind == "int8":
        # A float32 in [n, n + 1) units of a bfloat16 goes to n + 1, whole units stay.
        bits = (magnitude.amax(-1) / LARGEST_INT8).view(torch.int32)
        scales = ((bits + 0xFFFF) & -0x10000).view(torch.float32)
        lowest, highest = -LARGEST_INT8, LARGEST_INT8
    else:
        # argmax gives the first of several.
        largest = grouped.gather(-1, magnitude.argmax(-1, keepdim=True)).squeeze(-1)
        scales = (largest / LOWEST_INT4).bfloat16().float()
        lowest, highest = LOWEST_INT4, HIGHEST_INT4
    q = _divided(grouped, scales, lowest, highest)
    return q.flatten(1)[:, : weight.shape[1]].contiguous(), scales


def dequantize(q: Tensor, scales: Tensor, group: int) -> Tensor:
    """Computes scale · q in the dtype of the scales.

    Args:
        q: (rows, cols) int8.
        scales: (rows, groups) float.
        group: inputs that share a scale.

    Returns:
        (rows, cols).
    """
    return q * scales.repeat_interleave(group, dim=1)[:, : q.shape[1]]


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Quantises the inputs of a linear layer to int8.

    Args:
        x: (rows, cols) float32.
        group: inputs that share a scale.

    Returns:
        q (rows, cols) int8, and scales (rows, groups) float32; the scale of a group that holds inf
        or NaN is NaN.
    """
    grouped = _grouped(x.float(), group)
    # inf · 0 is NaN: the outputs of such a row are NaN instead of wrong.
    scales = grouped.abs().amax(-1) / LARGEST_INT8 + (grouped * 0).sum(-1)
    q = _divided(grouped, scales, -LARGEST_INT8, LARGEST_INT8)
    return q.flatten(1)[:, : x.shape[1]].contiguous(), scales


def fake_quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: QuantizedKind,
    *,
    exact_activations: bool,
    upcast: bool = False,
) -> Tensor:
    """Computes the layer as the quantised one rounds its operands, by a float product.

    Args:
        x: (rows, cols) float32.
        weight: (out_features, cols), finite; not quantised yet.
        bias: (out_features,) or None.
        kind: how the weight is stored.
        exact_activations: whether x is used as it is; else it is quantised too.
        upcast: whether the same operands are multiplied in float64: the truth of tests.

    Returns:
        (rows, out_features) float32, or float64 where upcast.
    """
    dtype = torch.float64 if upcast else torch.float32
    group = GROUPS[kind]
    q, scales = quantize(weight, kind)
    operand = dequantize(q, scales.to(dtype), group)
    if exact_activations:
        x = x.to(dtype)
    else:
        q, scales = quantize_rows(x, group)
        x = dequantize(q, scales.to(dtype), group)
    return F.linear(x, operand, None if bias is None else bias.to(dtype))


def _grouped(values: Tensor, group: int) -> Tensor:
    """(rows, cols) → (rows, groups, group), zeros behind the last column."""
    rows, cols = values.shape
    num_groups = -(-cols // group)
    return F.pad(values, (0, num_groups * group - cols)).view(rows, num_groups, group)


def _divided(grouped: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
    divisors = torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    q = (grouped / divisors).round().clamp(lowest, highest)
    return torch.where(scales.unsqueeze(-1) == 0, 0.0, q).to(torch.int8)
